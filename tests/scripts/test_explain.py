"""explain.py from end to end, on a small random model, a small autoencoder, a small corpus and a local server.

A run happens in a process of its own where the process matters (signals, the streams), and else in this one, which
spares it the imports. The server's replies are functions of the messages, so that a label says which prompt it is of.
"""

import base64
import gc
import gzip
import itertools
import json
import keyword
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PARAMS, random_weights, write_hugging_face_folder
from openai_server import LASTING, TRANSIENT, TRUNCATED, Raw, Server, random_faults

import config
from mistral_sae.cli import override
from mistral_sae.explain.client import Client
from mistral_sae.explain.journal import Tokens
from mistral_sae.explain.labels import from_json
from mistral_sae.explain.scoring import balanced_accuracy
from mistral_sae.files import locked
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, save_sae

ROOT = Path(__file__).parent.parent.parent
FEATURES = 64
CHOSEN = [3, 11, 17, 29, 40, 58]
KEY = "sk-secret-0123456789abcdef"
SETTINGS = {
    "DEVICE": "cpu",
    "CONTEXT_LENGTH": 32,
    "HELD_OUT_FRACTION": 0.1,
    "EXPLAIN_TOKENS": 3100,
    "EXPLAIN_STRIDE": 1,
    "TOKENS_BEFORE": 8,
    "TOKENS_AFTER": 3,
    "ROWS_PER_FORWARD": 8,
    "SELECT": str(CHOSEN),
}
OPENAI = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "MISTRAL_MODEL_PATH")
BAR = re.compile(r"((explaining|scoring|report): +)?\d+%\|")


# ---- runs ----


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def problems(self):
        """What there is on the error stream besides progress bars."""
        pieces = [piece.strip() for piece in re.split(r"[\r\n]", self.err)]
        return [piece for piece in pieces if piece and not BAR.match(piece)]


def write_sae(folder, d_model=32, layer=1, seed=0):
    """An autoencoder as it begins: random, and alive all over."""
    sae = SparseAutoencoder(d_model, FEATURES, 4)
    sae.initialize(torch.randn(256, d_model, generator=torch.Generator().manual_seed(seed)), seed)
    save_sae(folder, sae, Metadata("tiny", f"blocks.{layer}.hook_resid_post", layer, True, 32, None))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of 120 documents of some words that come again and again: lines of JSON, and a text file."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    documents = [" ".join(chance.choices(keyword.kwlist, k=60)) for _ in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (folder / "b.txt").write_text("A plain text. " * 20)
    return folder


@pytest.fixture(scope="module")
def arguments(mistral_folder, corpus):
    """NAME=value of a run of a second, changed by keywords."""

    def of(run_dir, **changed):
        constants = {"MISTRAL_MODEL_PATH": mistral_folder, "DATA_PATH": corpus, "RUN_DIR": run_dir}
        return [f"{name}={value}" for name, value in (constants | SETTINGS | changed).items()]

    return of


def process(arguments, code=None):
    """explain.py, or `code` that runs it, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *(["explain.py"] if code is None else ["-c", code]), *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in OPENAI} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=60)
    return Ran(process.returncode, out, err)


@pytest.fixture
def here(run_script, quick_retries):
    """Run explain.py in this process."""
    return lambda arguments: Ran(*run_script("explain.py", arguments))


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder and the output of an offline run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    write_sae(run_dir / "sae")
    return run_dir, ended(process(arguments(run_dir)))


@pytest.fixture
def run_dir(finished, tmp_path):
    """A folder with the autoencoder and the examples of the finished run, and no labels."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "explanations.jsonl").unlink()
    (folder / "report.html").unlink()
    return folder


def labels_of(run_dir):
    return [from_json(line) for line in (run_dir / "explanations.jsonl").read_text().splitlines()]


def contents_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_refused(ran, said, code=2):
    assert ran.code == code
    assert len(ran.problems) == 1, ran.err
    assert ran.problems[0].startswith("error: ")
    assert said in ran.problems[0]
    assert "Traceback" not in ran.out


# ---- the server's side ----


def reply(messages):
    """An explanation that names its prompt, and verdicts by a rule of its own on each passage."""
    asked = messages[1]["content"]
    if '"pattern"' in asked:
        listed = " ".join(line for line in asked.splitlines() if line.startswith("   active: "))
        _, token = max((int(level), token) for token, level in re.findall(r'"((?:[^"\\]|\\.)*)" (\d+)', listed))
        return json.dumps({"pattern": "…", "explanation": f"{name_of(messages)}: the token {token.strip()}"})
    explanation = json.loads(re.search(r'of the feature: (".*")$', asked, re.MULTILINE)[1])
    token = explanation.split("the token ")[1].strip('" ')
    if "one token a line" in asked:
        positions = [int(n) for n, text in re.findall(r'^(\d+) "(.*)"$', asked, re.MULTILINE) if text.strip() == token]
        return json.dumps({"active": [{"position": n, "activation": 10} for n in positions]})
    passages = re.findall(r'^([a-z]{3}): "(.*)"$', asked, re.MULTILINE)
    held = [(id, f"«{token}" in text.replace("« ", "«") if "«" in text else token in text) for id, text in passages]
    return json.dumps({"answers": [{"id": id, "answer": answer} for id, answer in held]})


def name_of(messages):
    return f"prompt {zlib.crc32(messages[1]['content'].encode()):08x}"


def openai(server, **changed):
    """Settings of a run that asks the server."""
    url = server if isinstance(server, str) else server.url
    fixed = {"OPENAI_MODEL": "test-model", "REQUEST_TIMEOUT": 20, "CONCURRENCY": 8}
    fixed |= {"PROMPT_DOLLARS": 0.15, "COMPLETION_DOLLARS": 0.6}
    return {"OPENAI_BASE_URL": url, "SCORERS": "detection fuzzing simulation"} | fixed | changed


