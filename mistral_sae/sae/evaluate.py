"""What a sparse autoencoder keeps of the residuals, and what of it the language model needs.

Shapes: R rows, T positions, D model width, F features, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import RARE, Counts

LOGITS_BYTES = 2**28  # of logits at a time, which exist HELD_LOGITS times over
HELD_LOGITS = 5  # log-probabilities clean and spliced, and what their divergence is computed through


class Model(Protocol):
    """What cross-entropy needs of a language model."""

    device: torch.device
    vocab_size: int

    def residuals(self, tokens_BT: Tensor, layer: int) -> Tensor:
        """The residual stream after `layer`, (B, T, D)."""

    def log_probabilities(
        self, tokens_BT: Tensor, layer: int | None = None, replace: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Next-token log-probabilities (B, T - 1, V), `layer`'s residuals replaced at all but the first position."""


class Reconstruction(NamedTuple):
    """How well the autoencoder reconstructs some residuals, and with how many features."""

    tokens: int
    l0: float  # mean number of active features a token
    normalized_mse: float  # |z - z^|^2 / |z - mean(z)|^2 of the standardised residuals, what training minimises
    explained_variance: float  # 1 - |x - x^|^2 / |x - mean(x)|^2 of the residuals themselves, about their mean
    silent_fraction: float  # of the features: fired on none of these tokens
    rare_fraction: float  # of the features: fired on fewer than one token in ten thousand
    density: Tensor  # (F) share of tokens on which each feature fired


@torch.no_grad()
def reconstruction(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> Reconstruction:
    """Measure over batches of residuals (B, D). Means and variances are over all of them, in float64."""
    counts = Counts(sae.n_features, sae.W_dec.device)
    errors = {"z": 0.0, "x": 0.0}
    sums, squares = {"z": 0.0, "x": 0.0}, {"z": 0.0, "x": 0.0}
    for batch in batches:
        x = batch.float()
        encoded = sae.encode(x)
        x_hat = sae.decode(encoded)
        z, mean, std = sae.standardize(x)
        for space, true, found in (("x", x, x_hat), ("z", z, (x_hat - mean) / std)):
            errors[space] += (true - found).double().square().sum().item()
            sums[space] += true.double().sum(dim=0)
            squares[space] += true.double().square().sum().item()
        counts.add(encoded.values, encoded.indices)
    count, density = counts.tokens, counts.density_F()
    if not count:
        raise ValueError("there are no held-out residuals to evaluate on: raise EVALUATION_ROWS or HELD_OUT_FRACTION")
    unexplained = {s: errors[s] / (squares[s] - sums[s].square().sum().item() / count) for s in errors}
    return Reconstruction(
        tokens=count,
        l0=counts.fired_F.sum().item() / count,
        normalized_mse=unexplained["z"],
        explained_variance=1 - unexplained["x"],
        silent_fraction=(density == 0).double().mean().item(),
        rare_fraction=(density < RARE).double().mean().item(),
        density=density.float(),
    )


class CrossEntropy(NamedTuple):
    """Cross-entropy (nats a token) of the model with its residuals replaced, the first position of each row kept."""

    ce_loss_clean: float
    ce_loss_with_sae: float
    ce_loss_ablated: float  # every residual replaced by their mean
    ce_loss_zero_ablated: float
    ce_loss_recovered: float  # (ablated - with_sae) / (ablated - clean)
    ce_loss_recovered_zero: float  # the same against zero ablation
    kl: float  # KL(clean || with_sae), nats a token


class Ablated(NamedTuple):
    """Cross-entropy (nats a token) without the layer, to compare with: the same for every autoencoder."""

    mean: float
    zero: float


@torch.no_grad()
def ablated(model: Model, rows_RT: Tensor, layer: int, rows_per_forward: int) -> Ablated:
    """Splice the mean, then zero, into `layer`'s residuals and predict the rows' tokens."""
    parts = _parts(model, rows_RT, rows_per_forward)
    mean = sum(model.residuals(part, layer)[:, 1:].flatten(0, 1).double().sum(dim=0) for part in parts)
    mean = (mean / (len(rows_RT) * (rows_RT.shape[1] - 1))).float()
    losses = []
    for replace in (lambda x: mean.expand_as(x), torch.zeros_like):
        total = 0.0
        for tokens in parts:
            total += _negative_log_likelihood(model.log_probabilities(tokens, layer, replace), tokens)
        losses.append(total / (len(rows_RT) * (rows_RT.shape[1] - 1)))
    return Ablated(*losses)


@torch.no_grad()
def cross_entropy(
    model: Model,
    sae: SparseAutoencoder,
    rows_RT: Tensor,
    layer: int,
    rows_per_forward: int,
    without: Ablated | None = None,
) -> CrossEntropy:
    """Splice the reconstruction into `layer`'s residuals and predict the rows' tokens.

    `without` is what `ablated` gave for the same rows; it is measured where it is None.
    """
    without = without or ablated(model, rows_RT, layer, rows_per_forward)
    totals = torch.zeros(3, dtype=torch.float64)
    for tokens in _parts(model, rows_RT, rows_per_forward):
        clean, spliced = model.log_probabilities(tokens), model.log_probabilities(tokens, layer, sae)
        divergence = F.kl_div(spliced, clean, log_target=True, reduction="sum").item()
        losses = (_negative_log_likelihood(logprobs, tokens) for logprobs in (clean, spliced))
        totals += torch.tensor([*losses, divergence])
    clean, spliced, divergence = (totals / (len(rows_RT) * (rows_RT.shape[1] - 1))).tolist()
    return CrossEntropy(
        ce_loss_clean=clean,
        ce_loss_with_sae=spliced,
        ce_loss_ablated=without.mean,
        ce_loss_zero_ablated=without.zero,
        ce_loss_recovered=(without.mean - spliced) / (without.mean - clean),
        ce_loss_recovered_zero=(without.zero - spliced) / (without.zero - clean),
        kl=divergence,
    )


def _parts(model: Model, rows_RT: Tensor, rows_per_forward: int) -> list[Tensor]:
    """The rows, so many at a time that their logits have room."""
    rows = max(1, min(rows_per_forward, LOGITS_BYTES // (4 * rows_RT.shape[1] * model.vocab_size)))
    return [part.to(model.device) for part in rows_RT.split(rows)]


def _negative_log_likelihood(logprobs_RTV: Tensor, tokens_RT: Tensor) -> float:
    return F.nll_loss(logprobs_RTV.flatten(0, 1), tokens_RT[:, 1:].flatten(), reduction="sum").item()
