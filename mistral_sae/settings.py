"""Constants that the command line can set for one run: `python train.py K=64 SEED=1`."""

import ast
import difflib
import inspect
import math
import os
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
        SettingsError: an argument is not `NAME=value`, the name is unknown, a value, given or in the file, is not of
            the constant's type (its annotation or else its default's), another constant cannot follow it, or the
            environment has a constant that is not read from there.
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
            for name in names:
                setattr(module, name, _value(name, values.get(name), statement, module))
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


def _value(name: str, argument: str | None, statement: ast.stmt, module: ModuleType) -> Any:
    """The constant that a statement has just set, or what the argument for it says, as one of its types."""
    annotation, value = getattr(statement, "annotation", None), getattr(module, name)
    kinds: tuple[type, ...] = (type(value),)
    if annotation is not None:
        allowed = eval(ast.unparse(annotation), module.__dict__)
        kinds = (allowed,) if isinstance(allowed, type) else allowed.__args__
        value = _typed(name, value, kinds)  # whoever edits the file may be mistaken, too
    in_environment = f"os.environ.get('{name}'" in ast.unparse(statement)  # its default is there
    if argument is not None:
        return _given(name, argument, kinds, empty_is_none=in_environment)
    if name in os.environ and not in_environment:  # a budget that is not kept costs money
        raise SettingsError(
            f"found {name} in the environment, where it is not looked for: "
            f"give it after the script's name, {name}=..., or unset it"
        )
    return value


def _given(name: str, text: str, kinds: tuple[type, ...], *, empty_is_none: bool) -> Any:
    """What an argument says, as one of the constant's types; a string needs no quotes."""
    if text == "" and type(None) in kinds:
        if empty_is_none:
            return None
        raise SettingsError(f"{name} is empty: give it a value, or {name}=None")  # as after a misspelt shell variable
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # whatever else the text may be
        value = text
    try:
        return _typed(name, value, kinds)
    except SettingsError:
        if str in kinds:
            return text
        raise _of_another_type(name, text, kinds) from None


def _typed(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """A value as one of the constant's types: 1 may stand for 1.0 or True, and 1e6 for a million."""
    if type(value) in kinds:
        return value
    if bool in kinds and type(value) is int and value in (0, 1):
        return bool(value)
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    raise _of_another_type(name, value, kinds)


def _of_another_type(name: str, found: Any, kinds: tuple[type, ...]) -> SettingsError:
    expected = " or ".join("nothing (None)" if kind is type(None) else kind.__name__ for kind in kinds)
    return SettingsError(f"{name} must be of type {expected}: found {found!r}")


def are_rising(values: tuple | list) -> bool:
    """Whether a constant is numbers above 0, from small to large."""
    numbers = bool(values) and all(type(value) in (int, float) and 0 < value < math.inf for value in values)
    return numbers and list(values) == sorted(values)


def begin(script: str, *modules: ModuleType) -> None:
    """Set the constants from the command line and print a script's first line: which model it runs.

    Called before torch is imported, so that a script answers at once. A bad setting or model folder ends it here. From
    here on lines appear as they are printed, in a pipe too, and Ctrl-C ends the script with one line.
    """
    # OpenMP's threads that wait for others spin for less long before they sleep: beside another process, spinning takes
    # time from those that work
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
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


def run(main: Callable[[], None], bad_input: tuple[type[Exception], ...], out_of_memory: str) -> None:
    """Run a script's `main`, then exit: 0 done, 1 failed, 2 bad configuration. Mistakes of the user's get one line.

    `out_of_memory` says which constants to lower where the device's memory does not suffice.
    """
    import torch  # as main's modules have

    try:
        main()
    except torch.OutOfMemoryError:
        fail(f"the device is out of memory: lower {out_of_memory}", code=1)
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
