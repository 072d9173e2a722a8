"""The client against a local server that does to it what servers do."""

import asyncio
import itertools
import json
import logging
import math
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from openai_server import FATAL, LASTING, TRANSIENT, TRUNCATED, Raw, Server, random_faults

from mistral_sae.explain.client import FIRST_AT_OWN, LATE_IN_A_ROW, SAMPLING, Client, ClientError, DryRun, Prices
from mistral_sae.explain.journal import FINAL, Journal, request_key
from mistral_sae.explain.replies import estimate_tokens, most_tokens
from mistral_sae.explain.throttle import FIRST_LIMIT, Budget, BudgetReached, Limit, Tokens
from mistral_sae.explain.types import Completion, Request

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-test-0123456789abcdef"
MODEL = "test-model"
SCHEMA = {"type": "object", "properties": {"description": {"type": "string"}}}
QUICK = {"backoff": 0.01, "timeout": 20.0, "deadline": 60.0}
WRONG = ("malformed", "html", "schema", "empty", "500", "cut", "drop")
CONTEXT = "This model's maximum context length is 8192 tokens"


def reply(messages):
    return f"about {messages[-1]['content']}"


def request(content, schema=SCHEMA, max_tokens=100):
    messages = [{"role": "system", "content": "Describe."}, {"role": "user", "content": content}]
    return Request(messages, schema, max_tokens)


def ask(server, journal, *requests, **settings):
    """The completions, or exceptions, of requests made at once (strings stand for `request`s), and the client."""

    async def main():
        url = server if isinstance(server, str) else server.url
        async with Client(journal, settings.pop("model", MODEL), url, **{"key": KEY} | QUICK | settings) as client:
            made = [request(r) if isinstance(r, str) else r for r in requests]
            return await asyncio.gather(*map(client.complete, made), return_exceptions=True), client

    return asyncio.run(main())


def first(*faults):
    """A rule: the first attempts have these faults, the others none."""
    return lambda asked: faults[asked.attempt] if asked.attempt < len(faults) else None


def lines(journal):
    return [json.loads(line) for line in journal.path.read_text().splitlines()]


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "completions.jsonl") as journal:
        yield journal


# ---- what happens to one attempt ----


@pytest.mark.parametrize("fault", [*TRANSIENT, "429-date", "429-ms"])
def test_a_fault_that_passes_is_retried(journal, fault):
    with Server(reply, first(fault), key=KEY) as server:
        start = time.monotonic()
        (completion,), client = ask(server, journal, "x", timeout=0.7)
    assert completion[:2] == ("ok", "about x")
    assert server.outcomes("x") == [fault, "ok"]
    assert time.monotonic() - start < 10  # a hanging or trickling server is left at the timeout
    assert client.usage.retries == 1
    assert [line["status"] for line in lines(journal)] == ["ok"]


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_that_stays_is_a_failure_with_its_reason(journal, fault):
    with Server(reply, lambda asked: fault) as server:
        (completion,), _ = ask(server, journal, "x", attempts=3)
    assert completion.status == "failed"
    assert completion.text.startswith("3 attempts failed, the last with")
    assert "\n" not in completion.text
    assert server.outcomes("x") == [fault] * 3


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_server_that_stays_busy_is_asked_until_the_deadline(journal, fault):
    with Server(reply, lambda asked: fault) as server:
        start = time.monotonic()
        (completion,), client = ask(server, journal, "x", attempts=1, timeout=0.2, deadline=1.0, backoff=0.02)
    assert 0.4 < time.monotonic() - start < 10
    assert completion.status == "failed"
    assert completion.text.startswith("no answer within 1 s; the last attempt: ")
    assert len(server.log) >= 3
    assert client.usage.concurrency == 1


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_request_that_the_server_answers_too_slowly_fails_and_the_constants_that_help_are_named(journal, fault):
    with Server(reply, lambda asked: fault) as server:
        (completion,), client = ask(server, journal, "x", attempts=2, timeout=0.2, backoff=0.02)
    assert completion.status == "failed"
    assert completion.text == "2 attempts failed, the last with no reply within 0.2 s"
    assert server.outcomes("x") == [fault] * 2
    assert len(client.notes) == 1
    assert client.notes[0].startswith("2 attempts had no reply within 0.2 s: raise REQUEST_TIMEOUT")


def test_a_server_that_answers_one_after_the_other_is_given_the_time_for_all(journal):
    """Each reply takes half the timeout, so that of several out at once most come too late."""
    with Server(reply, delay=0.15, serial=True) as server:
        completions, _ = ask(server, journal, *map(str, range(16)), timeout=0.3, deadline=1.5, backoff=0.02)
    assert {completion.status for completion in completions} == {"ok"}


def test_a_server_that_has_gone_silent_ends_the_run_and_what_was_answered_is_kept(journal):
    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK | {"timeout": 0.4, "deadline": 0.8}) as client:
            assert (await client.complete(request("answered"))).status == "ok"
            start = time.monotonic()
            rest = await asyncio.gather(*(client.complete(request(str(i))) for i in range(40)))
            return client, rest, time.monotonic() - start

    with Server(reply, lambda asked: None if asked.content == "answered" else "hang") as server:
        client, rest, took = asyncio.run(main())
    statuses = Counter(completion.status for completion in rest)
    assert set(statuses) == {"failed", "stopped"}
    assert statuses["failed"] <= LATE_IN_A_ROW
    assert took < 8  # not 40 deadlines, one after the other
    assert client.is_broken
    assert "does not answer" in client.stopped
    assert [line["status"] for line in lines(journal)].count("ok") == 1


def pauses(journal, fault, *contents, **settings):
    """Seconds between the attempts of each request."""
    with Server(reply, fault) as server:
        ask(server, journal, *contents, **settings)
    times = [[served.time for served in server.log if served.content == content] for content in contents]
    return [[after - before for before, after in itertools.pairwise(each)] for each in times]


def test_every_retry_waits_about_twice_as_long_as_the_one_before(journal):
    (waited,) = pauses(journal, first(*["500"] * 5), "x", backoff=0.05)
    for number, seconds in enumerate(waited):
        assert 0.5 * 0.05 * 2**number < seconds < 0.05 * 2**number + 0.3
    assert waited[4] > 3 * waited[0]


