"""Documents of text: the standard library, English that is installed here, local files, or a dataset on the hub.

Everything is read record by record, in bounded memory, and every document knows its place: what to start from to read
it again, and nothing before it.
"""

import contextlib
import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from mistral_sae.cli import one_line, printable, size_of
from mistral_sae.data.english import english_file
from mistral_sae.data.forms import KINDS, file_records, kind_of, text_size
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.records import Document, Fault, TextError, Wanted, document_of
from mistral_sae.files import files_below

IN_MEMORY = 256_000_000  # bytes of text; up to that a local corpus is held in memory and shuffled
PIECES = 16  # of a file, that its fingerprint reads
GIVE_UP_AFTER = 10_000  # records without a document among them: a wrong field, not a bad stretch
MAX_DOCUMENT_BYTES = 16_000_000  # of a line of a file, or the text of a record; a longer one is skipped
NAMED = 10  # fields, where the one that is wanted is in no record

# owner/name, owner/name:configuration, owner/name@revision or with both
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:[\w.,+-]+)?(@[\w./-]+)?")
_PACKED_FOLDERS = {".zip", ".tar", ".gz", ".tgz"}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}  # of `datasets`, no text


class Skipped:
    """What was left out of a corpus: how many records, and the first few of them in full."""

    KEEP = 3

    def __init__(self) -> None:
        self.count, self.first = 0, list[str]()

    def add(self, where: str, reason: str) -> None:
        """Count one record, at `where` (file:line), that was skipped for `reason`."""
        self.count += 1
        if len(self.first) < self.KEEP:
            self.first.append(printable(f"{where}: {reason}"))

    def take(self, other: "Skipped") -> None:
        """Count what another has counted, too."""
        self.count += other.count
        self.first += other.first[: self.KEEP - len(self.first)]

    def summary(self) -> str:
        """One line for people, or "" when nothing was skipped."""
        if not self.count:
            return ""
        more = self.count - len(self.first)
        listed = "; ".join(self.first) + (f"; and {more:,} more" if more else "")
        return f"skipped {self.count:,} record{'s' * (self.count > 1)}: {listed}"


