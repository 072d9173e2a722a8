"""JSON that others may have written, checked once, where it is read: a pydantic type for each format.

Whatever is wrong (bytes that are no JSON or no UTF-8, nesting without end, another type, a number out of its range)
becomes one line: what was found and where, what was expected, what to do.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

from mistral_sae.cli import UserError, printable, size_of

MOST = 64_000_000  # bytes of a JSON file or of a line: more than any model's description, and no trouble to hold
STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # "4" and 4.0 are no 4, and no number is NaN

# An escape in a string, and as group 1 half a character, which json.dumps writes and no other parser takes
_HALF = rb"u[dD][89a-fA-F][0-9a-fA-F]{2}"
_SURROGATE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(" + _HALF + rb")|.)", re.DOTALL)

Words = Annotated[str, AfterValidator(printable)]  # that are shown to people
Count = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Total = Annotated[int, Field(ge=0, lt=2**53)]  # of many counts

_OF_A_UNION = re.compile(
    r"\.(constrained-\w+|int|float|str|bool|list\[.*\])(?=\.|$)"
)  # which type, in pydantic's paths


class Schema(BaseModel):
    """An object of a JSON file; what it does not name is passed over. Validators raise ValueError(found, expected)."""

    model_config = STRICT | ConfigDict(protected_namespaces=())


def schema_of(record: Any, **other: Any) -> Any:
    """The type that reads a NamedTuple from an object, which may hold more; `other` types in place of its own."""
    kinds, defaults = get_type_hints(record, include_extras=True) | other, record._field_defaults
    fields: dict[str, Any] = {name: (kind, defaults.get(name, ...)) for name, kind in kinds.items()}
    found: Any = create_model(record.__name__, __base__=Schema, **fields)
    return Annotated[found, AfterValidator(lambda value: record(*(getattr(value, name) for name in record._fields)))]


def read(kind: Any, path: Path, advice: str, error: type[UserError] = UserError) -> Any:
    """A JSON file's content as a type, or the error, which ends with the advice."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST + 1)
    except OSError as cause:
        raise error(f"found no readable {path} ({cause.strerror}), expected a file of JSON: {advice}") from None
    if len(content) > MOST:
        raise error(f"found more than {size_of(MOST)} in {path}, expected less: {advice}")
    return parse(kind, content, str(path), advice, error)


def lines(path: Path, advice: str, error: type[UserError] = UserError) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, each with where it stands; raises the error for one that is too long to be a record."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MOST + 1):
            number += 1
            where = f"line {number} of {path}"
            if len(line) > MOST:
                raise error(f"found more than {size_of(MOST)} in {where}, expected a record: {advice}")
            yield where, line


def parse(kind: Any, content: bytes | str, where: str, advice: str, error: type[UserError] = UserError) -> Any:
    """JSON as a type, or the error, which says where it stood and ends with the advice."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        return _adapter(kind).validate_json(_SURROGATE.sub(lambda each: b"\\ufffd" if each[1] else each[0], content))
    except ValidationError as cause:
        found, expected = _found_and_expected(cause)
        raise error(f"found {found} in {where}, expected {expected}: {advice}") from None


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter:
    try:
        return TypeAdapter(kind, config=STRICT)
    except PydanticUserError:  # a Schema has its own
        return TypeAdapter(kind)


def _found_and_expected(error: ValidationError) -> tuple[str, str]:
    """The first of pydantic's complaints in our words."""
    first: Any = error.errors(include_url=False)[0]
    name, message = _OF_A_UNION.sub("", ".".join(map(str, first["loc"]))), first["msg"]
    if first["type"] == "json_invalid":
        return f"no JSON ({first['ctx']['error']})", "JSON"
    if first["type"] == "missing":
        return f"no {name}", "one"
    if first["type"] == "value_error":  # of a validator here
        found, expected = first["ctx"]["error"].args
        return found, expected
    message = message.removeprefix("Input should be ")
    found = reprlib.repr(first["input"])
    return (f"{name} = {found}" if name else found), message[:1].lower() + message[1:]
