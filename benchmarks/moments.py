"""Adam's moments in bfloat16, which save half of the optimizer's memory, beside float32: the loss curve of each.

    python -m benchmarks.moments

The same residuals of the stand-in, the same order, sizes and schedule (warm-up, linear decay).
"""

from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

import config
from benchmarks.machine import save
from mistral_sae.cli import Progress
from mistral_sae.data.activations import shuffled_batches
from mistral_sae.data.tokens import Corpus, shuffle
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.trainer import TrainConfig, Trainer

LAYER, F, K, BATCH, STEPS = config.TARGET_LAYER, 4096, 32, 1024, 500
WARM_UP, DECAY = 50, 100  # steps
LEARNING_RATE = 2e-3  # what config.py gives for so many features
DEAD_AFTER = 200_000  # tokens
EVERY = 25  # steps a point of the curve


def residual_batches() -> list[Tensor]:
    """The residuals that both are trained on, (B, D) a step."""
    model = load_model(None, last_layer=LAYER)
    rows = replace(Corpus.of(config), data_path="stdlib", seed=0).rows(model.tokenizer, held_out=False)
    sizes = {"buffer_tokens": config.BUFFER_TOKENS, "rows_per_forward": config.ROWS_PER_FORWARD}
    rows = shuffle(rows, config.SHUFFLE_ROWS, 0)
    stream = islice(shuffled_batches(rows, model, LAYER, batch_size=BATCH, seed=0, **sizes), STEPS)
    return [x for x, _ in Progress(stream, "residuals", total=STEPS)]


def main() -> None:
    """Train twice, save the curves."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    batches = residual_batches()
    curves = {}
    for moments in ("float32", "bfloat16"):
        sizes = {"k_aux": config.K_AUX, "dead_after_tokens": DEAD_AFTER}
        trainer = Trainer(TrainConfig(batches[0].shape[1], F, K, moments_dtype=moments, **sizes))
        trainer.initialize(batches[0])
        losses, curve = [], []
        for step, x in enumerate(batches):
            rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP, (STEPS - step) / DECAY)
            losses.append(trainer.step(x, rate).normalized_mse.item())
            if (step + 1) % EVERY == 0:
                trainer.find_dead()
                curve.append({"tokens": (step + 1) * BATCH, "normalized_mse": sum(losses[-EVERY:]) / EVERY})
        curves[moments] = curve
        print(moments, *(f"{point['normalized_mse']:.4f}" for point in curve), flush=True)
    save("moments", curves)


if __name__ == "__main__":
    main()
