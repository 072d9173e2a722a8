"""What a CUDA GPU makes of it: the training step, its parts and its floor, text-free end to end, memory, sparsify.

    python -m benchmarks.gpu

Sizes are those that mistral_sae/defaults.py has for Mistral 7B, and the language model is a Mistral 7B up to the target
layer with random weights, made on the device: speed and memory do not depend on what it has learned, and nothing is
downloaded. Tokens are random too, so tokenizing is not part of it. Times are medians after a warm-up, by CUDA's own
clock. A part that runs out of memory says so and the others go on.

The floor of a step is one encoder product, at the rate the device is found to have for it, and Adam's traffic, at the
bandwidth it is found to have. `--smoke` runs everything in tiny sizes, on a CPU too, and saves nothing.
"""

import gc
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import config
from benchmarks.machine import save
from benchmarks.stages import STEP, STEP_STAGES, Stages
from mistral_sae import cli
from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.tokens import prefetch
from mistral_sae.defaults import defaults
from mistral_sae.model import engines
from mistral_sae.model.folder import MISTRAL_INFERENCE, PARAMS, ModelFolder, Stored
from mistral_sae.model.language_model import LanguageModel, ModelSpec
from mistral_sae.model.params import shapes_of_params
from mistral_sae.model.source import Source
from mistral_sae.sae import memory
from mistral_sae.sae.trainer import TrainConfig, Trainer

MISTRAL_7B = {  # params.json of v0.3
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32768,
    "rope_theta": 1e6,
}
BATCHES = (4096, 16384)  # tokens a step
WARM_UP, REPEATS = 3, 20
BUFFERS = 3  # of residuals, end to end, after one as a warm-up
DEAD = 0.1  # share of the features, in the step with AuxK
COPY_BYTES = 2**31
GPU_BYTES = 24e9  # of the card that config.py's constants are meant to fit

RANDOM = "MISTRAL_MODEL_PATH=random weights"  # anything but the stand-in
SMOKE_MISTRAL = MISTRAL_7B | {
    "dim": 64, "n_layers": 3, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128,
}  # fmt: skip
SMOKE = ["TARGET_LAYER=1", "D_HIDDEN=512", "K=8", "K_AUX=16", "CONTEXT_LENGTH=16", "BATCH_SIZE=64"]
SMOKE += ["BUFFER_TOKENS=256", "ROWS_PER_FORWARD=4"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- clock ----


def seconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the device, after a warm-up."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        if DEVICE.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return statistics.median(times[WARM_UP:])


def wall() -> float:
    """The time, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- what is measured ----


def random_residuals(batch: int, d_model: int) -> torch.Tensor:
    """A batch (B, D) in the language model's dtype."""
    return torch.randn(batch, d_model, device=DEVICE, dtype=torch.bfloat16)


def new_trainer(d_model: int, moments: str) -> Trainer:
    """A trainer with config.py's constants, on random residuals."""
    training = replace(TrainConfig.of(config, d_model), moments_dtype=moments)
    trainer = Trainer(training, DEVICE)
    trainer.initialize(random_residuals(256, d_model))
    return trainer


def floor(d_model: int, batch: int, moments: str, bf16: bool) -> float:
    """Seconds that no step can avoid."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(batch, d_model, device=DEVICE, dtype=dtype)
    weight = torch.randn(config.D_HIDDEN, d_model, device=DEVICE, dtype=dtype)
    source = torch.empty(COPY_BYTES if DEVICE.type == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / seconds(lambda: target.copy_(source))
    per_weight = (
        3 * 4 + 4 * getattr(torch, moments).itemsize
    )  # weight read and written, gradient read, two moments read and written
    return seconds(lambda: x @ weight.T) + 2 * d_model * config.D_HIDDEN * per_weight / bandwidth


def step(d_model: int, batch: int, moments: str) -> dict[str, Any]:
    """The autoencoder's training step: time, with dead features too, its parts, and the floor beside it."""
    found = step_alone(d_model, batch, moments)  # when it returns, its memory is free
    found["floor"] = floor(d_model, batch, moments, found["bf16_product"])
    took, ratio = found["seconds"], found["seconds"] / found["floor"]
    print(f"  {1000 * took:.1f} ms   {batch / took:,.0f} tokens/s   {ratio:.2f} x the floor ({1 / ratio:.0%} is floor)")
    print(f"  {1000 * found['seconds_with_dead']:.1f} ms with {DEAD:.0%} dead features")
    for name, value in found["parts"].items():
        print(f"    {name:34}{1000 * value:9.2f} ms")
    return found


def step_alone(d_model: int, batch: int, moments: str) -> dict[str, Any]:
    """The same without the floor."""
    trainer, x = new_trainer(d_model, moments), random_residuals(batch, d_model)

    def one() -> None:
        trainer.step(x, config.LEARNING_RATE)

    found: dict[str, Any] = {"bf16_product": trainer.bf16, "seconds": seconds(one)}
    stages = Stages()
    with stages.wrapping(STEP):
        for _ in range(REPEATS):
            one()
        stages.stop()
    found["parts"] = {name: stages.seconds[name] / REPEATS for name in STEP_STAGES if name in stages.seconds}
    trainer.dead = torch.randperm(config.D_HIDDEN, device=DEVICE)[: int(DEAD * config.D_HIDDEN)].sort().values
    trainer.sae.b_enc[trainer.dead] = -100.0
    return found | {"seconds_with_dead": seconds(one)}


def spec_of(params: dict[str, Any]) -> ModelSpec:
    """Sizes of a mistral-inference model."""
    shapes = shapes_of_params(params, None)

    def parameters(*prefixes: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))

    return ModelSpec(
        "random weights",
        MISTRAL_INFERENCE,
        params["dim"],
        params["n_layers"],
        params["vocab_size"],
        parameters("tok_embeddings"),
        tuple(parameters(f"layers.{layer}.") for layer in range(params["n_layers"])),
        parameters("norm.", "output."),
    )


