"""Files that are whole or not there: the state from which a run continues."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mistral_sae import files
from mistral_sae.files import SAEError, load_state, save_state


def test_training_state_comes_back_as_it_was(tmp_path):
    whole = torch.randn(100, 8)
    state = {
        "W_enc": whole.T,
        "row": whole[3],
        "same": whole[3],
        "generator": torch.get_rng_state(),
        "count": torch.tensor(7),
        "half": torch.randn(4).to(torch.bfloat16),
        "dead": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    metadata = {"step": 12, "rate": 2e-4, "names": ["a", "é"], "nothing": None, "nested": {"k": [1, 2]}}
    save_state(tmp_path / "deep" / "state.safetensors", state, metadata)
    found, found_metadata = load_state(tmp_path / "deep" / "state.safetensors", "cpu")
    assert found_metadata == metadata
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    save_state(tmp_path / "state", {"row": torch.randn(1000, 100)[3]}, {})
    assert (tmp_path / "state").stat().st_size < 1000


def test_the_old_state_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.zeros(3)}, {"step": 1})

    def disk_full(tensors, filename, **_):
        Path(filename).write_bytes(b"half of")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", disk_full)
        with pytest.raises(OSError, match="no space"):
            save_state(path, {"x": torch.ones(3)}, {"step": 2})
    with pytest.raises(TypeError):
        save_state(path, {"x": torch.ones(3)}, {"step": object()})
    assert load_state(path, "cpu")[1] == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no half-written file stays behind
    save_state(path, {"x": torch.ones(3)}, {"step": 3})
    assert load_state(path, "cpu")[1] == {"step": 3}


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    save_state(tmp_path / "state", {"x": torch.zeros(3)}, {})
    assert done[:2] == ["sync", "rename"]


def test_damaged_and_foreign_states_are_one_line(tmp_path):
    path = tmp_path / "state.safetensors"

    def assert_refused(match):
        with pytest.raises(SAEError, match=match) as error:
            load_state(path, "cpu")
        assert "\n" not in str(error.value)
        assert "expected" in str(error.value)

    assert_refused("found no")
    save_state(path, {"x": torch.zeros(300)}, {"step": 1})
    data = path.read_bytes()
    for damaged in (b"", data[:6], data[:40], data[:-1], b"PK\x03\x04" + data):
        path.write_bytes(damaged)
        assert_refused("damaged")
    save_file({"x": torch.zeros(3)}, path)
    assert_refused("no training state")
    save_file({"x": torch.zeros(3)}, path, metadata={files.STATE_KEY: "{"})
    assert_refused("no JSON .* in the metadata")
