"""What the scripts share with the shell: one-line errors, exit codes, signals and progress."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rich import filesize
from tqdm import tqdm

STANDIN_NAME = "the bundled stand-in, a tiny Mistral that has read nothing but Python"  # what the scripts call it
QUIET_SECONDS = 30.0  # between two lines of progress where there is no terminal


class UserError(ValueError):
    """A mistake of the user's, in one line: what was found, what was expected, what to do. Exit code 2."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(printable(message))  # it may quote a file or a server


class Failed(UserError):
    """A run that could not end well, for a reason that is said in one line. Exit code 1."""

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does."""


# ---- ranks ----


def rank() -> int:
    """The number of this process among those that torchrun started, or 0: the first one prints and writes."""
    return int(os.environ.get("RANK", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0


# ---- words ----


# Control characters, lone surrogates and the marks that turn the direction of what follows
_MISLEADING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text that is safe to print: control characters are written as escapes, \\x1b for example."""
    return _MISLEADING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: Exception | str) -> str:
    """The message of an error on one line, without its full stop and cut where it gets long."""
    text = printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def size_of(count: float) -> str:
    """A number of bytes in words: 999 bytes, 1.5 kB, 20.0 GB."""
    return filesize.decimal(round(count))


def not_finite(what: str, do: str) -> str:
    """The message of numbers that are not finite: of what, and what to do."""
    return f"found NaN or infinity in {what}, expected finite numbers: {do}"


def duration_of(seconds: float) -> str:
    """A time in words: 12 seconds, 2.5 hours."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def expect(name: str, value: Any, good: Any, expected: str) -> None:
    """Raise UserError that names a constant, its value and what was expected, unless `good`."""
    if not good:
        raise UserError(f"{name} is {quoted(value)}: expected {expected}")


def quoted(value: Any) -> str:
    """A value as it would be written, cut where it gets long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 200 else text[:200] + "..."


# ---- a script's beginning and end ----


def begin() -> None:
    """Have lines appear as they are printed, in a pipe too, and Ctrl-C and SIGTERM end the script with one line."""
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # idle threads of OpenMP sleep sooner: spinning slows the others
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # whatever the terminal's encoding
    sys.excepthook = _report
    signal.signal(signal.SIGTERM, _terminate)


def run(main: Callable[[], None], out_of_memory: str, stopped: str = "") -> None:
    """Run a script's `main`; mistakes of the user's and failures end it with one line and an exit code.

    `out_of_memory` says which constants to lower where the device's memory does not suffice, `stopped` what is there
    after Ctrl-C.
    """
    try:
        with room_for("this run", f"lower {out_of_memory}"):
            main()
    except UserError as error:
        fail(error, error.exit_code)
    except OSError as error:  # a file that cannot be read or written
        fail(error, 1)
    except KeyboardInterrupt as error:
        raise type(error)(str(error) or stopped) from None


@contextmanager
def room_for(what: str, advice: str) -> Iterator[None]:
    """Raise Failed where memory does not suffice for something, of the device or the host; it says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise Failed(f"the device is out of memory for {what}: {advice}") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is for want of memory; only some of PyTorch's have a kind of their own."""
    words = r"out of memory|can't allocate memory|_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def fail(error: Exception | str, code: int) -> NoReturn:
    """Print one line and exit; of other ranks than the first, failures only: mistakes the first one names for all."""
    who = f"rank {rank()}: " if rank() else ""
    if not who or code == 1:
        print(f"{who}error: {printable(str(error))}", file=sys.stderr)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say of Ctrl-C, which may strike during imports too, one line; of other exceptions what Python says.

    Of a pipe whose reader has seen enough, `head -1` say, nothing.
    """
    if issubclass(kind, KeyboardInterrupt):
        fail(f"stopped {error}".strip(), 128 + (signal.SIGTERM if issubclass(kind, Terminated) else signal.SIGINT))
    if not issubclass(kind, BrokenPipeError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def stoppable() -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Let the first Ctrl-C or SIGTERM be asked for, so that a loop can end well; the second ends the process at once.

    Yields a function that returns None, or what is to be raised when the loop is done.
    """
    asked: list[type[KeyboardInterrupt]] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping when this step is done and saved; the same again stops at once\n")

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]  # as in a nohup
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- progress ----


class Progress(tqdm):
    """A tqdm bar; without a terminal, a line every QUIET_SECONDS. Rate and time left are the run's mean."""

    def __init__(self, *args: Any, **options: Any):
        options.setdefault("smoothing", 0)
        options.setdefault("dynamic_ncols", True)
        options.setdefault("delay", 1)  # what is done within a second needs no bar
        options.setdefault("disable", rank() > 0)
        if not sys.stderr.isatty():
            quiet = dict.fromkeys(("mininterval", "maxinterval", "delay"), QUIET_SECONDS)
            options |= {"file": _Lines(), "ncols": 100} | quiet
        options.setdefault("miniters", 0)  # so that a bar that does not move may be drawn, with what it waits for
        super().__init__(*args, **options)

    @asynccontextmanager
    async def showing(self, words: Callable[[], str]) -> AsyncIterator[None]:
        """Show words behind the bar that are asked for once a second, while the body waits for others."""

        async def ask() -> None:
            while True:
                self.set_postfix_str(words())
                self.update(0)
                await asyncio.sleep(1)

        asking = asyncio.create_task(ask())
        try:
            yield
        finally:
            asking.cancel()
            self.set_postfix_str(words())

    def set_postfix_str(self, s: str = "", refresh: bool = False) -> None:
        """Set what stands behind the bar, shown with the next update."""
        super().set_postfix_str(s, refresh)


class _Lines:
    """The standard error stream for tqdm, whose movements of the cursor become lines."""

    last = ""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line and line != self.last:  # closing a bar shows it once more
            self.last = line
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing waits."""