@pytest.mark.parametrize(("fault", "least"), [("500", 0.2), (Raw(500, {}, {"Retry-After": "0.1"}), 0.4)])
def test_requests_that_fail_together_are_not_retried_together(journal, fault, least):
    waited = [seconds for (seconds,) in pauses(journal, first(fault), *map(str, range(FIRST_LIMIT)), backoff=0.4)]
    assert max(waited) - min(waited) > 0.03
    assert min(waited) > least


def test_only_answers_raise_the_number_of_attempts_that_may_be_out(journal):
    with Server(reply, lambda asked: "500") as server:
        _, client = ask(server, journal, *map(str, range(20)), attempts=2)
        assert client.usage.concurrency == FIRST_AT_OWN
    with Server(reply) as server:
        _, client = ask(server, journal, *map(str, range(20)))
        assert client.usage.concurrency == FIRST_AT_OWN + 20


def test_the_deadline_also_ends_an_attempt_that_is_out(journal):
    with Server(reply, lambda asked: "hang") as server:
        start = time.monotonic()
        (completion,), _ = ask(server, journal, "x", timeout=20, deadline=0.5)
    assert time.monotonic() - start < 10
    assert completion.status == "failed"
    assert "within 0.5 s" in completion.text


def test_the_deadline_does_not_run_while_a_request_waits_for_its_first_attempt(journal):
    with Server(reply, delay=0.2) as server:
        completions, _ = ask(server, journal, *map(str, range(8)), concurrency=1, deadline=1.0)
    assert {completion.status for completion in completions} == {"ok"}


@pytest.mark.parametrize(("fault", "least"), [("429-after", 0.5), ("429-ms", 0.5), ("429-date", 0.9), ("429", 0.0)])
def test_the_server_says_how_long_to_wait(journal, fault, least):
    with Server(reply, first(fault), retry_after=0.5) as server:
        (completion,), _ = ask(server, journal, "x")
    waited = server.log[1].time - server.log[0].time
    assert completion.status == "ok"
    assert waited >= least
    assert waited < least + 5


@pytest.mark.parametrize("header", ["nan", "inf", "-5", "soon", "", "Mon, 99 Foo"])
def test_a_nonsense_retry_after_is_no_reason_to_wait(journal, header):
    with Server(reply, first(Raw(503, {}, {"Retry-After": header}))) as server:
        start = time.monotonic()
        (completion,), _ = ask(server, journal, "x")
    assert completion.status == "ok"
    assert time.monotonic() - start < 10


def test_a_wait_beyond_the_deadline_fails_at_once(journal):
    with Server(reply, lambda asked: Raw(429, {}, {"Retry-After": "3600"})) as server:
        start = time.monotonic()
        (completion,), _ = ask(server, journal, "x")
    assert completion.status == "failed"
    assert completion.text.startswith("the server asks for 3600 s of patience, and there is no answer within 60 s")
    assert len(server.log) == 1
    assert time.monotonic() - start < 10


def test_nobody_asks_a_server_to_learn_again_that_it_wants_more_patience_than_there_is(journal):
    with Server(reply, lambda asked: Raw(429, {}, {"Retry-After": "3600"})) as server:
        start = time.monotonic()
        completions, _ = ask(server, journal, *map(str, range(100)))
    assert {completion.status for completion in completions} == {"failed"}
    assert all("asks for 3600 s of patience" in completion.text for completion in completions)
    assert len(server.log) <= FIRST_LIMIT
    assert time.monotonic() - start < 10


def test_a_server_that_names_a_wait_is_sent_nothing_until_then_and_not_all_at_once_after_it(journal):
    def fault(asked):
        return Raw(429, {}, {"Retry-After": "1"}) if len(server.log) < FIRST_LIMIT else None

    with Server(reply, fault) as server:
        completions, client = ask(server, journal, *map(str, range(300)), backoff=0.3)
    assert {completion.status for completion in completions} == {"ok"}
    assert client.usage.retries == FIRST_LIMIT
    first, *rest = (served.time for served in server.log[FIRST_LIMIT - 1 :])
    assert rest[0] - first > 0.9
    assert rest[3] - rest[0] > 0.02
    turned_away = {served.content for served in server.log[:FIRST_LIMIT]}
    assert turned_away <= {served.content for served in server.log[FIRST_LIMIT : 3 * FIRST_LIMIT]}  # they go first


@pytest.mark.parametrize("header", [{"Retry-After": "0.25"}, {}])
def test_no_deadline_runs_out_while_a_busy_server_answers_others(journal, header):
    """20 answers each quarter of a second are 2.5 s of work, and no request may take more than one."""
    answered = Counter()

    def fault(asked):
        window = int(time.monotonic() / 0.25)
        answered[window] += 1
        return Raw(429, {}, header) if answered[window] > 20 else None

    with Server(reply, fault) as server:
        start = time.monotonic()
        completions, client = ask(server, journal, *map(str, range(200)), deadline=1.0, backoff=0.05)
    assert Counter(completion.status for completion in completions) == {"ok": 200}
    assert 2.0 < time.monotonic() - start < 15
    assert not header or client.usage.retries < 200


# ---- statuses ----


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("refusal", "refused", "I'm sorry, I can't help with that."),
        ("filter", "filtered", "the provider's content filter withheld the reply"),
        ("filter-400", "filtered", "content management policy"),
        ("overflow", "overflow", "maximum context length"),
    ],
)
def test_what_asking_again_would_not_change_is_asked_once_and_kept(journal, fault, status, text):
    with Server(reply, lambda asked: fault) as server:
        (completion,), _ = ask(server, journal, "x")
        assert completion.status == status
        assert text in completion.text
        (again,), client = ask(server, journal, "x")
    assert again == completion
    assert client.usage.known == 1
    assert server.outcomes("x") == [fault]


def test_a_truncated_reply_gets_more_room(journal):
    with Server(reply, lambda asked: "truncated" if asked.body["max_tokens"] < 400 else None) as server:
        (completion,), _ = ask(server, journal, "x" * 40)
    assert completion[:2] == ("ok", "about " + "x" * 40)
    assert [served.body["max_tokens"] for served in server.log] == [100, 200, 400]
    assert completion.completion_tokens == 5 + 5 + 11  # of all three