def journal_of(run_dir):
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_bytes().splitlines(keepends=False)]


@pytest.fixture(scope="module")
def served(finished, arguments, tmp_path_factory):
    """The folder, the output and the number of requests of a run against a server without faults."""
    folder = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(finished[0], folder)
    with Server(reply) as server:
        ran = ended(process(arguments(folder, **openai(server))))
    return folder, ran, len(server.log)


# ---- offline ----


def test_an_offline_run_writes_a_label_of_each_selected_feature_and_the_report(finished):
    run_dir, ran = finished
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in (run_dir / "explanations.jsonl").read_text().splitlines()]
    assert [record["feature"] for record in records] == CHOSEN
    for record in records:
        assert {"feature", "explanation", "explainer", "scores", "status", "judgements"} <= set(record)
        assert record["explainer"] == "offline"
        assert record["status"] in ("ok", "no pattern", "dead")
        assert bool(record["explanation"]) == (record["status"] == "ok")
    scored = [record["scores"]["detection"] for record in records if record["status"] == "ok"]
    assert len(scored) >= 3
    assert all({"value", "low", "high", "other_feature", "top_token"} <= set(score) for score in scored)
    assert any(score["value"] is not None for score in scored)
    assert "feature" in (run_dir / "report.html").read_text()
    names = {"explanations.jsonl", "report.html", "activations/manifest.json", "activations/00000.safetensors"}
    assert {name for name in contents_of(run_dir) if not name.startswith("sae/")} == names


def test_the_output_says_what_runs_and_where_the_results_are(finished, mistral_folder):
    run_dir, ran = finished
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"explain: {mistral_folder}")
    for line in (
        "layer     1 of 0 to 2 (blocks.1.hook_resid_post)",
        f"features  64 of {run_dir / 'sae'}",
        "explainer offline: counting, without a model, since neither OPENAI_API_KEY nor OPENAI_BASE_URL is set",
        f"labels    {run_dir / 'explanations.jsonl'}",
        f"report    {run_dir / 'report.html'}",
    ):
        assert line in lines
    assert any(line.startswith("6 features: ") for line in lines)


