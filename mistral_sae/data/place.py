"""Where a stream of text, rows or residuals stands, so that a run can go on from there."""

from __future__ import annotations

import json
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from mistral_sae.schema import parse, schema_of

Number = Annotated[int, Field(ge=0, lt=2**63)]


class Place(NamedTuple):
    """Where a document, a row, a window of rows or a buffer of residuals begins in its stream.

    Each stage of the chain fills in its own fields, and hands on those of the stages before it. A place belongs to what
    was consumed: it travels with the items, so that what was read ahead does not count.
    """

    epoch: Number = 0
    # The document: its file, by number; the records before it, and their bytes (unpacked)
    file: Number = 0
    record: Number = 0
    offset: Number = 0
    hub: dict[str, Any] | None = None  # of a dataset on the hub: its state_dict before the record
    mixed: list[dict[str, Any]] | None = None  # of a mixture: for each source the place of its next document
    # The row: tokens of the document that are in rows before it
    tokens: Number = 0
    # The window of shuffled rows: its number, and those of its rows that are in earlier buffers
    window: Number = 0
    rows: Number = 0
    # The buffer of shuffled residuals: its number, and those of its residuals that are in earlier batches
    buffer: Number = 0
    residuals: Number = 0

    @classmethod
    def of(cls, fields: Any) -> Place:
        """The place of which `fields` are `_asdict()`, as read from JSON. Raises UserError if they are of none."""
        return parse(schema_of(cls), json.dumps(fields), "a checkpoint's stream", "start over with RESUME=False")


BEGINNING = Place()
