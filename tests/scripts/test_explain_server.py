"""explain.py from end to end with a server: labels and scores, faults, kills, keys."""

import gc
import itertools
import os
import re
import shutil
import signal
import socket
import time
import zlib

import pytest
from explain_runs import (
    CHOSEN,
    Ran,
    assert_refused,
    contents_of,
    journal_of,
    labels_of,
    name_of,
    openai,
    reply,
)
from forks import Fork
from openai_server import LASTING, TRANSIENT, TRUNCATED, Raw, Server, random_faults

from mistral_sae.explain.client import Client
from mistral_sae.explain.journal import Tokens
from mistral_sae.explain.scoring import verdict_score

KEY = "sk-secret-0123456789abcdef"


# ---- a run ----


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
            assert score.value == pytest.approx(verdict_score(judged, 0).value)
            assert (score.answered, score.unanswered) == (len(judged), 0)
    assert len({label.explanation for label in labels}) == len(CHOSEN)
    assert re.search(r"^  detection +0\.\d\d   another feature's explanation 0\.\d\d", ran.out, re.MULTILINE)


def test_text_that_is_gone_while_the_server_answers_costs_no_report(here, arguments, run_dir, corpus, tmp_path):
    text = shutil.copytree(corpus, tmp_path / "text")

    def reply_and_remove(messages):
        shutil.rmtree(text, ignore_errors=True)
        return reply(messages)

    with Server(reply_and_remove) as server:
        ran = here(arguments(run_dir, DATA_PATH=text, **openai(server)))
    assert ran.code == 0, ran.err
    assert (run_dir / "report.html").exists()


def test_a_scorer_named_twice_scores_once(here, arguments, served, run_dir):
    with Server(reply) as server:
        ran = here(arguments(run_dir, **openai(server, SELECT="3", SCORERS="detection,detection")))
    assert ran.code == 0, ran.err
    (label,) = labels_of(run_dir)
    assert len(label.judgements) == len(set(label.judgements)) == label.scores["detection"].answered


def test_scorers_that_are_asked_later_add_their_scores(here, arguments, served, tmp_path):
    folder = shutil.copytree(served[0], tmp_path / "run")
    before = labels_of(folder)
    with Server(reply) as server:
        ran = here(arguments(folder, **openai(server, SCORERS="simulation")))
    assert ran.code == 0, ran.err
    for old, new in zip(before, labels_of(folder), strict=True):
        assert new.scores.keys() == {*old.scores, "simulation"}
        assert old.scores.items() <= new.scores.items()


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


# ---- faults, kills and Ctrl-C ----


def test_faults_and_a_kill_leave_exactly_one_true_record_of_each_feature(here, arguments, served, run_dir):
    by_chance = random_faults(0.2, TRANSIENT + TRUNCATED + LASTING, seed=0)

    def faults(asked):  # a quarter of the explanations is refused, so that there are some
        explains = '"pattern"' in asked.content
        return "refusal" if explains and zlib.crc32(asked.content.encode()) % 4 == 0 else by_chance(asked)

    changed = {"SELECT": "0-11", "REQUEST_TIMEOUT": 1, "MAX_FAILED_SHARE": 1.0, "CONCURRENCY": 32}
    with Server(reply) as server:
        whole = here(arguments(run_dir, **openai(server, **changed, OPENAI_MODEL="without-faults")))
    assert whole.code == 0, whole.err
    truth = {label.feature: label for label in labels_of(run_dir)}
    with Server(reply, faults) as server:
        first = Fork("explain", arguments(run_dir, **openai(server, **changed)))
        until(lambda: len(server.log) > 40, first)
        os.kill(first.pid, signal.SIGKILL)
        assert first.ended()[0] == -signal.SIGKILL
        ran = here(arguments(run_dir, **openai(server, **changed)))
    assert ran.code == 0, ran.err
    assert ran.problems == []
    assert sum(entry.outcome != "ok" for entry in server.log) > 0.1 * len(server.log)
    labels = labels_of(run_dir)
    assert [label.feature for label in labels] == list(range(12))
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
        assert process.is_at_work(), process.ended()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_that_was_killed_goes_on_and_asks_nothing_twice(here, arguments, served, run_dir):
    with Server(reply, delay=0.03) as server:
        first = Fork("explain", arguments(run_dir, **openai(server)))
        until(lambda: len(server.log) > served[2] // 2, first)
        os.kill(first.pid, signal.SIGKILL)
        assert first.ended()[0] == -signal.SIGKILL
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
def test_a_refusal_in_the_middle_leaves_labels_of_what_was_answered(here, arguments, served, run_dir, fault, words):
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_a_run_with_one_line_and_the_next_one_goes_on(
    here, arguments, served, run_dir, number, code
):
    with Server(reply, delay=0.1) as server:
        first = Fork("explain", arguments(run_dir, **openai(server, CONCURRENCY=2)))
        until(lambda: len(server.log) > 8, first)
        os.kill(first.pid, number)
        ran = Ran(*first.ended())
    assert_refused(ran, "stopped early: started again, it goes on from what is saved", code=code)
    assert "Traceback" not in ran.err
    answered = sum(record["status"] == "ok" for record in journal_of(run_dir))
    assert answered >= 5
    with Server(reply) as server:
        assert here(arguments(run_dir, **openai(server))).code == 0
    assert len(server.log) == served[2] - answered
    assert (run_dir / "explanations.jsonl").read_bytes() == (served[0] / "explanations.jsonl").read_bytes()


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


@pytest.mark.parametrize(
    ("kind", "said"),
    [("refusal", "6 of 6 features have no label or no score"), ("500", "5 requests in a row had 6 attempts failed")],
)
def test_explanations_of_which_none_could_be_scored_fail_the_run(here, arguments, run_dir, kind, said):
    def all_but_explanations(asked):
        return None if '"pattern"' in asked.content else kind

    with Server(reply, all_but_explanations) as server:
        ran = here(arguments(run_dir, **openai(server)))
    labels = labels_of(run_dir)
    assert {label.status for label in labels} == {"ok"}
    assert {score.answered for label in labels for score in label.scores.values()} == {0}
    assert_refused(ran, "error: ", code=1)
    assert said in ran.out + ran.err
    assert ("start again" in ran.problems[0]) == (kind == "500")


# ---- keys and addresses ----


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
