"""The client against a local server that does to it what servers do."""

import asyncio
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import openai_server as fake
import pytest
from asking import KEY, MODEL, ask, first, lines, opened, request, serve
from openai_server import LASTING, TRANSIENT, TRUNCATED, Raw, random_faults

from mistral_sae.cli import UserError
from mistral_sae.explain.client import IN_A_ROW
from mistral_sae.explain.journal import Budget, Journal, Prices, estimate_tokens, most_tokens, request_key
from mistral_sae.explain.server import Server
from mistral_sae.explain.types import STATUSES, Request

ROOT = Path(__file__).parent.parent.parent
WRONG = {
    "500": 3,
    "cut": 3,
    "drop": 3,
    "malformed": 2,
    "html": 2,
    "schema": 2,
    "empty": 2,
}  # the latter may be paid for
FINAL = {status for status, outcome in STATUSES.items() if not outcome.ask_again}
pytestmark = pytest.mark.usefixtures("quick_retries")


# ---- what happens to one attempt ----


@pytest.mark.parametrize("fault", [*TRANSIENT, "429-date", "429-ms"])
@pytest.mark.parametrize("after_first", [False, True])
def test_a_fault_that_passes_is_retried(journal, fault, after_first):
    with serve(first(fault), key=KEY) as server:
        start = time.monotonic()
        (completion,), client = ask(server, journal, "x", timeout=0.7, after_first=after_first)
    assert completion[:2] == ("ok", "about x")
    assert server.outcomes("x") == [fault, "ok"]
    assert time.monotonic() - start < 10  # a hanging or trickling server is left at the timeout
    assert f"{1 + after_first} requests, 1 retries" in client.report[-1]
    assert {line["status"] for line in lines(journal)} == {"ok"}


@pytest.mark.parametrize(("fault", "attempts"), WRONG.items())
def test_a_fault_that_stays_is_a_failure_with_its_reason(journal, fault, attempts):
    with serve(lambda asked: fault) as server:
        (completion,), _ = ask(server, journal, "x", attempts=3, after_first=True)
    assert completion.status == "failed"
    assert completion.text.startswith(f"{attempts} attempts failed, the last with")
    assert "\n" not in completion.text
    assert server.outcomes("x") == [fault] * attempts


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_request_answered_too_slowly_fails_and_names_the_constants_that_help(journal, fault):
    with serve(lambda asked: fault) as server:
        (completion,), client = ask(server, journal, "x", attempts=2, timeout=0.2)
    assert completion[:2] == ("failed", "2 attempts failed, the last with no reply within 0.2 s")
    assert server.outcomes("x") == [fault] * 2
    assert client.notes["slow"].startswith("2 attempts had no reply within 0.2 s: raise REQUEST_TIMEOUT")


@pytest.mark.parametrize("fault", ["429", "503", "hang"])
def test_a_request_is_given_up_at_its_deadline(journal, fault):
    with serve(lambda asked: fault) as server:
        start = time.monotonic()
        (completion,), _ = ask(server, journal, "x", deadline=1.0, after_first=True)
    assert 0.9 < time.monotonic() - start < 10
    assert completion.status == "failed"
    assert completion.text.startswith("no answer within 1 s; the last attempt: ")
    assert len(server.log) >= (2 if fault == "hang" else 8)  # being busy is no fault


def test_the_deadline_does_not_run_while_a_request_waits_for_its_turn(journal):
    with serve(delay=0.2) as server:
        completions, _ = ask(server, journal, *map(str, range(8)), concurrency=1, deadline=1.0)
    assert {completion.status for completion in completions} == {"ok"}


def test_no_deadline_runs_out_while_a_busy_server_answers_others(journal):
    """20 answers each quarter of a second are 2.5 s of work, and no request may take more than one."""
    answered = Counter()

    def fault(asked):
        window = int(time.monotonic() / 0.25)
        answered[window] += 1
        return "429" if answered[window] > 20 else None

    with serve(fault) as server:
        start = time.monotonic()
        completions, _ = ask(server, journal, *map(str, range(200)), deadline=1.0)
    assert Counter(completion.status for completion in completions) == {"ok": 200}
    assert 2.0 < time.monotonic() - start < 20


