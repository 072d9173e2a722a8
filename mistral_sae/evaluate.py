"""What a sparse autoencoder keeps of the residuals, and what of it the language model needs.

Shapes: R rows, T positions, D model width, F features, V vocabulary.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.activations import residuals_of
from mistral_sae.hooks import edit_residual
from mistral_sae.lm import LanguageModel
from mistral_sae.sae import SparseAutoencoder

RARE = 1e-4  # a feature that fires on fewer tokens than one in ten thousand; evaluations have some ten thousand tokens
LOGITS_BYTES = 2**28  # of logits at a time, which exist HELD_LOGITS times over
HELD_LOGITS = 5  # log-probabilities clean and spliced, and what their divergence is computed through


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
    count, active = 0, 0.0
    fired = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_dec.device)
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
        count += len(x)
        active += (encoded.values > 0).sum().item()
        fired += torch.bincount(encoded.indices[encoded.values > 0], minlength=sae.n_features)
    if not count:
        raise ValueError("there are no held-out residuals to evaluate on: raise EVALUATION_ROWS or HELD_OUT_FRACTION")
    unexplained = {s: errors[s] / (squares[s] - sums[s].square().sum().item() / count) for s in errors}
    density = fired.double() / count
    return Reconstruction(
        tokens=count,
        l0=active / count,
        normalized_mse=unexplained["z"],
        explained_variance=1 - unexplained["x"],
        silent_fraction=(fired == 0).double().mean().item(),
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


@torch.no_grad()
def cross_entropy(
    lm: LanguageModel, sae: SparseAutoencoder, rows_RT: Tensor, layer: int, rows_per_forward: int
) -> CrossEntropy:
    """Splice the reconstruction, the mean and zero into `layer`'s residuals and predict the rows' tokens."""
    rows = max(1, min(rows_per_forward, LOGITS_BYTES // (4 * rows_RT.shape[1] * lm.vocab_size)))
    parts = [part.to(lm.device) for part in rows_RT.split(rows)]
    mean = sum(residuals_of(lm, part, layer).double().sum(dim=0) for part in parts)
    mean = (mean / (len(rows_RT) * (rows_RT.shape[1] - 1))).float()

    edits: dict[str, Callable[[Tensor, int], Tensor] | None] = {
        "clean": None,
        "with_sae": _from_second_position(lambda x: sae(x)),
        "ablated": _from_second_position(lambda x: mean.expand_as(x)),
        "zero_ablated": _from_second_position(torch.zeros_like),
    }
    totals = dict.fromkeys([*edits, "kl"], 0.0)
    for tokens in parts:
        clean = None
        for name, edit in edits.items():
            with nullcontext() if edit is None else edit_residual(lm, layer, edit):
                logprobs = lm.forward(tokens)[:, :-1].float().log_softmax(dim=-1).flatten(0, 1)
            totals[name] += F.nll_loss(logprobs, tokens[:, 1:].flatten(), reduction="sum").item()
            if name == "clean":
                clean = logprobs
            elif name == "with_sae":
                totals["kl"] += F.kl_div(logprobs, clean, log_target=True, reduction="sum").item()
    loss = {name: total / (len(rows_RT) * (rows_RT.shape[1] - 1)) for name, total in totals.items()}

    def recovered(ablated: str) -> float:
        return (loss[ablated] - loss["with_sae"]) / (loss[ablated] - loss["clean"])

    return CrossEntropy(
        ce_loss_clean=loss["clean"],
        ce_loss_with_sae=loss["with_sae"],
        ce_loss_ablated=loss["ablated"],
        ce_loss_zero_ablated=loss["zero_ablated"],
        ce_loss_recovered=recovered("ablated"),
        ce_loss_recovered_zero=recovered("zero_ablated"),
        kl=loss["kl"],
    )


def _from_second_position(replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """An edit for `hooks.edit_residual` that replaces all but the first position of each row."""

    def edit(resid_RTD: Tensor, start: int) -> Tensor:
        kept = 1 if start == 0 else 0
        return torch.cat([resid_RTD[:, :kept], replace(resid_RTD[:, kept:]).to(resid_RTD.dtype)], dim=1)

    return edit
