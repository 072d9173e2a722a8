"""The client against a server that others wrote: `transformers serve`, with a small random model."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from asking import ask, request

SECONDS = 120  # in which it has to start
pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture(scope="module")
def url(hugging_face_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(hugging_face_folder)]
    options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    process = subprocess.Popen(
        command + options,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + SECONDS
    try:
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _is_up(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def test_what_a_real_server_generates_is_a_reply_and_its_tokens_are_counted(url, hugging_face_folder, journal):
    requests = [request(f"number {n}", max_tokens=8) for n in range(3)]
    asking = {"model": str(hugging_face_folder), "timeout": 60, "longest_reply": 32}
    completions, client = ask(url, journal, *requests, **asking)
    for completion in completions:  # of a random model, which ends where it is cut off
        assert completion.status in ("ok", "truncated")
        assert completion.text
        assert completion.prompt_tokens > 0
        assert completion.completion_tokens >= 8
    assert client.notes["a system message"].startswith("the server does not take")  # HTTP 500, of the chat template
    assert client.stopped == ""
    again, client = ask(url, journal, *requests, **asking)
    assert again == completions
    assert "3 answered from the journal" in client.report[-1]
