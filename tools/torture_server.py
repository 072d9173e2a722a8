"""explain.py against a server at fault, killed on the way: a part of `tools.torture`.

The server is that of the tests: a fifth of its replies are errors, broken connections, refusals or cut short, by chance
but the same in each run. What comes out is compared with a run on a server without a fault.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from mistral_sae.explain.labels import read_labels
from mistral_sae.explain.types import Label

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests/explain"), str(ROOT / "tests/scripts")]

from explain_runs import name_of, openai  # noqa: E402
from forks import ENVIRONMENT  # noqa: E402
from openai_server import LASTING, TRANSIENT, TRUNCATED, Served, Server, random_faults  # noqa: E402

FAULTS, KILLS, AT_ONCE = 0.2, 5, 16
CALLS_A_FEATURE = 23  # about
LASTED = {"refusal": "refused", "filter": "filtered", "filter-400": "filtered", "overflow": "overflow"}


def server(count: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """Explain features in about `count` calls, and count what is lost, doubled, mislabelled or paid twice."""
    with tempfile.TemporaryDirectory() as place:
        run_dir = Path(place) / "run"
        features = max(5, count // CALLS_A_FEATURE)
        given = sizes | {"RUN_DIR": run_dir, "DATA_PATH": "stdlib", "SELECT": f"random {features}", "D_HIDDEN": 1024}
        given |= {"EXPLAIN_TOKENS": 40_000, "EXPLAINER": "openai"}
        subprocess.run([sys.executable, "train.py", *_arguments(given)], cwd=ROOT, check=True, capture_output=True)
        changed = {
            "REQUEST_TIMEOUT": 1,
            "MAX_FAILED_SHARE": 1.0,
            "CONCURRENCY": AT_ONCE,
            "SCORERS": "detection fuzzing",
        }

        with Server(reply) as faultless:
            _end(_start(given | openai(faultless, **changed, OPENAI_MODEL="without-faults")))
        truth = {label.feature: label for label in read_labels(run_dir / "explanations.jsonl").values()}
        calls = len(faultless.log)

        with Server(reply, random_faults(FAULTS, TRANSIENT + TRUNCATED + LASTING, seed=0)) as faulty:
            killed = 0
            for kill in range(1, KILLS + 1):
                run = _start(given | openai(faulty, **changed))
                while run.poll() is None and len(faulty.log) < kill * calls / (KILLS + 1):
                    time.sleep(0.002)
                killed += run.poll() is None
                run.kill()
                run.communicate()
            _end(_start(given | openai(faulty, **changed)))
        lines = (run_dir / "explanations.jsonl").read_text().splitlines()
        numbers = Counter(json.loads(line)["feature"] for line in lines)
        labels = read_labels(run_dir / "explanations.jsonl")
        asked = {name_of(each.body["messages"]): each.body["messages"][1]["content"] for each in faulty.log}
        outcomes: dict[str, set[str]] = {}
        for each in faulty.log:
            outcomes.setdefault(each.body["messages"][1]["content"], set()).add(each.outcome)
        wrong = [f for f, label in labels.items() if not _agrees(label, truth[f], asked, outcomes)]
    paid = Counter(json.dumps(each.body, sort_keys=True) for each in faulty.log if _is_answer(each))
    return {
        "features": len(truth),
        "calls": len(faulty.log),
        "of them faults": sum(each.outcome != "ok" for each in faulty.log),
        "kills": killed,
        "lost": len(truth.keys() - labels.keys()),
        "doubled": sum(n - 1 for n in numbers.values()),
        "mislabelled": len(wrong),
        "of a smaller prompt": sum(label.explanation not in ("", truth[f].explanation) for f, label in labels.items()),
        "paid twice": sum(n - 1 for n in paid.values()),
        "at most in flight at the kills": killed * AT_ONCE,
        "statuses": dict(Counter(label.status for label in labels.values())),
    }


def reply(messages: list[dict[str, str]]) -> str:
    """An explanation that names its prompt, and of each passage a verdict that hangs on its words alone."""
    asked = messages[1]["content"]
    if '"pattern"' in asked:
        return json.dumps({"pattern": "...", "explanation": f"{name_of(messages)}: some tokens"})
    passages = re.findall(r'^([a-z]{3}): "(.*)"$', asked, re.MULTILINE)
    return json.dumps({"answers": [{"id": id, "answer": zlib.crc32(text.encode()) % 2 == 0} for id, text in passages]})


def _is_answer(each: Served) -> bool:
    """Whether a reply was one that nobody should ask for again: all of it, and it came over."""
    return each.outcome == "ok" or each.outcome in LASTING


def _agrees(found: Label, true: Label, asked: dict[str, str], outcomes: dict[str, set[str]]) -> bool:
    """Whether a label is of its own feature's prompt, or has the status of what that prompt met.

    Where the prompt was too long for the server, a smaller one was sent, of some of the same passages.

    Args:
        asked: what was asked, by the name in the reply.
        outcomes: what each request met.
    """
    own = asked[_named(true)]
    if found.status != "ok":
        return found.status in {LASTED.get(outcome) for outcome in outcomes[own]}
    name, verdicts = _named(found), {each[:4]: each.verdict for each in true.judgements}
    is_smaller = "overflow" in outcomes[own] and _passages(asked[name]) < _passages(own)
    is_own = name == _named(true) or is_smaller
    return is_own and all(each.verdict in (None, verdicts[each[:4]]) for each in found.judgements)


def _named(label: Label) -> str:
    return label.explanation.partition(":")[0]


def _passages(asked: str) -> set[str]:
    return set(re.findall(r"^\d+\. (.*)$", asked, re.MULTILINE))


def _arguments(constants: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in constants.items()]


def _start(constants: dict[str, Any]) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return subprocess.Popen(
        [sys.executable, "explain.py", *_arguments(constants)],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _end(run: subprocess.Popen) -> None:
    out, err = run.communicate(timeout=600)
    if run.returncode:
        raise RuntimeError(f"ended with {run.returncode}: {out[-1000:]}{err[-2000:]}")
