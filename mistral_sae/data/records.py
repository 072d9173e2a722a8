"""What one record of a corpus holds: a text, or token ids, or messages; or why it is no document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mistral_sae.cli import UserError, size_of
from mistral_sae.data.place import Place


class TextError(UserError):
    """A corpus that cannot be used."""


class Document(NamedTuple):
    """One text, or what becomes one: token ids, or the messages of a conversation."""

    id: str  # file:line or the like
    text: str
    place: Place = Place()
    tokens: np.ndarray | None = None  # int32, where the text was tokenized by others; `text` is empty then
    messages: list[dict[str, str]] | None = None  # {"role", "content"} each, of which `text` has the contents


class Fault(NamedTuple):
    """A record that is no document."""

    id: str
    reason: str
    fields: Iterable[str] = ()  # that it has


class Wanted(NamedTuple):
    """Where in a record its text is, and how long it may be."""

    text_field: str
    max_bytes: int  # of a line, of a text file, and of the text of any record


def document_of(record_id: str, record: Any, wanted: Wanted, place: Place) -> Document | Fault:
    """The document that a record with named fields holds, or why it holds none."""
    field = wanted.text_field
    if not isinstance(record, dict):
        return Fault(record_id, f"not an object with fields but of type {type(record).__name__}")
    if field not in record:
        return Fault(record_id, f"no field {field!r}", record)
    try:
        found = _document(record_id, record[field], place)
        if isinstance(found, str):
            return Fault(record_id, f"field {field!r} is {found}", record)
        size = len(found.text.encode()) if found.tokens is None else found.tokens.nbytes
    except UnicodeDecodeError:
        return Fault(record_id, "not UTF-8", record)
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        return Fault(record_id, f"field {field!r} is not valid Unicode", record)
    return found if size <= wanted.max_bytes else too_long(record_id, size, wanted)


def _document(record_id: str, value: Any, place: Place) -> Document | str:
    """A value as a document: a text, its bytes, token ids or messages; or what it is instead."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        return Document(record_id, value, place) if value and not value.isspace() else "empty"
    if not isinstance(value, list):
        return "null" if value is None else f"of type {type(value).__name__}, not a string"
    if not value:
        return "empty"
    if all(type(id) is int and 0 <= id < 2**31 for id in value):
        return Document(record_id, "", place, tokens=np.array(value, np.int32))
    try:
        messages = [{"role": each["role"] + "", "content": each["content"] + ""} for each in value]
    except (TypeError, KeyError):
        return "a list, but neither of token ids nor of messages with a role and a content"
    return Document(record_id, "\n\n".join(each["content"] for each in messages), place, messages=messages)


def too_long(record_id: str, size: int, wanted: Wanted) -> Fault:
    """What is said of a record of `size` bytes."""
    return Fault(record_id, f"{size_of(size)} long, over MAX_DOCUMENT_BYTES={wanted.max_bytes}")
