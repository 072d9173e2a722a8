"""Where text comes from: this Python's standard library, local files, or a dataset streamed from the hub."""

import hashlib
import math
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mistral_sae.data.readers import KINDS, Document, Fault, TextError, document_of, kind_of, one_line, read

IN_MEMORY = 256_000_000  # bytes of text; up to that a local corpus is held in memory and shuffled
GIVE_UP_AFTER = 10_000  # records without a document among them: a wrong field, not a bad stretch

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = {*KINDS, ".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".tar", ".xz", ".bz2", ".arrow"}


class Skipped:
    """What was left out of a corpus: how many records, and the first few of them in full."""

    KEEP = 3

    def __init__(self):
        self.count = 0
        self.first: list[str] = []

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


def documents(
    data_path: str, *, text_field: str = "text", split: str = "train", skipped: Skipped | None = None
) -> Iterator[Document]:
    """The documents of a corpus, once each, in an order that depends on nothing but the corpus.

    `data_path` is "stdlib", a local file of one of the KINDS, a folder of such files (read in the order of
    their paths, hidden ones left out), or the name of a dataset on the Hugging Face hub, whose `split` is
    streamed. Ids are `file:line` (lines count from 1), `file:row` for parquet (rows from 0), the path of a
    .txt or library file, and `name:index` on the hub; paths are relative to `data_path`.

    Records that hold no text are counted in `skipped`. Raises TextError where there is nothing to read, where
    no record is a document, and for a file that is truncated or damaged.
    """
    skipped = Skipped() if skipped is None else skipped
    before_first = Skipped()
    fields: dict[str, None] = {}
    found = False
    for item in _records(data_path, text_field, split):
        if isinstance(item, Document):
            found = True
            yield item
            continue
        skipped.add(item.id, item.reason)
        if not found:
            before_first.add(item.id, item.reason)
            fields.update(dict.fromkeys(item.fields))
            if before_first.count >= GIVE_UP_AFTER:
                break
    if not found:
        raise _nothing_found(data_path, text_field, list(fields), before_first)


def check(data_path: str, text_field: str = "text") -> str:
    """A short description of a corpus; a local one is read up to its first document, the hub not at all.

    Raises TextError for a path that is not there, a file or folder of an unknown kind, and a local corpus
    that does not begin with text.
    """
    if data_path == "stdlib":
        count = sum(1 for _ in stdlib_documents())
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return f"standard library of {python}, {count:,} files"
    root = _local(data_path)
    if root is None:
        return f"{data_path}, streamed from the hub"
    files = _files(root)
    first = documents(data_path, text_field=text_field)
    next(first)
    first.close()
    kinds = " and ".join(sorted({kind_of(path) for _, path in files}))
    size = _size(sum(path.stat().st_size for _, path in files))
    return f"{len(files):,} file{'s' * (len(files) > 1)}, {size} of {kinds}"


def fits_in_memory(data_path: str) -> bool:
    """Whether a corpus may be held as a list: by the sizes of its files and IN_MEMORY, never from the hub."""
    if data_path == "stdlib":
        return True
    root = _local(data_path)
    if root is None:
        return False
    return sum(path.stat().st_size * KINDS[kind_of(path)] for _, path in _files(root)) <= IN_MEMORY


def stdlib_documents() -> Iterator[Document]:
    """The source files of this Python's standard library, ids relative to its folder, in the order of paths.

    Empty files and the few that are not UTF-8 on purpose, to test Python's parser, are no part of the corpus.
    """
    for name, path in _stdlib_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield Document(name, text)


def fingerprint(data_path: str) -> str:
    """A hash that changes with the files of a corpus: their names, sizes and times of change, as make compares them.

    Of a dataset on the hub only its name is known without the network. Raises TextError as `check` does.
    """
    root = None if data_path == "stdlib" else _local(data_path)
    if data_path != "stdlib" and root is None:
        return data_path
    stats = [(name, path.stat()) for name, path in (_files(root) if root else _stdlib_files())]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _records(data_path: str, text_field: str, split: str) -> Iterator[Document | Fault]:
    if data_path == "stdlib":
        yield from stdlib_documents()
    elif root := _local(data_path):
        for name, path in _files(root):
            yield from read(name, path, text_field)
    else:
        yield from _hub_records(data_path, text_field, split)


def _hub_records(name: str, text_field: str, split: str) -> Iterator[Document | Fault]:
    """Stream one split of a Hugging Face dataset; whatever goes wrong on the way is one TextError."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    try:
        dataset = datasets.load_dataset(name, split=split, streaming=True)
        stream = iter(dataset)
    except Exception as error:  # of many kinds: the library lets through those of httpx, fsspec and pyarrow
        raise _hub_error(name, split, "cannot be opened", error) from error
    columns = dataset.column_names  # None where only the records tell
    if columns and text_field not in columns:
        yield Fault(name, f"no column {text_field!r}", columns)
        return
    index = 0
    while True:
        try:
            record = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(name, split, f"broke off after {index:,} records", error) from error
        yield document_of(f"{name}:{index}", record, text_field)
        index += 1


def _stdlib_files() -> list[tuple[str, Path]]:
    """The library's source files as (path relative to its folder, path), in the order of paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        # Installed packages can live inside the library's folder, and are many
        folders[:] = [name for name in folders if not name.endswith(("site-packages", "dist-packages"))]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(files)]


def _local(data_path: str) -> Path | None:
    """The path that `data_path` means, or None for a dataset on the hub; TextError where it is neither."""
    path = Path(data_path).expanduser()
    if data_path and path.exists():
        return path
    if _HUB_NAME.fullmatch(data_path) and kind_of(path) not in _FILE_SUFFIXES:
        return None
    raise TextError(
        f"there is no file or folder {data_path!r}: DATA_PATH takes 'stdlib', a path that exists, "
        "or a Hugging Face dataset as 'owner/name'"
    )


def _files(root: Path) -> list[tuple[str, Path]]:
    """The files of a local corpus as (path relative to it, path), sorted; TextError where it has none."""
    supported = ", ".join(KINDS)
    if root.is_file():
        if kind_of(root) not in KINDS:
            raise TextError(f"{root} is of an unknown kind: DATA_PATH takes {supported}")
        return [(root.name, root)]
    files = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and kind_of(path) in KINDS and path.is_file():
            # A name that is not UTF-8 would break whatever hashes or prints the id
            files.append((relative.as_posix().encode("utf-8", "replace").decode(), path))
    if not files:
        raise TextError(f"no file that can be read in the folder {root}: DATA_PATH takes {supported}")
    return sorted(files)


def _nothing_found(data_path: str, text_field: str, fields: list[str], skipped: Skipped) -> TextError:
    if fields and text_field not in fields:
        which = f"none of the first {skipped.count:,} records" if skipped.count >= GIVE_UP_AFTER else "no record"
        return TextError(
            f"{which} of {data_path!r} has the field {text_field!r}; found "
            f"{', '.join(repr(name) for name in fields[:10])}: choose one of them as the text field"
        )
    why = skipped.summary() or "it is empty"
    return TextError(f"no document in {data_path!r}: {why}. Point DATA_PATH at text")


def _hub_error(name: str, split: str, what: str, error: Exception) -> TextError:
    return TextError(
        f"the dataset {name!r} (split {split!r}) {what}: {type(error).__name__}: {one_line(error)}. "
        "Check its name, the split and the network, or point DATA_PATH at a local copy"
    )


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:,.1f} {' kMGT'[power]}B"