def random_model(params: dict[str, Any], last_layer: int) -> LanguageModel:
    """A mistral-inference model up to `last_layer`, with random weights made on the device."""
    spec, shapes = spec_of(params), shapes_of_params(params, None)
    stored = {name: Stored(Path("random"), name, shape) for name, shape in shapes.items()}
    folder = ModelFolder(Source(Path("random")), spec, PARAMS, params, stored)

    def random_tensors(wanted, device, dtype):
        tensors = {name: torch.empty(stored.shape, device=device, dtype=dtype) for name, stored in wanted.items()}
        for tensor in tensors.values():
            tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(std=tensor.shape[1] ** -0.5)
        return tensors

    with patch.object(engines, "_read_tensors", random_tensors):
        engine = engines.MistralInference(folder, last_layer, DEVICE, torch.bfloat16)
    return LanguageModel(spec, None, engine, last_layer, DEVICE, torch.bfloat16)


def random_rows(vocab_size: int) -> Iterator[np.ndarray]:
    """Rows of random tokens behind a BOS."""
    generator = np.random.default_rng(config.SEED)
    while True:
        row = generator.integers(vocab_size, size=config.CONTEXT_LENGTH)
        row[0] = 1
        yield row


def end_to_end(params: dict[str, Any], batch: int) -> dict[str, Any]:
    """Tokens to a trained autoencoder, as train.py does it, with config.py's constants but for the batch."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_model(params, config.TARGET_LAYER)
    trainer = new_trainer(model.d_model, config.MOMENTS_DTYPE)
    batches = shuffled_batches(
        prefetch(random_rows(model.vocab_size), depth=4 * config.ROWS_PER_FORWARD),
        model,
        config.TARGET_LAYER,
        batch_size=batch,
        buffer_tokens=config.BUFFER_TOKENS,
        rows_per_forward=config.ROWS_PER_FORWARD,
        seed=config.SEED,
    )

    def train(steps: int) -> None:
        for x in islice(batches, steps):
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

    tokens = torch.from_numpy(np.stack(list(islice(random_rows(model.vocab_size), config.ROWS_PER_FORWARD))))
    forward = seconds(lambda: residuals_of(model, tokens, config.TARGET_LAYER))
    spec = spec_of(params)
    found["language_model_tokens_per_second"] = tokens[:, 1:].numel() / forward
    found["language_model_share"] = found["tokens_per_second"] / found["language_model_tokens_per_second"]
    found["language_model_flops"] = 2 * sum(spec.layer_parameters[: config.TARGET_LAYER + 1]) * tokens.numel() / forward
    print(
        f"  {found['tokens_per_second']:,.0f} tokens/s, of whose time the language model takes "
        f"{found['language_model_share']:.0%} (at {found['language_model_flops'] / 1e12:.3g} TFLOP/s)"
    )
    planned = memory.memory_plan(
        replace(trainer.config, batch_size=batch),
        spec,
        last_layer=config.TARGET_LAYER,
        dtype=torch.bfloat16,
        device=DEVICE.type,
        free=0,
    )
    found["planned_bytes"] = sum(planned.training.values())
    if "peak_bytes" in found:
        fits = "fits" if found["peak_bytes_reserved"] < GPU_BYTES else "does not fit"
        print(
            f"  peak memory {found['peak_bytes'] / 1e9:.1f} GB, {found['peak_bytes_reserved'] / 1e9:.1f} with what "
            f"PyTorch keeps: {fits} a GPU of {GPU_BYTES / 1e9:.0f} GB; the plan said {found['planned_bytes'] / 1e9:.1f}"
        )
    return found


def sparsify(d_model: int, batch: int) -> dict[str, float]:
    """The step of sparsify's trainer, Adam in place of its default SignSGD; in float32 with its own autocast."""
    from sparsify import SparseCoder, SparseCoderConfig

    sizes = SparseCoderConfig(num_latents=config.D_HIDDEN, k=config.K)
    coder = SparseCoder(d_model, sizes, device=str(DEVICE), dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=config.LEARNING_RATE, fused=True)
    x = random_residuals(batch, d_model).float()

    def one() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        (out.fvu + out.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), config.MAX_GRADIENT_NORM)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    found = {"seconds": seconds(one)}
    print(f"  {1000 * found['seconds']:.1f} ms   {batch / found['seconds']:,.0f} tokens/s")
    return found


