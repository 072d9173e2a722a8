"""The Triton kernels without a GPU: equal to torch's under the interpreter, compiled for GPUs, and counted."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch

from mistral_sae.sae.kernels import devices
from mistral_sae.sae.kernels.devices import operations

ROOT = Path(__file__).parent.parent.parent
SMALLEST_SHARED = 99 * 1024  # bytes that a block may have on sm_89, the least of those below
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux on x86-64")


def run(*command: str, **environment: str) -> str:
    """What a process of its own prints: whether Triton interprets is settled when it is imported."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_under_the_interpreter_every_kernel_equals_torchs():
    printed = run("-m", "pytest", "-q", "tests/sae/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert " passed" in printed
    assert "skipped" not in printed


@needs_triton
def test_every_kernel_compiles_without_spills_and_into_little_shared_memory(tmp_path):
    printed = run("-W", "error", "tests/sae/compile_kernels.py", TRITON_CACHE_DIR=str(tmp_path))
    used = [json.loads(line) for line in printed.splitlines()]
    kernels = ("inner_products_kernel", "squares_kernel", "adam_rows_kernel")
    assert {(each["gpu"], each["kernel"]) for each in used} == set(product((80, 89, 90), kernels))
    for each in used:
        assert each["stack"] == each["local"] == 0, each  # where registers spill to
        assert 0 <= each["shared"] <= SMALLEST_SHARED, each


@pytest.fixture
def chosen_for(monkeypatch):
    """A function: what is chosen for a kind of device of some capability."""
    devices.operations.cache_clear()
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape) + 1)  # as if it were there

    def choose(kind: str, capability: tuple[int, int] = (9, 0)) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return operations(torch.device(kind)).__name__.rpartition(".")[2]

    yield choose
    devices.operations.cache_clear()


def test_the_package_runs_without_triton(monkeypatch, chosen_for):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert chosen_for("cuda") == "portable"


@needs_triton
@pytest.mark.parametrize(("kind", "capability", "name"), [
    ("cpu", (9, 0), "portable"), ("cuda", (7, 5), "portable"), ("cuda", (8, 0), "fused"), ("cuda", (9, 0), "fused"),
])  # fmt: skip
def test_tritons_kernels_run_on_a_gpu_from_ampere_on(monkeypatch, chosen_for, kind, capability, name):
    from mistral_sae.sae.kernels import fused

    monkeypatch.setattr(fused, "inner_products", lambda x, indices, rows: x)
    assert chosen_for(kind, capability) == name


@needs_triton
def test_where_tritons_kernels_do_not_start_a_line_says_so_and_torchs_run(monkeypatch, chosen_for, capsys):
    from mistral_sae.sae.kernels import fused

    def fail(x, indices, rows):
        raise RuntimeError("Failed to find C compiler\nmore of it")

    monkeypatch.setattr(fused, "inner_products", fail)
    assert chosen_for("cuda") == chosen_for("cuda") == "portable"
    (line,) = capsys.readouterr().out.splitlines()
    assert "do not start on cuda (Failed to find C compiler): training uses torch's" in line


def test_importing_the_package_does_not_import_triton():
    code = "import sys, mistral_sae.sae.trainer; print('mistral_sae.sae.kernels.fused' in sys.modules)"
    assert run("-c", code).strip() == "False"