def test_a_server_that_answers_one_after_the_other_is_given_the_time_for_all(journal):
    """Each reply takes half the timeout, so that of several out at once most come too late."""
    with serve(delay=0.15, serial=True) as server:
        completions, client = ask(server, journal, *map(str, range(16)), timeout=0.3, deadline=5)
    assert {completion.status for completion in completions} == {"ok"}
    assert "lower CONCURRENCY" in client.notes["slow"]


def test_a_server_that_takes_few_at_once_is_given_few(journal):
    with serve(lambda asked: "429" if server.at_once > 5 else None, delay=0.03) as server:
        completions, client = ask(server, journal, *map(str, range(150)), concurrency=64)
    assert {completion.status for completion in completions} == {"ok"}
    assert int(client.progress.split(", ")[-1].split()[0]) <= 10


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_the_first_request_goes_alone_and_then_no_more_at_once_than_allowed(journal, concurrency):
    with serve(delay=0.1) as server:
        ask(server, journal, *map(str, range(6 * concurrency)), concurrency=concurrency)
    assert concurrency * 2 // 3 <= server.most_at_once <= concurrency
    assert server.log[1].time - server.log[0].time > 0.09


@pytest.mark.parametrize(("fault", "least"), [("429-after", 0.5), ("429-ms", 0.5), ("429-date", 0.9), ("429", 0.0)])
def test_the_server_says_how_long_to_wait(journal, fault, least):
    with serve(first(fault), retry_after=0.5) as server:
        (completion,), _ = ask(server, journal, "x")
    assert completion.status == "ok"
    assert least <= server.log[1].time - server.log[0].time < least + 5


@pytest.mark.parametrize("header", ["nan", "inf", "-5", "soon", "", "Mon, 99 Foo"])
def test_a_nonsense_retry_after_is_no_reason_to_wait(journal, header):
    with serve(first(Raw(503, {}, {"Retry-After": header}))) as server:
        start = time.monotonic()
        (completion,), _ = ask(server, journal, "x")
    assert completion.status == "ok"
    assert time.monotonic() - start < 10


def test_other_requests_go_on_beside_one_that_fails(journal):
    with serve(lambda asked: "500" if asked.content == "3" else None) as server:
        completions, client = ask(server, journal, *map(str, range(6)), attempts=2)
    assert [completion.status for completion in completions] == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert client.report[-1].startswith("6 requests, 1 retries")


# ---- what ends the run ----

REFUSED = [
    ("401", "wants a valid key (HTTP 401)"),
    ("403", "wants a valid key (HTTP 403"),
    ("404", "has no model 'test-model'"),
    ("quota", "has no quota left for this key (HTTP 429"),
    (Raw(400, {"error": {"message": "API key not valid. Pass a valid one."}}), "wants a valid key (HTTP 400"),
    (Raw(402, {"error": "Payment required"}), "has no quota left for this key (HTTP 402"),
    (Raw(400, {"error": {"message": "Your credit balance is too low to access the API"}}), "has no quota left"),
    (Raw(400, {"error": {"message": "Limit", "code": "billing_hard_limit_reached"}}), "has no quota left"),
    (Raw(403, {"error": {"message": "Country, region, or territory not supported"}}), "(HTTP 403: Country, region"),
    (Raw(400, {"message": "Invalid model: test-model"}), "has no model 'test-model'"),
    (Raw(404, [{"error": {"message": "models/m is not found", "status": "NOT_FOUND"}}]), "no chat completions for"),
    (Raw(405, "Method Not Allowed"), "has no chat completions for model 'test-model'"),
    (Raw(429, {}, {"Retry-After": "3600"}), "no quota left for this key (HTTP 429, for 3,600 s): add credit, or wait"),
    ("hang", "does not answer"),
]


