"""What a grid costs where the language model dominates: four autoencoders on one pass of it, beside one.

    python -m benchmarks.grid

train.py's chain from tokens to steps, without evaluations and checkpoints, on a Mistral with random weights and random
tokens: two layers times two sparsities, and the deeper layer with one of them alone, which goes as deep. Runs of both
take turns, and the medians are compared. `--smoke` is a run of seconds that saves nothing.
"""

import statistics
import sys
import time
from itertools import islice, product
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.random_mistral import MISTRAL_7B, SMOKE_MISTRAL, random_model, random_rows
from mistral_sae.data.activations import Stream, shuffled_streams
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.trainer import TrainConfig, Trainer

MODEL = MISTRAL_7B | {"dim": 1024, "n_layers": 8, "head_dim": 64, "hidden_dim": 3584, "n_heads": 16, "n_kv_heads": 4}
LAYERS, SPARSITIES, FEATURES = (4, 7), (16, 32), 4096
BATCH, LENGTH, RUNS = 1024, 256, 3
ONE = [(7, 16)]
FOUR = list(product(LAYERS, SPARSITIES))


def seconds_of(model: LanguageModel, points: list[tuple[int, int]], features: int, steps: int) -> float:
    """Wall time of so many steps of autoencoders, each of a layer and a K, on one pass of the model."""
    config = {"train_tokens": steps * BATCH, "batch_size": BATCH}
    trainers = [Trainer(TrainConfig(model.d_model, features, k, **config)) for _, k in points]
    streams = [Stream(layer, seed=0) for layer, _ in points]
    different = list(dict.fromkeys(streams))
    begin = time.perf_counter()
    batches = shuffled_streams(
        random_rows(model.vocab_size, LENGTH, 0), model, different,
        batch_size=BATCH, buffer_tokens=4 * BATCH, rows_per_forward=4,
    )  # fmt: skip
    for step, (x_SBD, _) in enumerate(islice(batches, steps)):
        for trainer, stream in zip(trainers, streams, strict=True):
            x_BD = x_SBD[different.index(stream)]
            if step == 0:
                trainer.initialize(x_BD)
            trainer.step(x_BD, trainer.config.learning_rate_at(step))
    return time.perf_counter() - begin


def measure(smoke: bool) -> dict[str, Any]:
    """Both times, run in turns."""
    params, features, steps, runs = (SMOKE_MISTRAL | {"n_layers": 8}, 64, 2, 1) if smoke else (MODEL, FEATURES, 8, RUNS)
    model = random_model(params, max(LAYERS), torch.device("cpu"))
    seconds_of(model, ONE, features, 1)
    turns = [[seconds_of(model, points, features, steps) for points in (ONE, FOUR)] for _ in range(runs)]
    one, four = map(list, zip(*turns, strict=True))
    return {
        "model": params, "layers": LAYERS, "k": SPARSITIES, "features": features, "batch": BATCH, "steps": steps,
        "one_seconds": one, "four_seconds": four, "ratio": statistics.median(four) / statistics.median(one),
    }  # fmt: skip


def main() -> None:
    """Measure, print, save."""
    smoke = sys.argv[1:] == ["--smoke"]
    found = measure(smoke)
    one, four = (statistics.median(found[f"{name}_seconds"]) for name in ("one", "four"))
    print(f"one autoencoder {one:.1f} s, four on the same pass {four:.1f} s: {found['ratio']:.2f} times as long")
    if not smoke:
        save("grid", found)


if __name__ == "__main__":
    main()
