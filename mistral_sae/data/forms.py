"""What a file of text holds: the documents of JSON lines and arrays, of tables (parquet, arrow, CSV) and of plain text.

A file is read as what it holds, which its first bytes say, packed or not; its suffix tells text from CSV only. Files
are read here and not by `datasets`, which neither skips a bad line nor says which one it was, and takes a .zst file
that was cut short for a whole one. Memory is bounded whatever a file of text holds: a record of more than `max_bytes`
is passed over, a piece at a time.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mistral_sae.cli import one_line
from mistral_sae.data import tables
from mistral_sae.data.place import Place
from mistral_sae.data.records import Document, Fault, TextError, Wanted, document_of, too_long

CHUNK = 1 << 20  # bytes of what is passed over that are held at once

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark among them
JSON_SIGN = re.compile(rb'\\.?|["{}]', re.DOTALL)  # an escaped byte of a string, or what begins and ends objects


def file_records(name: str, path: Path, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    """What a file holds from `start` on, under ids that begin with `name`; a .txt file is one document.

    A plain file is entered at `start` itself, a table at the batch of rows around it; a packed one is unpacked up to
    there. Raises TextError for a file that is truncated, damaged or of no kind that is read.
    """
    try:
        with open(path, "rb") as plain:
            head = plain.read(8)
        if table := next((read for magic, read in tables.FORMS.items() if head.startswith(magic)), None):
            yield from tables.table_records(table, name, path, wanted, start)
            return
        unpacked = next((opened for magic, opened in PACKED.values() if re.match(magic, head)), None)
        with unpacked(path) if unpacked else open(path, "rb") as file:
            form, packing = kind_of(path)
            is_packed_as_named = unpacked or not packing or _beginning(file)[:1] in (b"{", b"[", b"")
            if (read := FORMS.get(form, _json)) is None or not is_packed_as_named:
                raise OSError("its beginning is damaged, or it is of another kind than its name says")
            yield from read(name, file, wanted, start)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, csv.Error) as error:  # the first of data that ends too early
        raise TextError(f"{path} cannot be read: {one_line(error)}. Fetch it again, unpack it or remove it") from error


def kind_of(path: Path) -> tuple[str, str]:
    """The suffixes of a file of text: of FORMS and of PACKED or "". Of any other file both are ""."""
    found = KIND.search(path.name.lower())
    return (found[1], found[2] or "") if found else ("", "")


def text_size(path: Path) -> int:
    """The bytes of text that a file holds, roughly."""
    form, packing = kind_of(path)
    return path.stat().st_size * (4 if packing else 3 if form == ".parquet" else 1)


def _beginning(file: Any) -> bytes:
    """What an open file begins with, left to be read, without blanks before it."""
    return file.peek(CHUNK)[:CHUNK].lstrip(BLANK)


def _enter(file: Any, offset: int) -> None:
    """Go from the beginning of a file to an offset in its unpacked bytes."""
    if file.seekable():
        file.seek(offset)
    while not file.seekable() and offset and (passed := file.read(min(offset, CHUNK))):
        offset -= len(passed)


# ---- text: plain, JSON and CSV ----


def _txt(name: str, file: Any, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    raw = file.read(wanted.max_bytes + 1)
    if len(raw) > wanted.max_bytes:
        yield too_long(name, len(raw), wanted)
        return
    try:
        text, place = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"), Place(start.epoch, start.file)
        yield Document(name, text, place) if text and not text.isspace() else Fault(name, "is empty")
    except UnicodeDecodeError:
        yield Fault(name, "not UTF-8")


def _json(name: str, file: Any, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    """JSON lines, or the objects of an array, or objects over several lines each, by what the file begins with."""
    begins, offset = _beginning(file), start.offset
    pieces = _objects if begins[:1] == b"[" or begins.partition(b"\n")[0].strip() == b"{" else _lines
    _enter(file, offset)
    for number, (raw, size) in enumerate(pieces(file, wanted.max_bytes), start.record):
        record_id, place = f"{name}:{number + 1}", Place(start.epoch, start.file, number, offset)
        offset += size
        if raw is None:
            yield too_long(record_id, size, wanted)
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 0 else "utf-8").strip()
            if text:  # else between records or at the end: no record at all
                yield document_of(record_id, json.loads(text), wanted, place)
        except UnicodeDecodeError:
            yield Fault(record_id, "not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Fault(record_id, f"not JSON ({one_line(error)})")


Pieces = Iterator[tuple[bytes | bytearray | None, int]]


def _lines(file: BinaryIO, max_bytes: int) -> Pieces:
    """Each line and its size in bytes; None in place of a line of more than `max_bytes`."""
    while line := file.readline(max_bytes + 1):
        size = len(line)
        if size <= max_bytes:
            yield line, size
            continue
        while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
            size += len(line)
        yield None, size


def _objects(file: BinaryIO, max_bytes: int) -> Pieces:
    """Each object of an array, or of a sequence, and its size with what stands before it; None as in `_lines`."""
    piece, size, depth, quoted, escaped = bytearray(), 0, 0, False, False
    while chunk := file.read(CHUNK):
        begin, last = 0, b""
        for match in JSON_SIGN.finditer(chunk, int(escaped)):
            last = match[0]
            if last == b'"':
                quoted = not quoted
            elif not quoted and last in b"{}":
                depth += 1 if last == b"{" else -1
                if depth <= 0:
                    piece += chunk[begin : match.end()]
                    size += match.end() - begin
                    yield None if size > max_bytes else piece.strip(BLANK + b"[,]"), size
                    piece, size, depth, begin = bytearray(), 0, 0, match.end()
        escaped = last == b"\\"  # the byte that it escapes is in the next chunk
        size += len(chunk) - begin
        if size <= max_bytes:
            piece += chunk[begin:]
    if size:
        yield None if size > max_bytes else piece.strip(BLANK + b"[,]"), size


def _csv(name: str, file: Any, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    """The rows of a table whose first row has the names; what separates those separates all."""
    csv.field_size_limit(wanted.max_bytes)
    heading = _beginning(file).partition(b"\n")[0]
    too_much = b"x" * (wanted.max_bytes + 1)  # which no field may hold
    lines = (too_much if line is None else line for line, _ in _lines(file, wanted.max_bytes))
    texts = (line.decode("utf-8-sig", "surrogateescape") for line in lines)
    rows = csv.reader(texts, delimiter=max(",\t;", key=lambda sign: heading.count(sign.encode())))
    names = next(filter(None, rows), [])
    while True:
        line, reason = rows.line_num, ""
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            values, reason = names, f"not CSV ({one_line(error)})"
        if len(values) != len(names):
            reason = f"{len(values)} values, but {len(names)} names in the first row"
        if line < start.record or not values:  # before the place, or an empty line
            continue
        record_id, place = f"{name}:{line + 1}", Place(start.epoch, start.file, line)
        record = dict(zip(names, values, strict=not reason))
        yield Fault(record_id, reason, names) if reason else document_of(record_id, record, wanted, place)


# ---- packed files ----


def _zstd(path: Path) -> BinaryIO:
    """An open .zst file of any number of frames, unpacked by pyarrow: zstandard takes one that was cut for whole."""
    import pyarrow  # slow to import

    return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"), CHUNK)


# What unpacks a file, by its first bytes; reading raises where its data ends too early
PACKED: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    ".gz": (rb"\x1f\x8b", gzip.open),
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstd),  # the second is what pzstd puts between frames
    ".xz": (rb"\xfd7zXZ\x00", lzma.open),
    ".bz2": (rb"BZh[1-9]", bz2.open),
}
# What is read in a folder, by suffix, and how, unless the first bytes say otherwise; None: only if they do
FORMS: dict[str, Callable[..., Iterator[Document | Fault]] | None] = {
    ".jsonl": _json,
    ".json": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
    ".parquet": None,
    ".arrow": None,
}
KINDS = f"{', '.join(FORMS)}, also packed as {', '.join(PACKED)}"
KIND = re.compile(f"({'|'.join(FORMS)})({'|'.join(PACKED)})?$".replace(".", r"\."))
