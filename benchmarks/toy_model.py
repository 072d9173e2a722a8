"""Does a sparse autoencoder find features that are known to be in superposition? The toy model of Elhage et al. (2022).

    python -m benchmarks.toy_model

n features, each present with a small probability and then uniform in [0, 1], are squeezed into M dimensions by the
model x' = relu(W^T W x + b), trained to give them back (sections 2 and 3 there; all features equally important).
What W does to a feature is the direction that it has in those dimensions: the truth. Dictionaries are learnt from the
model's hidden states alone: by this project's trainer, SAE Lens's TopK trainer, ICA and PCA (scikit-learn), each with
as many directions as there are features or dimensions, and drawn at random as a control.

Measured over the features that the model represents (|W_i| > 0.5): the mean cosine with the nearest direction of the
dictionary, and the share recovered, at a cosine above 0.9; of ICA, PCA and the random directions either sign counts.
Our trainer standardises each hidden state, which takes the mean of its dimensions away: that component is left out of
both before they are compared. K is the mean number of features in a hidden state, rounded, 1 at least. Both trainers
take the learning rate of three that leaves the least unexplained in one setting, which knows nothing of the truth.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import normalize, relu
from tqdm import tqdm

from benchmarks.machine import RESULTS, save
from mistral_sae.sae.trainer import TrainConfig, Trainer

M = 32  # dimensions
FEATURES = (32, 64, 128, 256)
PRESENT = (0.3, 0.1, 0.03, 0.01)  # the probability of each
TUNED_ON = (128, 0.03)
SEEDS = (0, 1, 2)
TOY_STEPS, TOY_BATCH, TOY_RATE = 5000, 1024, 1e-3
STEPS, BATCH = 2000, 1024  # of the dictionaries
SAMPLE = 20_000  # hidden states for PCA and ICA
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
REPRESENTED, RECOVERED = 0.5, 0.9

Draw = Callable[[int], Tensor]  # so many hidden states (B, M)


def features(n: int, present: float, count: int, generator: torch.Generator) -> Tensor:
    """Sparse features (B, n)."""
    values = torch.rand(count, n, generator=generator)
    return values * (torch.rand(count, n, generator=generator) < present)


def toy_model(n: int, present: float, seed: int) -> Tensor:
    """W (M, n) of a trained toy model."""
    generator = torch.Generator().manual_seed(seed)
    W = (torch.randn(M, n, generator=generator) / math.sqrt(M)).requires_grad_()
    b = torch.zeros(n, requires_grad=True)
    optimizer = torch.optim.Adam([W, b], lr=TOY_RATE)
    for step in range(TOY_STEPS):
        x = features(n, present, TOY_BATCH, generator)
        loss = (relu(x @ W.T @ W + b) - x).square().mean()
        optimizer.param_groups[0]["lr"] = TOY_RATE * (1 - step / TOY_STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return W.detach()


def hidden_states(W: Tensor, present: float, seed: int) -> Draw:
    """What draws hidden states of the toy model; those without any feature are drawn again."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(count: int) -> Tensor:
        some = features(W.shape[1], present, 2 * count + 64, generator)
        while (some.any(dim=1)).sum() < count:
            some = torch.cat([some, features(W.shape[1], present, count, generator)])
        return some[some.any(dim=1)][:count] @ W.T

    return draw


# ---- dictionaries ----


def ours(draw: Draw, n: int, k: int, seed: int, learning_rate: float) -> tuple[Tensor, float]:
    """Decoder rows (n, M) of this project's trainer, and the normalized MSE at the end."""
    trainer = Trainer(
        TrainConfig(
            M, n, k, train_tokens=STEPS * BATCH, batch_size=BATCH, learning_rate=learning_rate, warm_up_steps=50,
            k_aux=M // 2, dead_after_tokens=50 * BATCH, seed=seed,
        )
    )  # fmt: skip
    errors = []
    for step in range(STEPS):
        x = draw(BATCH)
        if step == 0:
            trainer.initialize(x)
        if step % 10 == 0:
            trainer.find_dead()
        errors.append(trainer.step(x, trainer.config.learning_rate_at(step)).normalized_mse)
    return trainer.sae.W_dec, torch.stack(errors[-100:]).mean().item()