@pytest.mark.parametrize(
    ("larger", "rooms"), [("truncated", [100, 200, 300]), ("overflow", [100, 200]), (Raw(400, {}), [100, 200])]
)
def test_a_reply_that_stays_truncated_says_so(journal, larger, rooms):
    with Server(reply, lambda asked: "truncated" if asked.attempt == 0 else larger) as server:
        (completion,), _ = ask(server, journal, "x", longest_reply=300)
    assert completion[:2] == ("truncated", "abo")
    assert [served.body["max_tokens"] for served in server.log] == rooms
    assert journal.get(lines(journal)[0]["key"]) == completion


def test_a_reply_that_stayed_truncated_is_asked_for_again_with_a_larger_bound_and_no_other(journal):
    with Server(reply, lambda asked: "truncated" if asked.body["max_tokens"] < 800 else None) as server:
        (cut,), client = ask(server, journal, "x", longest_reply=400)
        assert cut.status == "truncated"
        assert "raise MAX_REPLY_TOKENS" in client.notes[0]
        ((again,), _), asked = ask(server, journal, "x", longest_reply=400), len(server.log)
        assert (again, len(server.log)) == (cut, asked)
        ((whole,), _) = ask(server, journal, "x", longest_reply=800)
        assert whole.status == "ok"
        assert ask(server, journal, "x", longest_reply=400)[0] == [whole]


def test_no_reply_is_given_more_room_than_the_bound(journal):
    with Server(reply, lambda asked: "truncated") as server:
        (cut,), _ = ask(server, journal, "x", longest_reply=60)
    assert cut.status == "truncated"
    assert [served.body["max_tokens"] for served in server.log] == [60]


def test_requests_of_a_kind_begin_with_the_room_that_one_of_them_needed(journal):
    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK) as client:
            return [await client.complete(each) for each in made]

    def fault(asked):
        if asked.content == "small":
            return "overflow" if asked.body["max_tokens"] > 100 else None
        return "truncated" if asked.body["max_tokens"] < 400 else None

    kinds = {"x": "a", "y": "a", "large": "a", "small": "a", "other": "b"}
    made = [request(c, SCHEMA | {"title": kind}, 500 if c == "large" else 100) for c, kind in kinds.items()]
    with Server(reply, fault) as server:
        completions = asyncio.run(main())
        again, client = ask(server, journal, *made)
    rooms = {content: [s.body["max_tokens"] for s in server.log if s.content == content] for content in kinds}
    assert rooms == {
        "x": [100, 200, 400],
        "y": [400],
        "large": [500],
        "small": [400, 100],  # which the room of others is too large for
        "other": [100, 200, 400],
    }
    assert {completion.status for completion in completions} == {"ok"}
    assert again == completions
    assert client.usage.known == 5  # the journal knows them by what they asked for


@pytest.mark.parametrize(
    ("text", "status"), [('{"a": [1, 2]}' + " \n" * 40, "ok"), ('{"a": [1, 2', "truncated"), ("12", "truncated")]
)
def test_a_reply_cut_off_in_the_white_space_after_its_json_is_whole(journal, text, status):
    body = {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}
    with Server(reply, lambda asked: Raw(200, body)) as server:
        (completion,), _ = ask(server, journal, "x", longest_reply=100)
    assert completion[:2] == (status, text)


