import asyncio
import errno
import io
import os

import pytest

from mistral_sae.cli import UserError
from mistral_sae.explain.journal import Budget, DryRun, Journal, Prices, Tokens
from mistral_sae.explain.types import STATUSES, Completion, Request

COMPLETIONS = {
    "a": Completion("ok", 'a "reply"\nof two lines, with \u2028 and \U0001f9e0', 10, 5),
    "b": Completion("refused", "no", 7, 1),
    "c": Completion("truncated", "half a", 9, 3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "completions.jsonl"


def fill(path, completions=COMPLETIONS):
    journal = Journal(path)
    for key, completion in completions.items():
        journal.append(key, completion, dollars=0.25)


def test_what_was_written_is_there_after_opening_again(path):
    fill(path)
    journal = Journal(path)
    assert {key: journal.get(key) for key in COMPLETIONS} == COMPLETIONS
    assert journal.get("d") is None
    assert len(journal) == 3
    assert (journal.tokens, journal.dollars) == (35, 0.75)


def test_a_line_is_in_the_file_when_append_returns(path):
    journal = Journal(path)
    for number, (key, completion) in enumerate(COMPLETIONS.items(), 1):
        journal.append(key, completion)
        assert len(path.read_text().splitlines()) == number
        assert journal.get(key) == completion


def test_every_final_status_is_kept_and_a_failure_is_only_paid_for(path):
    statuses = [status for status in STATUSES if status != "stopped"]
    fill(path, {status: Completion(status, "", 1, 1) for status in statuses})
    journal = Journal(path)
    assert [status for status in statuses if journal.get(status) is None] == ["failed"]
    assert journal.tokens == 2 * len(statuses)
    journal.append("failed", Completion("ok", "at last"))
    assert journal.get("failed").text == "at last"
    journal = Journal(path)
    assert journal.get("failed").text == "at last"


def test_tokens_that_had_no_price_are_counted_apart(path):
    fill(path)
    journal = Journal(path)
    assert journal.unpriced == 0
    journal.append("d", Completion("ok", "", 20, 2))
    journal.append("e", Completion("failed", "", 5, 0))
    journal.append("f", Completion("ok", "", 1, 1), dollars=1e-9)
    assert (journal.unpriced, journal.tokens) == (27, 35 + 29)
    journal = Journal(path)
    assert journal.unpriced == 27


def test_a_last_line_torn_at_any_byte_is_repaired_and_nothing_else_is_lost(path):
    fill(path)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        kept = size == len(whole)
        assert (journal.get("c") is not None) == kept, size
        assert journal.get("a") == COMPLETIONS["a"]
        if not kept:
            journal.append("c", COMPLETIONS["c"], dollars=0.25)
        assert path.read_bytes() == whole


def test_zeros_after_a_power_cut_are_a_torn_line(path):
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(4096))
    assert Journal(path).get("c") == COMPLETIONS["c"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"key": "x"}', '{"feature": 3, "status": "ok"}'])
def test_a_file_that_is_no_journal_is_left_alone(path, line):
    fill(path)
    content = path.read_text() + line + "\n"
    path.write_text(content)
    with pytest.raises(UserError, match=r"line 4 of .*: remove that line") as error:
        Journal(path)
    assert "\n" not in str(error.value)
    assert path.read_text() == content


def test_a_full_disk_is_one_line_and_leaves_the_file_whole(path, monkeypatch):
    fill(path)
    whole = path.read_bytes()
    journal = Journal(path)

    class Full(io.FileIO):
        """A disk with room for ten more bytes."""

        def write(self, data):
            if self.tell() >= len(whole) + 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:10])

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", lambda path, mode: io.BufferedWriter(Full(path, "a")))
        with pytest.raises(UserError, match="No space left on device") as error:
            journal.append("d", Completion("ok", "text"))
    assert "\n" not in str(error.value)
    assert journal.get("d") is None
    assert path.read_bytes() == whole
    journal.append("d", Completion("ok", "text"))
    assert Journal(path).get("d").text == "text"


# ---- what requests cost ----


@pytest.mark.parametrize(
    ("bound", "shown"), [(0.0001, "$0.00010"), (0.00000123, "$0.0000012"), (0.5, "$0.50"), (1234.5, "$1,234.50")]
)
def test_a_budget_that_is_reached_is_shown_with_digits_that_say_something(path, bound, shown):
    journal = Journal(path)
    journal.append("a", Completion("ok", ""), dollars=bound)
    shortage = Budget(journal, Prices(1.0, 1.0), bound).shortage(Tokens(1, 0))
    assert f"the budget of {shown} is reached: {shown} spent ({shown} of them before this run)" in shortage
    assert "take $0.0000010: raise MAX_DOLLARS to go on" in shortage


def test_a_budget_waits_for_what_is_in_flight_before_it_says_no(path):
    async def main():
        budget = Budget(Journal(path), max_tokens=100)
        assert await budget.reserve(Tokens(30, 30)) == ""
        waiting = asyncio.create_task(budget.reserve(Tokens(30, 30)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        budget.settle(Tokens(30, 30), Tokens(10, 10))
        assert await waiting == ""
        budget.settle(Tokens(30, 30), Tokens(10, 40))
        assert "the budget of 100 tokens is reached: 70 tokens spent" in await budget.reserve(Tokens(31, 0))
        assert await budget.reserve(Tokens(1, 0))  # from then on nothing goes out, however small

    asyncio.run(main())


def test_a_dry_run_counts_what_a_run_would_use_and_answers_with_what_the_journal_has(path):
    journal = Journal(path)
    journal.append("known", Completion("ok", "from the journal"))
    budget = Budget(journal, Prices(1000.0, 2000.0), max_dollars=0.2)

    def keys(request):
        return [request.messages[0]["content"].strip("x") or "unknown"]

    dry = DryRun(lambda request: "a pattern", keys, journal, budget)

    async def main():
        asked = ["x" * 350, "x" * 350, "known", "known"]
        return [await dry.complete(Request([{"role": "user", "content": each}], None, 100)) for each in asked]

    assert [completion.text for completion in asyncio.run(main())] == ["a pattern"] * 2 + ["from the journal"] * 2
    assert (dry.typical, dry.most) == (Tokens(100, 3), Tokens(100, 100))
    assert dry.summary == (
        "1 requests, and 1 that are answered already, about 100 tokens to read and 3 to write: $0.11, without retries "
        "at most $0.30, at $1000 and $2000 a million"
    )
    budget = Budget(journal, max_tokens=102)
    dry = DryRun(lambda request: "a pattern", keys, journal, budget)
    asyncio.run(main())
    assert dry.summary.endswith(" 3 to write; the budget ends before that")