@pytest.mark.parametrize(("fault", "words"), REFUSED)
def test_what_no_request_can_survive_ends_the_run_at_once_and_costs_nothing(journal, fault, words):
    with serve(lambda asked: fault) as server:
        start = time.monotonic()
        results, client = ask(server, journal, *map(str, range(50)), deadline=1.0)
    assert time.monotonic() - start < 10
    assert len(client.report) == 1  # which the error need not be repeated in
    assert {type(result) for result in results} == {UserError}
    assert len({str(result) for result in results}) == 1
    assert words in str(results[0])
    assert "\n" not in str(results[0])
    assert len(server.log) == 1
    assert fault == "hang" or journal.tokens == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("html", "no chat completion but '<html><body>Welcome"),
        ("malformed", 'no chat completion but \'{"choices": [{"message"'),
        ("empty", "an empty reply"),
        (Raw(200, "data: {\n\ndata: [DONE]"), "no chat completion but 'data: { data: [DONE]'"),
        (Raw(200, {"success": True, "data": {"choices": []}}), 'no chat completion but \'{"success": true'),
        (Raw(200, {"choices": [{"message": {"content": "", "reasoning": "I think."}}]}), "the thoughts 'I think'"),
    ],
)
def test_a_server_of_useless_replies_is_asked_twice_and_its_words_are_quoted(journal, fault, words):
    with serve(lambda asked: fault) as server:
        results, _ = ask(server, journal, *map(str, range(50)))
    assert {type(result) for result in results} == {UserError}
    assert words in str(results[0])
    assert "\n" not in str(results[0])
    assert len(server.log) == 2


@pytest.mark.parametrize(
    "fault", ["html", "empty", Raw(200, {"choices": [{"message": {"content": None, "reasoning": "I think."}}]})]
)
def test_a_server_that_comes_to_send_nothing_useful_is_left_after_a_few_requests(journal, fault):
    with serve(lambda asked: fault) as server:
        results, client = ask(server, journal, *map(str, range(50)), after_first=True, concurrency=2)
    assert {result.status for result in results} == {"failed", "stopped"}
    assert f"{IN_A_ROW} requests in a row had 2 attempts failed" in client.stopped
    assert client.is_broken
    assert len(server.log) <= 1 + 2 * (IN_A_ROW + 1)


def test_useless_replies_here_and_there_end_no_run(journal):
    with serve(lambda asked: "empty" if int(asked.content) % 2 else None) as server:
        results, client = ask(server, journal, *map(str, range(30)), after_first=True, concurrency=1)
    assert [result.status for result in results] == ["ok", "failed"] * 15
    assert client.stopped == ""


def test_what_a_run_waits_for_stands_in_its_progress(journal, monkeypatch):
    monkeypatch.setattr("mistral_sae.explain.client.SILENCE", 0.1)

    async def main():
        async with opened(server, journal, timeout=0.3) as client:
            before, task = client.progress, asyncio.create_task(client.complete(request("x")))
            await asyncio.sleep(0.2)
            first = client.progress
            await asyncio.sleep(0.4)
            task.cancel()
            return before, first, client.progress

    with serve(lambda asked: "hang") as server:
        before, first, second = asyncio.run(main())
    assert before == "0 requests, 0 retries, 1 at once"
    assert first == "0 requests, 0 retries, 1 at once, no answer for 0 s"
    assert re.fullmatch(
        r"0 requests, . retries, . late, . at once, no answer for . s \(no reply within 0.3 s\)", second
    )


@pytest.mark.parametrize(
    ("fault", "words"), [("401", "wants a valid key"), ("quota", "no quota left"), ("hang", "does not answer")]
)
def test_a_server_that_answers_no_more_stops_the_run_and_its_answers_are_kept(journal, fault, words):
    numbers = map(str, range(40))
    with serve(lambda asked: "hang" if asked.content == "0" else fault) as server:
        start = time.monotonic()
        rest, client = ask(server, journal, *numbers, deadline=0.8, timeout=0.4, after_first=True)
    statuses = Counter(completion.status for completion in rest)
    assert set(statuses) == ({"failed", "stopped"} if fault == "hang" else {"stopped"})
    assert statuses["failed"] < IN_A_ROW
    assert time.monotonic() - start < 8  # not 40 deadlines, one after the other
    assert client.is_broken
    assert client.report[0] == f"stopped: {client.stopped}"
    assert words in client.stopped
    assert [line["status"] for line in lines(journal)].count("ok") == 1
    assert fault == "hang" or len(lines(journal)) == 2  # what is refused costs nothing; what hung beside it may have


