"""What the three scripts share with the shell: NAME=value arguments, progress, one-line errors and exit codes."""

import ast
import asyncio
import difflib
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from itertools import product
from pathlib import Path
from types import FrameType, GenericAlias, ModuleType, TracebackType
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

from rich import filesize
from tqdm import tqdm

One = TypeVar("One")
OneOrMore = Annotated[One, "or a list"]  # of a constant that may be a list of values, of which a run takes each
STANDIN = "the bundled stand-in, a tiny Mistral that has read nothing but Python"  # what the scripts call it
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


# ---- constants ----


def expect(name: str, value: Any, good: Any, expected: str) -> None:
    """Raise UserError that names a constant, its value and what was expected, unless `good`."""
    if not good:
        raise UserError(f"{name} is {quoted(value)}: expected {expected}")


def path_of(name: str, value: str | None) -> Any:
    """A constant that is a path or a name, with its ~ as a folder; UserError for one that can be neither."""
    if value is None:
        return None
    expect(name, value, value.strip(), "a path or a name")
    expect(name, value, "\0" not in value and max(map(len, value.encode().split(b"/"))) < 256, "a shorter path")
    try:
        return os.path.normpath(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:
        raise UserError(f"{name} is {quoted(value)}: expected a user of this machine after ~") from None


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        return False


def quoted(value: Any) -> str:
    """A value as it would be written, cut where it gets long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 200 else text[:200] + "..."


def override(arguments: list[str], config: ModuleType) -> None:
    """Set constants of a module, the annotated names at its top level, from NAME=value arguments.

    The module runs again with the given values in their places, so what is computed from a constant follows it, and so
    do the checks at its foot. Raises UserError for an argument that is no NAME=value, an unknown name, a value (given,
    or in the file) that is not of the annotated type, and whatever the module's own checks raise.
    """
    for argument in arguments:
        if "=" not in argument:
            raise UserError(f"expected NAME=value, as in SEED=1: found {quoted(argument)}")
        if argument.encode(errors="replace").decode() != argument:  # Python keeps other bytes as halves of characters
            raise UserError(f"found {quoted(argument)}: expected text in UTF-8")
    given = {name.strip(): value for name, _, value in (argument.partition("=") for argument in arguments)}
    constants = config.__annotations__
    for name in given:
        if name not in constants:
            (close,) = difflib.get_close_matches(name.upper(), sorted(constants), n=1, cutoff=0.0)
            raise UserError(f"there is no constant {one_line(name)}: the closest is {close} (all are in config.py)")
    scope, file = vars(config), str(config.__file__)
    scope["_arguments"] = arguments  # for `variants`
    for statement in ast.parse(inspect.getsource(config)).body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as default):
                kinds = _kinds(constants[name])
                if name in given:
                    scope[name] = _parsed(name, given[name], kinds)
                    continue
                try:
                    value = eval(compile(ast.Expression(default), file, "eval"), scope)
                except (ArithmeticError, ValueError) as error:  # as of a division or a root
                    shown = " ".join(f"{key}={quoted(text)[1:-1]}" for key, text in given.items() if "KEY" not in key)
                    raise UserError(f"{name} cannot be computed with {shown}: {error}") from None
                scope[name] = _typed(name, value, kinds)
            case _:
                exec(compile(ast.Module([statement], []), file, "exec"), scope)


def variants(config: ModuleType, names: Mapping[str, str]) -> dict[str, ModuleType]:
    """The module itself, by ""; or where constants are lists one like it for each combination of their values.

    The key of each is made of the values that vary, in the order of `names`, which has a word for each constant that
    may be a list. What is computed from a constant follows its value. Raises what `override` does.
    """
    lists = {name: value for name in names if isinstance(value := getattr(config, name), list)}
    if not lists:
        return {"": config}
    found = {}
    for values in product(*lists.values()):
        module = ModuleType(config.__name__)
        vars(module).update(vars(config))
        here = [f"{name}={value!r}" for name, value in zip(lists, values, strict=True)]
        override([*vars(config).get("_arguments", []), *here], module)
        words = [f"{names[name]}{value}" for name, value in zip(lists, values, strict=True) if len(lists[name]) > 1]
        found["-".join(words)] = module
    return found


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    if get_origin(annotation) is Annotated:  # OneOrMore
        single = _kinds(get_args(annotation)[0])
        return *single, GenericAlias(list, single[:1])
    return get_args(annotation) or (annotation,)


def _parsed(name: str, text: str, kinds: tuple[type, ...]) -> Any:
    """What an argument says, as one of the constant's types; a string needs no quotes."""
    if text == "" and type(None) in kinds:  # as after a misspelt shell variable: a budget must not get lost
        raise UserError(f"{name} is empty: give it a value, or {name}=None")
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    if list[str] in kinds and re.fullmatch(r"\[[\w\s,]*\]", text):  # which needs none in a list, either
        return text[1:-1].replace(",", " ").split()
    try:
        return _typed(name, literal(text), kinds, found=text)
    except UserError:
        if str in kinds:
            return text
        raise


def literal(text: str) -> Any:
    """The value that a text is the Python literal of, or else the text itself."""
    try:
        value = ast.literal_eval(text)
        repr(value)  # not of numbers of thousands of digits
        return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # whatever else the text may be
        return text


def _typed(name: str, value: Any, kinds: tuple[type, ...], found: Any = None) -> Any:
    """A value as one of the constant's types: 1 may stand for 1.0 or True, and 1e6 for a million."""
    if type(value) in kinds:
        return value
    if bool in kinds and type(value) is int and value in (0, 1):
        return bool(value)
    if float in kinds and type(value) is int and value.bit_length() < 1024:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, list) and (parts := [get_args(kind) for kind in kinds if get_origin(kind) is list]):
        return [_typed(name, each, parts[0]) for each in value]
    expected = " or ".join("nothing (None)" if kind is type(None) else kind.__name__ for kind in kinds)
    raise UserError(f"{name} must be of type {expected}: found {quoted(value if found is None else found)}")


# ---- a script's beginning and end ----


def start(script: str, config: ModuleType) -> None:
    """Set the constants from the command line and print a script's first line, before torch is imported.

    From here on lines appear as they are printed, in a pipe too, and Ctrl-C and SIGTERM end the script with one line.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # idle threads of OpenMP sleep sooner: spinning slows the others
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # whatever the terminal's encoding
    sys.excepthook = _report
    signal.signal(signal.SIGTERM, _terminate)
    try:
        override(sys.argv[1:], config)
    except UserError as error:
        fail(error, error.exit_code)
    print(f"{script}: {printable(config.MISTRAL_MODEL_PATH or '') or f'{STANDIN} (not Mistral 7B)'}")


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
    """Say of Ctrl-C, which may strike during imports too, one line; of other exceptions what Python says."""
    if issubclass(kind, KeyboardInterrupt):
        fail(f"stopped {error}".strip(), 128 + (signal.SIGTERM if issubclass(kind, Terminated) else signal.SIGINT))
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
