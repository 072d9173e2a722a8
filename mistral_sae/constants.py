"""The constants of config.py: set by NAME=value arguments, checked against their types, listed by --help."""

import ast
import difflib
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from mistral_sae.cli import STANDIN_NAME, UserError, begin, expect, fail, one_line, printable, quoted

One = TypeVar("One")
CONSTANT = re.compile(r"([A-Z_]+): .*?(?:  # (.*))?$")  # a line of config.py, with its comment
OneOrMore = Annotated[One, "or a list"]  # of a constant that may be a list of values, of which a run takes each


# ---- a script's first line ----


def start(script: str, config: ModuleType) -> None:
    """Set the constants from the command line and print a script's first line, before torch is imported.

    With --help among the arguments the constants are printed instead, as the other arguments set them.
    """
    begin()
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--help", "-h")]
    try:
        override(arguments, config)
    except UserError as error:
        fail(error, error.exit_code)
    if len(arguments) < len(sys.argv) - 1:
        print(*described(config, script), sep="\n")
        sys.exit(0)
    print(f"{script}: {printable(config.MISTRAL_MODEL_PATH or '') or f'{STANDIN_NAME} (not Mistral 7B)'}")


def described(config: ModuleType, script: str) -> Iterator[str]:
    """The constants that a script reads, line by line: by group, each with its value and its comments in config.py.

    A group that names scripts in its title is read by these, another one by all.
    """
    yield f"usage: python {script}.py [NAME=value ...], as in: python {script}.py SEED=1"
    title, shown, comments = "", "", list[str]()
    for line in inspect.getsource(config).splitlines():
        if group := re.fullmatch("# ---- (.*) ----", line):
            title = group[1]
        elif line.startswith("# "):
            comments.append(line[2:])
            continue
        elif (constant := CONSTANT.match(line)) and (f"{script}.py" in title or ".py" not in title):
            if title != shown:
                yield f"\n{title}"
            shown, value = title, getattr(config, constant[1])
            yield f"  {constant[1]}={'...' if value and 'KEY' in constant[1] else quoted(value)}"
            words = ". ".join(filter(None, [" ".join(comments), constant[2]]))
            yield from textwrap.wrap(words, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
        comments = []


# ---- values ----


def path_of(name: str, value: str | None) -> Any:
    """A constant that is a path or a name, with its ~ as a folder; UserError for one that can be neither."""
    if value is None:
        return None
    expect(name, value, value.strip(), "a path or a name")
    expect(name, value, "\0" not in value and max(map(len, os.fsencode(value).split(b"/"))) < 256, "a shorter path")
    try:
        return os.path.normpath(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:
        raise UserError(f"{name} is {quoted(value)}: expected a user of this machine after ~") from None


def words_of(text: str) -> list[str]:
    """The distinct words of a constant that lists some, between spaces or commas."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        return False


def override(arguments: list[str], config: ModuleType) -> None:
    """Set constants of a module, the annotated names at its top level, from NAME=value arguments.

    The module runs again with the given values in their places, so what is computed from a constant follows it, and
    then its `check`. Raises UserError for an argument that is no NAME=value, an unknown name, a value (given, or of the
    file or the environment) that is not of the annotated type or not text, and whatever `check` raises.
    """
    for argument in arguments:
        if "=" not in argument:
            raise UserError(f"expected NAME=value, as in SEED=1 (--help lists all): found {quoted(argument)}")
    given = {name.strip(): value for name, _, value in (argument.partition("=") for argument in arguments)}
    constants = config.__annotations__
    for name in given:
        if name not in constants:
            (close,) = difflib.get_close_matches(name.upper(), sorted(constants), n=1, cutoff=0.0)
            raise UserError(f"there is no constant {one_line(name)}: the closest is {close} (--help lists all)")
    shown = " ".join(f"{key}={quoted(text)[1:-1]}" for key, text in given.items() if "KEY" not in key)
    scope, file = vars(config), str(config.__file__)
    scope["_arguments"] = arguments  # for `variants`
    for statement in ast.parse(inspect.getsource(config)).body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as default):
                kinds = _kinds(constants[name])
                if name in given:
                    scope[name] = _parsed(name, given[name], kinds)
                else:
                    try:
                        value = eval(compile(ast.Expression(default), file, "eval"), scope)
                    except (ArithmeticError, ValueError) as error:  # as of a division or a root
                        raise UserError(f"{name} cannot be computed with {shown}: {error}") from None
                    scope[name] = _typed(name, value, kinds)
                # Of another encoding Python keeps halves of characters
                if isinstance(text := scope[name], str) and text.encode(errors="replace").decode() != text:
                    raise UserError(f"found {name} in another encoding: expected text in UTF-8")
            case _:
                exec(compile(ast.Module([statement], []), file, "exec"), scope)
    config.check()


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
