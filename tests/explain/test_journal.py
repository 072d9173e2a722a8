import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_sae.explain.journal import FINAL, Journal, JournalError, locked
from mistral_sae.explain.types import Completion

ROOT = Path(__file__).parent.parent.parent
COMPLETIONS = {
    "a": Completion("ok", 'a "reply"\nof two lines, with \u2028, \ud800 and \U0001f9e0', 10, 5),
    "b": Completion("refused", "no", 7, 1),
    "c": Completion("truncated", "half a", 9, 3),
}
HOLD = """
import sys, time
from mistral_sae.explain.journal import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "completions.jsonl"


def fill(path, completions=COMPLETIONS):
    with Journal(path) as journal:
        for key, completion in completions.items():
            journal.append(key, completion, dollars=0.25)


def hold(run_dir):
    process = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_what_was_written_is_there_after_opening_again(path):
    fill(path)
    with Journal(path) as journal:
        assert {key: journal.get(key) for key in COMPLETIONS} == COMPLETIONS
        assert journal.get("d") is None
        assert len(journal) == 3
        assert (journal.tokens, journal.dollars) == (35, 0.75)
        assert journal.repaired == 0


def test_a_line_is_in_the_file_when_append_returns(path):
    with Journal(path) as journal:
        for number, (key, completion) in enumerate(COMPLETIONS.items(), 1):
            journal.append(key, completion)
            assert len(path.read_text().splitlines()) == number
            assert journal.get(key) == completion


def test_every_final_status_is_kept_and_a_failure_is_only_paid_for(path):
    statuses = [*sorted(FINAL), "failed"]
    fill(path, {status: Completion(status, "", 1, 1) for status in statuses})
    with Journal(path) as journal:
        assert [status for status in statuses if journal.get(status) is None] == ["failed"]
        assert journal.tokens == 2 * len(statuses)
        journal.append("failed", Completion("ok", "at last"))
        assert journal.get("failed").text == "at last"
    with Journal(path) as journal:
        assert journal.get("failed").text == "at last"


def test_tokens_that_had_no_price_are_counted_apart(path):
    fill(path)
    with Journal(path) as journal:
        assert journal.unpriced == 0
        journal.append("d", Completion("ok", "", 20, 2))
        journal.append("e", Completion("failed", "", 5, 0))
        journal.append("f", Completion("ok", "", 1, 1), dollars=1e-9)
        assert (journal.unpriced, journal.tokens) == (27, 35 + 29)
    with Journal(path) as journal:
        assert journal.unpriced == 27


def test_lines_are_synced_to_the_disk_every_so_often_and_at_the_end(path, monkeypatch):
    synced, now = [], 0.0
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(now))
    monkeypatch.setattr("mistral_sae.explain.journal.time.monotonic", lambda: now)
    with Journal(path) as journal:
        for number in range(40):
            now = 0.1 * number
            journal.append(str(number), Completion("ok", ""))
        assert synced == pytest.approx([1.1, 2.2, 3.3], abs=0.11)
    assert len(synced) == 4


def test_a_last_line_torn_at_any_byte_is_repaired_and_nothing_else_is_lost(path):
    fill(path)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(path) as journal:
            kept = size >= len(whole) - 1  # without its line break, the line is still whole
            assert (journal.get("c") is not None) == kept, size
            assert journal.get("a") == COMPLETIONS["a"]
            assert journal.repaired == (0 if kept else size - last)
            if not kept:
                journal.append("c", COMPLETIONS["c"], dollars=0.25)
        assert path.read_bytes() == whole


def test_zeros_after_a_power_cut_are_a_torn_line(path):
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(4096))
    with Journal(path) as journal:
        assert journal.repaired == 4096
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"key": "x"}', '{"feature": 3, "status": "ok"}'])
def test_a_file_that_is_no_journal_is_left_alone(path, line):
    fill(path)
    content = path.read_text() + line + "\n"
    path.write_text(content)
    with pytest.raises(JournalError, match=r"line 4 of .*: remove that line") as error:
        Journal(path)
    assert "\n" not in str(error.value)
    assert path.read_text() == content


def test_a_full_disk_is_one_line_and_leaves_the_file_whole(path, monkeypatch):
    fill(path)
    whole = path.read_bytes()
    with Journal(path) as journal:

        class Full:
            """A disk with room for ten more bytes."""

            room = 10

            def __getattr__(self, name):
                return getattr(real, name)

            def write(self, data):
                if not self.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = real.write(data[: self.room])
                self.room -= written
                return written

        real = journal._file
        monkeypatch.setattr(journal, "_file", Full())
        with pytest.raises(JournalError, match="No space left on device") as error:
            journal.append("d", Completion("ok", "text"))
        assert "\n" not in str(error.value)
        assert journal.get("d") is None
        assert path.read_bytes() == whole
        monkeypatch.setattr(journal, "_file", real)
        journal.append("d", Completion("ok", "text"))
    with Journal(path) as journal:
        assert journal.get("d").text == "text"


def test_a_write_that_takes_only_part_of_a_line_is_finished(path, monkeypatch):
    with Journal(path) as journal:

        class Short:
            def __getattr__(self, name):
                return getattr(real, name)

            def write(self, data):
                return real.write(data[:7])

        real = journal._file
        monkeypatch.setattr(journal, "_file", Short())
        journal.append("a", COMPLETIONS["a"])
        monkeypatch.setattr(journal, "_file", real)
        assert journal.get("a") == COMPLETIONS["a"]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a"]


def test_a_journal_that_somebody_else_writes_to_is_an_error(path):
    fill(path)
    with Journal(path) as journal:
        path.write_bytes(b"\n" + path.read_bytes())
        with pytest.raises(JournalError, match="changed under this run"):
            journal.get("b")


def test_a_line_that_somebody_else_replaced_is_not_taken_for_the_one_that_was_there(path):
    fill(path)
    with Journal(path) as journal:
        path.write_bytes(path.read_bytes().replace(b'"key": "b"', b'"key": "x"'))
        with pytest.raises(JournalError, match="changed under this run"):
            journal.get("b")


def test_the_second_run_on_a_run_dir_says_so_and_stops(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(JournalError, match="another run at work") as error, locked(tmp_path):
            pass
        assert f"process {process.pid} on " in str(error.value)
        assert "\n" not in str(error.value)
        with locked(tmp_path / "other"):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_run_holds_nothing(tmp_path):
    process = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path) as note:
        assert note == ""
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with locked(tmp_path):  # nor does one that has ended
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path) as note:
        assert "has no locks" in note
        assert "\n" not in note