def test_a_reply_that_was_cut_off_before_its_first_character_gets_more_room(journal):
    words = (
        "Could not finish the message because max_tokens or model output limit was reached. Please try again with "
        "higher max_tokens."
    )

    def fault(asked):
        return Raw(400, {"error": {"message": words}}) if asked.body["max_tokens"] < 400 else None

    with Server(reply, fault) as server:
        (completion,), client = ask(server, journal, "x")
        (cut,), _ = ask(server, journal, "y", longest_reply=200)
    assert completion[:2] == ("ok", "about x")
    assert [served.body["max_tokens"] for served in server.log] == [100, 200, 400, 100, 200]
    assert completion.completion_tokens == 100 + 200 + 1  # what was cut off may have been charged for
    assert cut[:2] == ("truncated", "the reply was cut off before it began")
    assert client.notes == []


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        # OpenAI
        (400, {"error": {"message": "Input tokens exceed the configured limit of 272000 tokens."}}, "overflow"),
        (400, {"error": {"message": CONTEXT, "code": "context_length_exceeded"}}, "overflow"),
        (429, {"error": {"message": "Request too large for gpt-4o on tokens per min (TPM)"}}, "overflow"),
        (400, {"error": {"message": "Invalid prompt", "code": "content_policy_violation"}}, "filtered"),
        # Azure
        (400, {"error": {"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, "filtered"),
        # Mistral
        (400, {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum"}, "overflow"),
        # vLLM, old and new
        (400, {"object": "error", "message": CONTEXT, "type": "BadRequestError", "code": 400}, "overflow"),
        (400, {"error": {"message": "The decoder prompt is longer than the maximum model length of 16"}}, "overflow"),
        (400, {"error": {"message": "Prompt length (9000) exceeds max_model_len (8192)"}}, "overflow"),
        # xAI
        (400, {"error": "This model's maximum prompt length is 131072 but the request contains 140000"}, "overflow"),
        # Bedrock
        (400, {"message": "Input is too long for requested model."}, "overflow"),
        # llama.cpp
        (400, {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}, "overflow"),
        # Ollama
        (400, {"error": "the input length exceeds the context length"}, "overflow"),
        (500, {"error": {"message": "input exceeds context length"}}, "overflow"),
        # TGI
        (422, {"error": "`inputs` must have less than 1024 tokens. Given: 2000"}, "overflow"),
        # nginx
        (413, "<html>Request Entity Too Large</html>", "overflow"),
        # OpenRouter
        (403, {"error": {"message": "Your input was flagged", "code": 403}}, "filtered"),
        (200, {"error": {"message": "Upstream is away", "code": 502}}, "failed"),
        # whatever else
        (400, {"error": {"message": "Conversation roles must alternate"}}, "failed"),
        (409, {}, "failed"),
        (418, "a teapot", "failed"),
        (200, "null", "failed"),
        (200, "[1, 2]", "failed"),
        (200, '"text"', "failed"),
        (200, "[" * 5000, "failed"),
        (200, {"choices": []}, "failed"),
        (200, {"choices": [None]}, "failed"),
        (200, {"choices": "ok"}, "failed"),
        (200, {"choices": [{"message": None, "finish_reason": "stop"}]}, "failed"),
        (200, {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}, "failed"),
        (200, {"choices": [{"message": {"content": [{"type": "text", "text": 5}]}}]}, "failed"),
        (200, {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}, "failed"),
        (200, {"choices": [{"message": {"content": " \n"}, "finish_reason": "stop"}]}, "failed"),
        (200, {"choices": [{"message": {"content": "x"}}], "usage": "much"}, "ok"),
        (200, {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -3}}, "ok"),
        (200, {"choices": [{"message": {"content": [{"type": "thinking"}, {"type": "text", "text": "x"}]}}]}, "ok"),
    ],
)
def test_whatever_a_server_says_becomes_a_status(journal, status, body, expected):
    with Server(reply, lambda asked: Raw(status, body)) as server:
        (completion,), _ = ask(server, journal, "y", attempts=2)
    assert isinstance(completion, Completion)
    assert completion.status == expected
    assert completion.text == "x" if expected == "ok" else completion.text
    assert min(completion[2:]) >= 0
    assert all(math.isfinite(line["dollars"]) for line in lines(journal))


def test_other_requests_go_on_beside_one_that_fails(journal):
    with Server(reply, lambda asked: "500" if asked.content == "3" else None) as server:
        completions, client = ask(server, journal, *map(str, range(6)), attempts=2)
    assert [completion.status for completion in completions] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert client.usage.done == 6


# ---- what ends the run ----


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "refused the key (HTTP 401)"),
        ("403", "refused the key (HTTP 403"),
        ("404", "has no model 'test-model'"),
        ("quota", "has no quota left (HTTP 429"),
        (Raw(400, {"error": {"message": "API key not valid. Pass a valid one."}}), "refused the key (HTTP 400"),
        (Raw(402, {"error": "Payment required"}), "has no quota left (HTTP 402"),
        (
            Raw(400, {"error": {"message": "Your credit balance is too low to access the API"}}),
            "has no quota left (HTTP 400",
        ),
        (
            Raw(400, {"error": {"message": "Limit", "code": "billing_hard_limit_reached"}}),
            "has no quota left (HTTP 400",
        ),
        (
            Raw(403, {"error": {"message": "Country, region, or territory not supported"}}),
            "serves nobody from here (HTTP 403: Country, region, or territory not supported)",
        ),
        (Raw(400, {"message": "Invalid model: test-model"}), "has no model 'test-model'"),
        (Raw(405, "Method Not Allowed"), "no chat completions for model 'test-model'"),
    ],
)
def test_what_no_request_can_survive_ends_the_run_at_once(journal, fault, words):
    assert {"401", "403", "404", "quota"} == set(FATAL)
    with Server(reply, lambda asked: fault if asked.content == "0" else "hang") as server:
        start = time.monotonic()
        results, _ = ask(server, journal, *map(str, range(50)))
    assert time.monotonic() - start < 10
    assert {type(result) for result in results} == {ClientError}
    assert len({str(result) for result in results}) == 1
    assert words in str(results[0])
    assert "\n" not in str(results[0])
    assert server.outcomes("0") == ["raw" if isinstance(fault, Raw) else fault]
    assert len(server.log) <= FIRST_LIMIT


@pytest.mark.parametrize("fault", FATAL)
def test_what_a_server_refuses_costs_nothing_however_often_it_is_tried(journal, fault):
    numbers = list(map(str, range(50)))
    with Server(reply, lambda asked: fault if asked.content == "0" else "hang") as server:
        for _ in range(4):
            results, client = ask(server, journal, *numbers)
            assert {type(result) for result in results} == {ClientError}
            assert client.usage[3:6] == (0, 0, 0.0)
    assert len(server.log) > 4  # others were out
    assert journal.tokens == 0
    with Server(reply) as server:
        results, _ = ask(server, journal, *numbers, max_tokens=10_000)
    assert {result.status for result in results} == {"ok"}


@pytest.mark.parametrize(("fault", "words"), [("401", "refused the key"), ("quota", "has no quota left")])
def test_a_server_that_refuses_everything_once_it_has_answered_stops_the_run_and_what_is_out_costs_nothing(
    journal, fault, words
):
    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK) as client:
            await client.complete(request("answered"))
            hanging = asyncio.create_task(client.complete(request("hang")))
            await asyncio.sleep(0.2)
            return client, await asyncio.gather(client.complete(request(fault)), hanging)

    with Server(reply, lambda asked: None if asked.content == "answered" else asked.content) as server:
        client, completions = asyncio.run(main())
    assert {completion.status for completion in completions} == {"stopped"}
    assert client.is_broken
    assert words in client.stopped
    assert [line["status"] for line in lines(journal)] == ["ok"]


@pytest.mark.parametrize(
    ("fault", "status", "attempts"), [(Raw(403, "<html>blocked</html>"), "filtered", 1), ("404", "failed", 3)]
)
def test_one_request_that_is_forbidden_or_not_found_leaves_the_others_alone(journal, fault, status, attempts):
    """A firewall's page, or a balancer's, once a completion has shown that key and model are right."""

    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK, attempts=3) as client:
            await client.complete(request("answered"))
            return client, await asyncio.gather(*(client.complete(request(each)) for each in ("odd", "x", "y")))

    with Server(reply, lambda asked: fault if asked.content == "odd" else None) as server:
        client, completions = asyncio.run(main())
    assert [completion.status for completion in completions] == [status, "ok", "ok"]
    assert len(server.outcomes("odd")) == attempts
    assert (client.stopped, client.is_broken) == ("", False)


def test_the_first_error_names_what_is_wrong(journal):
    with Server(reply, key=KEY, model=MODEL) as server:
        ((completion,), _), ((model,), _) = ask(server, journal, "x"), ask(server, journal, "x", model="gpt-99")
        ((address,), _) = ask(server.url.removesuffix("/v1"), journal, "y")
        ((other,), _), ((none,), _) = (ask(server, journal, "y", key=key) for key in ("sk-another-key", None))
    assert completion.status == "ok"
    assert "no model 'gpt-99'" in str(model)
    assert "OPENAI_BASE_URL, which mostly ends in /v1" in str(address)
    assert "refused the key" in str(other)
    assert "wants a key (HTTP 401), found none" in str(none)


