"""The hub, which no test of this folder reaches."""

import pytest

from mistral_sae.data import documents


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """The Hugging Face hub cannot be asked, and nothing is here that was read from it earlier."""
    from huggingface_hub import constants

    documents._on_hub.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    return tmp_path / "hub cache"
