"""Constants that the command line can set for one run: `python train.py K=64 SEED=1`."""

import ast
import difflib
import inspect
import math
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from mistral_sae import lm


class SettingsError(ValueError):
    """A setting that does not exist or has the wrong type: one line that says what was expected."""


def override(arguments: list[str], *modules: ModuleType) -> None:
    """Set constants of `modules` from `NAME=value` arguments.

    The constants are the upper-case names assigned at the top level of a module. Their assignments are run again in
    the order of the file, each given value in its place, so that what is computed from a constant follows it.

    Raises:
        SettingsError: an argument is not `NAME=value`, the name is unknown, the value is not of its type (that of the
            annotation if the constant has one, else that of its default), or another constant cannot follow it.
    """
    values = dict(_split(argument) for argument in arguments)
    known: set[str] = set()
    for module in modules:
        for statement in ast.parse(inspect.getsource(module)).body:
            names = _assigned(statement)
            if not names:
                continue
            known |= set(names)
            try:
                exec(compile(ast.Module([statement], []), module.__file__, "exec"), module.__dict__)
            except (ArithmeticError, ValueError) as error:
                given = " ".join(argument for argument in arguments if "KEY" not in argument.partition("=")[0])
                raise SettingsError(f"{names[0]} cannot be computed with {given}: {error}") from None
            for name in set(names) & set(values):
                annotated = isinstance(statement, ast.AnnAssign)
                annotation = eval(ast.unparse(statement.annotation), module.__dict__) if annotated else None
                setattr(module, name, _typed(name, values[name], getattr(module, name), annotation))
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.0)
            raise SettingsError(
                f"there is no constant {name}: the closest is {close[0]} (all are in config.py or demo.py)"
            )


def _split(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not equals:
        raise SettingsError(f"expected NAME=value, as in SEED=1: found {argument!r}")
    return name.strip(), value


def _assigned(statement: ast.stmt) -> list[str]:
    """The upper-case names that a top-level statement assigns."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    else:
        return []
    return [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()]


def _typed(name: str, text: str, default: Any, annotation: Any) -> Any:
    """`text` as a value of the constant's type; a string needs no quotes."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # whatever else the text may be
        value = text
    allowed = annotation if annotation is not None else type(default)
    kinds = allowed if isinstance(allowed, type) else getattr(allowed, "__args__", None)
    kinds = (kinds,) if isinstance(kinds, type) else kinds
    if text == "" and type(None) in kinds:
        return None
    if bool in kinds and value in (0, 1, "true", "false"):
        return value in (1, "true")
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if type(value) is float and int in kinds and float not in kinds and value.is_integer():
        return int(value)  # 1e6
    if type(value) in kinds and not (isinstance(value, bool) and bool not in kinds):
        return value
    if str in kinds:
        return text
    expected = " or ".join("nothing (None)" if k is type(None) else k.__name__ for k in kinds)
    raise SettingsError(f"{name} must be of type {expected}, like its default {default!r}: found {text!r}")


def is_number(value: Any, *kinds: type) -> bool:
    """Whether a constant is a finite number, of these kinds."""
    return isinstance(value, kinds or (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def are_rising(values: Any) -> bool:
    """Whether a constant is a tuple or list of numbers above 0, from small to large."""
    if not isinstance(values, tuple | list) or not values or not all(map(is_number, values)):
        return False
    return list(values) == sorted(values) and values[0] > 0


def begin(script: str, *modules: ModuleType) -> None:
    """Set the constants from the command line and print a script's first line: which model it runs.

    Called before torch is imported, so that a script answers at once. A bad setting or model folder ends it here. From
    here on lines appear as they are printed, in a pipe too, and Ctrl-C ends the script with one line.
    """
    sys.stdout.reconfigure(line_buffering=True)
    sys.excepthook = _report
    try:
        override(sys.argv[1:], *modules)
        path = modules[0].MISTRAL_MODEL_PATH
        spec = lm.inspect(path or lm.STANDIN)
    except ValueError as error:
        fail(error, code=2)
    name = (
        "the bundled stand-in, a tiny Mistral that has read nothing but Python (not Mistral 7B)"
        if path is None
        else path
    )
    print(
        f"{script}: {name} · {spec.n_layers} layers, width {spec.d_model}, {spec.parameters() / 1e6:,.1f}M parameters"
    )


def run(main: Callable[[], None], bad_input: tuple[type[Exception], ...]) -> None:
    """Run a script's `main`, then exit: 0 done, 1 failed, 2 bad configuration. Mistakes of the user's get one line."""
    try:
        main()
    except bad_input as error:
        fail(error, code=2)
    except Failed as error:
        fail(error, code=1)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(error, code=1)


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python does with an exception that nobody caught, but for Ctrl-C, which may strike during imports too."""
    if issubclass(kind, KeyboardInterrupt):
        fail("stopped", code=1)
    sys.__excepthook__(kind, error, traceback)


class Failed(RuntimeError):
    """A run that could not end well, for a reason that is said in one line."""


def fail(error: Exception | str, code: int) -> NoReturn:
    """Print one line and exit."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