def test_a_server_that_is_not_running_is_said_soon(journal):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        start = time.monotonic()
        results, _ = ask(url, journal, *map(str, range(8)))
    assert time.monotonic() - start < 10
    assert all(f"found no server at {url}" in str(result) for result in results)
    assert {type(result) for result in results} == {ClientError}
    assert lines(journal) == []


def test_a_server_that_goes_away_later_is_waited_for(journal):
    async def main():
        with Server(reply) as server:
            client = Client(journal, MODEL, server.url, KEY, **QUICK, attempts=2)
            assert (await client.complete(request("x"))).status == "ok"
        task = asyncio.create_task(client.complete(request("y")))
        await asyncio.sleep(0.5)
        assert not task.done()
        with Server(reply, port=server.port):
            completion = await task
            await client._openai.close()
        return completion, client.usage.retries

    completion, retries = asyncio.run(main())
    assert completion.status == "ok"
    assert retries > 3  # more than attempts: being away is no fault


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1"])
def test_a_base_url_that_is_none_is_an_error(journal, url):
    with pytest.raises(ClientError, match="found the base URL"):
        Client(journal, MODEL, url, KEY)


@pytest.mark.parametrize("url", ["ftp://me:hunter2@host/v1", "host/v1?key=hunter2"])
def test_a_secret_in_a_base_url_that_is_none_is_not_shown(journal, url):
    with pytest.raises(ClientError, match="found the base URL") as error:
        Client(journal, MODEL, url, KEY)
    assert "hunter2" not in str(error.value)


def test_a_journal_that_cannot_be_written_ends_the_run(journal, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, data):
            raise OSError(28, "No space left on device")

    real = journal._file
    with Server(reply) as server:
        monkeypatch.setattr(journal, "_file", Full())
        results, _ = ask(server, journal, *map(str, range(20)))
        monkeypatch.setattr(journal, "_file", real)
    assert {type(result) for result in results} == {ClientError}
    assert "No space left on device" in str(results[0])
    assert len(server.log) <= FIRST_LIMIT


# ---- how servers want to be asked ----


@pytest.mark.parametrize(
    ("rejects", "kinds"),
    [
        ((), ["json_schema"]),
        (("json_schema",), ["json_schema", "json_object"]),
        (("response_format",), ["json_schema", "json_object", None]),
    ],
)
def test_the_best_format_that_a_server_takes_is_found_once(journal, rejects, kinds):
    with Server(reply, rejects=rejects) as server:
        (completion,), client = ask(server, journal, "x", attempts=1)
        assert [served.body.get("response_format", {}).get("type") for served in server.log] == kinds
        assert completion.status == "ok"
        assert len(client.notes) == len(kinds) - 1

        server.log.clear()
        ask(server, journal, *map(str, range(20)), attempts=1, concurrency=4)
    formats = [served.body.get("response_format", {}).get("type") for served in server.log]
    assert formats.count(kinds[-1]) == 20
    assert len(formats) <= 20 + 4 * (len(kinds) - 1)  # those that were out together when it was found out


@pytest.mark.parametrize(
    ("length", "counted", "n_notes"),
    [(14_000, 2900, 1), (14_000, 3100, 0), (14_000, 0, 0), (14_000, None, 0), (3000, 100, 0)],
)
def test_a_server_that_leaves_out_most_of_a_prompt_is_said_once(journal, length, counted, n_notes):
    body = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": counted}}
    with Server(reply, lambda asked: Raw(200, body)) as server:
        _, client = ask(server, journal, "x" * length, "y" * length)
    note = (
        "the server read only 2,900 of about 4,000 tokens of a prompt: raise its context length (Ollama: "
        "OLLAMA_CONTEXT_LENGTH)"
    )
    assert client.notes == [note] * n_notes


def test_the_schema_is_sent_as_servers_expect_it(journal):
    with Server(reply) as server:
        ask(server, journal, "x")
        ask(server, journal, request("y", schema=None))
    body, plain = (served.body for served in server.log)
    assert body["response_format"]["json_schema"] == {"name": "reply", "schema": SCHEMA, "strict": True}
    assert "response_format" not in plain
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.0, 100, False)
    assert body["messages"] == request("x").messages


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "'messages' must contain the word 'json' to use 'response_format'"}}),
        (400, {"error": "'response_format.type' must be 'json_schema' or 'text'"}),  # LM Studio
        (404, {"error": {"message": "No endpoints found that support response_format"}}),  # OpenRouter
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "response_format"], "input": "temperature"}]}),
        (422, {"detail": "Unexpected fields in the request: {'format'}"}),
        (500, {"error": {"message": 'response_format type must be one of "text" or "json_object"'}}),  # llama.cpp
        (501, {"error": "structured outputs are not implemented"}),
    ],
)
def test_a_rejected_format_is_understood_in_every_wording(journal, status, body):
    def fault(asked):
        return Raw(status, body) if "response_format" in asked.body else None

    with Server(reply, fault) as server:
        (completion,), _ = ask(server, journal, "x", attempts=1)
    assert completion.status == "ok"
    assert "response_format" not in server.log[-1].body
    assert server.log[-1].body["temperature"] == 0.0


@pytest.mark.parametrize("words", ["Bad Request", "Unknown name 'additionalProperties'", "Invalid schema"])
def test_a_format_that_was_never_answered_is_given_up_whatever_the_words(journal, words):
    refused = Raw(400, {"error": {"message": words}})
    with Server(reply, lambda asked: refused if "response_format" in asked.body else None) as server:
        (completion,), client = ask(server, journal, "x")
    assert completion.status == "ok"
    assert len(client.notes) == 2
    with Server(reply, lambda asked: refused if asked.content == "y" else None) as server:
        (answered, refused_later), client = ask(server, journal, "z", "y", concurrency=1)
    assert (answered.status, refused_later.status, client.notes) == ("ok", "failed", [])


def test_the_parameters_of_reasoning_models_are_found_out(journal):
    with Server(reply, rejects=["max_tokens", "temperature"]) as server:
        (completion,), client = ask(server, journal, "x", attempts=1, sampling={"temperature": 0.0, "seed": 3})
        ask(server, journal, "y", attempts=1, sampling={"temperature": 0.0, "seed": 3})
    assert completion.status == "ok"
    assert server.log[2].body["max_completion_tokens"] == 100
    assert server.log[2].body["seed"] == 3
    assert not {"max_tokens", "temperature"} & set(server.log[2].body)
    assert len(client.notes) == 2
    assert len(server.log) == 6  # a new client finds it out again


