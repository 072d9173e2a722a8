"""What explain.py says that a run will cost, and how a budget bounds it."""

import re
import shutil

import pytest
from explain_runs import CHOSEN, assert_refused, contents_of, journal_of, labels_of, openai, reply
from forks import ENVIRONMENT
from openai_server import Server

import config
from mistral_sae.constants import override

# ---- a dry run ----


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


def test_a_dry_run_that_needs_no_server_says_so(here, arguments, run_dir):
    ran = here(arguments(run_dir, DRY_RUN=1))
    assert ran.code == 0, ran.err
    assert "6 features would be explained without a request" in ran.out
    assert not {"explanations.jsonl", "report.html"} & set(contents_of(run_dir))


# ---- prices ----


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
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    try:
        override([f"{name}={value}" for name, value in changed.items()], config)
        assert (config.PROMPT_DOLLARS is not None) == (config.COMPLETION_DOLLARS is not None) == priced
    finally:
        monkeypatch.undo()
        override([], config)


def test_tokens_that_had_no_price_are_named_beside_a_bound_in_dollars(here, arguments, run_dir):
    unknown = {"PROMPT_DOLLARS": None, "COMPLETION_DOLLARS": None, "SELECT": "3"}
    with Server(reply) as server:
        assert here(arguments(run_dir, **openai(server, **unknown))).code == 0
        tokens = sum(record["prompt_tokens"] + record["completion_tokens"] for record in journal_of(run_dir))
        ran = here(arguments(run_dir, **openai(server, SELECT="3", MAX_DOLLARS=1)))
        unbounded = here(arguments(run_dir, **openai(server, SELECT="3")))
    assert f"MAX_DOLLARS leaves out {tokens:,} tokens of earlier runs" in ran.out
    assert "leaves out" not in unbounded.out


# ---- a budget ----


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


def test_a_dry_run_leaves_the_cache_of_another_corpus_and_its_explanations(here, arguments, served):
    run_dir = served[0]

    def kept():
        paths = [run_dir / "explanations.jsonl", *(run_dir / "activations").iterdir()]
        return {path: path.read_bytes() for path in paths}

    before = kept()
    ran = here(arguments(run_dir, DRY_RUN=1, EXPLAIN_TOKENS=100))
    assert ran.code == 2
    assert "another corpus, or another part of it" in ran.err
    assert "without DRY_RUN" in ran.err
    assert kept() == before
