"""Files that are whole or not there, the lock of a RUN_DIR, and the state from which a run continues.

Weights are safetensors and nothing else; nothing is ever unpickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mistral_sae.cli import UserError, one_line
from mistral_sae.schema import parse

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
STATE_KEY = "mistral_sae_state"  # the entry of a state file's header that holds its metadata


class SAEError(UserError):
    """A checkpoint that cannot be used. One line: what was found, what was expected, what to do."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, sync it and rename it: a reader never sees half of one."""
    os.replace(write_beside(path, write), path)
    sync_folder(path.parent)


def write_beside(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a synced file beside `path` and return where; nothing stays behind if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        write(partial)
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


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
def locked(run_dir: Path, name: str = ".lock") -> Iterator[str]:
    """Hold a folder for this process, until the block or the process ends, be it by kill -9.

    Locks of different names do not know each other: explain.py may read what train.py is still writing.

    Yields "", or one line to print where the file system has no locks. Raises UserError if another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, note = run_dir / name, ""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(path, timeout=0))
            path.write_text(f"process {os.getpid()} on {platform.node()}")
        except Timeout:
            raise UserError(
                f"found another run at work in {run_dir} ({path.read_text() or 'an unknown process'}), expected none: "
                "wait for it, stop it or set another RUN_DIR"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            note = f"the file system of {run_dir} has no locks ({error.strerror}): start no second run on it"
        yield note


@contextlib.contextmanager
def opened(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """A safetensors file, open for reading; whatever is wrong with it becomes one line."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise SAEError(f"found no {path}, expected a complete checkpoint: check the path or save again") from None
    except (SafetensorError, OSError) as error:
        raise SAEError(f"found a damaged {path} ({one_line(error)}), expected safetensors: get it again") from None


def save_state(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write what resuming needs as one safetensors file: tensors in their dtype, and metadata as JSON.

    Views are written as what they show.
    """
    header = {STATE_KEY: json.dumps(metadata)}
    contents, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        contents[name] = tensor.clone() if storage in storages else tensor  # safetensors wants no shared memory
        storages.add(storage)
    write_atomically(path, lambda partial: save_file(contents, partial, metadata=header))


def load_state(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote, the tensors on `device`. Raises SAEError if it is damaged or foreign."""
    metadata = load_metadata(path)
    with opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone. Raises SAEError like `load_state`."""
    with opened(path) as file:
        header = (file.metadata() or {}).get(STATE_KEY)
    if header is None:
        raise SAEError(f"found no training state in {path}, expected what train.py saved: remove the file")
    return parse(dict[str, Any], header, f"the metadata of {path}", "remove the file", SAEError)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def cache_folder(name: str) -> Path:
    """A folder of the user's, for what is made once and can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistral-sae" / name


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add one JSON object to a file of one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def hash_of(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, by which what was made from them is known again, and of whatever `description` prints."""
    digest = hashlib.sha256(repr(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
