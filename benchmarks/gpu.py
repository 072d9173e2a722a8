"""What a CUDA GPU makes of it: the training step beside what is reckoned of it, end to end, generation, memory, peers.

    python -m benchmarks.gpu

Sizes are those that mistral_sae/defaults.py has for Mistral 7B, and the language model is a Mistral 7B with random
weights, made on the device: nothing is downloaded. Tokens are random too, so tokenizing is not part of it. Times are
medians after a warm-up, by CUDA's own clock. A part that runs out of memory says so and the others go on.

Beside each time of a step stands what benchmarks/traffic.py reckons of it, with the bandwidth and the rates of products
that this device is found to have, and a verdict; likewise beside the peak of memory what is planned. `--check` runs the
tests that want a GPU first and writes what they said with the rest: `make gpu-check`. `--smoke` runs everything in tiny
sizes, on a CPU too, and saves nothing.
"""

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import config
from benchmarks import traffic
from benchmarks.accounting import Speeds
from benchmarks.clock import DEVICE, REPEATS, peak, seconds, speeds, wall
from benchmarks.machine import save
from benchmarks.peers import sparsify_step
from benchmarks.random_mistral import MISTRAL_7B, SMOKE_MISTRAL, random_model, random_rows, spec_of
from benchmarks.stages import Stages, step_parts
from mistral_sae import constants
from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.tokens import Row, prefetch
from mistral_sae.defaults import defaults
from mistral_sae.sae import memory, optimizer
from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels import step as topk_step
from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.trainer import TrainConfig, Trainer

BATCHES = (4096, 16384)  # tokens a step
BUFFERS = 3  # of residuals, end to end, after one as a warm-up
DEAD = 8192  # features, in the step with AuxK
GPU_BYTES = 24e9  # of the card that config.py's constants are meant to fit
HOLDS = 1.3  # times what is reckoned, up to which a reckoning holds
PROMPT, GENERATED = 32, 64  # tokens

RANDOM = "MISTRAL_MODEL_PATH=random weights"  # anything but the stand-in
SMOKE = ["TARGET_LAYER=1", "D_HIDDEN=512", "K=8", "K_AUX=16", "CONTEXT_LENGTH=16", "BATCH_SIZE=64"]
SMOKE += ["BUFFER_TOKENS=256", "ROWS_PER_FORWARD=4"]


# ---- the step ----


def random_residuals(batch: int, d_model: int) -> torch.Tensor:
    """A batch (B, D) in the language model's dtype."""
    return torch.randn(batch, d_model, device=DEVICE, dtype=torch.bfloat16)


def new_trainer(d_model: int, moments: str) -> Trainer:
    """A trainer with config.py's constants, on random residuals."""
    training = replace(TrainConfig.of(config, d_model), moments_dtype=moments)
    trainer = Trainer(training, DEVICE)
    trainer.initialize(random_residuals(256, d_model))
    return trainer


def step(d_model: int, batch: int, moments: str, rates: Speeds, torch_only: bool = False) -> dict[str, Any]:
    """The autoencoder's training step: time, with dead features too, its parts, its peak, and what is reckoned."""
    with ExitStack() as stack:
        if torch_only:
            for module in (topk_step, optimizer):
                stack.enter_context(patch.object(module, "operations", lambda device: portable))
        found = step_alone(d_model, batch, moments)  # when it returns, its memory is free
    took = found["seconds"]
    print(f"  {1000 * took:.1f} ms   {batch / took:,.0f} tokens/s   peak {found['peak_bytes'] / 1e9:.1f} GB")
    print(f"  {1000 * found['seconds_with_dead']:.1f} ms with {found['dead']:,} dead features")
    if not torch_only and find_spec("triton") is not None:
        sizes = traffic.Sizes(batch, d_model, config.D_HIDDEN, config.K, 0, moments)
        found["reckoned"] = judge(found, sizes, rates)
    return found