def sae_lens(draw: Draw, n: int, k: int, seed: int, learning_rate: float) -> tuple[Tensor, float]:
    """The same of SAE Lens's TopK trainer, on the hidden states as they are."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=learning_rate,
            lr_warm_up_steps=50,
            lr_decay_steps=STEPS // 5,
            lr_end=0.0,
            dead_feature_window=50,
        ),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=M, d_sae=n, k=k)),
        (draw(BATCH) for _ in itertools.count()),
    )
    trained = trainer.fit()
    x = draw(8 * BATCH)
    with torch.no_grad():
        error = (trained(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    return trained.W_dec.detach(), error.item()


def ica(draw: Draw, seed: int) -> Tensor:
    """The mixing directions (M, M) of FastICA."""
    import warnings

    from sklearn.decomposition import FastICA

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge: it is what it gives after so many iterations
        return torch.from_numpy(FastICA(random_state=seed, max_iter=400).fit(draw(SAMPLE).numpy()).mixing_.T).float()


def pca(draw: Draw) -> Tensor:
    """The principal components (M, M)."""
    x = draw(SAMPLE)
    return torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)[2]


# ---- what of the truth is in them ----


def best_cosines(W: Tensor, rows: Tensor, either_sign: bool) -> Tensor:
    """For each feature that the toy model represents the cosine with the nearest row, without the mean's component."""
    truth = W.T[W.norm(dim=0) > REPRESENTED]
    truth, rows = (normalize(each - each.mean(dim=1, keepdim=True), dim=1) for each in (truth, rows))
    cosines = truth @ rows.T
    return (cosines.abs() if either_sign else cosines).amax(dim=1)


def setting(n: int, present: float, seed: int, rates: dict[str, float]) -> dict[str, Any]:
    """The figures of one toy model."""
    W = toy_model(n, present, seed)
    draw, k = hidden_states(W, present, seed), max(1, round(n * present))
    k = min(k, M)
    dictionaries = {
        "mistral-sae": (ours(draw, n, k, seed, rates["mistral-sae"])[0], False),
        "sae-lens": (sae_lens(draw, n, k, seed, rates["sae-lens"])[0], False),
        "ICA": (ica(draw, seed), True),
        "PCA": (pca(draw), True),
        "random directions": (torch.randn(n, M, generator=torch.Generator().manual_seed(seed)), True),
    }
    found = {}
    for name, (rows, either_sign) in dictionaries.items():
        cosines = best_cosines(W, rows, either_sign)
        found[name] = {
            "mean_best_cosine": cosines.mean().item() if len(cosines) else None,
            "recovered": (cosines > RECOVERED).float().mean().item() if len(cosines) else None,
        }
    represented = int((W.norm(dim=0) > REPRESENTED).sum())
    return {"features": n, "present": present, "seed": seed, "k": k, "represented": represented, **found}


def tuned() -> dict[str, float]:
    """The learning rate of each trainer that leaves the least unexplained in one setting."""
    n, present = TUNED_ON
    W = toy_model(n, present, seed=0)
    rates = {}
    for name, trainer in {"mistral-sae": ours, "sae-lens": sae_lens}.items():
        error = partial(trainer, hidden_states(W, present, 0), n, round(n * present), 0)
        rates[name] = min(LEARNING_RATES, key=lambda rate: error(rate)[1])
    return rates


def plot(results: list[dict[str, Any]], names: list[str]) -> None:
    """The phase picture: the share recovered over features a dimension and their probability."""
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(names), 3.0), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), sharey=True), strict=True):
        shares = [[_mean(results, name, "recovered", n, present) for n in FEATURES] for present in PRESENT]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, j in itertools.product(range(len(PRESENT)), range(len(FEATURES))):
            share = shares[i][j]
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", color="white" if share < 0.6 else "black")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(FEATURES)), [f"{n / M:g}" for n in FEATURES])
        axes.set_yticks(range(len(PRESENT)), [f"{present:g}" for present in PRESENT])
        axes.set_xlabel("features a dimension")
    figure.axes[0].set_ylabel("probability of a feature")
    figure.colorbar(image, ax=figure.axes, label="share of features recovered", fraction=0.02)
    figure.savefig(RESULTS.parent.parent / "docs/toy-model.png", dpi=120)


def _mean(results: list[dict[str, Any]], name: str, figure: str, n: int, present: float) -> float:
    values = [r[name][figure] for r in results if (r["features"], r["present"]) == (n, present)]
    return statistics.mean(value for value in values if value is not None) if any(v is not None for v in values) else 0


def main() -> None:
    """Train, measure, save, draw."""
    rates = tuned()
    print(f"learning rates: {rates}")
    results = []
    for n, present, seed in tqdm(list(itertools.product(FEATURES, PRESENT, SEEDS))):
        results.append(setting(n, present, seed, rates))
    names = [name for name, found in results[0].items() if isinstance(found, dict)]
    save("toy_model", {"learning_rates": rates, "settings": results})
    plot(results, names)
    for n, present in itertools.product(FEATURES, PRESENT):
        shares = "  ".join(f"{name} {_mean(results, name, 'recovered', n, present):4.0%}" for name in names)
        print(f"{n / M:3g} features a dimension, each present with {present:g}:  {shares}")


if __name__ == "__main__":
    main()
