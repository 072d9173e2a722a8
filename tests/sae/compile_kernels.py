"""Compile what the Triton wrappers start, for GPUs that need not be there: a line of JSON a kernel with what it takes.

`python tests/sae/compile_kernels.py`; test_fused.py reads the lines. Triton is told of a driver that has
such a GPU, and kernels are compiled for the arguments that they are called with and not started.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from mistral_sae.sae.kernels import fused
from mistral_sae.sae.kernels.types import MatrixGradient, Rates, RowState

# The widest at which nothing spills, by capability; and on the newest Mistral 7B's
WIDTHS = {80: [8192], 89: [8192], 90: [4096, 8192]}
B, F, K = 6, 5, 160


def start_everything(d_model):
    """Every kernel as a training step at this width calls it, with and without rows on top, moments of either kind."""
    vectors, rows = torch.randn(B, d_model), torch.randn(F, d_model)
    fused.inner_products(vectors, torch.zeros(B, K, dtype=torch.int64), rows)
    terms = torch.arange(F + 1), vectors, torch.arange(F), torch.ones(F)
    plain, more = MatrixGradient(*terms), MatrixGradient(*terms, (torch.tensor([1, 3]), torch.randn(2, d_model)))
    for gradient in (plain, more):
        fused.row_products(gradient, rows)
        fused.squares(gradient)
    for moments in (torch.float32, torch.bfloat16):
        for along, copy in ((None, torch.empty(F, d_model, dtype=torch.bfloat16)), (torch.ones(F), None)):
            state = RowState(rows, torch.ones(F, d_model, dtype=moments), torch.ones(F, d_model, dtype=moments), copy)
            fused.adam_rows(state, more._replace(along=along), Rates(1e-3, torch.tensor(1.0), torch.tensor(0.0)))


def made_for(capability):
    """The kernels that are started on a GPU of this capability, which is its number, too: for Triton's caches."""
    gpu, run, made = GPUTarget("cuda", capability, 32), JITFunction.run, {}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: gpu,
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
        )
    )

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made[kernel.hash] = kernel

    with patch.object(JITFunction, "run", compile_only):
        for d_model in WIDTHS[capability]:
            start_everything(d_model)
    return made.values()


def main():
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for capability in WIDTHS:
            for kernel in made_for(capability):
                path.write_bytes(kernel.asm["cubin"])
                listing = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
                used = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
                told = {"gpu": kernel.metadata.target.arch, "kernel": kernel.name, "shared": kernel.metadata.shared}
                print(json.dumps(told | used))


if __name__ == "__main__":
    main()