@pytest.mark.parametrize(
    "words",
    [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Only user and assistant roles are supported!",
    ],
)
@pytest.mark.parametrize("status", [400, 500])  # 500 is llama.cpp's
def test_a_server_without_a_system_role_gets_its_text_from_the_user(journal, words, status):
    def refuse(asked):
        if asked.messages[0]["role"] == "system":
            return Raw(status, {"error": {"message": words, "type": "BadRequestError", "code": 400}})
        return None

    with Server(reply, refuse) as server:
        results, client = ask(server, journal, "x", *map(str, range(10)), attempts=1)
    assert {result.status for result in results} == {"ok"}
    assert server.log[-1].body["messages"][0]["content"].startswith("Describe.\n\n")
    assert [len(served.body["messages"]) for served in server.log].count(1) == 11
    assert server.log[-1].body["response_format"]["type"] == "json_schema"  # the format was not to blame
    assert len(client.notes) == 1


# ---- the journal ----


def test_what_was_answered_is_not_asked_again(journal):
    with Server(reply) as server:
        before, _ = ask(server, journal, "x", "y")
        after, client = ask(server, journal, "x", "y", "z")
    assert after[:2] == before
    assert [served.content for served in server.log[2:]] == ["z"]
    assert client.usage[:2] == (1, 2)


def test_whatever_a_completion_depends_on_makes_it_another(journal):
    with Server(reply) as server:
        ask(server, journal, "x", request("x", max_tokens=99), request("x", schema=None), request("x", {"a": 1}))
        ask(server, journal, "x", model="another")
        ask(server, journal, "x", sampling={"temperature": 0.5})
        assert len(server.log) == len(journal) == 6
        ask(server.url + "/", journal, "x", key="sk-another-key-0123", prices=Prices(1, 1), concurrency=3)
        assert len(server.log) == 6


def test_what_failed_is_asked_again_at_the_next_start(journal):
    with Server(reply, first("500", "500")) as server:
        (failed,), _ = ask(server, journal, "x", attempts=2)
        (completion,), _ = ask(server, journal, "x", attempts=2)
    assert (failed.status, completion.status) == ("failed", "ok")
    assert [line["status"] for line in lines(journal)] == ["failed", "ok"]


def test_a_completion_is_written_down_before_it_is_handed_out(journal):
    async def main():
        async with Client(journal, MODEL, server.url, KEY) as client:
            for number in range(3):
                completion = await client.complete(request(str(number)))
                assert [line["text"] for line in lines(journal)][number:] == [completion.text]

    with Server(reply) as server:
        asyncio.run(main())


def test_the_same_request_asked_twice_at_once_goes_out_once(journal):
    with Server(reply, first("500"), delay=0.05) as server:
        completions, _ = ask(server, journal, *["x"] * 10, "y")
    assert [completion.text for completion in completions] == ["about x"] * 10 + ["about y"]
    assert server.outcomes("x") == ["500", "ok"]
    assert len(lines(journal)) == 2


def test_whoever_waits_for_the_same_request_gets_it_when_the_first_to_ask_is_stopped(journal):
    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK) as client:
            tasks = [asyncio.create_task(client.complete(request("x"))) for _ in range(3)]
            await asyncio.sleep(0.2)
            tasks[0].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    with Server(reply, delay=0.4) as server:
        stopped, *others = asyncio.run(main())
    assert isinstance(stopped, asyncio.CancelledError)
    assert {other.text for other in others} == {"about x"}
    assert len(server.log) == 2


def test_the_first_to_ask_goes_on_when_one_that_waits_for_the_same_is_stopped(journal):
    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK) as client:
            tasks = [asyncio.create_task(client.complete(request("x"))) for _ in range(3)]
            await asyncio.sleep(0.2)
            tasks[1].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    with Server(reply, delay=0.4) as server:
        results = asyncio.run(main())
    assert [type(result) for result in results] == [Completion, asyncio.CancelledError, Completion]
    assert len(server.log) == 1


# ---- how many at once ----


def test_the_limit_rises_to_its_bound_and_halves_once_a_round():
    async def main():
        limit = Limit(32)
        assert limit.value == FIRST_LIMIT
        for _ in range(100):
            limit.succeeded()
        assert limit.value == 32
        now = asyncio.get_running_loop().time()
        for _ in range(5):
            limit.overwhelmed(began=now)  # five that were out together
        assert limit.value == 16
        limit.overwhelmed(began=now + 60)
        assert limit.value == 8
        for _ in range(8):
            limit.succeeded()
        assert 8.9 < limit.value < 9  # one a round from now on
        for _ in range(20):
            limit.overwhelmed(began=float("inf"))
        assert limit.value == 1

    asyncio.run(main())


def test_slots_are_given_to_the_oldest_and_survive_cancelling():
    async def main():
        limit, order, out = Limit(1), [], 0

        async def work(name, since):
            nonlocal out
            async with limit.slot(since):
                out += 1
                assert out == 1
                order.append(name)
                try:
                    await asyncio.sleep(0.01)
                finally:
                    out -= 1

        async with limit.slot(None):
            ages = [("new", None), ("newer", None), ("retry", 5.0), ("older retry", 2.0), ("stopped", 1.0)]
            tasks = [asyncio.create_task(work(*age)) for age in ages]
            await asyncio.sleep(0)
            tasks[-1].cancel()
        assert [await asyncio.gather(*tasks[:-1]), tasks[-1].cancelled()] == [[None] * 4, True]
        assert order == ["older retry", "retry", "new", "newer"]  # one after the other, without the one that stopped

        async with limit.slot(None):
            tasks = [asyncio.create_task(work("a", None)), asyncio.create_task(work("b", None))]
            await asyncio.sleep(0)
        tasks[0].cancel()  # let in, and stopped before it knew
        await tasks[1]
        assert order[-1] == "b"

    asyncio.run(main())


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_no_more_are_out_at_once_than_allowed(journal, concurrency):
    with Server(reply, delay=0.05) as server:
        ask(server, journal, *map(str, range(6 * concurrency)), concurrency=concurrency)
    assert min(concurrency, FIRST_LIMIT + 1) <= server.most_at_once <= concurrency


