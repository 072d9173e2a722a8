"""Where a stream of text, rows or residuals stands, so that a run can go on from there."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from mistral_sae.cli import UserError

Count = Annotated[int, Field(ge=0, lt=2**63)]


class Place(NamedTuple):
    """Where a document, a row, a window of rows or a buffer of residuals begins in its stream.

    Each stage of the chain fills in its own fields, and hands on those of the stages before it. A place belongs to what
    was consumed: it travels with the items, so that what was read ahead does not count.
    """

    epoch: Count = 0
    # The document: its file, by number; the records before it, and their bytes (unpacked)
    file: Count = 0
    record: Count = 0
    offset: Count = 0
    hub: dict[str, Any] | None = None  # of a dataset on the hub: its state_dict before the record
    # The row: tokens of the document that are in rows before it
    tokens: Count = 0
    # The window of shuffled rows: its number, and those of its rows that are in earlier buffers
    window: Count = 0
    rows: Count = 0
    # The buffer of shuffled residuals: its number, and those of its residuals that are in earlier batches
    buffer: Count = 0
    residuals: Count = 0

    @classmethod
    def of(cls, fields: Any) -> Place:
        """The place of which `fields` are `_asdict()`, as read from JSON. Raises UserError if they are of none."""
        try:
            return TypeAdapter(cls).validate_python(fields, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise UserError(
                f"found no place in a stream of text ({where!r}: {first['msg']}), expected what train.py saved: "
                "start over with RESUME=False"
            ) from None


BEGINNING = Place()
