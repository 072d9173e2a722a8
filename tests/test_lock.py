import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from mistral_sae.cli import UserError
from mistral_sae.files import locked

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from mistral_sae.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(run_dir):
    process = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_on_a_run_dir_says_so_and_stops(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError, match="another run at work") as error, locked(tmp_path):
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
    def acquire(lock, *arguments, **options):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path) as note:
        assert "has no locks" in note
        assert "\n" not in note
