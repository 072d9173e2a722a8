"""The tests' tables of bad inputs, each given to a script as a user would: a part of `tools.torture`.

Each has to end with exit code 1 or 2 and one line on the error stream, within 20 s of work and 2 GB, and to leave all
files as they were.
"""

import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools import forked
from tools.fuzz import READERS

sys.path += [str(forked.ROOT / "tests"), str(forked.ROOT / "tests/scripts")]

from test_bad_arguments import REFUSED, SCRIPTS, WITH_A_MODEL
from test_bad_files import CASES

SECONDS, KILOBYTES = 20, 2_000_000  # at most
NOBODY = ["EXPLAINER=openai", "OPENAI_MODEL=m", "OPENAI_BASE_URL=http://127.0.0.1:9/v1"]
# For each reader the script that calls it, where its files lie in a RUN_DIR or by which constant, and more constants
USED_BY: dict[str, tuple[str, str, list[str]]] = {
    "params.json and weights": ("train", "MISTRAL_MODEL_PATH", []),
    "config.json, index and weights": ("explain", "MISTRAL_MODEL_PATH", []),
    "autoencoder": ("demo", "SAE_PATH", []),
    "completions.jsonl": ("explain", ".", NOBODY),
    "explanations.jsonl": ("explain", ".", ["TEXT=some words"]),
    "evaluation.json and metrics.jsonl": ("explain", ".", []),
    "state": ("train", "checkpoints", []),
}


class Input(NamedTuple):
    """A script, what it is given, and what is made of a RUN_DIR before."""

    name: str
    script: str
    arguments: list[str]
    prepare: Callable[[Path], object] = lambda run_dir: None


def inputs(count: int, place: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Give the scripts up to `count` of the inputs, drawn at random, and say what was wrong with what came of them."""
    forked.load("train", "explain", "demo")
    whole, run_dir = place / "whole", place / "run"
    given = [f"{name}={value}" for name, value in (sizes | {"RUN_DIR": run_dir}).items()]
    for script in ("train", "explain"):
        if os.waitpid(forked.start(script, given, place / "output"), 0)[1]:
            raise RuntimeError(Path(f"{place / 'output'}.err").read_text())
    run_dir.rename(whole)
    every = list(_of_arguments()) + list(_of_files(place))
    drawn = random.Random(0).sample(every, min(count, len(every)))
    seconds, kilobytes, codes, failed = {}, {}, Counter[int](), {}
    for number, each in enumerate(drawn, 1):
        shutil.copytree(whole, run_dir)
        each.prepare(run_dir)
        before = _contents(run_dir)
        seconds[each.name], kilobytes[each.name], code = _ended(each, given, place / "output")
        codes[code] += 1
        error = Path(f"{place / 'output'}.err").read_text(errors="replace")
        wrong = {
            f"exit code {code}": code not in (1, 2),
            f"said {error[-300:]!r}": not error.startswith("error: ") or error.count("\n") != 1,
            "changed files": _contents(run_dir) != before,
            f"{seconds[each.name]:.0f} s": seconds[each.name] > SECONDS,
            f"{kilobytes[each.name]} KB": kilobytes[each.name] > KILOBYTES,
        }
        if any(wrong.values()):
            failed[each.name] = [what for what, is_so in wrong.items() if is_so]
        shutil.rmtree(run_dir)
        if number % 50 == 0:
            print(f"{number} of {len(drawn)} inputs, {len(failed)} failed", flush=True)
    slowest, largest = max(seconds, key=seconds.__getitem__), max(kilobytes, key=kilobytes.__getitem__)
    return {
        "inputs": len(drawn),
        "by exit code": dict(sorted(codes.items())),
        "slowest": {"seconds of a core": round(seconds[slowest], 1), "input": slowest},
        "largest": {"MB": kilobytes[largest] // 1000, "input": largest},
        "failed": failed,
    }


def _of_arguments() -> Iterator[Input]:
    for script in SCRIPTS:
        for argument in (*REFUSED, *WITH_A_MODEL):
            yield Input(f"{script} {argument[:60]!a}", script.removesuffix(".py"), [argument])


def _of_files(place: Path) -> Iterator[Input]:
    for number, (reader, file, what, edit) in enumerate(CASES):
        if reader not in USED_BY:  # which no script reads before its work is done
            continue
        script, where, arguments = USED_BY[reader]

        def prepare(run_dir: Path, number=number, reader=reader, file=file, edit=edit, where=where) -> None:
            folder = place / f"input {number}" if where.isupper() else run_dir / where
            if where == "checkpoints":  # or a whole one would be used
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            READERS[reader].write(folder)
            if where == "checkpoints":
                (folder / file).rename(folder / "step-60.safetensors")
                file = "step-60.safetensors"
            (folder / file).write_bytes(edit((folder / file).read_bytes()))

        given = [f"{where}={place / f'input {number}'}"] if where.isupper() else []
        yield Input(f"{script}.py {file}: {what}", script, [*given, *arguments], prepare)


def _ended(each: Input, given: list[str], output: Path) -> tuple[float, int, int]:
    """Seconds of a core, largest memory in KB and exit code of a script with an input; it is stopped where it hangs."""
    pid = forked.start(each.script, [*given, *each.arguments], output, lambda: signal.alarm(10 * SECONDS))
    _, status, usage = os.wait4(pid, 0)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status)


def _contents(run_dir: Path) -> dict[str, bytes]:
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in files}
