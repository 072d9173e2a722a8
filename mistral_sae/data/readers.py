"""Files of text in the forms that corpora come in, read record by record in bounded memory."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mistral_sae.cli import UserError

# The kinds of files that are read, with the bytes of text that one byte of them holds, roughly
KINDS = {".jsonl": 1, ".jsonl.zst": 4, ".jsonl.gz": 4, ".parquet": 3, ".txt": 1}
CHUNK = 1 << 17  # bytes read at once; unpacked, even of well compressed text, they stay a few MB


class TextError(UserError):
    """A corpus that cannot be used: one line with what was found, what was expected and what to do."""


class Document(NamedTuple):
    """One text and the name by which it is found again."""

    id: str
    text: str


class Fault(NamedTuple):
    """A record that is no document, the reason, and the names of the fields it had."""

    id: str
    reason: str
    fields: Iterable[str] = ()


def kind_of(path: Path) -> str:
    """The longest suffix of a file that is a key of KINDS, or else its last suffix."""
    name = path.name.lower()
    return max((kind for kind in KINDS if name.endswith(kind)), key=len, default=path.suffix)


def read(name: str, path: Path, text_field: str) -> Iterator[Document | Fault]:
    """What the file at `path` holds, in its order, under ids that begin with `name`.

    The ids are `name:line` (lines count from 1), `name:row` for parquet (rows from 0) and `name` for .txt,
    where the whole file is one document. Raises TextError for a file that cannot be read, is damaged, or is
    truncated.
    """
    kind = kind_of(path)
    try:
        if kind == ".txt":
            yield _txt(name, path)
        elif kind == ".parquet":
            yield from _parquet(name, path, text_field)
        else:
            yield from _jsonl(name, _unpacked(path, kind), text_field)
    except EOFError as error:
        raise TextError(f"{path} is truncated: its packed data ends too early. Fetch the file again") from error
    except (OSError, zlib.error) as error:
        raise TextError(f"{path} cannot be read: {one_line(error)}. Mend or remove the file") from error


def document_of(record_id: str, record: Any, text_field: str) -> Document | Fault:
    """The document that a record with named fields holds, or why it holds none."""
    if not isinstance(record, dict):
        return Fault(record_id, f"not an object with fields but of type {type(record).__name__}")
    if text_field not in record:
        return Fault(record_id, f"no field {text_field!r}", record)
    text = record[text_field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}, not a string"
        return Fault(record_id, f"field {text_field!r} is {kind}", record)
    if not text or text.isspace():
        return Fault(record_id, f"field {text_field!r} is empty", record)
    try:
        text.encode()  # JSON can escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        return Fault(record_id, f"field {text_field!r} is not valid Unicode", record)
    return Document(record_id, text)


def one_line(error: Exception) -> str:
    """The message of an error on one line, without its full stop and cut where it gets long."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 200 else text[:200] + "..."


def _jsonl(name: str, chunks: Iterator[bytes], text_field: str) -> Iterator[Document | Fault]:
    for number, line in enumerate(_lines(chunks), 1):
        record_id = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text or text.isspace():  # between records or at the end: no record at all
                continue
            record = json.loads(text)
        except UnicodeDecodeError:
            yield Fault(record_id, "not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Fault(record_id, f"not JSON ({one_line(error)})")
        else:
            yield document_of(record_id, record, text_field)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of the line under way, joined once: the cost of a long line is linear
    for chunk in chunks:
        head, *lines = chunk.split(b"\n")
        pieces.append(head)
        if lines:
            yield b"".join(pieces)
            yield from lines[:-1]
            pieces = [lines[-1]]
    if last := b"".join(pieces):
        yield last


def _unpacked(path: Path, kind: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in chunks. Raises EOFError where its packed data ends too early."""
    with open(path, "rb") as file:
        if kind == ".jsonl.zst":
            yield from _unpacked_zst(file)
        elif kind == ".jsonl.gz":
            with gzip.open(file) as unpacked:
                yield from iter(lambda: unpacked.read(CHUNK), b"")
        else:
            yield from iter(lambda: file.read(CHUNK), b"")


def _unpacked_zst(file: BinaryIO) -> Iterator[bytes]:
    # Frame by frame, by hand: zstandard's own reader takes a file that ends inside a frame for a whole one.
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` needs
    frame = None
    while chunk := file.read(CHUNK):
        while chunk:
            frame = frame or unpacker.decompressobj()
            try:
                unpacked = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise OSError(f"damaged zstd data ({one_line(error)})") from error
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if unpacked:
                yield unpacked
    if frame is not None:
        raise EOFError


def _parquet(name: str, path: Path, text_field: str) -> Iterator[Document | Fault]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                yield Fault(name, f"no column {text_field!r}", names)
                return
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    record_id = f"{name}:{row}"
                    try:
                        yield document_of(record_id, {text_field: value.as_py()}, text_field)
                    except UnicodeDecodeError:
                        yield Fault(record_id, "not UTF-8", [text_field])
                    row += 1
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged or truncated parquet data ({one_line(error)})") from error


def _txt(name: str, path: Path) -> Document | Fault:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return Fault(name, "not UTF-8")
    return Fault(name, "is empty") if not text or text.isspace() else Document(name, text)
