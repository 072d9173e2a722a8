"""Training steps of one process and of two, which share the features or the batch, on a core each.

    python -m benchmarks.scaling

Two processes with a thread each take turns: one of them makes steps alone while the other sleeps, then both make the
same steps together, as shards and as replicas. What is timed is a step on a batch that both have. Figures are medians
over ROUNDS; the load of the machine is beside them, since other work on it slows two processes more than one.

    python -m benchmarks.scaling reckon

prints the tables of docs/scaling.md: memory and bytes on the wire by `mistral_sae.sae.memory`, times by the terms that
`benchmarks.traffic` counts for one GPU and by data sheets. Nothing of it is measured.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed as dist

from benchmarks.machine import RESULTS, save
from mistral_sae.cli import size_of
from mistral_sae.distributed import ALONE, connect
from mistral_sae.sae.memory import training_needs, wire
from mistral_sae.sae.trainer import TrainConfig, Trainer

ROUNDS = 7
MESHES = {"one process": ALONE, "two shards": "1x2", "two replicas": "2x1"}
SIZES = [(16_384, 32, 1024), (16_384, 64, 1024), (16_384, 32, 4096), (65_536, 32, 1024)]  # features, K, batch
D_MODEL = 512

# ---- what a GPU and its wires do, for the reckoning ----

FEATURES, BATCH, TOKENS = (2**17, 2**20, 2**24), 4096, (1e9, 40e9)
MODEL_MS = 50.0  # Mistral 7B to layer 16 on BATCH tokens, the middle of what is reckoned for an H100
NEAR, FAR = 0.8 * 450e9, 0.8 * 50e9  # bytes a second into a GPU: NVLink in a machine of 8; 400 Gb/s between machines
LATENCY_MS = 0.03 * 12  # of a dozen exchanges a step
ROOM = 80e9 * 0.97  # of a GPU
# Shares of a term that grow with the features: one reads parameters and moments, the other W_enc; the rest is tokens'
OF_PARAMETERS = {"gradients, projection, Adam, rounding, rows": 0.51, "losses, gradients of biases": 0.72}
BETWEEN = ("residuals", "active features of other replicas", "the same from other replicas")  # machines, of replicas


def measure() -> None:
    """Time all sizes and write the result."""
    folder = RESULTS / "scaling.partial"
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, "-m", "benchmarks.scaling", "rank", str(folder)], env=environment, check=True)
    path = folder / "times.json"
    found = json.loads(path.read_text())
    path.unlink()
    folder.rmdir()
    for each in found:
        print(f"F={each['F']:,}, K={each['K']}, B={each['B']}:", end=" ")
        print(", ".join(f"{name} {rate:,.0f}" for name, rate in each["tokens_per_second"].items()), "tokens a second")
    save("scaling", {"D": D_MODEL, "rounds": ROUNDS, "load": os.getloadavg(), "sizes": found})


def rank(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, found = dist.get_rank() == 0, []
    meshes = {name: mesh if mesh is ALONE else connect(mesh, "cpu") for name, mesh in MESHES.items()}
    for F, k, B in SIZES:
        config = TrainConfig(D_MODEL, F, k, batch_size=B, train_tokens=1000 * B, dead_after_tokens=10**9)
        x = torch.randn(B, D_MODEL, generator=torch.Generator().manual_seed(0))
        trainers = {name: Trainer(config, mesh=mesh) for name, mesh in meshes.items() if first or mesh is not ALONE}
        for trainer in trainers.values():
            trainer.initialize(x)
        seconds: dict[str, list[float]] = {name: [] for name in meshes}
        for turn in range(ROUNDS + 1):  # the first is to warm up
            for name in meshes:
                dist.barrier()
                start = time.perf_counter()
                if name in trainers:
                    trainers[name].step(x, 1e-4)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        rates = {name: B / statistics.median(each) for name, each in seconds.items()}
        found.append({"F": F, "K": k, "B": B, "tokens_per_second": rates})
    if first:
        (folder / "times.json").write_text(json.dumps(found))
    dist.destroy_process_group()


class Model(NamedTuple):
    """The sizes of Mistral 7B up to layer 16, as the plan asks for them."""

    d_model: int = 4096
    vocab_size: int = 32_768
    head_parameters: int = 4096 * 32_768
    cache_width: int = 65_536

    def parameters(self, last_layer: int | None = None) -> int:
        """Those of all layers, or up to one with the embedding."""
        return 7_248_023_552 if last_layer is None else 32_768 * 4096 + (last_layer + 1) * 218_112_000


def step_ms(features: int, mesh: tuple[int, int]) -> tuple[float, float]:
    """Milliseconds of a rank's step, computing and receiving, reckoned; no feature is dead."""
    steps = json.loads((RESULTS / "traffic.json").read_text())["results"]["steps"]
    (replicas, shards), ms = mesh, 0.0
    grown = features / 2**17 / shards
    for name, term in steps["mistral-sae"]["terms"].items():
        each = 1e3 * term["seconds"]
        if name in ("encoder product", "top-k"):
            ms += each * grown / replicas
        elif name == "exact values of candidates":
            ms += each / shards / replicas
        elif name == "standardise":
            ms += each
        else:  # tokens' parts are split, but for errors and their means
            share = OF_PARAMETERS.get(name, 0.0)
            ms += each * share * grown + each * (1 - share) / (1 if name.startswith("losses") else shards)
    if mesh == (1, 1):
        return ms, 0.0
    far = {name for name in received(features, mesh) if shards > 8 or (replicas > 1 and name in BETWEEN)}
    times = (size / (FAR if name in far else NEAR) for name, size in received(features, mesh).items())
    return ms, LATENCY_MS + 1e3 * sum(times)


