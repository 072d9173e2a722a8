"""Which layer, size, sparsity, batch and learning rate `make english` takes: a sweep, one of them varied at a time.

    python -m benchmarks.english [NAME=value ...]

All autoencoders see the same residuals of SmolLM2-135M-Instruct, read once at every layer of LAYERS, in the same order,
for TRAIN_TOKENS, by default as many as `make english` trains on. Measured on held-out text: normalized MSE, the share
of the cross-entropy recovered, and dead features; and how many tokens a second the model reads up to the layer.
"""

import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

import config
from benchmarks.machine import save
from mistral_sae import cli, constants
from mistral_sae.data.tokens import Corpus, batches, shuffle
from mistral_sae.defaults import fill
from mistral_sae.model.hooks import read_residuals
from mistral_sae.model.language_model import LanguageModel, load_model
from mistral_sae.sae.evaluate import Evaluator
from mistral_sae.sae.trainer import TrainConfig, Trainer

LAYERS = (6, 9, 12, 15, 18)
HELD_OUT_ROWS = 24
LOG_EVERY = 10  # steps, as in config.py: how often the set of dead features is brought up to date


class Setting(NamedTuple):
    """What is varied."""

    layer: int = 15
    d_hidden: int = 6144
    k: int = 32
    batch_size: int = 512
    learning_rate: float = 1.6e-3


BASE = Setting()
SETTINGS = [
    BASE,
    *(BASE._replace(layer=layer) for layer in LAYERS if layer != BASE.layer),
    *(BASE._replace(d_hidden=n) for n in (3072, 12_288)),
    *(BASE._replace(k=k) for k in (16, 64)),
    *(BASE._replace(learning_rate=scale * BASE.learning_rate) for scale in (0.5, 2)),
    BASE._replace(batch_size=1024),
]


def residuals_by_layer(model: LanguageModel, corpus: Corpus) -> dict[int, Tensor]:
    """The residuals that all are trained on, {layer: (N, D)} in float16, in one order by SEED."""
    rows = shuffle(corpus.rows(model.tokenizer, held_out=False), config.SHUFFLE_ROWS, config.SEED)
    n_rows = -(-config.TRAIN_TOKENS // (config.CONTEXT_LENGTH - 1))
    parts: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    parts_RT = batches(islice(rows, n_rows), config.ROWS_PER_FORWARD)
    for tokens_RT in cli.Progress(parts_RT, "residuals", -(-n_rows // config.ROWS_PER_FORWARD)):
        with read_residuals(model, LAYERS) as residuals:
            model.forward(tokens_RT)
        for layer, x_RTD in residuals.items():
            parts[layer].append(x_RTD[model.kept(tokens_RT)].half())
    order = torch.randperm(sum(map(len, parts[LAYERS[0]])), generator=torch.Generator().manual_seed(config.SEED))
    return {layer: torch.cat(parts.pop(layer))[order] for layer in LAYERS}


def train(x_ND: Tensor, setting: Setting) -> tuple[Trainer, float]:
    """An autoencoder of these residuals, and the seconds that its training took."""
    tokens = len(x_ND) // setting.batch_size * setting.batch_size
    sizes = setting._asdict() | {"train_tokens": tokens, "k_aux": x_ND.shape[1] // 2, "seed": config.SEED}
    del sizes["layer"]
    steps = tokens // setting.batch_size
    trainer = Trainer(TrainConfig(x_ND.shape[1], **sizes, warm_up_steps=steps // 20, dead_after_tokens=tokens // 5))
    started = time.perf_counter()
    for step, x in enumerate(x_ND[:tokens].split(setting.batch_size)):
        x = x.float()
        if step == 0:
            trainer.initialize(x)
        trainer.step(x, trainer.config.learning_rate_at(step))
        if step % LOG_EVERY == 0:
            trainer.find_dead()
    return trainer, time.perf_counter() - started


def tokens_per_second(model: LanguageModel, rows_RT: Tensor) -> dict[int, float]:
    """How fast the model reads up to each layer."""
    speeds = {}
    for layer in LAYERS:
        started = time.perf_counter()
        for part in rows_RT.split(config.ROWS_PER_FORWARD):
            model.residuals(part, layer)
        speeds[layer] = rows_RT.numel() / (time.perf_counter() - started)
    return speeds


def measured(model: LanguageModel, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """The figures of each setting."""
    rows_RT = corpus.held_out_rows(model.tokenizer, HELD_OUT_ROWS, config.EVALUATION_STRIDE)
    speeds, residuals = tokens_per_second(model, rows_RT), residuals_by_layer(model, corpus)
    evaluators = {layer: Evaluator(model, rows_RT, layer, config.ROWS_PER_FORWARD) for layer in LAYERS}
    for setting in SETTINGS:
        trainer, seconds = train(residuals[setting.layer], setting)
        dead = len(trainer.find_dead()) / setting.d_hidden
        figures = evaluators[setting.layer](trainer.sae)
        shown = ("normalized_mse", "ce_loss_clean", "ce_loss_with_sae", "ce_loss_recovered", "silent_fraction")
        yield setting._asdict() | {name: figures[name] for name in shown} | {
            "dead_fraction": dead, "training_seconds": seconds, "tokens_per_second": speeds[setting.layer]
        }  # fmt: skip


def main() -> None:
    """Measure and save."""
    constants.override(["MISTRAL_MODEL_PATH=smollm2", *sys.argv[1:]], config)
    filled, *_ = fill(config)
    model, results = load_model(config.MISTRAL_MODEL_PATH), []
    for found in measured(model, Corpus.of(config)):
        print(found, flush=True)
        results.append(found)
    save("english", {"tokens": filled.TRAIN_TOKENS, "settings": results})


if __name__ == "__main__":
    main()
