"""The full training step of a TopK autoencoder: ours beside SAE Lens's, sparsify's, and the machine's floor.

    python -m benchmarks.step

A step is forward, loss, backward, projection, clipping, optimizer and renormalisation, of each project's own training
code on float32 parameters. Ours runs twice: with the encoder product in float32, like the others', and with the
product in bfloat16 that nominates the features whose values float32 computes, which is our default where it pays. All
take turns in one process, so that a machine that slows down slows all of them; figures are medians. Peak memory is
that of a process of each one's own, above what it needed before the autoencoder was made. Where the processor has more
than AVX2, all of it is measured again by a process whose libraries are told to use no more: what older processors have.

The floor is what no TopK step in float32 can avoid: one dense encoder product at the machine's own rate, Adam's
traffic (seven passes over both matrices) and one write and one read of the pre-activations at its own bandwidth.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import peak_megabytes, save
from benchmarks.peers import sparsify_step
from mistral_sae.sae.kernels.step import bf16_pays
from mistral_sae.sae.trainer import TrainConfig, Trainer

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel needs a GPU; this is the path it takes without one
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
THREADS = 2
ROUNDS = 7
LEARNING_RATE = 1e-4


class Size(NamedTuple):
    """One problem."""

    D: int
    F: int
    K: int
    B: int
    dead: float  # share of the features

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        dead = f", {self.dead:.0%} dead" if self.dead else ""
        return f"D={self.D}, F={self.F}, K={self.K}, B={self.B}{dead}"


SIZES = [Size(D, F, K, 1024, dead) for D, F, K in ((512, 16384, 32), (1024, 32768, 64)) for dead in (0.0, 0.1)]


def dead_features(size: Size) -> torch.Tensor:
    """Which features are dead: spread over all of them."""
    return torch.randperm(size.F, generator=torch.Generator().manual_seed(1))[: int(size.dead * size.F)].sort().values


def keep_dead(b_enc: torch.Tensor, dead: torch.Tensor, W_enc: torch.Tensor) -> None:
    """Lower the biases of dead features by two standard deviations of their pre-activations, W_enc (D, F).

    About where those of dead features lay in trainings of the stand-in; far below the K-th largest of all.
    """
    b_enc.data[dead] = -2 * torch.linalg.vector_norm(W_enc.data[:, dead], dim=0)


def ours(size: Size, bf16: bool | None = None) -> Callable[[torch.Tensor], Any]:
    """Our step; by default its encoder product is in bfloat16 where that pays."""
    config = TrainConfig(size.D, size.F, size.K, k_aux=size.D // 2, dead_after_tokens=10**9)
    trainer = Trainer(config, bf16=bf16)
    trainer.initialize(torch.randn(256, size.D))
    dead = dead_features(size)
    keep_dead(trainer.sae.b_enc, dead, trainer.sae.W_enc)
    trainer.dead = dead
    return lambda x: trainer.step(x, LEARNING_RATE)


def sae_lens(size: Size) -> Callable[[torch.Tensor], Any]:
    """SAE Lens's SAETrainer on its TopKTrainingSAE."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=size.D, d_sae=size.F, k=size.K))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=size.B,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        dead_feature_window=10**6,
    )
    trainer = SAETrainer(config, sae, iter(()))
    dead = dead_features(size)
    keep_dead(sae.b_enc, dead, sae.W_enc)
    trainer.n_forward_passes_since_fired[dead] = 1e9
    return trainer.step