@pytest.mark.parametrize(
    ("fault", "status", "attempts"), [(Raw(403, "<html>blocked</html>"), "filtered", 1), ("404", "failed", 3)]
)
def test_one_request_that_is_forbidden_or_not_found_leaves_the_others_alone(journal, fault, status, attempts):
    """A firewall's page, or a balancer's, once a completion has shown that key and model are right."""
    with serve(lambda asked: fault if asked.content == "odd" else None) as server:
        completions, client = ask(server, journal, "odd", "x", "y", attempts=3, after_first=True)
    assert [completion.status for completion in completions] == [status, "ok", "ok"]
    assert len(server.outcomes("odd")) == attempts
    assert (client.stopped, client.is_broken) == ("", False)


def test_the_first_error_names_what_is_wrong(journal):
    with serve(key=KEY, model=MODEL) as server:
        ((completion,), _), ((model,), _) = ask(server, journal, "x"), ask(server, journal, "x", model="gpt-99")
        ((address,), _) = ask(server.url.removesuffix("/v1"), journal, "y")
        ((other,), _), ((none,), _) = (ask(server, journal, "y", key=key) for key in ("sk-another-key", None))
    assert completion.status == "ok"
    assert "no model 'gpt-99'" in str(model)
    assert "OPENAI_BASE_URL, which mostly ends in /v1" in str(address)
    assert "wants a valid key (HTTP 401)" in str(other)
    assert "wants a valid key (HTTP 401)" in str(none)


def test_a_server_that_is_not_running_is_said_soon(journal):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        start = time.monotonic()
        results, _ = ask(url, journal, *map(str, range(8)))
    assert time.monotonic() - start < 10
    assert all(f"the server at {url} cannot be reached" in str(result) for result in results)
    assert {type(result) for result in results} == {UserError}
    assert lines(journal) == []


def test_a_server_that_goes_away_later_is_waited_for(journal):
    async def main():
        with serve() as server:
            client = opened(server, journal, attempts=2)
            assert (await client.complete(request("x"))).status == "ok"
        task = asyncio.create_task(client.complete(request("y")))
        await asyncio.sleep(0.5)
        assert not task.done()
        with serve(port=server.port):
            completion = await task
            await client.__aexit__()
        return completion

    assert asyncio.run(main()).status == "ok"


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1"])
def test_a_base_url_that_is_none_is_an_error(journal, url):
    with pytest.raises(UserError, match="found the base URL"):
        Server(MODEL, url, KEY)


@pytest.mark.parametrize("url", ["ftp://me:hunter2@host/v1", "host/v1?key=hunter2"])
def test_a_secret_in_a_base_url_that_is_none_is_not_shown(journal, url):
    with pytest.raises(UserError, match="found the base URL") as error:
        Server(MODEL, url, KEY)
    assert "hunter2" not in str(error.value)


def test_azure_wants_its_query_behind_the_path_and_the_key_in_a_header_of_its_own():
    client = opened("http://me:pass@host/openai/deployments/m?api-version=2024-10-21", None, Budget(Journal("none")))
    assert str(client._openai.base_url) == "http://me:pass@host/openai/deployments/m/"
    assert client._openai.default_query == {"api-version": "2024-10-21"}
    assert client._openai.default_headers["api-key"] == KEY
    assert client.server.address == "http://host/openai/deployments/m"


def test_a_journal_that_cannot_be_written_is_an_error(journal):
    journal.path.mkdir()
    with serve() as server:
        (result,), _ = ask(server, journal, "x")
    assert isinstance(result, UserError)
    assert "Is a directory" in str(result)


# ---- the journal ----


def test_what_was_answered_is_not_asked_again(journal):
    with serve() as server:
        before, _ = ask(server, journal, "x", "y")
        after, client = ask(server, journal, "x", "y", "z")
    assert after[:2] == before
    assert [served.content for served in server.log[2:]] == ["z"]
    assert client.report[-1].startswith("1 requests, 0 retries, 2 answered from the journal; ")


def test_whatever_a_completion_depends_on_makes_it_another(journal):
    with serve() as server:
        ask(server, journal, "x", request("x", max_tokens=99), request("x", schema=None), request("x", {"a": 1}))
        ask(server, journal, "x", model="another")
        ask(server, journal, "x", sampling={"temperature": 0.5})
        assert len(server.log) == len(journal) == 6
        ask(server.url + "/", journal, "x", key="sk-another-key-0123", concurrency=3)
        assert len(server.log) == 6


