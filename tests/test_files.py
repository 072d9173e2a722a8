"""Files that are whole or not there: the state from which a run continues."""

import os
import resource
import stat
import subprocess

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

from mistral_sae import files
from mistral_sae.cli import Failed
from mistral_sae.files import SAEError, load_state, save_state


def test_training_state_comes_back_as_it_was(tmp_path):
    state = {
        "W_enc": torch.randn(100, 8).T,
        "row": torch.randn(100, 8)[3],
        "generator": torch.get_rng_state(),
        "count": torch.tensor(7),
        "half": torch.randn(4).to(torch.bfloat16),
        "dead": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    metadata = {"step": 12, "rate": 2e-4, "names": ["a", "é"], "nothing": None, "nested": {"k": [1, 2]}}
    save_state(tmp_path / "deep" / "state.safetensors", state, metadata)
    found, found_metadata = load_state(tmp_path / "deep" / "state.safetensors")
    assert found_metadata == metadata
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_view_is_stored_without_the_rest_of_its_storage(tmp_path):
    save_state(tmp_path / "state", {"row": torch.randn(1000, 100)[3]}, {})
    assert (tmp_path / "state").stat().st_size < 1000


def test_the_old_state_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.zeros(3)}, {"step": 1})
    with pytest.raises(TypeError):
        save_state(path, {"x": torch.ones(3)}, {"step": object()})

    def interrupted(partial):
        partial.write_bytes(b"half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, interrupted)
    assert load_state(path)[1] == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no half-written file stays behind
    save_state(path, {"x": torch.ones(3)}, {"step": 3})
    assert load_state(path)[1] == {"step": 3}


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a real file system of 1 MB, or where none can be mounted one in which no file may be larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted.returncode:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if mounted.returncode == 0:
        subprocess.run(["umount", folder], check=True)


WRITERS = {
    "a state": lambda path, big: save_state(path, {"x": torch.zeros(2**19 if big else 3)}, {}),
    "torch's safetensors": lambda path, big: files.write_atomically(
        path, lambda partial: save_file({"x": torch.zeros(2**19 if big else 3)}, partial)
    ),
    "numpy's safetensors": lambda path, big: files.write_atomically(
        path, lambda partial: safetensors.numpy.save_file({"x": np.zeros(2**18 if big else 3)}, partial)
    ),
    "text": lambda path, big: files.write_text(path, "x" * (2**21 if big else 3)),
    "a line": lambda path, big: files.append_line(path, {"x": "x" * (2**21 if big else 3)}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_what_was_there_stays(small_disk, writer):
    path = small_disk / "file"
    WRITERS[writer](path, False)
    before = path.read_bytes()
    with pytest.raises(Failed, match=rf"could not write {path} \((No space left on device|File too large)") as error:
        WRITERS[writer](path, True)
    assert "\n" not in str(error.value)
    assert "expected room" in str(error.value)
    assert path.read_bytes()[: len(before)] == before
    assert [entry.name for entry in small_disk.iterdir()] == [path.name]


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "a line"])
def test_a_file_is_synced_then_renamed_and_then_its_folder_is_synced(tmp_path, monkeypatch, writer):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        found = os.fstat(handle)
        done.append(f"sync {'folder' if stat.S_ISDIR(found.st_mode) else found.st_size}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    WRITERS[writer](tmp_path / "file", False)
    size = (tmp_path / "file").stat().st_size
    assert done == [f"sync {size}", "rename", "sync folder"]


def test_damaged_and_foreign_states_are_one_line(tmp_path):
    path = tmp_path / "state.safetensors"

    def assert_refused(match):
        with pytest.raises(SAEError, match=match) as error:
            load_state(path)
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
    save_file({"x": torch.zeros(3)}, path, metadata={files.STATE_KEY: "{}"})  # without a checksum
    assert_refused("damaged")


def test_one_flipped_bit_anywhere_in_a_state_is_found(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.ones(3), "half": torch.ones(2).bfloat16(), "none": torch.empty(0)}, {"step": 1})
    (expected, said), data, missed = load_state(path), path.read_bytes(), 0
    for bit in range(0, 8 * len(data), 3):  # wherever it is: in a name, a type, a shape, the metadata, a number
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensors, metadata = load_state(path)
        except SAEError:
            continue
        missed += 1
        assert metadata == said
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert missed < 8 * 8  # of the header's spaces
