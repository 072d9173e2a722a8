"""What a file of text holds: the documents of JSON lines, packed or not, of parquet tables and of plain text.

Files are read here and not by `datasets`, which neither skips a bad line nor says which one it was, and takes a .zst
file that was cut short for a whole one. Memory is bounded whatever a file holds: a record of more than `max_bytes` is
passed over, a piece at a time.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mistral_sae.cli import UserError, one_line, size_of
from mistral_sae.data.place import Place

# The kinds of files that are read, with the bytes of text that one byte of them holds, roughly
KINDS = {".jsonl": 1, ".jsonl.zst": 4, ".jsonl.gz": 4, ".parquet": 3, ".txt": 1}
CHUNK = 1 << 20  # bytes of what is passed over that are held at once
ZSTD_CHUNK = 1 << 9  # bytes of a .zst file that are unpacked at once: of a hostile one they make 16 MB
PARQUET_ROWS = 32  # rows of a parquet file that are held at once
PARQUET_TIMES = 500  # the size of a parquet file that a group of its rows unpacks to at most; text does to 20


class TextError(UserError):
    """A corpus that cannot be used."""


class Document(NamedTuple):
    """One text."""

    id: str  # file:line or the like
    text: str
    place: Place = Place()


class Fault(NamedTuple):
    """A record that is no document."""

    id: str
    reason: str
    fields: Iterable[str] = ()  # that it has


class Wanted(NamedTuple):
    """Where in a record its text is, and how long it may be."""

    text_field: str
    max_bytes: int  # of a line, of a text file, and of the text of any record


def kind_of(path: Path) -> str:
    """The longest suffix of a file that is a key of KINDS, or else its last suffix."""
    name = path.name.lower()
    return max((kind for kind in KINDS if name.endswith(kind)), key=len, default=path.suffix)


def file_records(name: str, path: Path, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    """What a file holds from `start` on, under ids that begin with `name`; a .txt file is one document.

    A plain file is entered at `start` itself, a parquet file at the group of rows around it; a packed one is unpacked
    up to there. Raises TextError for a file that is truncated or damaged.
    """
    kind = kind_of(path)
    try:
        if kind == ".txt":
            yield _txt(name, path, wanted, start)
        elif kind == ".parquet":
            yield from _parquet(name, path, wanted, start)
        else:
            yield from _jsonl(name, path, kind, wanted, start)
    except EOFError as error:
        raise TextError(f"{path} is truncated: its packed data ends too early. Fetch the file again") from error
    except (OSError, zlib.error) as error:
        raise TextError(f"{path} cannot be read: {one_line(error)}. Mend or remove the file") from error


def document_of(record_id: str, record: Any, wanted: Wanted, place: Place) -> Document | Fault:
    """The document that a record with named fields holds, or why it holds none."""
    field = wanted.text_field
    if not isinstance(record, dict):
        return Fault(record_id, f"not an object with fields but of type {type(record).__name__}")
    if field not in record:
        return Fault(record_id, f"no field {field!r}", record)
    text = record[field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}, not a string"
        return Fault(record_id, f"field {field!r} is {kind}", record)
    if not text or text.isspace():
        return Fault(record_id, f"field {field!r} is empty", record)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        return Fault(record_id, f"field {field!r} is not valid Unicode", record)
    return Document(record_id, text, place) if size <= wanted.max_bytes else _too_long(record_id, size, wanted)


def _too_long(record_id: str, size: int, wanted: Wanted) -> Fault:
    return Fault(record_id, f"{size_of(size)} long, over MAX_DOCUMENT_BYTES={wanted.max_bytes}")


def _txt(name: str, path: Path, wanted: Wanted, start: Place) -> Document | Fault:
    with open(path, encoding="utf-8-sig") as file:
        if (size := os.fstat(file.fileno()).st_size) > wanted.max_bytes:
            return _too_long(name, size, wanted)
        try:
            text = file.read()
        except UnicodeDecodeError:
            return Fault(name, "not UTF-8")
    if not text or text.isspace():
        return Fault(name, "is empty")
    return Document(name, text, Place(start.epoch, start.file))


def _parquet(name: str, path: Path, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    import pyarrow
    import pyarrow.parquet

    field = wanted.text_field
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                yield Fault(name, f"no column {field!r}", columns)
                return
            for row, value in _values(file, path, wanted, start.record):
                record_id = f"{name}:{row}"
                try:
                    yield document_of(record_id, {field: value.as_py()}, wanted, Place(start.epoch, start.file, row))
                except UnicodeDecodeError:
                    yield Fault(record_id, "not UTF-8", [field])
                except (ValueError, OverflowError) as error:  # of a column of dates, say
                    yield Fault(record_id, f"column {field!r} is no text ({one_line(error)})", [field])
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise OSError(f"damaged or truncated parquet data ({one_line(error)})") from error


def _values(file: Any, path: Path, wanted: Wanted, start: int) -> Iterator[tuple[int, Any]]:
    """The values of the column from row `start` on, each with its row; groups of rows before that are not read.

    Raises OSError for a group that unpacks to far more than text does: pyarrow holds a page, however large, whole.
    """
    first, field, size = 0, wanted.text_field, path.stat().st_size
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        end = first + about.num_rows
        if end > start:
            if about.total_byte_size > max(wanted.max_bytes, PARQUET_TIMES * size):
                raise OSError(f"{size_of(about.total_byte_size)} would be unpacked from a file of {size_of(size)}")
            batches = file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field])
            values = enumerate((value for batch in batches for value in batch.column(0)), first)
            yield from islice(values, max(0, start - first), None)
        first = end


def _jsonl(name: str, path: Path, kind: str, wanted: Wanted, start: Place) -> Iterator[Document | Fault]:
    with _opened(path, kind, start.offset) as file:
        offset = start.offset
        for number, (line, size) in enumerate(_lines(file, wanted.max_bytes), start.record):
            record_id, place = f"{name}:{number + 1}", Place(start.epoch, start.file, number, offset)
            offset += size
            if line is None:
                yield _too_long(record_id, size, wanted)
                continue
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8").strip()
                if text:  # else between records or at the end: no record at all
                    yield document_of(record_id, json.loads(text), wanted, place)
            except UnicodeDecodeError:
                yield Fault(record_id, "not UTF-8")
            except (ValueError, RecursionError) as error:
                yield Fault(record_id, f"not JSON ({one_line(error)})")


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line and its size in bytes; None in place of a line of more than `max_bytes`."""
    while line := file.readline(max_bytes + 1):
        size = len(line)
        if size <= max_bytes:
            yield line, size
            continue
        while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
            size += len(line)
        yield None, size


def _opened(path: Path, kind: str, offset: int) -> BinaryIO:
    """A file from an offset in its unpacked bytes on. Reading raises EOFError where its packed data ends too early."""
    if kind == ".jsonl":
        file: Any = open(path, "rb")  # noqa: SIM115
        file.seek(offset)
        return file
    file = io.BufferedReader(_ZstdFile(path), CHUNK) if kind == ".jsonl.zst" else gzip.open(path)  # noqa: SIM115
    while offset and (passed := file.read(min(offset, CHUNK))):
        offset -= len(passed)
    return file


class _ZstdFile(io.RawIOBase):
    """A .zst file, unpacked frame by frame: zstandard's own reader takes one that ends within a frame for whole."""

    def __init__(self, path: Path):
        import zstandard

        self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` needs
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")
        self._file = open(path, "rb")  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(ZSTD_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._unpacker.decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise OSError(f"damaged zstd data ({one_line(error)})") from error
            self._packed, self._frame = (self._frame.unused_data, None) if self._frame.eof else (b"", self._frame)
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
