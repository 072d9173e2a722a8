"""A script in a fork of this process, which has the imports behind it."""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent


def start(script: str, arguments: Sequence[str], output: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """The process id of a fork that runs `prepare`, then train, explain or demo; what it prints goes into two files.

    These are `output`, and with .err at its end what is for the error stream.
    """
    pid = os.fork()
    if not pid:
        run(script, arguments, output, prepare)
    return pid


def run(script: str, arguments: Sequence[str], output: Path, prepare: Callable[[], object]) -> NoReturn:
    """Run a script and end with it, as `start` does in a fork."""
    code = 1
    try:
        for number, path in ((1, output), (2, Path(f"{output}.err"))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
        prepare()
        sys.argv = [f"{script}.py", *arguments]
        code = _run(script)
    finally:
        os._exit(code)


def load(*scripts: str) -> None:
    """Import what scripts need, once for all forks."""
    for script in scripts:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="imported")


def _run(script: str) -> int:
    try:
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except (Exception, KeyboardInterrupt) as error:  # as Python would say it
            sys.excepthook(type(error), error, error.__traceback__)  # which may exit
            return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