def documents(
    data_path: str,
    *,
    text_field: str = "text",
    max_bytes: int = MAX_DOCUMENT_BYTES,
    split: str = "train",
    start: Place = BEGINNING,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """The documents of a corpus from `start` on, once each, in an order that depends on nothing but the corpus.

    `data_path` is "stdlib", "english" (see data/english.py), a local file of one of the KINDS, a folder of such files
    (read in the order of their paths, linked folders too, hidden ones left out), or the name of a dataset on the
    Hugging Face hub as owner/name, owner/name:configuration or with @revision, whose `split` is streamed. Ids are
    `file:line` (from 1; of a JSON array `file:element`), `file:row` for parquet and arrow (from 0), the path of a .txt,
    library or English file, and `name:index` on the hub; paths are relative to `data_path`.

    Records that hold no text, or more than `max_bytes` of it, are counted in `skipped`: of what is read from `start`
    on. Raises TextError where there is nothing to read, where no record is a document, and for a file that is truncated
    or damaged.
    """
    skipped = Skipped() if skipped is None else skipped
    fields: dict[str, None] = {}
    found = has_field = False
    for record in _records(data_path, Wanted(text_field, max_bytes), split, start):
        if isinstance(record, Document):
            found = True
            yield record
            continue
        skipped.add(record.id, record.reason)
        if not found:
            has_field |= text_field in record.fields
            fields |= dict.fromkeys(islice(record.fields, NAMED - len(fields)))
            if skipped.count >= GIVE_UP_AFTER:
                break
    if found:
        return
    if fields and not has_field:
        names = ", ".join(one_line(repr(name)) for name in fields)
        raise TextError(f"no field {text_field!r} in {data_path!r}; found {names}: choose one of them as TEXT_FIELD")
    why = skipped.summary() or "it is empty"
    raise TextError(f"no document in {data_path!r}: {why}. Point DATA_PATH at text: {KINDS}")


def check(data_path: str, text_field: str = "text", max_bytes: int = MAX_DOCUMENT_BYTES) -> str:
    """A short description of a corpus; a local one is read up to its first document. Raises TextError."""
    files = _files(data_path)
    if files is None:
        return f"{data_path}, streamed from the hub"
    if data_path == "stdlib":
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return f"standard library of {python}, {sum(1 for _ in documents(data_path)):,} files"
    next(documents(data_path, text_field=text_field, max_bytes=max_bytes))
    if data_path == "english":
        return f"English in the packages and manuals of this machine, {size_of(files[0][1].stat().st_size)}"
    kinds = " and ".join(sorted({"".join(kind_of(path)) or "text" for _, path in files}))
    size = size_of(sum(path.stat().st_size for _, path in files))
    return f"{len(files):,} file{'s' * (len(files) > 1)}, {size} of {kinds}"


def in_memory(documents: Iterable[Document]) -> list[Document] | None:
    """Documents as a list; None if they hold more than IN_MEMORY characters, as well packed files may."""
    found, size = [], 0
    for document in documents:
        found.append(document)
        size += len(document.text) + (0 if document.tokens is None else document.tokens.nbytes)
        if size > IN_MEMORY:
            return None
    return found


def fits_in_memory(data_path: str) -> bool:
    """True if a corpus may be held as a list, by the sizes of its files; one on the hub may not."""
    files = _files(data_path)
    return files is not None and sum(text_size(path) for _, path in files) <= IN_MEMORY


def fingerprint(data_path: str) -> str:
    """A hash of the files of a corpus, wherever they lie: of names, sizes and contents, as far as that is quick.

    All files together take 256 MB: of one that has more than its even share, PIECES are read, evenly spread. Of a
    dataset on the hub it is name@commit, or its name where the commit cannot be found out. Raises TextError as `check`
    does.
    """
    files = _files(data_path)
    if files is None:
        name, commit = _on_hub(data_path)
        return f"{name}@{commit}" if commit else name
    digest, piece = hashlib.sha256(), max(2**12, IN_MEMORY // max(1, len(files)) // PIECES)
    for name, path in files:
        size = path.stat().st_size
        digest.update(repr((name, size)).encode())
        with open(path, "rb") as file:
            for start in sorted({part * max(0, size - piece) // (PIECES - 1) for part in range(PIECES)}):
                file.seek(start)
                digest.update(file.read(piece))
    return digest.hexdigest()


# ---- where the records are ----


def _records(data_path: str, wanted: Wanted, split: str, start: Place) -> Iterator[Document | Fault]:
    files = _files(data_path)
    if files is None:
        yield from _hub_records(data_path, wanted, split, start)
        return
    for number, (name, path) in enumerate(files[start.file :], start.file):
        place = start if number == start.file else Place(start.epoch, number)
        if data_path == "stdlib":
            with contextlib.suppress(UnicodeDecodeError):  # some files are not UTF-8, to test Python's parser
                if text := path.read_text(encoding="utf-8"):
                    yield Document(name, text, Place(start.epoch, number))
        elif data_path == "english":
            for record, line in enumerate(path.read_text(encoding="utf-8").splitlines()[start.record :], start.record):
                yield Document(**json.loads(line), place=Place(start.epoch, number, record))
        else:
            yield from file_records(name, path, wanted, place)


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
        if _HUB_NAME.fullmatch(data_path) and not kind_of(root)[0] and root.suffix not in _PACKED_FOLDERS:
            return None
        raise TextError(
            f"there is no file or folder {data_path!r}: DATA_PATH takes 'stdlib', 'english', a path that exists, a "
            "Hugging Face dataset as 'owner/name' or 'owner/name:configuration', or a mixture as 'a*0.7 + b*0.3'"
        )
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise TextError(f"{root} holds the splits {', '.join(splits)}: DATA_PATH takes one, as in {root / splits[0]}")
    files = []
    for path in [root] if root.is_file() else files_below(root, followlinks=True):
        name = path.relative_to(root.parent if path == root else root).as_posix()
        hidden = "/." in f"/{name}" and path != root
        is_text = path == root or (kind_of(path)[0] and path.name not in _DESCRIPTIONS)
        if is_text and not hidden and path.is_file():
            # A name that is not UTF-8 would break whatever hashes or prints the id
            files.append((name.encode("utf-8", "replace").decode(), path))
    if not files:
        raise TextError(f"{root} holds no text of a kind that is read: DATA_PATH takes {KINDS}")
    return sorted(files)


@cache
def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    # Installed packages can live inside the library's folder, and are many
    below = files_below(root, ("site-packages", "dist-packages"), followlinks=True)
    return [(path.relative_to(root).as_posix(), path) for path in sorted(below) if path.suffix == ".py"]


@cache
def _on_hub(data_path: str) -> tuple[str, str | None]:
    """Name, with the configuration, and commit of a dataset: as the hub says, asked once, or as it was last read here.

    Where neither knows the commit it is the revision that was asked for, or None; reading then says what is wrong.
    """
    from huggingface_hub import dataset_info, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    name, _, words = data_path.partition("@")
    revision, repo = words or None, name.partition(":")[0]
    if re.fullmatch("[0-9a-f]{40}", words):
        return name, revision
    with contextlib.suppress(OSError, HTTPError, ValueError):
        return name, dataset_info(repo, revision=revision, timeout=10).sha
    with contextlib.suppress(OSError, ValueError):
        read = try_to_load_from_cache(repo, "README.md", repo_type="dataset", revision=revision)
        return name, Path(read).parent.name if isinstance(read, str) else revision
    return name, revision


def _hub_records(data_path: str, wanted: Wanted, split: str, start: Place) -> Iterator[Document | Fault]:
    """One split of a dataset, streamed; whatever goes wrong on the way is one TextError."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()

    what, (name, commit) = "cannot be opened", _on_hub(data_path)  # the same commit in every epoch
    repo, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repo, name=config or None, split=split, streaming=True, revision=commit)
        if start.hub is not None:
            dataset.load_state_dict(start.hub)
        records = iter(dataset)
        columns = dataset.column_names  # None where only the records tell
        if columns and wanted.text_field not in columns:
            yield Fault(name, f"no column {wanted.text_field!r}", columns)
            return
        state = dataset.state_dict()
        for number, record in enumerate(records, start.record):
            yield document_of(f"{name}:{number}", record, wanted, Place(start.epoch, record=number, hub=state))
            what, state = f"broke off after {number + 1:,} records", dataset.state_dict()
    except Exception as error:  # of many kinds: the library lets through those of httpx, fsspec and pyarrow
        why = f"{type(error).__name__}: {one_line(error)}"
        raise TextError(
            f"the dataset {data_path!r} (split {split!r}) {what}: {why}. Check name, configuration (as in "
            "'owner/name:configuration'), split and network, or use a local copy"
        ) from error
