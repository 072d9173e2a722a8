"""Adam's moments in bfloat16, which save half of the optimizer's memory, beside float32: the loss curve of each.

    python -m benchmarks.moments

The same residuals of the stand-in, the same order, sizes and schedule as in benchmarks.quality.
"""

import torch

import config
from benchmarks.machine import save
from benchmarks.quality import BATCH, DEAD_AFTER, DECAY, LAYER, LEARNING_RATE, STEPS, WARM_UP, F, K, residual_batches
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.trainer import TrainConfig, Trainer

EVERY = 25  # steps a point of the curve


def main() -> None:
    """Train twice, save the curves."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    batches = residual_batches(load_model(None, last_layer=LAYER), seed=0)
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