def test_a_server_that_takes_few_at_once_is_given_few(journal):
    """The server takes 5 at once: the limit swings about that, instead of staying at its bound."""
    with Server(reply, lambda asked: "429" if server.at_once > 5 else None, delay=0.03) as server:
        completions, client = ask(server, journal, *map(str, range(150)), concurrency=64)
    assert {completion.status for completion in completions} == {"ok"}
    assert client.usage.concurrency <= 10
    refused = Counter(served.outcome for served in server.log[40:])["429"]  # after it had found out
    assert refused < 60


# ---- budget ----


def test_the_budget_holds_with_many_out_and_over_several_runs(journal):
    requests = [request(str(number), max_tokens=50) for number in range(40)]
    most = sum((most_tokens(requests[0].messages, SCHEMA), 50))
    with Server(lambda messages: "word " * 40, delay=0.02) as server:
        for bound in (3 * most, 4 * most, 8 * most):
            results, client = ask(server, journal, *requests, max_tokens=bound)
            stopped = [result for result in results if result.status == "stopped"]
            assert {result.status for result in results} == {"ok", "stopped"}
            assert {result.text for result in stopped} == {client.stopped}
            assert f"{bound:,} tokens is reached" in client.stopped
            spent = sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines(journal))
            assert bound - most - 1 < spent <= bound  # no more, and no less than it could
            assert len(lines(journal)) == len(server.log) == 40 - len(stopped)  # all that went out ended
        results, _ = ask(server, journal, *requests)
    assert {result.status for result in results} == {"ok"}
    assert len(server.log) == 40


def test_dollars_are_counted_and_bounded(journal):
    prices = Prices(prompt=2.0, completion=8.0)
    with Server(reply) as server:
        (completion,), client = ask(server, journal, "x" * 400, prices=prices)
        dollars = (completion.prompt_tokens * 2 + completion.completion_tokens * 8) / 1e6
        assert client.usage.dollars == pytest.approx(dollars)
        assert lines(journal)[0]["dollars"] == pytest.approx(dollars)
    with Journal(journal.path) as later, Server(reply) as server:
        results, _ = ask(server, later, "x" * 400, "y" * 400, prices=prices, max_dollars=dollars + 1e-5)
        assert results[0] == completion  # what is known costs nothing
        assert results[1].status == "stopped"
        assert "before this run" in results[1].text
        assert server.log == []


@pytest.mark.parametrize(
    ("bound", "shown"), [(0.0001, "$0.00010"), (0.00000123, "$0.0000012"), (0.5, "$0.50"), (1234.5, "$1,234.50")]
)
def test_a_budget_that_is_reached_is_shown_with_digits_that_say_something(bound, shown):
    with pytest.raises(BudgetReached) as reached:
        asyncio.run(Budget(Prices(1.0, 1.0), bound, None, bound).reserve(Tokens(1, 0)))
    assert f"the budget of {shown} is reached" in str(reached.value)
    assert "cost $0.0000010:" in str(reached.value)


def test_lost_replies_count_with_the_most_they_can_have_cost(journal):
    with Server(reply, first("cut", "hang", "500", "429")) as server:
        (completion,), client = ask(server, journal, "x", timeout=0.5)
    lost = most_tokens(request("x").messages, SCHEMA)
    assert completion.prompt_tokens == 2 * lost + 2
    assert completion.completion_tokens == 2 * 100 + 1
    assert client.usage[3:5] == completion[2:]


def test_what_a_stopped_request_may_have_cost_is_written_down(journal):
    async def main():
        async with Client(journal, MODEL, server.url, KEY, **QUICK) as client:
            task = asyncio.create_task(client.complete(request("x")))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with Server(reply, lambda asked: "hang") as server:
        asyncio.run(main())
    (line,) = lines(journal)
    assert (line["status"], line["completion_tokens"]) == ("failed", 100)


