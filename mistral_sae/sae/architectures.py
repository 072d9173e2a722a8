"""The architectures beside TopK: what each does on a batch, its loss and its gradients in closed form.

All work on z, the standardised residual, with pre = (z - b_dec) @ W_enc + b_enc and z^ = f @ W_dec + b_dec; V is the
squared norm of z about its mean over the batch. BatchTopK and Matryoshka go through the sparse step of TopK, and are
JumpReLU autoencoders afterwards; ReLU and JumpReLU have no bound on what is active, and go through what is.

Shapes: B tokens, D model width, F features, K active features a token on average, E pairs of a token and a feature.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.distributed import ALONE, Group
from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.kernels.step import (
    SMALLEST_VARIANCE,
    encode_batch,
    only_used,
    run_sums,
    sparse_step,
    squared_norm,
    tokens_at_once,
    variation,
)
from mistral_sae.sae.kernels.types import AuxK, MatrixGradient, Step, Weights

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu")
PENALIZED = ("relu", "jumprelu")  # how many features are active follows from a penalty
START = 4  # times K: how many features of those two fire at first
SLOTS = 4  # times K: what one token may have active under BatchTopK; a token that wants more is cut there


def activation_of(architecture: str) -> str:
    """What activates features after training: BatchTopK needs a batch, so that a threshold takes its place."""
    return "jumprelu" if architecture in ("batchtopk", "matryoshka") else architecture


def nested_sizes(n_features: int, levels: int, shards: Group = ALONE.shards) -> Tensor:
    """How many of a shard's features are in each nested autoencoder of Matryoshka (P).

    Those have all n_features, half of them, half of those ...
    """
    ends, width = {max(1, n_features >> level) for level in range(levels)}, n_features // shards.size
    return (torch.tensor(sorted(ends)) - shards.rank * width).clamp(0, width)


@torch.no_grad()
def batchtopk_step(
    z: Tensor, weights: Weights, k: int, aux: AuxK | None = None, ends: Tensor | None = None
) -> tuple[Step, Tensor]:
    """BatchTopK (Bussmann, Leask and Nanda 2024), and with `ends` Matryoshka (Bussmann et al. 2025).

    ::

        f    = relu(pre) where it is among the B K largest of the batch
        loss = mean over ends n of |z - f[:n] @ W_dec[:n] - b_dec|^2 / V  +  AuxK as for TopK

    Returns the step and the smallest activation, of which the threshold is a moving average (`threshold_after`).
    """
    centered, shards = z - weights.b_dec, weights.mesh.shards
    slots = min(len(weights.b_enc) * shards.size, SLOTS * k)
    values, indices = encode_batch(centered, weights, slots)
    everywhere = shards.gather(values, dim=1).flatten()
    least = everywhere.topk(min(k, slots) * len(z), sorted=False).values.min()
    values = values.masked_fill(values < least, 0.0)
    if shards.size > 1 or values.device.type == "cpu":  # where asking how many are in use costs little
        values, indices = only_used(values, indices)
    return sparse_step(z, centered, weights, values, indices, aux, ends), least


def threshold_after(threshold_F: Tensor, least: Tensor, steps: Tensor) -> Tensor:
    """The threshold after so many steps of BatchTopK: a moving average over about ten, one for all features."""
    return torch.lerp(threshold_F, least.expand_as(threshold_F), (1 / (steps + 1)).clamp_min(0.1))


class Pairs(NamedTuple):
    """Tokens and features that have to do with each other, E of them, token by token."""

    tokens: Tensor  # int64
    features: Tensor  # int64
    pre: Tensor  # pre-activations


def pairs_above(centered: Tensor, weights: Weights, least_F: Tensor) -> Pairs:
    """Where pre-activations are above `least_F`; like `encode` it runs over some tokens at a time."""
    size = tokens_at_once(centered.device, torch.float32, len(weights.b_enc))

    def above(first: int) -> Pairs:
        pre_BF = torch.addmm(weights.b_enc, centered[first : first + size], weights.W_enc)
        tokens, features = (pre_BF > least_F).nonzero(as_tuple=True)
        return Pairs(tokens + first, features, pre_BF[tokens, features])

    found = [above(first) for first in range(0, len(centered), size)]
    return found[0] if len(found) == 1 else Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.no_grad()
def relu_step(z: Tensor, weights: Weights, coefficient: Tensor) -> Step:
    """ReLU with an L1 penalty weighted by the decoder's norms, which are free (Templeton et al. 2024).

    ::

        f = relu(pre);  loss = (|z - z^|^2 + coefficient * sum_i f_i |W_dec_i|) / V
    """
    centered, W_dec = z - weights.b_dec, weights.W_dec
    pairs = pairs_above(centered, weights, torch.zeros_like(weights.b_enc))
    norm_F, share = torch.linalg.vector_norm(W_dec, dim=1), coefficient / variation(z).clamp_min(SMALLEST_VARIANCE)
    summed_F = torch.zeros_like(norm_F).index_add_(0, pairs.features, pairs.pre)
    step, _ = _step_of_pairs(z, centered, weights, pairs, pairs.pre, share * norm_F)
    of_rows = (share * summed_F / norm_F.clamp_min(1e-12)).unsqueeze(1) * W_dec
    everywhere = torch.arange(len(W_dec), device=z.device), of_rows
    of_W_dec = step.W_dec._replace(added=everywhere, along=None, squares=None)
    penalty = share * weights.mesh.shards.total(summed_F @ norm_F)
    return step._replace(loss=step.loss + penalty, W_dec=of_W_dec)


@torch.no_grad()
def jumprelu_step(z: Tensor, weights: Weights, threshold_F: Tensor, coefficient: Tensor, bandwidth: float) -> Step:
    """JumpReLU with an L0 penalty, thresholds trained straight through (Rajamanoharan et al. 2024, section 3).

    ::

        f = pre where pre > threshold, else 0;  loss = (|z - z^|^2 + coefficient * number of active features) / V

    Threshold's gradients come from pre-activations within half a bandwidth of it: -threshold / bandwidth times the
    gradient of f, and -1 / bandwidth times the coefficient. The threshold itself is trained, not its logarithm.
    """
    centered, share = z - weights.b_dec, coefficient / variation(z).clamp_min(SMALLEST_VARIANCE)
    pairs = pairs_above(centered, weights, threshold_F - bandwidth / 2)
    threshold_E = threshold_F.take(pairs.features)
    is_active = (pairs.pre > threshold_E) & (pairs.pre > 0)
    step, of_f_E = _step_of_pairs(z, centered, weights, pairs, pairs.pre * is_active, torch.zeros_like(threshold_F))
    near_E = pairs.pre - threshold_E < bandwidth / 2
    of_threshold_E = near_E * (of_f_E * threshold_E + share) / -bandwidth
    of_threshold_F = torch.zeros_like(threshold_F).index_add_(0, pairs.features, of_threshold_E)
    penalty = share * weights.mesh.shards.total(is_active.sum())
    return step._replace(loss=step.loss + penalty, threshold=of_threshold_F)


def _step_of_pairs(
    z: Tensor, centered: Tensor, weights: Weights, pairs: Pairs, values: Tensor, of_penalty_F: Tensor
) -> tuple[Step, Tensor]:
    """The step without its penalty where the activations (E) are known, and the gradient of each (E).

    `of_penalty_F` is the penalty's gradient of an activation.
    """
    (tokens, features, _), W_dec, (n_tokens, n_features) = pairs, weights.W_dec, (len(z), len(weights.b_enc))
    variance = variation(z).clamp_min(SMALLEST_VARIANCE)
    scale = -2 / variance
    counts = torch.bincount(tokens, minlength=n_tokens)
    starts = counts.cumsum(0) - counts
    decoded = F.embedding_bag(features, W_dec, starts, per_sample_weights=values, mode="sum")
    error = centered - weights.mesh.sum_tokens(decoded)
    # Feature by feature from here on
    ordered, order = features.to(torch.int32).sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(n_features + 1, dtype=torch.int32, device=z.device))
    owners, ordered_values = tokens.take(order), values.take(order)
    of_W_dec = MatrixGradient(offsets, error, owners, scale * ordered_values)
    products, squares = operations(z.device).row_products(of_W_dec, W_dec)
    of_f = scale * products + of_penalty_F.take(features.take(order))
    of_pre = of_f * (ordered_values > 0)
    of_b_enc = run_sums(of_pre, offsets)
    along = scale * run_sums(ordered_values * products, offsets)
    normalized_mse = squared_norm(error) / variance
    shape = n_tokens, max(1, int(counts.max()))
    places = tokens, torch.arange(len(tokens), device=z.device) - starts.take(tokens)
    step = Step(
        loss=normalized_mse,
        normalized_mse=normalized_mse,
        auxk=z.new_zeros(()),
        l0=weights.mesh.shards.total((values > 0).sum()) / n_tokens,
        values=values.new_zeros(shape).index_put_(places, values),
        indices=features.new_zeros(shape).index_put_(places, features),
        W_enc=MatrixGradient(offsets, centered, owners, of_pre),
        b_enc=of_b_enc,
        W_dec=of_W_dec._replace(along=along, squares=squares),
        b_dec=scale * error.sum(dim=0) - weights.mesh.shards.total(weights.W_enc @ of_b_enc),
    )
    return step, torch.empty_like(of_f).scatter_(0, order, of_f)


@torch.no_grad()
def equal_thresholds(weights: Weights, z: Tensor, k: float, *, keeps: bool) -> tuple[Tensor, Tensor]:
    """Thresholds (F) with which each feature fires as often as any other and k do a token, and a scale for W_enc.

    So JumpReLU autoencoders start, and ReLU ones with the negative as their bias (Conerly et al. 2025): where features
    do not fire they learn nothing. The scale, which the thresholds allow for, makes the reconstruction of z as good as
    it gets. `keeps` says whether an activation keeps what lies below the threshold, as JumpReLU's does.
    """
    centered, n_features = z - weights.b_dec, len(weights.b_enc) * weights.mesh.shards.size
    count = min(len(z) - 1, max(1, round(len(z) * k / n_features)))
    z_hat, thresholds = torch.zeros_like(z), []
    for W_enc, W_dec in zip(weights.W_enc.split(4096, dim=1), weights.W_dec.split(4096), strict=True):
        pre = centered @ W_enc
        threshold = pre.topk(count + 1, dim=0, sorted=False).values.amin(dim=0).clamp_min(0.0)
        z_hat += ((pre if keeps else pre - threshold) * (pre > threshold)) @ W_dec
        thresholds.append(threshold)
    z_hat = weights.mesh.sum_tokens(z_hat)
    scale = (z_hat * centered).sum().clamp_min(1e-12) / z_hat.square().sum().clamp_min(1e-12)
    return scale * torch.cat(thresholds), scale