def test_what_failed_is_asked_again_at_the_next_start(journal):
    with serve(first("500", "500")) as server:
        (failed,), _ = ask(server, journal, "x", attempts=2)
        (completion,), _ = ask(server, journal, "x", attempts=2)
    assert (failed.status, completion.status) == ("failed", "ok")
    assert [line["status"] for line in lines(journal)] == ["failed", "ok"]


def test_a_completion_is_written_down_before_it_is_handed_out(journal):
    async def main():
        async with opened(server, journal) as client:
            for number in range(3):
                completion = await client.complete(request(str(number)))
                assert [line["text"] for line in lines(journal)][number:] == [completion.text]

    with serve() as server:
        asyncio.run(main())


# ---- budget ----


def test_the_budget_holds_with_many_out_and_over_several_runs(journal):
    requests = [request(str(number), max_tokens=50) for number in range(40)]
    most = sum(most_tokens(requests[0], 50))
    with fake.Server(lambda messages: "word " * 40, delay=0.02) as server:
        for bound in (3 * most, 4 * most, 8 * most):
            budget = Budget(journal, max_tokens=bound)
            results, client = ask(server, journal, *requests, budget=budget)
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
    with serve() as server:
        (completion,), client = ask(server, journal, "x" * 400, budget=Budget(journal, prices))
        dollars = (completion.prompt_tokens * 2 + completion.completion_tokens * 8) / 1e6
        assert journal.dollars == lines(journal)[0]["dollars"] == pytest.approx(dollars)
        assert client.report[-1].endswith(": $0.00 at $2 and $8 a million")
        assert client.progress == f"${dollars:.3f}, 1 requests, 0 retries, 2 at once"
    with serve() as server:
        later = Journal(journal.path)
        budget = Budget(later, prices, max_dollars=dollars + 1e-5)
        results, client = ask(server, later, "x" * 400, "y" * 400, budget=budget)
        assert results[0] == completion  # what is known costs nothing
        assert results[1].status == "stopped"
        assert "before this run" in results[1].text
        assert client.progress.endswith(", stopping")
        assert server.log == []


def test_lost_replies_count_with_the_most_they_can_have_cost(journal):
    with serve(first("cut", "hang", "500", "429")) as server:
        (completion,), _ = ask(server, journal, "x", timeout=0.5)
    lost = most_tokens(request("x"), 100)
    assert completion[2:] == (2 * lost.prompt + 2, 2 * lost.completion + 1)
    assert journal.tokens == sum(completion[2:])


def test_what_a_stopped_request_may_have_cost_is_written_down(journal):
    async def main():
        async with opened(server, journal) as client:
            task = asyncio.create_task(client.complete(request("x")))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with serve(lambda asked: "hang") as server:
        asyncio.run(main())
    (line,) = lines(journal)
    assert (line["status"], line["completion_tokens"]) == ("failed", 100)


def test_a_server_that_counts_no_tokens_is_estimated(journal):
    with serve(usage=False) as server:
        (completion,), _ = ask(server, journal, "x" * 100)
    assert completion.prompt_tokens == estimate_tokens(*(m["content"] for m in request("x" * 100).messages)) == 3 + 29
    assert completion.completion_tokens == 31  # 106 characters


# ---- silence ----


@pytest.mark.parametrize("key", [KEY, "correcthorsebatterystaple", "MyVllmKey"])
@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
def test_the_key_is_in_no_file_log_or_error(journal, caplog, capfd, status, key):
    body = {"error": {"message": f"got Authorization: Bearer {key}", "code": key}, "detail": key}
    if status == 200:
        body = {"choices": [{"message": {"content": f"your key is {key}"}, "finish_reason": "stop"}]}
    caplog.set_level(logging.DEBUG)
    with serve(lambda asked: Raw(status, body)) as server:
        (result,), client = ask(server, journal, "x", key=key, attempts=2, deadline=0.5)
    shown = [repr(result), str(result), repr(client.server), str(client.report), str(lines(journal)), caplog.text]
    shown += [repr(getattr(result, "__context__", None)), repr(getattr(result, "__cause__", None)), *capfd.readouterr()]
    assert key not in "".join(shown)
    assert status == 401 or "[key]" in str(result)


