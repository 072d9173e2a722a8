"""Documents of text: the standard library, English that is installed here, local files, or a dataset on the hub.

Everything is read record by record, in bounded memory. `datasets` reads the hub; local files are read here, since it
neither skips a bad line nor says which one it was, and takes a .zst file that was cut short for a whole one.
"""

import contextlib
import gzip
import hashlib
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mistral_sae.cli import UserError, one_line, size_of
from mistral_sae.data.english import english_file

# The kinds of files that are read, with the bytes of text that one byte of them holds, roughly
KINDS = {".jsonl": 1, ".jsonl.zst": 4, ".jsonl.gz": 4, ".parquet": 3, ".txt": 1}
IN_MEMORY = 256_000_000  # bytes of text; up to that a local corpus is held in memory and shuffled
GIVE_UP_AFTER = 10_000  # records without a document among them: a wrong field, not a bad stretch
CHUNK = 1 << 17  # bytes of a .zst file read at once; unpacked, even of well compressed text, they stay a few MB

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = {*KINDS, ".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".tar", ".xz", ".bz2", ".arrow"}


class TextError(UserError):
    """A corpus that cannot be used."""


class Document(NamedTuple):
    """One text."""

    id: str  # file:line or the like
    text: str


class Skipped:
    """What was left out of a corpus: how many records, and the first few of them in full."""

    KEEP = 3

    def __init__(self) -> None:
        self.count, self.first = 0, list[str]()

    def add(self, where: str, reason: str) -> None:
        """Count one record, at `where` (file:line), that was skipped for `reason`."""
        self.count += 1
        if len(self.first) < self.KEEP:
            self.first.append(f"{where}: {reason}")

    def summary(self) -> str:
        """One line for people, or "" when nothing was skipped."""
        if not self.count:
            return ""
        more = self.count - len(self.first)
        listed = "; ".join(self.first) + (f"; and {more:,} more" if more else "")
        return f"skipped {self.count:,} record{'s' * (self.count > 1)}: {listed}"


class _Fault(NamedTuple):
    """A record that is no document."""

    id: str
    reason: str
    fields: Iterable[str] = ()  # that it has


def documents(
    data_path: str, *, text_field: str = "text", split: str = "train", skipped: Skipped | None = None
) -> Iterator[Document]:
    """The documents of a corpus, once each, in an order that depends on nothing but the corpus.

    `data_path` is "stdlib", "english" (see data/english.py), a local file of one of the KINDS, a folder of such files
    (read in the order of their paths, hidden ones left out), or the name of a dataset on the Hugging Face hub, whose
    `split` is streamed. Ids are `file:line` (from 1), `file:row` for parquet (from 0), the path of a .txt, library or
    English file, and `name:index` on the hub; paths are relative to `data_path`.

    Records that hold no text are counted in `skipped`. Raises TextError where there is nothing to read, where
    no record is a document, and for a file that is truncated or damaged.
    """
    skipped = Skipped() if skipped is None else skipped
    fields: dict[str, None] = {}
    found = False
    for record in _records(data_path, text_field, split):
        if isinstance(record, Document):
            found = True
            yield record
            continue
        skipped.add(record.id, record.reason)
        if not found:
            fields |= dict.fromkeys(record.fields)
            if skipped.count >= GIVE_UP_AFTER:
                break
    if found:
        return
    if fields and text_field not in fields:
        names = ", ".join(repr(name) for name in list(fields)[:10])
        raise TextError(f"no field {text_field!r} in {data_path!r}; found {names}: choose one of them as TEXT_FIELD")
    why = skipped.summary() or "it is empty"
    raise TextError(f"no document in {data_path!r}: {why}. Point DATA_PATH at text")


def check(data_path: str, text_field: str = "text") -> str:
    """A short description of a corpus; a local one is read up to its first document. Raises TextError."""
    files = _files(data_path)
    if files is None:
        return f"{data_path}, streamed from the hub"
    if data_path == "stdlib":
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return f"standard library of {python}, {sum(1 for _ in documents(data_path)):,} files"
    next(documents(data_path, text_field=text_field))
    if data_path == "english":
        return f"English in the packages and manuals of this machine, {size_of(files[0][1].stat().st_size)}"
    kinds = " and ".join(sorted({_kind_of(path) for _, path in files}))
    size = size_of(sum(path.stat().st_size for _, path in files))
    return f"{len(files):,} file{'s' * (len(files) > 1)}, {size} of {kinds}"


def fits_in_memory(data_path: str) -> bool:
    """True if a corpus may be held as a list, by the sizes of its files; one on the hub may not."""
    files = _files(data_path)
    return files is not None and sum(p.stat().st_size * KINDS.get(_kind_of(p), 1) for _, p in files) <= IN_MEMORY


def fingerprint(data_path: str) -> str:
    """A hash that changes with the files of a corpus: their names, sizes and times of change, as make compares them.

    Of a dataset on the hub only its name is known without the network. Raises TextError as `check` does.
    """
    files = _files(data_path)
    if files is None:
        return data_path
    stats = [(name, path.stat()) for name, path in files]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


# ---- where the records are ----


def _records(data_path: str, text_field: str, split: str) -> Iterator[Document | _Fault]:
    files = _files(data_path)
    if files is None:
        yield from _hub_records(data_path, text_field, split)
        return
    for name, path in files:
        if data_path == "stdlib":
            with contextlib.suppress(UnicodeDecodeError):  # some files are not UTF-8, to test Python's parser
                if text := path.read_text(encoding="utf-8"):
                    yield Document(name, text)
        elif data_path == "english":
            yield from (Document(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
        else:
            yield from _file_records(name, path, text_field)


def _files(data_path: str) -> list[tuple[str, Path]] | None:
    """The files of a corpus as (relative path, path), in order; None for a dataset on the hub.

    Raises TextError for a path that is not there and for files of an unknown kind.
    """
    if data_path == "stdlib":
        return _stdlib_files()
    if data_path == "english":
        return [("english.jsonl", english_file())]
    root = Path(data_path).expanduser()
    if not data_path or not root.exists():
        if _HUB_NAME.fullmatch(data_path) and _kind_of(root) not in _FILE_SUFFIXES:
            return None
        raise TextError(
            f"there is no file or folder {data_path!r}: DATA_PATH takes 'stdlib', 'english', a path "
            "that exists, or a Hugging Face dataset as 'owner/name'"
        )
    files = []
    for path in [root] if root.is_file() else root.rglob("*"):
        name = path.relative_to(root.parent if path == root else root).as_posix()
        hidden = "/." in f"/{name}" and path != root
        if not hidden and _kind_of(path) in KINDS and path.is_file():
            # A name that is not UTF-8 would break whatever hashes or prints the id
            files.append((name.encode("utf-8", "replace").decode(), path))
    if not files:
        raise TextError(f"{root} holds no text of a kind that is read: DATA_PATH takes {', '.join(KINDS)}")
    return sorted(files)


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        # Installed packages can live inside the library's folder, and are many
        folders[:] = [name for name in folders if not name.endswith(("site-packages", "dist-packages"))]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(files)]


def _hub_records(name: str, text_field: str, split: str) -> Iterator[Document | _Fault]:
    """One split of a dataset, streamed; whatever goes wrong on the way is one TextError."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()

    count, what = 0, "cannot be opened"
    try:
        dataset = datasets.load_dataset(name, split=split, streaming=True)
        records = iter(dataset)
        columns = dataset.column_names  # None where only the records tell
        if columns and text_field not in columns:
            yield _Fault(name, f"no column {text_field!r}", columns)
            return
        for count, record in enumerate(records, 1):
            yield _document_of(f"{name}:{count - 1}", record, text_field)
            what = f"broke off after {count:,} records"
    except Exception as error:  # of many kinds: the library lets through those of httpx, fsspec and pyarrow
        why = f"{type(error).__name__}: {one_line(error)}"
        raise TextError(
            f"the dataset {name!r} (split {split!r}) {what}: {why}. Check name, split and network, or use a local copy"
        ) from error


# ---- what a file holds ----


def _kind_of(path: Path) -> str:
    """The longest suffix of a file that is a key of KINDS, or else its last suffix."""
    name = path.name.lower()
    return max((kind for kind in KINDS if name.endswith(kind)), key=len, default=path.suffix)


def _file_records(name: str, path: Path, text_field: str) -> Iterator[Document | _Fault]:
    """What a file holds, under ids that begin with `name`; a .txt file is one document."""
    kind = _kind_of(path)
    try:
        if kind == ".txt":
            yield _txt(name, path)
        elif kind == ".parquet":
            yield from _parquet(name, path, text_field)
        else:
            yield from _jsonl(name, path, kind, text_field)
    except EOFError as error:
        raise TextError(f"{path} is truncated: its packed data ends too early. Fetch the file again") from error
    except (OSError, zlib.error) as error:
        raise TextError(f"{path} cannot be read: {one_line(error)}. Mend or remove the file") from error


def _txt(name: str, path: Path) -> Document | _Fault:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return _Fault(name, "not UTF-8")
    return _Fault(name, "is empty") if not text or text.isspace() else Document(name, text)


def _parquet(name: str, path: Path, text_field: str) -> Iterator[Document | _Fault]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                yield _Fault(name, f"no column {text_field!r}", columns)
                return
            batches = file.iter_batches(batch_size=1024, columns=[text_field])
            for row, value in enumerate(value for batch in batches for value in batch.column(0)):
                try:
                    yield _document_of(f"{name}:{row}", {text_field: value.as_py()}, text_field)
                except UnicodeDecodeError:
                    yield _Fault(f"{name}:{row}", "not UTF-8", [text_field])
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged or truncated parquet data ({one_line(error)})") from error


def _jsonl(name: str, path: Path, kind: str, text_field: str) -> Iterator[Document | _Fault]:
    for number, line in enumerate(_lines(path, kind), 1):
        record_id = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:  # else between records or at the end: no record at all
                yield _document_of(record_id, json.loads(text), text_field)
        except UnicodeDecodeError:
            yield _Fault(record_id, "not UTF-8")
        except (ValueError, RecursionError) as error:
            yield _Fault(record_id, f"not JSON ({one_line(error)})")


def _lines(path: Path, kind: str) -> Iterator[bytes]:
    """The lines of a file, unpacked. Raises EOFError where its packed data ends too early."""
    if kind == ".jsonl.zst":
        rest = b""
        for chunk in _unpacked_zst(path):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        yield rest
    else:
        with gzip.open(path) if kind == ".jsonl.gz" else open(path, "rb") as file:
            yield from file


def _unpacked_zst(path: Path) -> Iterator[bytes]:
    """Frame by frame, by hand: zstandard's own reader takes a file that ends inside a frame for a whole one."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` needs
    frame = None
    with open(path, "rb") as file:
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


def _document_of(record_id: str, record: Any, text_field: str) -> Document | _Fault:
    """The document that a record with named fields holds, or why it holds none."""
    if not isinstance(record, dict):
        return _Fault(record_id, f"not an object with fields but of type {type(record).__name__}")
    if text_field not in record:
        return _Fault(record_id, f"no field {text_field!r}", record)
    text = record[text_field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}, not a string"
        return _Fault(record_id, f"field {text_field!r} is {kind}", record)
    if not text or text.isspace():
        return _Fault(record_id, f"field {text_field!r} is empty", record)
    try:
        text.encode()  # JSON can escape half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        return _Fault(record_id, f"field {text_field!r} is not valid Unicode", record)
    return Document(record_id, text)
