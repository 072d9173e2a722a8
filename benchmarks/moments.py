"""Adam's moments in bfloat16, which save half of the optimizer's memory, beside float32: the loss curve of each.

    python -m benchmarks.moments

The same residuals of the stand-in, the same order, sizes and schedule as in benchmarks.quality.
"""

import torch

import config
from benchmarks.machine import save
from benchmarks.quality import BATCH, DEAD_AFTER, DECAY, LAYER, LEARNING_RATE, STEPS, WARM_UP, F, K, residual_batches
from mistral_sae.model import language_model as lm
from mistral_sae.sae.trainer import Trainer

EVERY = 25  # steps a point of the curve


def main() -> None:
    """Train twice, save the curves."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    batches = residual_batches(lm.load(None, last_layer=LAYER), seed=0)
    curves = {}
    for moments in (torch.float32, torch.bfloat16):
        trainer = Trainer(
            batches[0].shape[1], F, K,
            k_aux=config.K_AUX, auxk_coefficient=config.AUXK_COEFFICIENT, dead_after_tokens=DEAD_AFTER,
            max_gradient_norm=config.MAX_GRADIENT_NORM, moments=moments,
        )  # fmt: skip
        trainer.initialize(batches[0], seed=0)
        losses, curve = [], []
        for step, x in enumerate(batches):
            rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP, (STEPS - step) / DECAY)
            losses.append(trainer.step(x, rate).normalized_mse.item())
            if (step + 1) % EVERY == 0:
                trainer.find_dead()
                curve.append({"tokens": (step + 1) * BATCH, "normalized_mse": sum(losses[-EVERY:]) / EVERY})
        name = str(moments).removeprefix("torch.")
        curves[name] = curve
        print(name, *(f"{point['normalized_mse']:.4f}" for point in curve), flush=True)
    save("moments", curves)


if __name__ == "__main__":
    main()