@pytest.mark.parametrize("key", ["sk-secret-123\n", "sk secret-123", "sk-secret-é"])
def test_a_key_that_cannot_be_sent_is_an_error_without_it(journal, key):
    with pytest.raises(UserError, match="a space, a line break or a foreign letter") as error:
        Server(MODEL, "http://127.0.0.1:1/v1", key)
    assert "secret" not in str(error.value)


def test_a_password_in_the_base_url_is_not_shown(journal):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (error,), _ = ask(f"http://me:hunter2@127.0.0.1:{unused.getsockname()[1]}/v1?token=hunter2", journal, "x")
    assert "hunter2" not in str(error)


def test_a_placeholder_is_no_secret(journal):
    with fake.Server(lambda messages: "names of ollama models") as server:
        (completion,), _ = ask(server, journal, "x", key="ollama")
    assert completion.text == "names of ollama models"


def test_nothing_is_printed_or_logged(journal, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with serve(random_faults(0.5, ("500", "cut", "429", "malformed"), 1)) as server:
        ask(server, journal, *map(str, range(20)))
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records if record.name != "asyncio"] == []


# ---- stopped and started again ----

RUN = """
import asyncio, sys
from pathlib import Path
import openai._base_client
from mistral_sae.explain.client import Client
from mistral_sae.explain.journal import Budget, Journal
from mistral_sae.explain.server import Server
from mistral_sae.explain.types import Request
from mistral_sae.files import locked

openai._base_client.INITIAL_RETRY_DELAY = 0.01
url, run_dir, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

async def main(journal):
    async with Client(Server("test-model", url, "sk-test-0123456789", timeout=0.5), journal, Budget(journal)) as client:
        requests = [Request([{"role": "user", "content": f"request {i}"}], None, 100) for i in range(count)]
        completions = await asyncio.gather(*map(client.complete, requests))
        print(*(completion.status for completion in completions))

try:
    with locked(run_dir):
        asyncio.run(main(Journal(run_dir / "completions.jsonl")))
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


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_the_journal_whole_and_the_terminal_clean(tmp_path):
    path = tmp_path / "completions.jsonl"
    with serve(lambda asked: "hang" if int(asked.content.split()[1]) % 7 == 0 else None, delay=0.01) as server:
        process = started(server, tmp_path, 500)
        wait_for_lines(process, path, 40)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert out == "stopped\n"
    assert err == "" or sys.version_info < (3, 11)  # whose asyncio.run leaves noise of its own
    assert path.read_bytes().endswith(b"\n")
    assert len(Journal(path)) >= 34


def test_400_requests_with_every_fault_and_two_kills_end_with_one_true_record_each(tmp_path):
    """A fifth of all attempts go wrong, in every way, and the run is killed twice on the way."""
    count, path = 400, tmp_path / "completions.jsonl"
    requests = [Request([{"role": "user", "content": f"request {i}"}], None, 100) for i in range(count)]
    contents = {request_key(r, MODEL, {"temperature": 0.0}): r.messages[-1]["content"] for r in requests}
    fault = random_faults(0.2, (*TRANSIENT, *TRUNCATED, *LASTING), seed=0)
    asked_again = []
    with serve(fault) as server:
        for lines_until_kill in (100, 260):
            process = started(server, tmp_path, count)
            wait_for_lines(process, path, lines_until_kill)
            process.kill()
            process.communicate()
            journal = Journal(path)
            finished = {content for key, content in contents.items() if journal.get(key)}
            assert len(finished) < count
            asked_again.append((len(server.log), finished))
        out, err = started(server, tmp_path, count).communicate()
        statuses = out.split()
        assert len(statuses) == count, err
        assert statuses.count("failed") < 4  # those few that had bad luck with every attempt
        for position, finished in asked_again:
            assert not finished & {served.content for served in server.log[position:]}

        journal = Journal(path)
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
        again, _ = ask(server, Journal(path), *requests)
        assert {served.content for served in server.log[before:]} == {
            content for content, status in zip(records, statuses, strict=True) if status == "failed"
        }
        assert [a.status for a, status in zip(again, statuses, strict=True) if status in FINAL] == [
            status for status in statuses if status in FINAL
        ]
