"""Files that are whole or not there, the lock of a RUN_DIR, and the state from which a run continues.

Weights are safetensors and nothing else; nothing is ever unpickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mistral_sae.cli import Failed, UserError, one_line
from mistral_sae.schema import parse

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
PARTIAL = ".partial"  # how the name ends of what is not whole yet
# Entries of a state file's header: its metadata, and checksums of them alone and of them with all tensors
STATE_KEY, CHECKSUMS_KEY = "mistral_sae_state", "mistral_sae_checksums"


class SAEError(UserError):
    """A checkpoint that cannot be used. One line: what was found, what was expected, what to do."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise Failed, one line, where what is done to write a file or folder fails, for want of room say."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for a full disk
        number = getattr(error, "errno", None) or int((re.findall(r"\(os error (\d+)\)", str(error)) or [0])[0])
        why = os.strerror(number) if number else one_line(error)
        raise Failed(
            f"could not write {path} ({why}), expected room and the right to write there: what was there before is as "
            "it was; make room, or choose another folder"
        ) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it and rename it: no reader sees half of one. May raise Failed."""
    partial = write_beside(path, write)
    with writing(path):
        put_in_place(partial, path)
        sync_folder(path.parent)


def write_beside(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a synced file beside `path` and return where; nothing stays behind if it fails, as Failed.

    It is made in a folder of its own, which the next writing of `path` removes with all that a kill has left in it:
    safetensors writes to a file of another name first.
    """
    folder = path.with_name(path.name + PARTIAL)
    partial = folder / path.name
    try:
        with writing(path):
            remove(folder)
            folder.mkdir(parents=True)
            partial.touch()
            mode = partial.stat().st_mode
            write(partial)
            partial.chmod(mode)  # safetensors makes files that only their owner can read
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            remove(folder)
        raise
    return partial


def put_in_place(partial: Path, path: Path) -> None:
    """Rename what `write_beside` made to `path`, and remove the folder that it was in."""
    os.replace(partial, path)
    shutil.rmtree(partial.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last through a power cut, where the system can sync a folder."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # some network file systems refuse
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(run_dir: Path, name: str = ".lock", constant: str = "RUN_DIR") -> Iterator[str]:
    """Hold a folder for this process, until the block or the process ends, be it by kill -9.

    Locks of different names do not know each other: explain.py may read what train.py is still writing. `constant` is
    what the folder is set by.

    Yields "", or one line to print where the file system has no locks. Raises UserError if another process holds it.
    """
    path, note = run_dir / name, ""
    with contextlib.ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path, timeout=0))
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        except Timeout:
            raise UserError(
                f"found another run at work in {run_dir} ({path.read_text() or 'an unknown process'}), expected none: "
                f"wait for it, stop it or set another {constant}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                with writing(path):
                    raise
            note = f"the file system of {run_dir} has no locks ({error.strerror}): start no second run on it"
        yield note


def holder(run_dir: Path, name: str) -> str:
    """Which process holds a folder by a lock of `locked`, or "" if none does; nothing is changed."""
    path = run_dir / name
    if path.exists():
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return path.read_text() or "an unknown process"
        except OSError:  # no locks here, or no right to them
            pass
    return ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; whatever is wrong with it becomes one line."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise SAEError(f"found no {path}, expected a complete checkpoint: check the path or save again") from None
    except (SafetensorError, OSError) as error:
        raise SAEError(f"found a damaged {path} ({one_line(error)}), expected safetensors: get it again") from None


def save_state(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write what resuming needs as one safetensors file: tensors in their dtype, metadata as JSON, and a checksum."""
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = header_of(json.dumps(metadata), contents)
    write_atomically(path, lambda partial: save_file(contents, partial, metadata=header))


def header_of(text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a state file's header says beside its tensors: metadata, which are JSON, and the checksums."""
    return {STATE_KEY: text, CHECKSUMS_KEY: f"{_checksum(text, {})} {_checksum(text, tensors)}"}


def _checksum(metadata: str, tensors: Mapping[str, Tensor]) -> str:
    """XXH3: seven times as fast as SHA-256, and enough against accidents."""
    return hash_of(metadata, tensors, xxhash.xxh3_128())


def load_state(path: Path, kind: Any = dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Read what `save_state` wrote, the tensors on the CPU, the metadata as a type that `schema.parse` takes.

    Raises SAEError if it is damaged, be it by one bit, or foreign.
    """
    with opened(path) as file:
        text, checksum = _metadata(path, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check(path, checksum, _checksum(text, tensors))
        return tensors, _parsed(path, text, kind)


def load_metadata(path: Path, kind: Any = dict[str, Any]) -> Any:
    """The metadata alone, at once. Raises SAEError like `load_state`; the tensors may be damaged all the same."""
    with opened(path) as file:
        return _parsed(path, _metadata(path, file)[0], kind)


def _metadata(path: Path, file: Any) -> tuple[str, str]:
    """The metadata, after a look at their own checksum, and the checksum of them with the tensors."""
    header = file.metadata() or {}
    if STATE_KEY not in header:
        raise SAEError(f"found no training state in {path}, expected what train.py saved: remove the file")
    alone, _, whole = header.get(CHECKSUMS_KEY, "").partition(" ")
    _check(path, alone, _checksum(header[STATE_KEY], {}))
    return header[STATE_KEY], whole


def _check(path: Path, saved: str, found: str) -> None:
    if saved != found:
        raise SAEError(f"found a damaged {path} (another checksum), expected what was saved: remove the file")


def _parsed(path: Path, text: str, kind: Any) -> Any:
    return parse(kind, text, f"the metadata of {path}", "remove the file", SAEError)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def files_below(root: Path, left_out: tuple[str, ...] = (), followlinks: bool = False) -> Iterator[Path]:
    """The files of a folder and of all below it, in order, but for folders whose names end so.

    Where links are followed, the first of several to one folder counts.
    """
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=followlinks):
        folders[:] = sorted(name for name in folders if not name.endswith(left_out))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in sorted(names))


def cache_folder(name: str) -> Path:
    """A folder of the user's, for what is made once and can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistral-sae" / name


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object to a file of one object a line. May raise Failed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def hash_of(description: Any, tensors: Mapping[str, Tensor], digest: Any = None) -> str:
    """A hash of weights, by which what was made from them is known again, and of whatever `description` prints.

    It is SHA-256 unless `digest` is another, as hashlib makes them.
    """
    digest = digest or hashlib.sha256()
    digest.update(repr(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