# ---- all of it ----


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
    smoke = sys.argv[1:] == ["--smoke"]
    if DEVICE.type != "cuda" and not smoke:
        print("benchmarks.gpu: found no CUDA GPU, nothing is measured (--smoke runs it in tiny sizes)")
        return
    warnings.simplefilter("ignore")
    cli.override([RANDOM, *(SMOKE if smoke else [])], config)
    params = SMOKE_MISTRAL if smoke else MISTRAL_7B
    for name, value, _ in defaults(config, spec_of(params), DEVICE, torch.bfloat16):
        setattr(config, name, value)
    d_model, batches = params["dim"], (config.BATCH_SIZE, 2 * config.BATCH_SIZE) if smoke else BATCHES
    print(f"D={d_model}, F={config.D_HIDDEN}, K={config.K}, layer {config.TARGET_LAYER}, on {DEVICE.type}")
    results: dict[str, Any] = {}
    try:
        for moments in ("float32", "bfloat16"):
            for batch in batches:
                name = f"step, B={batch}, moments in {moments}"
                attempt(results, name, lambda batch=batch, moments=moments: step(d_model, batch, moments))
        for batch in batches:
            attempt(results, f"end to end, B={batch}", lambda batch=batch: end_to_end(params, batch))
        if find_spec("sparsify") is None:
            print("sparsify is not installed: pip install -r benchmarks/requirements.txt")
            return
        if DEVICE.type != "cuda":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernel needs a GPU
        for batch in batches:
            attempt(results, f"sparsify's step, B={batch}", lambda batch=batch: sparsify(d_model, batch))
            compare(results, batch)
    finally:
        if not smoke:
            save("gpu", {"sizes": {"D": d_model, "F": config.D_HIDDEN, "K": config.K}, "parts": results})


def compare(results: dict[str, Any], batch: int) -> None:
    """Our step, with the same moments, beside sparsify's."""
    ours, peers = results[f"step, B={batch}, moments in float32"], results[f"sparsify's step, B={batch}"]
    if "seconds" in ours and "seconds" in peers:
        print(f"  {peers['seconds'] / ours['seconds']:.2f} x ours")


if __name__ == "__main__":
    main()