def test_budget_waits_for_what_is_out_before_it_says_no():
    async def main():
        budget = Budget(Prices(), None, 100)
        await budget.reserve(Tokens(30, 30))
        waiting = asyncio.create_task(budget.reserve(Tokens(30, 30)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        budget.settle(Tokens(30, 30), Tokens(10, 10))
        await waiting
        budget.settle(Tokens(30, 30), Tokens(10, 40))
        with pytest.raises(BudgetReached):
            await budget.reserve(Tokens(31, 0))
        with pytest.raises(BudgetReached):  # from then on nothing goes out, however small
            await budget.reserve(Tokens(1, 0))

    asyncio.run(main())


def test_a_server_that_counts_no_tokens_is_estimated(journal):
    with Server(reply, usage=False) as server:
        (completion,), _ = ask(server, journal, "x" * 100)
    assert completion.prompt_tokens == estimate_tokens(request("x" * 100).messages) == 3 + 29
    assert completion.completion_tokens == 31  # 106 characters


def test_a_dry_run_counts_what_a_run_would_use():
    dry = DryRun(lambda request: "a pattern", lambda r: [request_key(r, MODEL, SAMPLING)], Prices(1.0, 2.0))

    async def main():
        return [await dry.complete(request(content)) for content in ("x" * 350, "y" * 350, "x" * 350)]

    completions = asyncio.run(main())
    assert {completion[:2] for completion in completions} == {("ok", "a pattern")}
    assert dry.usage[:5] == (2, 0, 0, 2 * (100 + 3), 2 * 3)
    assert dry.usage.dollars == pytest.approx((206 * 1 + 6 * 2) / 1e6)
    assert dry.most_dollars == pytest.approx((206 * 1 + 200 * 2) / 1e6)


def test_a_dry_run_answers_with_what_the_journal_has(journal):
    with Server(reply) as server:
        (known,), _ = ask(server, journal, "x")
    dry = DryRun(lambda request: "a pattern", lambda r: [request_key(r, MODEL, SAMPLING)], journal=journal)

    async def main():
        return [await dry.complete(request(content)) for content in ("x", "x", "y")]

    assert asyncio.run(main())[:2] == [known, known]
    assert dry.usage[:2] == (1, 1)


# ---- silence ----


@pytest.mark.parametrize("key", [KEY, "correcthorsebatterystaple", "MyVllmKey"])
@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
def test_the_key_is_in_no_file_log_or_error(journal, caplog, capfd, status, key):
    body = {"error": {"message": f"got Authorization: Bearer {key}", "code": key}, "detail": key}
    if status == 200:
        body = {"choices": [{"message": {"content": f"your key is {key}"}, "finish_reason": "stop"}]}
    caplog.set_level(logging.DEBUG)
    with Server(reply, lambda asked: Raw(status, body)) as server:
        (result,), client = ask(server, journal, "x", key=key, attempts=2, deadline=0.5)
    shown = [repr(result), str(result), repr(client), str(client.notes), journal.path.read_text(), caplog.text]
    shown += [repr(getattr(result, "__context__", None)), repr(getattr(result, "__cause__", None)), *capfd.readouterr()]
    assert key not in "".join(shown)
    assert status in (401, 404) or "[key]" in str(result)


@pytest.mark.parametrize("key", ["sk-secret-123\n", "sk secret-123", "sk-secret-é"])
def test_a_key_that_cannot_be_sent_is_an_error_without_it(journal, key):
    with pytest.raises(ClientError, match="a space, a line break or a foreign letter") as error:
        Client(journal, MODEL, "http://127.0.0.1:1/v1", key)
    assert "secret" not in str(error.value)


def test_a_password_in_the_base_url_is_not_shown(journal):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (error,), _ = ask(f"http://me:hunter2@127.0.0.1:{unused.getsockname()[1]}/v1?token=hunter2", journal, "x")
    assert "hunter2" not in str(error)


def test_a_placeholder_is_no_secret(journal):
    with Server(lambda messages: "names of ollama models") as server:
        (completion,), _ = ask(server, journal, "x", key="ollama")
    assert completion.text == "names of ollama models"


def test_nothing_is_printed_or_logged(journal, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with Server(reply, random_faults(0.5, ("500", "cut", "429", "malformed"), 1)) as server:
        ask(server, journal, *map(str, range(20)))
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records if record.name != "asyncio"] == []


# ---- stopped and started again ----

RUN = """
import asyncio, sys
from pathlib import Path
from mistral_sae.explain.client import Client
from mistral_sae.explain.journal import Journal, locked
from mistral_sae.explain.types import Request

url, run_dir, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

async def main(journal):
    async with Client(journal, "test-model", url, "sk-test-0123456789abcdef", backoff=0.01, timeout=0.5) as client:
        requests = [Request([{"role": "user", "content": f"request {i}"}], None, 100) for i in range(count)]
        completions = await asyncio.gather(*map(client.complete, requests))
        print(*(completion.status for completion in completions))

try:
    with locked(run_dir), Journal(run_dir / "completions.jsonl") as journal:
        asyncio.run(main(journal))
except KeyboardInterrupt:
    print("stopped")
"""


def started(server, run_dir, count):
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", RUN, server.url, str(run_dir), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, path, number):
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_ctrl_c_leaves_the_journal_whole_and_the_terminal_clean(tmp_path):
    path = tmp_path / "completions.jsonl"
    with Server(reply, lambda asked: "hang" if int(asked.content.split()[1]) % 7 == 0 else None, delay=0.01) as server:
        process = started(server, tmp_path, 500)
        wait_for_lines(process, path, 40)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert out == "stopped\n"
    assert err == "" or sys.version_info < (3, 11)  # whose asyncio.run leaves noise of its own
    with Journal(path) as journal:
        assert journal.repaired == 0
        assert len(journal) >= 34


def test_2000_requests_with_every_fault_and_two_kills_end_with_one_true_record_each(tmp_path):
    """A fifth of all attempts go wrong, in every way, and the run is killed twice on the way."""
    count, path = 2000, tmp_path / "completions.jsonl"
    requests = [Request([{"role": "user", "content": f"request {i}"}], None, 100) for i in range(count)]
    contents = {request_key(r, MODEL, {"temperature": 0.0}): r.messages[-1]["content"] for r in requests}
    fault = random_faults(0.2, (*TRANSIENT, *TRUNCATED, *LASTING), seed=0)
    asked_again = []
    with Server(reply, fault) as server:
        for lines_until_kill in (500, 1300):
            process = started(server, tmp_path, count)
            wait_for_lines(process, path, lines_until_kill)
            process.kill()
            process.communicate()
            with Journal(path) as journal:
                finished = {content for key, content in contents.items() if journal.get(key)}
            assert len(finished) < count
            asked_again.append((len(server.log), finished))
        out, err = started(server, tmp_path, count).communicate()
        statuses = out.split()
        assert len(statuses) == count, err
        assert statuses.count("failed") < 20  # those few that had bad luck with every attempt
        for position, finished in asked_again:
            assert not finished & {served.content for served in server.log[position:]}

        with Journal(path) as journal:
            records = {content: journal.get(key) for key, content in contents.items()}
        recorded = Counter(
            line["key"] for line in map(json.loads, path.read_text().splitlines()) if line["status"] in FINAL
        )
        assert set(recorded.values()) == {1}  # none doubled
        truth = {"refusal": "refused", "filter": "filtered", "filter-400": "filtered", "ok": "ok"}
        for status, (content, record) in zip(statuses, records.items(), strict=True):
            outcomes = server.outcomes(content)
            if outcomes[-1] == "overflow":  # for the larger room of a reply that was truncated, if it was
                expected = "truncated" if "truncated" in outcomes else "overflow"
            else:
                expected = truth.get(outcomes[-1], "failed")
            assert status == (record.status if record else "failed") == expected, (content, outcomes)  # none lost
            assert status != "ok" or record.text == f"about {content}"
        served = Counter(served.outcome for served in server.log)
        assert set(served) == {*TRANSIENT, *TRUNCATED, *LASTING, "ok"}
        assert sum(served[fault] for fault in served if fault != "ok") > 0.15 * len(server.log)

        before = len(server.log)
        with Journal(path) as journal:
            again, _ = ask(server, journal, *requests)
        assert {served.content for served in server.log[before:]} == {
            content for content, status in zip(records, statuses, strict=True) if status == "failed"
        }
        assert [a.status for a, status in zip(again, statuses, strict=True) if status in FINAL] == [
            status for status in statuses if status in FINAL
        ]
