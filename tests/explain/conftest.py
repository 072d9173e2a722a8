import pytest

from mistral_sae.explain.journal import Journal


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "completions.jsonl")


@pytest.fixture
def quick_retries(monkeypatch):
    """openai waits for half a second before its first retry, and the client for longer."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("mistral_sae.explain.client.PAUSE", 0.05)
