"""Requests that wait together and agree in their edit are made in one batch, and none has to know of it."""

import threading
from collections import deque

import httpx2
import pytest
import torch

from mistral_sae.live import api, asked, batches
from mistral_sae.live.batches import ROWS
from mistral_sae.model.language_model import ModelError

PROMPTS = ["def load(path):\n", "import os\n", "class A:\n    def __init__(self", "", "return self._items["]
TOKENS = 10


@pytest.fixture
def forwards(known, monkeypatch):
    """How many rows each forward had."""
    run, rows = known.subject.model._run, []

    def counted(tokens_BT, *rest):
        rows.append(len(tokens_BT))
        return run(tokens_BT, *rest)

    monkeypatch.setattr(known.subject.model, "_run", counted)
    return rows


def bodies(known, **steer):
    """Requests that differ in all but the edit."""
    steer = {"features": {str(int(known.subject.statistics.maximum_F.argmax())): 2.0}, **steer}
    return [
        {"prompt": prompt, "steer": steer, "seed": i, "temperature": i / 4, "max_tokens": TOKENS - i}
        for i, prompt in enumerate(PROMPTS)
    ]


def made(known, *wanted, apart=0, closed_after=None):
    """What requests give that take turns as the engine gives them: the choices of each, or its error.

    They come so many turns apart.
    """
    found: list = [None] * len(wanted)
    coming = deque((i, api.completion(known, asked.Completion(**body)).whole()) for i, body in enumerate(wanted))
    jobs, turns = deque(), 0
    while jobs or coming:
        while coming and coming[0][0] * apart <= turns:
            jobs.append(coming.popleft())
        turns += 1
        i, job = jobs.popleft()
        try:
            found[i] = next(job)
            jobs.append((i, job))
        except StopIteration:
            found[i] = found[i]["choices"]
        except Exception as error:
            found[i] = error
        if closed_after and i == 0 and (closed_after := closed_after - 1) == 0:
            jobs.pop()[1].close()
    assert not known.waiting
    return found


def alone(known, wanted):
    return [made(known, body)[0] for body in wanted]


@pytest.mark.parametrize("steer", [{"features": {}}, {}, {"positions": "generated"}, {"exact": True}], ids=str)
def test_requests_of_one_edit_share_forwards_and_have_the_texts_of_each_alone(known, forwards, steer):
    wanted = bodies(known, **steer)
    expected = alone(known, wanted)
    forwards.clear()
    assert made(known, *wanted) == expected
    assert forwards == [len(PROMPTS)] * TOKENS
    assert len({choice["text"] for (choice,) in expected}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("again", "positions", "is_joined"), [(32, "all", True), (0, "all", False), (32, "generated", False)]
)
def test_a_request_joins_one_at_work_where_it_can_and_where_that_is_worth_it(
    known, forwards, monkeypatch, again, positions, is_joined
):
    monkeypatch.setattr(batches, "AGAIN", again)
    wanted = bodies(known, positions=positions)[:2]
    expected = alone(known, wanted)
    steps = len(forwards)
    forwards.clear()
    assert made(known, *wanted, apart=3) == expected
    assert (len(forwards) < steps - 5) if is_joined else (forwards == [1] * steps)


def test_requests_of_different_edits_do_not_meet(known, forwards):
    wanted = [body for edit in ({}, {"method": "add"}) for body in bodies(known, **edit)[:2]]
    expected = alone(known, wanted)
    forwards.clear()
    assert made(known, *wanted) == expected
    assert set(forwards) == {2}


def test_the_prompts_of_one_request_are_a_batch_and_those_over_the_limit_the_next(known, forwards):
    body = bodies(known)[0] | {"prompt": PROMPTS * 2, "n": 2}
    expected = [choice["text"] for prompt in PROMPTS * 2 for choice in made(known, body | {"prompt": prompt})[0]]
    forwards.clear()
    assert [choice["text"] for choice in made(known, body)[0]] == expected
    assert forwards == [rows for rows in (ROWS, 4) for _ in range(TOKENS)]


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_log_probabilities_are_read_in_one_forward_and_are_those_of_each_alone(known, forwards, positions):
    wanted = [body | {"echo": True, "logprobs": 2, "max_tokens": 3} for body in bodies(known, positions=positions)]
    expected = alone(known, wanted)
    forwards.clear()
    found = made(known, *wanted)
    assert forwards == [5] * 4 if positions == "all" else forwards[:3] == [5] * 3
    for (one,), (other,) in zip(found, expected, strict=True):
        log_a, log_b = one.pop("logprobs"), other.pop("logprobs")
        assert log_a["token_logprobs"] == pytest.approx(log_b["token_logprobs"], rel=1e-4, abs=1e-4)
        assert [each.keys() for each in log_a["top_logprobs"]] == [each.keys() for each in log_b["top_logprobs"]]
        assert one == other


def test_the_numbers_of_one_request_are_its_own_error(known, monkeypatch):
    wanted, run = bodies(known), known.subject.model._run
    expected, spoiled = alone(known, wanted), known.subject.model.tokenizer.encode(PROMPTS[1])[-2]

    def spoil(tokens_BT, *rest):
        hidden_BTD = run(tokens_BT, *rest)
        hidden_BTD[(tokens_BT == spoiled).any(dim=1)] = torch.nan
        return hidden_BTD

    monkeypatch.setattr(known.subject.model, "_run", spoil)
    found = made(known, *wanted)
    assert isinstance(found[1], ModelError)
    assert [each for i, each in enumerate(found) if i != 1] == [each for i, each in enumerate(expected) if i != 1]


@pytest.mark.parametrize("at", [0, 4])
def test_a_batch_that_memory_has_no_room_for_is_made_one_by_one(known, forwards, monkeypatch, at):
    wanted, run = bodies(known), known.subject.model._run
    expected = alone(known, wanted)

    def fail(tokens_BT, *rest):
        if len(tokens_BT) > 1 and len(forwards) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tokens_BT, *rest)

    monkeypatch.setattr(known.subject.model, "_run", fail)
    forwards.clear()
    assert made(known, *wanted) == expected
    assert forwards.count(len(PROMPTS)) == at
    assert set(forwards[at:]) == {1}


def test_the_others_of_a_batch_go_on_when_one_is_closed(known, forwards):
    wanted = bodies(known)
    expected = alone(known, wanted)
    forwards.clear()
    assert made(known, *wanted, closed_after=3)[1:] == expected[1:]
    assert set(forwards) == {len(PROMPTS)}


def test_ten_clients_at_once_cost_hardly_more_forwards_than_one(live, known, forwards):
    release, found = threading.Event(), {}

    def held():
        release.wait(20)
        yield None

    def post(i):
        body = {"prompt": PROMPTS[i % 5], "max_tokens": TOKENS, "seed": i}
        found[i] = httpx2.post(f"{live.address}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    def run(clients):
        threads = [threading.Thread(target=post, args=(i,)) for i in clients]
        for thread in threads:
            thread.start()
        return threads

    live.engine.prepare(held())
    threads = run(range(10))
    while live.engine.jobs < 10:
        threads[0].join(0.01)
    release.set()
    for thread in threads:
        thread.join()
    together, count = dict(found), len(forwards)
    forwards.clear()
    for i in range(10):
        run([i])[0].join()
    assert found == together
    assert count <= 2 * TOKENS
    assert len(forwards) > 7 * TOKENS
