"""The journal of completions, and the lock that keeps a second run out of a RUN_DIR.

A journal is a file of one JSON object a line, to which lines are only ever added. A line is in the operating system's
hands before anyone sees its completion, so a process that is killed has lost nothing; it is on the disk within
SYNC_SECONDS, so a power cut costs the requests of that long.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mistral_sae.cli import UserError
from mistral_sae.explain.types import Completion, Request

FINAL = frozenset({"ok", "refused", "filtered", "truncated", "overflow"})  # asking again would give the same
SYNC_SECONDS = 1.0
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class JournalError(UserError):
    """A RUN_DIR that is in use, or a journal that cannot be read or written: one line."""


@contextlib.contextmanager
def locked(run_dir: Path | str) -> Iterator[str]:
    """Hold a RUN_DIR for this process, until the block or the process ends, be it by kill -9.

    Yields "", or one line to print where the file system has no locks.

    Raises:
        JournalError: another process holds it.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        note = ""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "an unknown process"
            raise JournalError(
                f"found another run at work in {run_dir} ({holder}), expected none: "
                "wait for it, stop it or set another RUN_DIR"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            note = f"the file system of {run_dir} has no locks ({error.strerror}): start no second run on it"
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield note


def request_key(request: Request, model: str, sampling: dict[str, Any]) -> str:
    """What a completion is known by: SHA-256 of all that it depends on, so neither the server's address nor its key."""
    return hashlib.sha256(json.dumps([*request, model, sampling], sort_keys=True).encode()).hexdigest()


class Journal:
    """The completions of a RUN_DIR, by `request_key`. `with Journal(path) as journal`, under `locked`.

    Completions stay on the disk and only their places in memory, about 250 bytes each.

    Attributes:
        tokens: prompt and completion tokens of all lines, those of failed requests too.
        dollars: what they cost.
        unpriced: those of `tokens` whose lines cost 0 dollars, for want of prices when they were written.
        repaired: bytes of a torn last line that opening removed.

    Raises:
        JournalError: the file holds something else than a journal does.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.tokens, self.dollars, self.unpriced, self.repaired = 0, 0.0, 0, 0
        self._places: dict[str, int] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        try:
            self._size = self._read()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Requests that need not be asked again."""
        return len(self._places)

    def get(self, *keys: str) -> Completion | None:
        """The final completion of the first of these keys that has one; None if there is none, or it failed."""
        key = next((key for key in keys if key in self._places), None)
        if key is None:
            return None
        place = self._places[key]
        with open(self.path, "rb") as file:
            file.seek(place)
            line = _parsed(file.readline())
        if line is None or line.key != key:
            raise JournalError(
                f"found {self.path} changed under this run, expected nobody else to write to it: start again"
            )
        return line.completion

    def append(self, key: str, completion: Completion, dollars: float = 0.0) -> None:
        """Write a completion down. `dollars` is what its attempts cost, lost ones included.

        Raises:
            JournalError: it could not be written, and the file is as it was.
        """
        assert key not in self._places, key
        line = json.dumps({"key": key, **completion._asdict(), "dollars": dollars}).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise JournalError(
                f"could not write {self.path} ({error.strerror}), expected room for a line: "
                "make some and start again, what is in it is safe"
            ) from None
        self._take(_Line(key, completion, dollars), self._size)
        self._size += len(line)

    def close(self) -> None:
        """Sync and close the file."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _take(self, line: "_Line", place: int) -> None:
        if line.completion.status in FINAL:
            self._places.setdefault(line.key, place)
        tokens = line.completion.prompt_tokens + line.completion.completion_tokens
        self.tokens += tokens
        self.unpriced += 0 if line.dollars else tokens
        self.dollars += line.dollars

    def _read(self) -> int:
        """Take in the lines, repair the last one, and return the size in bytes."""
        size, raw = 0, b"\n"
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = _parsed(raw)
                if line is None:
                    if raw.endswith(b"\n"):  # which is written last: this line was whole, but not ours
                        raise JournalError(
                            f"found something else than a completion in line {number} of {self.path}: "
                            "remove that line, and its request is asked again"
                        )
                    self._file.truncate(size)
                    self.repaired, raw = len(raw), b"\n"
                    break
                self._take(line, size)
                size += len(raw)
        if not raw.endswith(b"\n"):  # all but the end of the line had been written
            size += self._file.write(b"\n")
        return size


class _Line(NamedTuple):
    key: str
    completion: Completion
    dollars: float


def _parsed(raw: bytes) -> _Line | None:
    """What a line says; None for one that is torn or no line of a journal."""
    try:
        record: dict[str, Any] = json.loads(raw)
        completion = Completion(**{name: record[name] for name in Completion._fields})
        return _Line(record["key"], completion, record["dollars"])
    except (ValueError, KeyError, TypeError):
        return None
