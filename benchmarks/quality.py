"""How good a sparse autoencoder is after the same training: ours beside SAE Lens's TopK trainer.

    python -m benchmarks.quality

Both see the same standardised residuals of the stand-in in the same order, with the same sizes, batches, steps and
schedule (warm-up, linear decay). SAE Lens trains at its own default learning rate and at ours. Measured: normalized
MSE on residuals of held-out files, and at the end the share of features that fired on none of the last 200,000
tokens.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

import config
from benchmarks.machine import save
from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.tokens import Corpus, batches, shuffle
from mistral_sae.model.language_model import LanguageModel, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.evaluate import reconstruction
from mistral_sae.sae.trainer import TrainConfig, Trainer

LAYER, F, K, BATCH, STEPS = config.TARGET_LAYER, 4096, 32, 1024, 500
WARM_UP, DECAY = 50, 100  # steps
LEARNING_RATE = 2e-3  # what config.py gives for so many features
SAE_LENS_LEARNING_RATE = 3e-4  # the default of its SAETrainerConfig
DEAD_AFTER = 200_000  # tokens; SAE Lens counts steps
SEEDS = (0, 1, 2)


def rows(model: LanguageModel, held_out: bool, seed: int) -> Iterator:
    """Token rows of one part of the standard library."""
    return replace(Corpus.of(config), data_path="stdlib", seed=seed).rows(model.tokenizer, held_out=held_out)


def residual_batches(model: LanguageModel, seed: int) -> list[Tensor]:
    """The residuals that all are trained on, (B, D) a step."""
    stream = shuffled_batches(
        shuffle(rows(model, False, seed), config.SHUFFLE_ROWS, seed), model, LAYER,
        batch_size=BATCH, buffer_tokens=config.BUFFER_TOKENS, rows_per_forward=config.ROWS_PER_FORWARD, seed=seed,
    )  # fmt: skip
    taken = tqdm(islice(stream, STEPS), total=STEPS, desc=f"residuals, seed {seed}", file=sys.stderr)
    return [x for x, _ in taken]


def ours(batches: Iterator[Tensor], seed: int) -> tuple[SparseAutoencoder, float]:
    """Train with this project's trainer; the autoencoder and the share of its features that are dead."""
    trainer = None
    for step, x in enumerate(batches):
        if trainer is None:
            sizes = {"k_aux": x.shape[1] // 2, "dead_after_tokens": DEAD_AFTER, "seed": seed}
            trainer = Trainer(TrainConfig(x.shape[1], F, K, **sizes))
            trainer.initialize(x)
        trainer.step(x, LEARNING_RATE * min(1, (step + 1) / WARM_UP, (STEPS - step) / DECAY))
        if step % 10 == 0:
            trainer.find_dead()
    return trainer.sae, len(trainer.find_dead()) / F


def theirs(batches: Iterator[Tensor], seed: int, learning_rate: float) -> tuple[SparseAutoencoder, float]:
    """Train with SAE Lens on z, the standardised residuals, since its trainer has no loss for dead features on x."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    first = next(batches)
    standardize = SparseAutoencoder(first.shape[1], F, K).standardize

    def z_batches() -> Iterator[Tensor]:
        yield standardize(first)[0]
        for x in batches:
            yield standardize(x)[0]

    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=learning_rate,
            lr_warm_up_steps=WARM_UP,
            lr_decay_steps=DECAY,
            lr_end=0.0,
            dead_feature_window=DEAD_AFTER // BATCH,
        ),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=first.shape[1], d_sae=F, k=K)),
        z_batches(),
    )
    trained = trainer.fit()
    sae = SparseAutoencoder(first.shape[1], F, K).requires_grad_(False)
    norms = trained.W_dec.detach().norm(dim=1)  # it selects by activation times decoder norm
    sae.W_enc.copy_(trained.W_enc.detach() * norms)
    sae.b_enc.copy_(trained.b_enc.detach() * norms)
    sae.W_dec.copy_(trained.W_dec.detach() / norms[:, None])
    sae.b_dec.copy_(trained.b_dec.detach())
    return sae, trainer.dead_neurons.float().mean().item()


def main() -> None:
    """Train, measure, save."""
    torch.set_num_threads(2)
    model = load_model(None, last_layer=LAYER)
    held_out = [
        residuals_of(model, part, LAYER)
        for part in batches(islice(rows(model, True, 0), 0, None, config.EVALUATION_STRIDE), 16)
    ]
    results = []
    for seed in SEEDS:
        stream = residual_batches(model, seed)
        trained = {
            "mistral-sae": ours(iter(stream), seed),
            "sae-lens": theirs(iter(stream), seed, SAE_LENS_LEARNING_RATE),
            "sae-lens at our learning rate": theirs(iter(stream), seed, LEARNING_RATE),
        }
        for name, (sae, dead_fraction) in trained.items():
            found = reconstruction(sae, held_out)
            results.append(
                {
                    "seed": seed,
                    "trainer": name,
                    "normalized_mse": found.normalized_mse,
                    "dead_fraction": dead_fraction,
                    "silent_fraction": found.silent_fraction,
                    "l0": found.l0,
                    "held_out_tokens": found.tokens,
                }
            )
            print(results[-1], flush=True)
    save("quality", results)


if __name__ == "__main__":
    main()
