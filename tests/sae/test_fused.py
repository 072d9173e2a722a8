"""The Triton kernels without a GPU: equal to torch's under the interpreter, compiled for GPUs, and counted."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mistral_sae.sae import kernels
from mistral_sae.sae.kernels import devices, portable

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
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_kernel_compiles_without_spills_and_into_little_shared_memory(capability, tmp_path):
    printed = run("-W", "error", "tests/sae/compile_kernels.py", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    used = [json.loads(line) for line in printed.splitlines()]
    assert {each["kernel"] for each in used} == {"inner_products_kernel", "squares_kernel", "adam_rows_kernel"}
    for each in used:
        assert each["stack"] == each["local"] == 0, each  # where registers spill to
        assert 0 <= each["shared"] <= SMALLEST_SHARED, each


def test_the_package_runs_without_triton(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    devices.operations.cache_clear()
    assert kernels.operations(torch.device("cuda")) is portable
    devices.operations.cache_clear()


@needs_triton
@pytest.mark.parametrize(("kind", "capability", "name"), [
    ("cpu", None, "portable"), ("cuda", (7, 5), "portable"), ("cuda", (8, 0), "fused"), ("cuda", (9, 0), "fused"),
])  # fmt: skip
def test_tritons_kernels_run_on_a_gpu_from_ampere_on(monkeypatch, kind, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    devices.operations.cache_clear()
    assert kernels.operations(torch.device(kind)).__name__ == f"mistral_sae.sae.kernels.{name}"
    devices.operations.cache_clear()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, mistral_sae.sae.trainer; print('mistral_sae.sae.kernels.fused' in sys.modules)"
    assert run("-c", code).strip() == "False"
