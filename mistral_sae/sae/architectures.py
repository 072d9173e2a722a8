"""The architectures beside TopK: what each does on a batch, its loss and its gradients in closed form.

All work on z, the standardised residual, with pre = (z - b_dec) @ W_enc + b_enc and z^ = f @ W_dec + b_dec; V is the
squared norm of z about its mean over the batch. BatchTopK and Matryoshka go through the sparse step of TopK, and are
JumpReLU autoencoders afterwards; ReLU and JumpReLU have no bound on what is active and take dense products.

Shapes: B tokens, D model width, F features, K active features a token on average.
"""

import torch
from torch import Tensor

from mistral_sae.distributed import ALONE, Group
from mistral_sae.sae.kernels import AuxK, MatrixGradient, Step, Weights
from mistral_sae.sae.kernels.step import (
    SMALLEST_VARIANCE,
    encode_batch,
    only_used,
    sparse_step,
    squared_norm,
    variation,
)

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu")
DENSE = ("relu", "jumprelu")
SLOTS = 4  # times K: what one token may have active under BatchTopK; a token that wants more is cut there


def activation_of(architecture: str) -> str:
    """What activates features after training: BatchTopK needs a batch, so that a threshold takes its place."""
    return "jumprelu" if architecture in ("batchtopk", "matryoshka") else architecture


def nested_sizes(n_features: int, levels: int, shards: Group = ALONE.shards) -> Tensor:
    """How many of a shard's features are in each nested autoencoder of Matryoshka (P).

    Those have all n_features, half of them, half of those ...
    """
    ends, width = (
        torch.tensor(sorted({max(1, n_features >> level) for level in range(levels)})),
        n_features // shards.size,
    )
    return (ends - shards.rank * width).clamp(0, width)


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


@torch.no_grad()
def relu_step(z: Tensor, weights: Weights, coefficient: Tensor) -> Step:
    """ReLU with an L1 penalty weighted by the decoder's norms, which are free (Templeton et al. 2024).

    ::

        f = relu(pre);  loss = (|z - z^|^2 + coefficient * sum_i f_i |W_dec_i|) / V
    """
    centered = z - weights.b_dec
    f_BF = torch.addmm(weights.b_enc, centered, weights.W_enc).relu_()
    norm_F = torch.linalg.vector_norm(weights.W_dec, dim=1)
    error = centered - weights.mesh.sum_tokens(f_BF @ weights.W_dec)
    variance = variation(z).clamp_min(SMALLEST_VARIANCE)
    of_f_BF = (error @ weights.W_dec.T).mul_(-2 / variance).add_(coefficient / variance * norm_F)
    of_pre_BF = of_f_BF.mul_(f_BF > 0)
    of_W_dec = f_BF.T @ error * (-2 / variance)
    summed_F = f_BF.sum(dim=0)
    of_W_dec += (coefficient / variance * summed_F / norm_F.clamp_min(1e-12)).unsqueeze(1) * weights.W_dec
    penalty = coefficient * (summed_F @ norm_F)
    return _dense(z, weights, f_BF, error, of_pre_BF, of_W_dec, penalty, unit_norm=False)


@torch.no_grad()
def jumprelu_step(z: Tensor, weights: Weights, threshold_F: Tensor, coefficient: Tensor, bandwidth: float) -> Step:
    """JumpReLU with an L0 penalty, thresholds trained straight through (Rajamanoharan et al. 2024, section 3).

    ::

        f = pre where pre > threshold, else 0;  loss = (|z - z^|^2 + coefficient * number of active features) / V

    Threshold's gradients come from pre-activations within half a bandwidth of it: -threshold / bandwidth times the
    gradient of f, and -1 / bandwidth times the coefficient. The threshold itself is trained, not its logarithm.
    """
    centered = z - weights.b_dec
    pre_BF = torch.addmm(weights.b_enc, centered, weights.W_enc)
    is_active = (pre_BF > threshold_F) & (pre_BF > 0)
    f_BF = pre_BF * is_active
    error = centered - weights.mesh.sum_tokens(f_BF @ weights.W_dec)
    variance = variation(z).clamp_min(SMALLEST_VARIANCE)
    of_f_BF = (error @ weights.W_dec.T).mul_(-2 / variance)
    is_near = (pre_BF - threshold_F).abs_() < bandwidth / 2
    of_threshold_F = -(is_near * (of_f_BF * threshold_F + coefficient / variance)).sum(dim=0) / bandwidth
    of_W_dec = f_BF.T @ error * (-2 / variance)
    penalty = coefficient * is_active.sum()
    step = _dense(z, weights, f_BF, error, of_f_BF.mul_(is_active), of_W_dec, penalty, unit_norm=True)
    return step._replace(threshold=of_threshold_F)


def _dense(
    z: Tensor,
    weights: Weights,
    f_BF: Tensor,
    error: Tensor,
    of_pre_BF: Tensor,
    of_W_dec: Tensor,
    penalty: Tensor,
    *,
    unit_norm: bool,
) -> Step:
    """The step from the gradients of pre-activations and decoder, which are dense."""
    variance, shards = variation(z).clamp_min(SMALLEST_VARIANCE), weights.mesh.shards
    normalized_mse = squared_norm(error) / variance
    of_b_enc = of_pre_BF.sum(dim=0)
    most = max(1, int((f_BF > 0).sum(dim=1).max()))
    values, indices = f_BF.topk(most, dim=1, sorted=False)
    along = (of_W_dec * weights.W_dec).sum(dim=1) if unit_norm else None
    return Step(
        loss=normalized_mse + shards.total(penalty) / variance,
        normalized_mse=normalized_mse,
        auxk=z.new_zeros(()),
        l0=shards.total((values > 0).sum()) / len(z),
        values=values,
        indices=indices,
        W_enc=_whole(of_pre_BF.T @ (z - weights.b_dec)),
        b_enc=of_b_enc,
        W_dec=_whole(of_W_dec)._replace(along=along),
        b_dec=(-2 / variance) * error.sum(dim=0) - shards.total(weights.W_enc @ of_b_enc),
    )


def _whole(gradient_FD: Tensor) -> MatrixGradient:
    """A dense gradient in the form of a sparse one: nothing but what comes on top of it."""
    n_features, device = len(gradient_FD), gradient_FD.device
    nothing, offsets = gradient_FD.new_empty(0), torch.zeros(n_features + 1, dtype=torch.int32, device=device)
    added = torch.arange(n_features, device=device), gradient_FD
    return MatrixGradient(offsets, gradient_FD[:1], nothing.long(), nothing, added)
