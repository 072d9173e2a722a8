"""Scripts in processes of their own: new ones, or forks of one that has the imports behind it, which spares seconds."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tools import forked

ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "MISTRAL_MODEL_PATH")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "mistral_sae.loading", "mistral_sae.model.language_model", "mistral_sae.sae.trainer", "mistral_sae.sae.resume",
    "mistral_sae.explain.report", "mistral_sae.explain.client", "mistral_common.tokens.tokenizers.mistral",
])  # fmt: skip


def in_a_new_process(script: str, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a script as a user does: exit code, output, error stream."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, f"{script}.py", *arguments],
        cwd=forked.ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def _nothing() -> None:
    pass


class Fork:
    """A script at work in a fork, after something that prepares it there, such as a patch."""

    def __init__(self, script: str, arguments: Sequence[str], prepare: Callable[[], object] = _nothing):
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output")
        self._process = FORKS.Process(target=_run, args=(script, arguments, self._output, prepare))
        self._process.start()
        self.pid = self._process.pid

    def is_at_work(self) -> bool:
        return self._process.is_alive()

    def ended(self, seconds: float = 120) -> tuple[int, str, str]:
        """Wait for its end: exit code, output, error stream."""
        self._process.join(seconds)
        assert not self.is_at_work()
        with self._folder:
            return self._process.exitcode, self._output.read_text(), Path(f"{self._output}.err").read_text()


def _run(script: str, arguments: Sequence[str], output: Path, prepare: Callable[[], object]) -> None:
    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(forked.ROOT)
    forked.run(script, arguments, output, prepare)