def config_of(features: int) -> TrainConfig:
    """The training of docs/mistral-7b.md with so many features."""
    sizes = {"k_aux": 2048, "buffer_tokens": 32_768, "rows_per_forward": 32, "context_length": 256}
    return TrainConfig(4096, features, 128, batch_size=BATCH, moments_dtype="bfloat16", **sizes)


def received(features: int, mesh: tuple[int, int]) -> dict[str, int]:
    """Bytes that a rank receives in a step without dead features."""
    found = wire([config_of(features)], mesh, torch.bfloat16)
    return {name: size for name, size in found.items() if "dead" not in name}


def reckon() -> None:
    """Print the table of docs/scaling.md."""
    print("| features | GPUs | mesh | memory of each | received a step | step, computing | receiving | model |", end="")
    print(" tokens/s | 1B tokens | 40B tokens |\n|" + " ---: |" * 11)
    for features in FEATURES:
        for mesh in ((1, 1), (1, 8), (1, 64), (8, 8)):
            ranks = mesh[0] * mesh[1]
            needs = training_needs(
                [config_of(features)], Model(), last_layer=16, dtype=torch.bfloat16, on_cpu=False, mesh=mesh
            )
            memory = sum(needs.first.parts(1)[0].values())
            row = [f"{features:,}", str(ranks), "x".join(map(str, mesh)), size_of(memory)]
            if memory > ROOM:
                print("|", " | ".join(row), "|" + " does not fit |" + " |" * 6)
                continue
            computing, receiving = step_ms(features, mesh)
            seconds = (MODEL_MS / ranks + computing + receiving) / 1e3
            row += [size_of(sum(received(features, mesh).values())), f"{computing:.1f} ms", f"{receiving:.1f} ms"]
            row += [f"{MODEL_MS / ranks:.1f} ms", f"{BATCH / seconds:,.0f}"]
            row += [f"{tokens / BATCH * seconds / 3600:,.1f} h" for tokens in TOKENS]
            print("|", " | ".join(row), "|")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["rank", folder]:
            rank(Path(folder))
        case ["reckon"]:
            reckon()
        case _:
            measure()
