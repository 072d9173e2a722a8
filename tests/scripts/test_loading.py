"""What explain.py and demo.py begin with."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mistral_sae.files import SAEError
from mistral_sae.loading import load_pair
from mistral_sae.model.language_model import STANDIN, inspect, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, save_sae

DOCS = Path(__file__).parent.parent.parent / "docs"


def opened(run_dir, **changed):
    rest = {"SAE_PATH": None, "HOOK_NAME": None, "MISTRAL_MODEL_PATH": None, "DEVICE": "cpu"}
    rest |= {"SAE_DEVICE": None, "DTYPE": None}
    rest |= {"ENGINE": "mistral-inference", "EXCLUDE_TOKENS": []}
    return load_pair(SimpleNamespace(RUN_DIR=str(run_dir), **rest | changed), inspect(STANDIN, "mistral-inference"))


def write_sae(folder, model_name="standin", fingerprint=None):
    sae = SparseAutoencoder(256, 8192, 8)
    sae.initialize(torch.randn(100, 256), seed=0)
    metadata = Metadata(model_name, "blocks.2.hook_resid_post", 2, True, 256, "stdlib", fingerprint)
    save_sae(folder, sae, metadata)


def test_what_is_opened_is_said_as_the_pages_show_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sae(Path("runs/standin/sae"))
    loaded, model = opened("runs/standin")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "engine    mistral-inference",
        "layer     2 of 0 to 5 (blocks.2.hook_resid_post)",
        "features  8,192 of runs/standin/sae",
    ]
    for page in ("explaining", "steering"):
        assert "\n".join(lines) in (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert (loaded.sae.d_model, model.last_layer) == (256, None)
    opened("elsewhere", SAE_PATH="runs/standin/sae")
    assert capsys.readouterr().out.splitlines() == lines


def test_a_folder_without_an_autoencoder_says_what_to_do(tmp_path):
    with pytest.raises(SAEError, match=r"run train\.py first"):
        opened(tmp_path)


def test_only_the_name_of_another_model_is_a_warning_not_a_longer_form_of_it(tmp_path, capsys):
    for name, warns in (("mistral-7b", True), ("someone/Standin", False)):
        write_sae(tmp_path / "sae", name)
        opened(tmp_path)
        assert ("warning: the autoencoder was trained on" in capsys.readouterr().out) == warns


def test_other_weights_are_a_warning_whatever_the_name_and_the_same_ones_are_none(tmp_path, capsys):
    ours = load_model(None, device="cpu").fingerprint(2)
    for name, fingerprint, warns in (("renamed", ours, False), ("standin", "0123456789abcdef", True)):
        write_sae(tmp_path / "sae", name, fingerprint)
        opened(tmp_path)
        out = capsys.readouterr().out
        assert ("warning: the autoencoder was trained on standin, of other weights than those of" in out) == warns
        assert out.count("warning") == warns
    opened(tmp_path, HOOK_NAME="blocks.1.hook_resid_post")  # its fingerprint is of the layer in its label
    assert "warning" not in capsys.readouterr().out