@pytest.mark.parametrize(
    ("documents", "constants", "advice"),
    [
        (1, {}, "use text of more files, or a .jsonl with a document a line"),
        (300, {"EXPLAIN_STRIDE": 50}, "lower EXPLAIN_STRIDE, by which 49 of 50 rows are left out"),
        (300, {"EXPLAIN_TOKENS": 300}, "raise EXPLAIN_TOKENS"),
    ],
)
def test_few_documents_are_said_to_give_few_examples(here, arguments, run_dir, tmp_path, documents, constants, advice):
    text = "def area(self):\n    return self.width * self.height\n" * max(2, 300 // documents)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": text}) + "\n") * documents)
    constants |= {"DATA_PATH": tmp_path / "a.jsonl", "HELD_OUT_FRACTION": 0.0001}
    ran = here(arguments(run_dir, **({"EXPLAIN_TOKENS": 40_000} | constants)))
    assert re.search(
        rf"warning: found \d+ documents to explain from and \d+ to score on, .*: {re.escape(advice)}\n", ran.out
    )


def test_a_short_run_leaves_the_error_stream_empty(finished):
    assert finished[1].err == ""


def test_a_second_run_reads_no_text_and_says_the_same(here, arguments, finished, run_dir):
    ran = here(arguments(run_dir))
    assert ran.code == 0, ran.err
    assert f"\ncache     {run_dir / 'activations'}: 3,0" in ran.out  # tokens, without each row's BOS
    assert "reading" not in ran.out
    assert (run_dir / "explanations.jsonl").read_bytes() == (finished[0] / "explanations.jsonl").read_bytes()


@pytest.mark.parametrize(
    "changed", [{"TOKENS_BEFORE": 2}, {"TOKENS_AFTER": 2}, {"EXAMPLES_PER_INTERVAL": 1}, {"SELECT": "0-9"}]
)
def test_other_examples_and_other_features_run_no_model(here, arguments, run_dir, monkeypatch, changed):
    before = contents_of(run_dir / "activations")
    monkeypatch.setattr("mistral_sae.model.language_model.LanguageModel._run", None)  # any forward would fail
    ran = here(arguments(run_dir, **changed))
    assert ran.code == 0, ran.err
    assert "reading" not in ran.out
    after = contents_of(run_dir / "activations")
    assert {name for name in after if after[name] != before[name]} <= {"manifest.json"}


def test_explanations_from_other_examples_are_set_aside(here, arguments, run_dir):
    assert here(arguments(run_dir)).code == 0
    ran = here(arguments(run_dir, SELECT="3", TOKENS_BEFORE=2))
    assert f"the explanations of earlier runs are in {run_dir / 'explanations-1.jsonl'}\n" in ran.out
    assert [label.feature for label in labels_of(run_dir)] == [3]
    assert "earlier runs are" not in here(arguments(run_dir, SELECT="5", TOKENS_BEFORE=2)).out
    assert [label.feature for label in labels_of(run_dir)] == [3, 5]


def test_a_cache_of_another_corpus_is_made_again(here, arguments, run_dir):
    before = contents_of(run_dir / "activations")
    ran = here(arguments(run_dir, CONTEXT_LENGTH=24))
    assert ran.code == 0, ran.err
    assert "is of another corpus, or another part of it: made again\nreading " in ran.out
    assert contents_of(run_dir / "activations") != before


def test_a_cache_of_another_autoencoder_is_made_again(here, arguments, run_dir):
    write_sae(run_dir / "sae", seed=1)
    ran = here(arguments(run_dir))
    assert ran.code == 0, ran.err
    assert "is of another autoencoder: made again\nreading " in ran.out


# ---- what is explained ----


@pytest.mark.parametrize(
    ("select", "chosen"),
    [
        ("[40, 3, 40]", [3, 40]),
        ("3,40", [3, 40]),
        ("10-13", [10, 11, 12, 13]),
        ("all", list(range(FEATURES))),
    ],
)
def test_select_names_features(here, arguments, run_dir, select, chosen):
    ran = here(arguments(run_dir, SELECT=select))
    assert ran.code == 0, ran.err
    assert [label.feature for label in labels_of(run_dir)] == chosen


def test_a_feature_that_is_explained_alone_has_no_other_to_compare_it_with(here, arguments, run_dir):
    ran = here(arguments(run_dir, SELECT="3"))
    assert (ran.code, ran.problems) == (0, [])
    assert [label.status for label in labels_of(run_dir)] == ["ok"]
    assert re.search(r"detection +0\.\d\d   another feature's explanation none, its top token 0\.\d\d", ran.out)


def test_select_takes_the_densest(here, arguments, run_dir):
    assert here(arguments(run_dir, SELECT="densest 5")).code == 0
    firings = firings_of(run_dir)
    chosen = [label.feature for label in labels_of(run_dir)]
    assert len(chosen) == 5
    assert sorted(firings[chosen].tolist()) == sorted(firings.tolist())[-5:]


def test_select_draws_living_features_by_the_seed(here, arguments, run_dir):
    firings, drawn = firings_of(run_dir), []
    for seed in (0, 0, 1):
        # Another seed orders the corpus anew, too, and so its examples are others: only the draw is looked at
        ran = here(arguments(run_dir, SELECT="random 7", SEED=seed))
        assert ran.code == 0, ran.err
        drawn.append([label.feature for label in labels_of(run_dir)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7
    assert (firings[drawn[0]] > 0).all()


def firings_of(run_dir):
    from safetensors.torch import load_file

    return load_file(run_dir / "activations/00000.safetensors")["offsets"].diff()


@pytest.mark.parametrize(
    "select", ["some", "random", "random 0", "64", "[3, 64]", "[3, 4", "0-4000000000", "9-4", "[3, x]", "-1"]
)
def test_a_bad_select_is_refused_in_one_line_and_nothing_is_lost(here, arguments, finished, tmp_path, select):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = contents_of(folder)
    ran = here(arguments(folder, SELECT=select, EXPLAIN_TOKENS=2000))  # examples that are not there yet
    assert_refused(ran, f"SELECT is '{select}': expected ")
    assert "reading" not in ran.out  # which takes long
    assert contents_of(folder) == before


# ---- a server ----


def test_a_server_explains_and_scores_each_feature(served):
    run_dir, ran, _ = served
    assert ran.code == 0, ran.err
    assert ran.problems == []
    labels = labels_of(run_dir)
    assert [label.feature for label in labels] == CHOSEN
    for label in labels:
        assert (label.status, label.explainer, label.reason) == ("ok", "test-model", "")
        assert re.fullmatch(r"prompt [0-9a-f]{8}: the token .+", label.explanation)
        assert set(label.scores) == {"detection", "fuzzing", "simulation"}
        simulation = label.scores["simulation"]
        assert simulation.unanswered == 0 < simulation.answered
        assert simulation.r2 <= simulation.value**2 + 1e-9  # no line through the prediction does better than the best
        for method, score in label.scores.items():
            assert score.low <= score.value <= score.high
            assert None not in (score.other_feature, score.top_token)
            if method == "simulation":
                continue
            judged = [judgement for judgement in label.judgements if judgement.method == method]
            assert score.value == pytest.approx(balanced_accuracy(judged))
            assert (score.answered, score.unanswered) == (len(judged), 0)
    assert len({label.explanation for label in labels}) == len(CHOSEN)
    assert re.search(r"^  detection +0\.\d\d   another feature's explanation 0\.\d\d", ran.out, re.MULTILINE)


def test_a_scorer_named_twice_scores_once(here, arguments, served, run_dir):
    with Server(reply) as server:
        ran = here(arguments(run_dir, **openai(server, SELECT="3", SCORERS="detection,detection")))
    assert ran.code == 0, ran.err
    (label,) = labels_of(run_dir)
    assert len(label.judgements) == len(set(label.judgements)) == label.scores["detection"].answered


def test_the_progress_bar_shows_what_is_spent(here, arguments, served, tmp_path, monkeypatch):
    folder = shutil.copytree(served[0], tmp_path / "run")
    monkeypatch.setattr("mistral_sae.cli.QUIET_SECONDS", 0)  # a line at every step
    ran = here(arguments(folder, **openai("http://127.0.0.1:9/v1")))
    assert re.search(r"scoring: .*\$0\.\d{3}, \d+ requests, 0 retries, \d+ at once", ran.err)


def test_a_second_run_asks_the_server_nothing(here, arguments, served, tmp_path):
    run_dir, _, asked = served
    folder = shutil.copytree(run_dir, tmp_path / "run")
    (folder / "explanations.jsonl").unlink()
    with Server(reply) as server:
        ran = here(arguments(folder, **openai(server)))
    assert ran.code == 0, ran.err
    assert server.log == []
    assert f"{asked} replies are in {folder / 'completions.jsonl'}" in ran.out
    assert f"0 requests, 0 retries, {asked} answered from the journal" in ran.out
    assert (folder / "explanations.jsonl").read_bytes() == (run_dir / "explanations.jsonl").read_bytes()


def test_faults_and_a_kill_leave_exactly_one_true_record_of_each_feature(here, arguments, served, run_dir):
    by_chance = random_faults(0.2, TRANSIENT + TRUNCATED + LASTING, seed=0)

    def faults(asked):  # a quarter of the explanations is refused, so that there are some
        explains = '"pattern"' in asked.content
        return "refusal" if explains and zlib.crc32(asked.content.encode()) % 4 == 0 else by_chance(asked)

    changed = {"SELECT": "0-19", "REQUEST_TIMEOUT": 1, "MAX_FAILED_SHARE": 1.0, "CONCURRENCY": 32}
    with Server(reply) as server:
        whole = here(arguments(run_dir, **openai(server, **changed, OPENAI_MODEL="without-faults")))
    assert whole.code == 0, whole.err
    truth = {label.feature: label for label in labels_of(run_dir)}
    with Server(reply, faults) as server:
        first = process(arguments(run_dir, **openai(server, **changed)))
        until(lambda: len(server.log) > 60, first)
        os.kill(first.pid, signal.SIGKILL)
        assert ended(first).code == -signal.SIGKILL
        ran = here(arguments(run_dir, **openai(server, **changed)))
    assert ran.code == 0, ran.err
    assert ran.problems == []
    assert sum(entry.outcome != "ok" for entry in server.log) > 0.1 * len(server.log)
    labels = labels_of(run_dir)
    assert [label.feature for label in labels] == list(range(20))
    lasting = {"refusal": "refused", "filter": "filtered", "filter-400": "filtered", "overflow": "overflow"}
    expected = {}  # of each feature's first prompt: what became of it
    for entry in server.log:
        if '"pattern"' in entry.content:
            expected[name_of([{}, {"content": entry.content}])] = lasting.get(entry.outcome, "ok")
    seen = set()
    for label in labels:
        name = truth[label.feature].explanation.split(":")[0]
        seen.add(label.status)
        if expected[name] == "overflow":  # asked again with fewer examples, which makes another prompt
            assert label.explanation != truth[label.feature].explanation
        else:
            assert label.status == expected[name]
            assert label.explanation == (truth[label.feature].explanation if label.status == "ok" else "")
        for method, score in label.scores.items():
            judged = [judgement for judgement in label.judgements if judgement.method == method]
            assert (score.unanswered > 0) == (f"{method}: " in label.reason)
            if method != "simulation":  # which has no verdicts
                assert score.unanswered == sum(judgement.verdict is None for judgement in judged)
            true = {j[:4]: j.verdict for j in truth[label.feature].judgements}
            if label.explanation == truth[label.feature].explanation:
                assert all(j.verdict in (None, true[j[:4]]) for j in judged)  # none is mislabelled
    assert {"ok"} < seen


def until(condition, process, seconds=30):
    """Wait for a condition while a process is at work."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_was_killed_goes_on_and_asks_nothing_twice(here, arguments, served, run_dir):
    with Server(reply, delay=0.03) as server:
        first = process(arguments(run_dir, **openai(server)))
        until(lambda: len(server.log) > served[2] // 2, first)
        os.kill(first.pid, signal.SIGKILL)
        assert ended(first).code == -signal.SIGKILL
    assert not (run_dir / "explanations.jsonl").exists()
    journal = run_dir / "completions.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn')
    answered = journal.read_bytes().count(b"\n")
    assert answered > 5
    with Server(reply) as server:
        ran = here(arguments(run_dir, **openai(server)))
    assert ran.code == 0, ran.err
    assert len(server.log) == served[2] - answered
    assert len({record["key"] for record in journal_of(run_dir)}) == len(journal_of(run_dir)) == served[2]
    assert (run_dir / "explanations.jsonl").read_bytes() == (served[0] / "explanations.jsonl").read_bytes()


@pytest.mark.parametrize(("fault", "words"), [("quota", "has no quota left"), ("401", "wants a valid key")])
def test_a_server_that_refuses_everything_in_the_middle_leaves_labels_of_what_it_answered(
    here, arguments, served, run_dir, fault, words
):
    answered = itertools.count()

    def only_the_first(asked):
        return fault if next(answered) > served[2] // 2 else None

    with Server(reply, only_the_first) as server:
        ran = here(arguments(run_dir, **openai(server)))
    assert ran.code == 1
    assert len(ran.problems) == 1
    assert words in ran.problems[0]
    assert "answered from the journal; " in ran.out  # what it has come to
    labels = labels_of(run_dir)
    assert [label.feature for label in labels] == CHOSEN
    assert {label.status for label in labels} <= {"ok", "stopped"}
    assert (run_dir / "report.html").exists()
    with Server(reply) as server:
        again = here(arguments(run_dir, **openai(server)))
    assert again.code == 0, again.err
    assert labels_of(run_dir) == labels_of(served[0])


def test_scorers_that_are_asked_later_add_their_scores(here, arguments, served, tmp_path):
    folder = shutil.copytree(served[0], tmp_path / "run")
    before = labels_of(folder)
    with Server(reply) as server:
        ran = here(arguments(folder, **openai(server, SCORERS="simulation")))
    assert ran.code == 0, ran.err
    for old, new in zip(before, labels_of(folder), strict=True):
        assert new.scores.keys() == {*old.scores, "simulation"}
        assert old.scores.items() <= new.scores.items()


def test_all_constants_of_asking_reach_the_client(here, arguments, served, run_dir, monkeypatch):
    made = []
    monkeypatch.setattr(Client, "__init__", lambda self, *positional: made.extend(positional) or 1 / 0)
    constants = {"SAMPLING": {"seed": 4}, "MAX_REPLY_TOKENS": 777, "REQUEST_TIMEOUT": 3.5, "REQUEST_DEADLINE": 41.5}
    constants |= {"CONCURRENCY": 3, "MAX_API_TOKENS": 10_000, "MAX_DOLLARS": 2.5}
    constants |= {"PROMPT_DOLLARS": 1, "COMPLETION_DOLLARS": 2, "OPENAI_API_KEY": KEY}
    with Server(reply) as server, pytest.raises(ZeroDivisionError):
        here(arguments(run_dir, **openai(server, **constants)))
    asked, journal, budget = made
    assert asked == type(asked)("test-model", server.url, KEY, {"seed": 4}, 3, 3.5, 41.5, longest_reply=777)
    assert journal.path == run_dir / "completions.jsonl"
    assert budget.prices == (1.0, 2.0)
    assert "raise MAX_DOLLARS" in budget.shortage(Tokens(2_500_001, 0))
    assert "raise MAX_API_TOKENS" in budget.shortage(Tokens(10_001, 0))
    assert budget.shortage(Tokens(10_000, 0)) == ""


def test_what_a_server_does_not_take_is_said(here, arguments, served, run_dir):
    with Server(reply, rejects=["json_schema"]) as server:
        ran = here(arguments(run_dir, **openai(server)))
    assert ran.code == 0, ran.err
    assert "the server does not take json_schema: asking for json_object\n" in ran.out


def test_a_second_run_is_refused_before_it_loads_its_model(here, arguments, run_dir, monkeypatch):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)
    with locked(run_dir):
        assert_refused(here(arguments(run_dir)), "found another run at work")


def test_a_server_of_ones_own_wants_its_model_named(here, arguments, run_dir, monkeypatch):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)
    ran = here(arguments(run_dir, OPENAI_BASE_URL="http://127.0.0.1:9/v1"))
    assert_refused(ran, "OPENAI_MODEL is None: expected the server's name for its model")
    ran = here(arguments(run_dir, OPENAI_BASE_URL="127.0.0.1:9/v1", OPENAI_MODEL="x"))
    assert_refused(ran, "expected one like http://localhost:8000/v1")


INTERRUPTED = """
import runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit deaf ears
sys.argv[0] = "explain.py"
runpy.run_path("explain.py", run_name="__main__")
"""


def test_ctrl_c_ends_a_run_with_one_line_and_the_next_one_goes_on(here, arguments, served, run_dir):
    with Server(reply, delay=0.1) as server:
        first = process(arguments(run_dir, **openai(server, CONCURRENCY=2)), INTERRUPTED)
        until(lambda: len(server.log) > 8, first)
        first.send_signal(signal.SIGINT)
        ran = ended(first)
    assert_refused(ran, "stopped", code=1)
    assert "Traceback" not in ran.err
    answered = sum(record["status"] == "ok" for record in journal_of(run_dir))
    assert answered >= 5
    with Server(reply) as server:
        assert here(arguments(run_dir, **openai(server))).code == 0
    assert len(server.log) == served[2] - answered
    assert (run_dir / "explanations.jsonl").read_bytes() == (served[0] / "explanations.jsonl").read_bytes()


def test_a_run_dir_that_is_at_work_is_refused(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = contents_of(folder)
    with Server(reply) as server, locked(folder):
        assert_refused(here(arguments(folder, **openai(server))), f"found another run at work in {folder}")
    assert server.log == []
    assert contents_of(folder) | {".lock": b""} == before | {".lock": b""}


# ---- what it may cost ----


def test_a_dry_run_says_what_would_be_asked_and_asks_nothing(here, arguments, served, run_dir):
    with Server(reply) as server:
        ran = here(arguments(run_dir, **openai(server, DRY_RUN=1)))
    assert ran.code == 0, ran.err
    assert server.log == []
    found = re.search(
        r"6 features need (\S+) requests, about (\S+) tokens to read and (\S+) to write: "
        r"\$(\S+), without retries at most \$\S+, at \$0\.15 and \$0\.6 a million; none was sent",
        ran.out,
    )
    requests, prompt, completion = (int(found[i].replace(",", "")) for i in (1, 2, 3))
    assert requests == served[2]
    used = [(record["prompt_tokens"], record["completion_tokens"]) for record in journal_of(served[0])]
    assert 0.5 < prompt / sum(p for p, _ in used) < 2
    assert 0.3 < completion / sum(c for _, c in used) < 3
    assert float(found[4]) == pytest.approx((0.15 * prompt + 0.6 * completion) / 1e6, abs=0.006)
    assert not {"explanations.jsonl", "report.html", "completions.jsonl"} & set(contents_of(run_dir))


def test_a_dry_run_knows_what_is_answered_already(here, arguments, served, tmp_path):
    folder = shutil.copytree(served[0], tmp_path / "run")
    with Server(reply) as server:
        ran = here(arguments(folder, **openai(server, DRY_RUN=1)))
        more = here(arguments(folder, **openai(server, DRY_RUN=1, SELECT=str([*CHOSEN, 5]))))
    assert f"6 features need 0 requests, and {served[2]} that are answered already" in ran.out
    assert "$0.00, without retries at most $0.00" in ran.out
    assert re.search(r"7 features need [1-9]\d* requests, and [1-9]\d* that are answered already", more.out)
    assert server.log == []


@pytest.mark.parametrize("limit", [{"MAX_DOLLARS": 0.0011}, {"MAX_API_TOKENS": 4000}])
def test_a_dry_run_says_when_the_budget_does_not_suffice(here, arguments, served, run_dir, limit):
    with Server(reply) as server:
        ran = here(arguments(run_dir, **openai(server, DRY_RUN=1, **limit)))
        enough = here(arguments(run_dir, **openai(server, DRY_RUN=1, MAX_DOLLARS=5, MAX_API_TOKENS=10**7)))
        known = here(arguments(served[0], **openai(server, DRY_RUN=1, **limit)))  # all spent, and nothing to ask
    assert "; the budget ends before that; none was sent" in ran.out
    assert "the budget ends" not in enough.out
    assert "the budget ends" not in known.out


def test_without_prices_no_dollars_are_named_and_none_can_be_bounded(here, arguments, run_dir):
    unknown = {"PROMPT_DOLLARS": None, "COMPLETION_DOLLARS": None}
    with Server(reply) as server:
        assert_refused(here(arguments(run_dir, **openai(server, MAX_DOLLARS=5, **unknown))), "PROMPT_DOLLARS and")
        dry = here(arguments(run_dir, **openai(server, DRY_RUN=1, **unknown)))
        assert server.log == []
        ran = here(arguments(run_dir, **openai(server, **unknown)))
    assert ran.code == dry.code == 0
    assert "$" not in dry.out + ran.out + ran.err


@pytest.mark.parametrize(
    ("changed", "priced"),
    [({}, True), ({"OPENAI_MODEL": "another"}, False), ({"OPENAI_BASE_URL": "http://localhost:1/v1"}, False)],
)
def test_only_the_default_model_at_its_own_server_has_a_price_by_default(changed, priced, monkeypatch):
    for name in OPENAI:
        monkeypatch.delenv(name, raising=False)
    try:
        override([f"{name}={value}" for name, value in changed.items()], config)
        assert (config.PROMPT_DOLLARS is not None) == (config.COMPLETION_DOLLARS is not None) == priced
    finally:
        monkeypatch.undo()
        override([], config)


def test_a_dry_run_that_needs_no_server_says_so(here, arguments, run_dir):
    ran = here(arguments(run_dir, DRY_RUN=1))
    assert ran.code == 0, ran.err
    assert "6 features would be explained without a request" in ran.out
    assert not {"explanations.jsonl", "report.html"} & set(contents_of(run_dir))


@pytest.mark.parametrize("limit", [{"MAX_DOLLARS": 0.0011}, {"MAX_API_TOKENS": 4000}])
def test_a_budget_stops_the_run_cleanly_and_more_goes_on(here, arguments, served, run_dir, limit):
    with Server(reply) as server:
        ran = here(arguments(run_dir, **openai(server, CONCURRENCY=1, **limit)))
        assert ran.code == 0, ran.err
        assert ran.problems == []
        stopped = [line for line in ran.out.splitlines() if line.startswith("stopped: ")]
        assert len(stopped) == 1
        assert next(iter(limit)).removeprefix("MAX_").lower() in stopped[0].lower() or "$" in stopped[0]
        labels = labels_of(run_dir)
        assert [label.feature for label in labels] == CHOSEN
        assert {label.status for label in labels} == {"ok", "stopped"}
        assert re.search(r"^6 features: .*\d stopped.*; \d of the ok ones lack a score$", ran.out, re.M)
        assert (run_dir / "report.html").exists()
        spent = journal_of(run_dir)
        assert sum(record["dollars"] for record in spent) <= limit.get("MAX_DOLLARS", 1)
        tokens = sum(record["prompt_tokens"] + record["completion_tokens"] for record in spent)
        assert 0 < tokens <= limit.get("MAX_API_TOKENS", 10**9)
        assert here(arguments(run_dir, **openai(server))).code == 0
    assert len(server.log) == served[2]
    assert (run_dir / "explanations.jsonl").read_bytes() == (served[0] / "explanations.jsonl").read_bytes()


def test_a_budget_takes_nothing_from_what_is_answered_already(here, arguments, served, tmp_path):
    folder = shutil.copytree(served[0], tmp_path / "run")
    more = str([0, *CHOSEN, 63])  # the first of them would ask
    with Server(reply) as server:
        ran = here(arguments(folder, **openai(server, SELECT=more, MAX_API_TOKENS=100, CONCURRENCY=1)))
    assert ran.code == 0, ran.err
    assert server.log == []
    statuses = {label.feature: label.status for label in labels_of(folder)}
    assert statuses == {0: "stopped", 63: "stopped"} | dict.fromkeys(CHOSEN, "ok")


def test_a_run_that_gets_nothing_leaves_the_labels_of_earlier_ones(here, arguments, served, tmp_path):
    folder = shutil.copytree(served[0], tmp_path / "run")
    before = (folder / "explanations.jsonl").read_bytes()
    with Server(reply) as server:
        ran = here(arguments(folder, **openai(server, OPENAI_MODEL="another", MAX_API_TOKENS=100)))
    assert (ran.code, server.log) == (0, [])
    assert f"{len(CHOSEN)} features: {len(CHOSEN)} stopped" in ran.out
    assert (folder / "explanations.jsonl").read_bytes() == before
    assert "0 of them explained" not in (folder / "report.html").read_text()


def test_features_explained_later_stand_beside_those_of_earlier_runs(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = {label.feature: label for label in labels_of(folder)}
    ran = here(arguments(folder, SELECT="3-5"))
    assert ran.code == 0, ran.err
    after = {label.feature: label for label in labels_of(folder)}
    assert list(after) == sorted({*CHOSEN, 3, 4, 5})
    assert {f: after[f] for f in CHOSEN if f != 3} == {f: before[f] for f in CHOSEN if f != 3}
    assert f"labels    {folder / 'explanations.jsonl'}, beside 5 of earlier runs\n" in ran.out
    assert "\n3 features: 3 ok\n" in ran.out
    assert not (folder / "explanations-1.jsonl").exists()


@pytest.mark.parametrize("changed", [{"EXPLAIN_TOKENS": 2500}, {"damaged": True}, {}])
def test_labels_of_other_examples_or_of_another_explainer_are_set_aside(here, arguments, served, tmp_path, changed):
    folder = shutil.copytree(served[0], tmp_path / "run", ignore=shutil.ignore_patterns("explanations-1.jsonl"))
    if changed.pop("damaged", False):
        (folder / "explanations.jsonl").write_text('{"feature": 3, "expl')
    before = (folder / "explanations.jsonl").read_bytes()
    for number in (1, 2):
        ran = here(arguments(folder, SELECT="3", **changed))
        assert ran.code == 0, ran.err
        assert (folder / "explanations-1.jsonl").read_bytes() == before
        assert ("explanations-1.jsonl" in ran.out) == (number == 1)
    assert not (folder / "explanations-2.jsonl").exists()
    labels = {label.feature: label.explainer for label in labels_of(folder)}
    kept = {} if changed or not before.endswith(b"\n") else dict.fromkeys(CHOSEN, "test-model")
    assert labels == kept | {3: "offline"}


def test_tokens_that_had_no_price_are_named_beside_a_bound_in_dollars(here, arguments, run_dir):
    unknown = {"PROMPT_DOLLARS": None, "COMPLETION_DOLLARS": None, "SELECT": "3"}
    with Server(reply) as server:
        assert here(arguments(run_dir, **openai(server, **unknown))).code == 0
        tokens = sum(record["prompt_tokens"] + record["completion_tokens"] for record in journal_of(run_dir))
        ran = here(arguments(run_dir, **openai(server, SELECT="3", MAX_DOLLARS=1)))
        unbounded = here(arguments(run_dir, **openai(server, SELECT="3")))
    assert f"MAX_DOLLARS leaves out {tokens:,} tokens of earlier runs" in ran.out
    assert "leaves out" not in unbounded.out


# ---- what ends a run ----


def test_a_wrong_key_is_refused_in_one_line_and_shown_nowhere(here, arguments, run_dir, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(reply, key="sk-another-one") as server:
        ran = here(arguments(run_dir, **openai(server)))
        gc.collect()
    assert_refused(ran, "wants a valid key (")
    assert caplog.text == ""  # asyncio writes tracebacks for exceptions that nobody took, when they are collected
    assert "check OPENAI_API_KEY" in ran.problems[0]
    assert KEY not in ran.out + ran.err
    assert all(KEY.encode() not in content for content in contents_of(run_dir).values())


def test_a_password_in_the_base_url_is_shown_nowhere(here, arguments, run_dir):
    with Server(reply) as server:
        url = server.url.replace("http://", "http://me:hunter2@")
        ran = here(arguments(run_dir, **openai(url, SELECT="3")))
    assert ran.code == 0, ran.err
    assert f"explainer test-model at {server.url}" in ran.out
    assert "hunter2" not in ran.out + ran.err
    assert all(b"hunter2" not in content for content in contents_of(run_dir).values())


def test_the_right_key_is_in_no_file(here, arguments, run_dir, monkeypatch):
    def parrot(asked):
        return Raw(500, {"error": {"message": f"no luck with {KEY}"}}) if asked.attempt == 0 else None

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(reply, parrot, key=KEY) as server:
        ran = here(arguments(run_dir, **openai(server, SELECT="3")))
    assert ran.code == 0, ran.err
    assert {entry.outcome for entry in server.log} == {"raw", "ok"}
    assert KEY not in ran.out + ran.err
    assert all(KEY.encode() not in content for content in contents_of(run_dir).values())


def test_an_unknown_model_is_named(here, arguments, run_dir):
    with Server(reply, model="another") as server:
        assert_refused(here(arguments(run_dir, **openai(server))), "has no model 'test-model'")


def test_a_server_that_is_not_there_is_one_line(here, arguments, run_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert_refused(here(arguments(run_dir, **openai(url))), f"the server at {url} cannot be reached")


@pytest.mark.parametrize(("share", "code"), [(0.4, 1), (0.5, 0)])
def test_more_failures_than_allowed_fail_the_run_with_all_files_written(here, arguments, run_dir, share, code):
    explained = []

    def half_of_them(asked):
        if '"pattern"' in asked.content and asked.attempt == 0:
            explained.append(asked.content)
        return "refusal" if asked.content in explained[::2] else None

    with Server(reply, half_of_them) as server:
        ran = here(arguments(run_dir, **openai(server, MAX_FAILED_SHARE=share)))
    statuses = [label.status for label in labels_of(run_dir)]
    assert sorted(statuses) == ["ok"] * 3 + ["refused"] * 3
    assert (run_dir / "report.html").exists()
    if code:
        assert_refused(ran, "3 of 6 features have no label or no score, more than MAX_FAILED_SHARE, 40%", code=1)
    else:
        assert (ran.code, ran.problems) == (0, [])


@pytest.mark.parametrize(("kind", "again"), [("refusal", False), ("500", True)])
def test_explanations_of_which_none_could_be_scored_fail_the_run(here, arguments, run_dir, kind, again):
    def all_but_explanations(asked):
        return None if '"pattern"' in asked.content else kind

    with Server(reply, all_but_explanations) as server:
        ran = here(arguments(run_dir, **openai(server)))
    labels = labels_of(run_dir)
    assert {label.status for label in labels} == {"ok"}
    assert {score.answered for label in labels for score in label.scores.values()} == {0}
    assert_refused(ran, "6 of 6 features have no label or no score", code=1)
    assert ("start again" in ran.problems[0]) == again


def test_a_missing_autoencoder_names_train_py(here, arguments, tmp_path):
    assert_refused(here(arguments(tmp_path / "run")), "run train.py first")


@pytest.mark.parametrize(
    ("made", "said"), [({"d_model": 48}, "width 48 and layer 1, and"), ({"layer": 3}, "width 32 and layer 3, and")]
)
def test_an_autoencoder_of_another_model_is_refused_in_one_line(here, arguments, tmp_path, monkeypatch, made, said):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)  # before the model is loaded
    write_sae(tmp_path / "run/sae", **made)
    ran = here(arguments(tmp_path / "run"))
    assert_refused(ran, said)
    assert "of width 32 and layers 0 to 2: expected the model" in ran.problems[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"EXPLAINER": "claude"}, "EXPLAINER is 'claude': expected openai, mistral or offline"),
        (
            {"EXPLAINER": "mistral", "MISTRAL_MODEL_PATH": None},
            "EXPLAINER is 'mistral': expected another, as the stand-in",
        ),
        ({"TEXT": ""}, "TEXT is empty"),
        ({"SCORERS": "detection guessing"}, "SCORERS is 'detection guessing': expected any of detection"),
        ({"EXPLAIN_TOKENS": 31}, "EXPLAIN_TOKENS is 31"),
        ({"CONCURRENCY": 0}, "CONCURRENCY is 0"),
        ({"MAX_DOLLARS": 0}, "MAX_DOLLARS is 0"),
        ({"MAX_FAILED_SHARE": 2}, "MAX_FAILED_SHARE is 2"),
        ({"TEXT": " "}, "TEXT is ' '"),
    ],
)
def test_a_setting_that_no_run_can_use_is_refused_before_anything_is_loaded(
    here, arguments, run_dir, monkeypatch, changed, said
):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)
    assert_refused(here(arguments(run_dir, **changed)), said)


# ---- the loaded model as its own explainer ----


def test_the_loaded_model_gives_each_feature_a_true_status(here, arguments, tmp_path, monkeypatch):
    write_sae(tmp_path / "sae")
    params = PARAMS | {"vocab_size": 274}  # of the tokenizer
    instruct = write_hugging_face_folder(tmp_path / "instruct", params, random_weights(params))
    changed = {"EXPLAINER": "mistral", "MISTRAL_MODEL_PATH": instruct, "SAE_PATH": tmp_path / "sae"}
    changed |= {"SELECT": "[3, 11]", "TOKENS_BEFORE": 2, "TOKENS_AFTER": 1}
    ran = here(arguments(tmp_path / "run", **changed, MAX_FAILED_SHARE=1.0))
    assert (ran.code, ran.problems) == (0, [])
    journal = tmp_path / "run/completions-mistral.jsonl"
    answered = journal.read_bytes()
    assert answered.count(b"\n") >= 2
    dry = here(arguments(tmp_path / "run", **changed, DRY_RUN=1))
    assert re.search(r"2 features need 0 requests, and \d+ that are answered already", dry.out)
    assert "$" not in dry.out
    labels = labels_of(tmp_path / "run")
    assert [label.feature for label in labels] == [3, 11]
    for label in labels:  # random weights give no JSON, and seldom an end
        assert label.explainer == "mistral"
        assert label.status in ("unparsed", "truncated")
        assert label.explanation == ""
    assert (tmp_path / "run/report.html").exists()

    def refuse(*arguments, **settings):
        raise AssertionError("what is in the journal is not generated again")

    monkeypatch.setattr(LanguageModel, "generate", refuse)
    again = here(arguments(tmp_path / "run", **changed, MAX_FAILED_SHARE=1.0))
    assert (again.code, again.problems) == (0, [])
    assert labels_of(tmp_path / "run") == labels
    assert journal.read_bytes() == answered


# ---- a text of the user's ----


def page_data(path):
    """The data in a page that explain.py wrote."""
    found = re.search(r'<script[^>]*id="text-data"[^>]*>([^<]+)<', path.read_text())
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_a_text_shows_its_tokens_and_the_features_that_fire_on_them(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert here(arguments(folder, SELECT="all")).code == 0
    before = contents_of(folder)
    ran = here(arguments(folder, TEXT="the value of an index, self"))
    assert ran.code == 0, ran.err
    assert f"page      {folder / 'text.html'}: " in ran.out
    data = page_data(folder / "text.html")
    assert "".join(token for token, _ in data["tokens"]) == "the value of an index, self"
    for _, features in data["tokens"]:
        values = [value for _, value in features]
        assert 1 <= len(values) <= 4
        assert values == sorted(values, reverse=True)
        assert values[-1] > 0
    explained = {str(label.feature): label.explanation for label in labels_of(folder) if label.explanation}
    fired = {str(feature) for _, features in data["tokens"] for feature, _ in features}
    assert data["explanations"] == {feature: explained[feature] for feature in explained.keys() & fired} != {}
    assert set(data["maxima"]) <= fired
    assert data["maxima"]
    after = contents_of(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"text.html"}


def test_a_text_is_not_explained_by_what_was_said_of_another_autoencoder(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    told = [label.explanation for label in labels_of(folder)]
    text = {"TEXT": " ".join(keyword.kwlist * 3), "SELECT": "all"}
    assert here(arguments(folder, **text)).code == 0
    shown = json.dumps(page_data(folder / "text.html"))
    assert any(json.dumps(explanation) in shown for explanation in told)
    write_sae(folder / "sae", seed=5)
    assert here(arguments(folder, **text)).code == 0
    shown = json.dumps(page_data(folder / "text.html"))
    assert not any(json.dumps(explanation) in shown for explanation in told)


def test_damaged_explanations_are_one_line(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "explanations.jsonl").write_text('{"a": 1}\n')
    assert_refused(here(arguments(folder, TEXT="def f(x):")), "explanations.jsonl, line 1: found '{\"a\": 1}'")


def test_a_text_is_shown_without_passages_where_the_examples_are_damaged(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "activations/00000.safetensors").write_bytes(b"damaged")
    ran = here(arguments(folder, TEXT="the value"))
    assert ran.code == 0, ran.err
    assert f"without passages: the cache in {folder / 'activations'} is damaged\n" in ran.out


def test_a_text_without_explanations_says_how_to_get_them(here, arguments, tmp_path):
    write_sae(tmp_path / "run/sae")
    ran = here(arguments(tmp_path / "run", TEXT="the value"))
    assert ran.code == 0, ran.err
    assert "run explain.py without TEXT for explanations" in ran.out
    assert "".join(token for token, _ in page_data(tmp_path / "run/text.html")["tokens"]) == "the value"
    assert not (tmp_path / "run/explanations.jsonl").exists()
