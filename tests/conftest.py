"""Small random models; scripts run in this process; Ctrl-C as Python handles it."""

import gc
import runpy
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_server import serve
from small_models import (
    KINDS,
    PARAMS,
    Folders,
    params_of,
    random_weights,
    write_hugging_face_folder,
    write_mistral_folder,
)

import config
from mistral_sae.constants import override

pytest_plugins = ["chromium"]  # the fixtures of tests in a browser


def pytest_collection_finish():
    """Garbage is looked for among what tests make, not in what was imported, which is most of a process."""
    gc.freeze()


@pytest.fixture(scope="session", params=KINDS)
def folders(request, tmp_path_factory) -> Folders:
    """One random model of each kind: dense with grouped queries, sliding window, mixture of experts."""
    root = tmp_path_factory.mktemp(request.param)
    params = params_of(request.param)
    weights = random_weights(params)
    return Folders(
        write_mistral_folder(root / "mistral", params, weights),
        write_hugging_face_folder(root / "hugging_face", params, weights),
    )


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory) -> Path:
    """A small random dense model in mistral-inference's layout."""
    root = tmp_path_factory.mktemp("dense")
    return write_mistral_folder(root / "tiny", PARAMS, random_weights(PARAMS))


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory) -> Path:
    """A small random dense model in Hugging Face's layout, of the weights of `mistral_folder`."""
    root = tmp_path_factory.mktemp("dense")
    return write_hugging_face_folder(root / "tiny-hf", PARAMS, random_weights(PARAMS))


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(20, 4096, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def sae_lens():
    """SAE Lens, without what its imports warn of; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Play the hub with a folder, within a with-block."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    @contextmanager
    def play(folder, **options):
        with serve(folder, **options) as (address, asked):
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
            )
            monkeypatch.setattr(hf_api.api, "endpoint", address)
            yield asked

    return play


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script of the repository in this process, which spares it the imports: exit code, output, error stream.

    Its pictures are left empty: drawing them takes half of a run. Runs in processes of their own draw them.
    """
    root = Path(__file__).parent.parent
    monkeypatch.setattr("mistral_sae.explain.figures._save", lambda path, panels: path.write_bytes(b""))
    monkeypatch.setattr("mistral_sae.explain.figures.svg", lambda panel: "<svg></svg>")
    monkeypatch.chdir(root)
    for name in ("MISTRAL_MODEL_PATH", "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which it replaces
    terminated = signal.getsignal(signal.SIGTERM)  # and so this

    def run(script: str, arguments: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, terminated)
    override([], config)


@pytest.fixture
def journal(tmp_path):
    """An empty journal of completions."""
    from mistral_sae.explain.journal import Journal

    return Journal(tmp_path / "completions.jsonl")


@pytest.fixture
def quick_retries(monkeypatch):
    """Shorten the pauses before requests are sent again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("mistral_sae.explain.client.PAUSE", 0.05)


@pytest.fixture
def interruptible():
    """Ctrl-C as Python handles it, here and in processes started from here: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