def sparsify(size: Size) -> Callable[[torch.Tensor], Any]:
    """sparsify's SparseCoder with the step of its trainer, Adam in place of its default SignSGD.

    Gradients are clipped, which its trainer does not, so that all do the same work: about 1 % of its time.
    """
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(size.D, SparseCoderConfig(num_latents=size.F, k=size.K), device="cpu", dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
    mask = torch.zeros(size.F, dtype=torch.bool)
    mask[dead_features(size)] = True
    keep_dead(coder.encoder.bias, dead_features(size), coder.encoder.weight.T)

    return lambda x: sparsify_step(coder, optimizer, x, dead_mask=mask if size.dead else None)


STEPS = {
    "mistral-sae": ours,
    "mistral-sae, float32 product": functools.partial(ours, bf16=False),
    "sparsify": sparsify,
    "sae-lens": sae_lens,
}
if not bf16_pays(torch.device("cpu")):
    del STEPS["mistral-sae, float32 product"]  # which is the default's


def floor(size: Size) -> Callable[[], float]:
    """A measurement of the unavoidable: seconds, from this machine's product and copy."""
    x, W, pre = torch.randn(size.B, size.D), torch.randn(size.F, size.D), torch.empty(size.B, size.F)
    source, target = torch.randn(2, 2**26)  # 256 MB each
    adam, pre_bytes = 7 * 4 * 2 * size.D * size.F, 2 * 4 * size.B * size.F

    def measure() -> float:
        product = seconds(lambda: torch.mm(x, W.T, out=pre))
        bandwidth = 2 * 4 * len(source) / seconds(lambda: target.copy_(source))
        return product + (adam + pre_bytes) / bandwidth

    return measure


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(size: Size, names: list[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Median seconds a step of each, taking turns, and of the floor."""
    x = torch.randn(size.B, size.D, generator=torch.Generator().manual_seed(0))
    steps = {name: STEPS[name](size) for name in names}
    lowest = floor(size)
    times: dict[str, list[float]] = {name: [] for name in [*names, "floor"]}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(seconds(lambda step=step: step(x)))
        times["floor"].append(lowest())
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is a warm-up


def peak_memory(size: Size, name: str) -> float:
    """Megabytes that a process of its own needs at most for three steps, above those before."""
    command = [sys.executable, "-m", "benchmarks.step", "--memory", name, *map(str, size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def print_peak_memory(name: str, size: Size) -> None:
    """What `peak_memory` runs."""
    tiny = STEPS[name](Size(8, 64, 4, 16, 0.0))  # imports and libraries' own buffers
    tiny(torch.randn(16, 8))
    x = torch.randn(size.B, size.D)
    before = peak_megabytes()
    step = STEPS[name](size)
    for _ in range(3):
        step(x)
    print(peak_megabytes() - before)


def kind() -> str:
    """What the libraries use of the processor."""
    return torch.backends.cpu.get_cpu_capability() + (" and bfloat16" if bf16_pays(torch.device("cpu")) else "")


def measure_all() -> list[dict[str, Any]]:
    """All sizes, all contenders."""
    results = []
    for size in SIZES:
        medians = measure(size, list(STEPS))
        memory = {name: peak_memory(size, name) for name in STEPS}
        print(f"\n{size.name}, {kind()}")
        for name, median in medians.items():
            ratio = f"{median / medians['mistral-sae']:5.2f} x ours   {median / medians['floor']:5.2f} x floor"
            extra = f"   {size.B / median:9,.0f} tokens/s   peak {memory[name]:7,.0f} MB" if name in memory else ""
            print(f"  {name:28} {1000 * median:8.1f} ms   {ratio}{extra}", flush=True)
        results.append({"size": size._asdict(), "seconds": medians, "peak_megabytes": memory})
    return results


def measure_avx2() -> list[dict[str, Any]]:
    """The same by a process that uses AVX2 alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.step", "--into", str(path)]
        subprocess.run(command, env=os.environ | AVX2, check=True)
        return json.loads(path.read_text())


def main() -> None:
    """Measure, print, save."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    match sys.argv[1:]:
        case ["--memory", name, D, F, K, B, dead]:
            print_peak_memory(name, Size(int(D), int(F), int(K), int(B), float(dead)))
        case ["--into", path]:
            Path(path).write_text(json.dumps(measure_all()))
        case _:
            results = {kind(): measure_all()}
            if torch.backends.cpu.get_cpu_capability() == "AVX512":
                results["AVX2"] = measure_avx2()
            save("step", results)


if __name__ == "__main__":
    main()