def step_alone(d_model: int, batch: int, moments: str) -> dict[str, Any]:
    """The same without what is reckoned."""
    peak()
    trainer, x = new_trainer(d_model, moments), random_residuals(batch, d_model)

    def one() -> None:
        trainer.step(x, config.LEARNING_RATE)

    kernels = operations(DEVICE).__name__.rpartition(".")[2]
    found: dict[str, Any] = {"kernels": kernels, "bf16_product": trainer.bf16, "seconds": seconds(one)}
    stages = Stages()
    with stages.wrapping(step_parts(DEVICE)):
        for _ in range(REPEATS):
            one()
        stages.stop()
    found["parts"] = {name: value / REPEATS for name, value in stages.seconds.items()}
    found["peak_bytes"] = peak()
    found["dead"] = min(DEAD, config.D_HIDDEN // 10)
    trainer.dead = torch.randperm(config.D_HIDDEN, device=DEVICE)[: found["dead"]].sort().values
    trainer.sae.b_enc[trainer.dead] = -100.0
    return found | {"seconds_with_dead": seconds(one)}


def judge(found: dict[str, Any], sizes: traffic.Sizes, rates: Speeds) -> dict[str, Any]:
    """What is reckoned of a step on a device with these speeds, printed beside what was measured."""
    count = traffic.our_step(sizes, rates)
    with_dead = traffic.our_step(sizes._replace(dead=found["dead"]), rates)
    reckoned = {name: cost.seconds for name, cost in count.costs.items()}
    floor = traffic.floor(sizes, rates).seconds
    print(f"  {verdict('step', found['seconds'], sum(reckoned.values()))}   {found['seconds'] / floor:.2f} x the floor")
    dead_seconds = sum(cost.seconds for cost in with_dead.costs.values())
    print(f"  {verdict('step with dead features', found['seconds_with_dead'], dead_seconds)}")
    if found["peak_bytes"]:
        print(f"  {verdict('peak memory', found['peak_bytes'] / 1e12, count.peak / 1e12)} (GB)")
    for name in reckoned.keys() & found["parts"].keys():
        print(f"    {verdict(name, found['parts'][name], reckoned[name])}")
    return {"seconds": reckoned, "seconds_with_dead": dead_seconds, "peak_bytes": count.peak, "floor": floor}


def verdict(name: str, measured: float, reckoned: float) -> str:
    """A line: what was measured and reckoned, in thousandths, and whether the reckoning holds."""
    times = measured / reckoned
    word = "holds" if times <= HOLDS else "does not hold"
    return f"{name:48}{1000 * measured:9.2f} measured {1000 * reckoned:9.2f} reckoned {times:6.2f} x   {word}"


# ---- the rest of a run ----


def end_to_end(params: dict[str, Any], batch: int) -> dict[str, Any]:
    """Tokens to a trained autoencoder, as train.py does it, with config.py's constants but for the batch."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_model(params, config.TARGET_LAYER, DEVICE)
    trainer = new_trainer(model.d_model, config.MOMENTS_DTYPE)
    batches = shuffled_batches(
        prefetch(rows_of(model.vocab_size), depth=4 * config.ROWS_PER_FORWARD),
        model,
        config.TARGET_LAYER,
        batch_size=batch,
        buffer_tokens=config.BUFFER_TOKENS,
        rows_per_forward=config.ROWS_PER_FORWARD,
        seed=config.SEED,
    )

    def train(steps: int) -> None:
        for x, _ in islice(batches, steps):
            trainer.step(x, config.LEARNING_RATE)

    a_buffer = max(1, config.BUFFER_TOKENS // batch)  # steps
    train(a_buffer)
    start = wall()
    train(BUFFERS * a_buffer)
    took = wall() - start
    found: dict[str, Any] = {"tokens_per_second": BUFFERS * a_buffer * batch / took}
    if DEVICE.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_bytes_reserved"] = torch.cuda.max_memory_reserved()
    batches.close()

    rows = islice(rows_of(model.vocab_size), config.ROWS_PER_FORWARD)
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    forward = seconds(lambda: residuals_of(model, tokens, config.TARGET_LAYER))
    spec = spec_of(params)
    found["language_model_tokens_per_second"] = tokens[:, 1:].numel() / forward
    found["language_model_share"] = found["tokens_per_second"] / found["language_model_tokens_per_second"]
    found["language_model_flops"] = 2 * sum(spec.layer_parameters[: config.TARGET_LAYER + 1]) * tokens.numel() / forward
    print(
        f"  {found['tokens_per_second']:,.0f} tokens/s, of whose time the language model takes "
        f"{found['language_model_share']:.0%} (at {found['language_model_flops'] / 1e12:.3g} TFLOP/s)"
    )
    planned = memory.training_needs(
        [replace(trainer.config, batch_size=batch)],
        spec,
        last_layer=config.TARGET_LAYER,
        dtype=torch.bfloat16,
        on_cpu=DEVICE.type == "cpu",
    ).first.parts(1)[0]
    found["planned_bytes"] = sum(planned.values())
    if "peak_bytes" in found:
        fits = "fits" if found["peak_bytes_reserved"] < GPU_BYTES else "does not fit"
        print(
            f"  peak memory {found['peak_bytes'] / 1e9:.1f} GB, {found['peak_bytes_reserved'] / 1e9:.1f} with what "
            f"PyTorch keeps: {fits} a GPU of {GPU_BYTES / 1e9:.0f} GB; the plan said {found['planned_bytes'] / 1e9:.1f}"
        )
    return found


def rows_of(vocab_size: int) -> Iterator[Row]:
    """Rows of random tokens behind a BOS."""
    return random_rows(vocab_size, config.CONTEXT_LENGTH, config.SEED)


def generation(params: dict[str, Any]) -> dict[str, float]:
    """Tokens that the whole model adds to a prompt, alone and in a batch of eight."""
    model, found = random_model(params, None, DEVICE), {}
    prompt = next(random_rows(model.vocab_size, PROMPT, config.SEED)).tokens.tolist()
    for rows in (1, 8):
        model.sample(prompt, range(rows), GENERATED)
        start = wall()
        model.sample(prompt, range(rows), GENERATED)
        found[f"milliseconds a token, {rows} rows"] = 1000 * (wall() - start) / GENERATED
    for name, value in found.items():
        print(f"  {value:.1f} {name}")
    return found


def sparsify(d_model: int, batch: int) -> dict[str, float]:
    """The step of sparsify's trainer, Adam in place of its default SignSGD; in float32 with its own autocast."""
    from sparsify import SparseCoder, SparseCoderConfig

    sizes = SparseCoderConfig(num_latents=config.D_HIDDEN, k=config.K)
    coder = SparseCoder(d_model, sizes, device=str(DEVICE), dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=config.LEARNING_RATE, fused=True)
    x = random_residuals(batch, d_model).float()

    peak()
    found = {"seconds": seconds(lambda: sparsify_step(coder, optimizer, x)), "peak_bytes": peak()}
    print(f"  {1000 * found['seconds']:.1f} ms   {batch / found['seconds']:,.0f} tokens/s")
    return found


# ---- all of it ----


def checks() -> dict[str, Any]:
    """What the tests say that want a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    return {"exit_code": done.returncode, "output": done.stdout[-4000:]}


def attempt(results: dict[str, Any], name: str, part: Callable[[], dict[str, Any]]) -> None:
    """Measure one part; for want of memory, go on without it."""
    print(name, flush=True)
    try:
        results[name] = part()
    except torch.OutOfMemoryError:
        results[name] = {"failed": "out of memory"}
        print("  needs more memory than is free")
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """All parts, as far as memory allows."""
    smoke = "--smoke" in sys.argv[1:]
    if DEVICE.type != "cuda" and not smoke:
        print("benchmarks.gpu: found no CUDA GPU, nothing is measured (--smoke runs it in tiny sizes)")
        return
    warnings.simplefilter("ignore")
    constants.override([RANDOM, *(SMOKE if smoke else [])], config)
    params = SMOKE_MISTRAL if smoke else MISTRAL_7B
    for name, value, _ in defaults(config, spec_of(params), DEVICE, torch.bfloat16):
        setattr(config, name, value)
    d_model = params["dim"]
    print(f"D={d_model}, F={config.D_HIDDEN}, K={config.K}, layer {config.TARGET_LAYER}, on {DEVICE.type}")
    results: dict[str, Any] = {}
    try:
        if "--check" in sys.argv[1:]:
            attempt(results, "tests", checks)
        measure(results, params, (config.BATCH_SIZE, 2 * config.BATCH_SIZE) if smoke else BATCHES)
    finally:
        if not smoke:
            save("gpu", {"sizes": {"D": d_model, "F": config.D_HIDDEN, "K": config.K}, "parts": results})


def measure(results: dict[str, Any], params: dict[str, Any], batches: tuple[int, ...]) -> None:
    """Every part into `results`."""
    d_model, rates = params["dim"], None

    def measured_speeds() -> dict[str, float]:
        nonlocal rates
        rates = speeds()
        return rates._asdict()

    attempt(results, "speeds", measured_speeds)
    for moments in ("float32", "bfloat16"):
        for batch in batches:
            name = f"step, B={batch}, moments in {moments}"
            attempt(results, name, lambda batch=batch, moments=moments: step(d_model, batch, moments, rates))
    name = f"step without Triton, B={batches[0]}, moments in bfloat16"
    attempt(results, name, lambda: step(d_model, batches[0], "bfloat16", rates, torch_only=True))
    for batch in batches:
        attempt(results, f"end to end, B={batch}", lambda batch=batch: end_to_end(params, batch))
    attempt(results, "generation", lambda: generation(params))
    if find_spec("sparsify") is None:
        print("sparsify is not installed: pip install -r benchmarks/requirements.txt")
        return
    if DEVICE.type != "cuda":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel needs a GPU
    for batch in batches:
        attempt(results, f"sparsify's step, B={batch}", lambda batch=batch: sparsify(d_model, batch))
        compare(results, batch)


def compare(results: dict[str, Any], batch: int) -> None:
    """Our step, with the same moments, beside sparsify's."""
    ours, peers = results[f"step, B={batch}, moments in float32"], results[f"sparsify's step, B={batch}"]
    if "seconds" in ours and "seconds" in peers:
        print(f"  {peers['seconds'] / ours['seconds']:.2f} x ours")


if __name__ == "__main__":
    main()
