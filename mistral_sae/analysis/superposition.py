"""Does the residual hold more features than it has dimensions? The decoder beside orthonormal bases and random rows.

That decoder rows outnumber the dimensions proves nothing: they were made so. What would speak for superposition is that
few of them rebuild a residual better than as few directions of any basis do, and better than as many random directions
do, whose number gives the same choice. All are given the same chance here, a matching pursuit.

Shapes: N tokens, D model width, F directions of a dictionary, K of them that a token may use, S resamples, G documents.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mistral_sae.analysis.intervals import interval, resamples
from mistral_sae.sae.features import Geometry

CHUNK_TOKENS = 1024  # at a time
RESAMPLES = 200  # of the documents, for an interval
CLEARLY = 0.9  # of what the best rival leaves unexplained: from there on the dictionary is better by more than a little
OWN = 0.9  # of a dimension: a feature that has as much to itself shares none


# ---- how well few directions rebuild a residual ----


@torch.no_grad()
def unexplained(z_ND: Tensor, rows_FD: Tensor, k: int) -> Tensor:
    """The squared error (N) of each row of `z_ND` rebuilt from the best k of some directions, found greedily.

    Orthogonal matching pursuit in its cheap form (Mallat and Zhang 1993, with the coefficients solved anew at the end):
    k times the direction with the largest |dot product| with what is left is taken. For an orthonormal basis this is
    exactly the best choice of k. Signs are free, which favours bases over features, which are never negative.
    """
    rows_FD = normalize(rows_FD.detach().float(), dim=1)
    k = min(k, *rows_FD.shape)
    errors = []
    for z in z_ND.float().split(CHUNK_TOKENS):
        left, chosen = z, torch.empty(len(z), 0, dtype=torch.int64, device=z.device)
        for _ in range(k):
            dots = (left @ rows_FD.T).scatter_(1, chosen, 0.0)
            best = dots.abs().argmax(dim=1, keepdim=True)
            left = left - dots.gather(1, best) * rows_FD[best.squeeze(1)]
            chosen = torch.cat([chosen, best], dim=1)
        atoms_NDK = rows_FD[chosen].mT
        gram_NKK = atoms_NDK.mT @ atoms_NDK + 1e-6 * torch.eye(k, device=z.device)  # two rows may be the same
        coefficients = torch.linalg.solve(gram_NKK, atoms_NDK.mT @ z.unsqueeze(2))
        errors.append((z - (atoms_NDK @ coefficients).squeeze(2)).square().sum(dim=1))
    return torch.cat(errors)


def rivals(z_ND: Tensor, n_directions: int, seed: int) -> dict[str, Tensor]:
    """Directions to compare a dictionary with: the basis, PCA, a rotation, as many random ones as it has.

    PCA is that of the residuals given.
    """
    d_model, generator = z_ND.shape[1], torch.Generator().manual_seed(seed)
    centred_ND = (z_ND - z_ND.mean(dim=0)).float().cpu()
    rotation_DD = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))[0]
    return {
        "basis directions": torch.eye(d_model),
        "a random rotation": rotation_DD,
        "principal components": torch.linalg.svd(centred_ND, full_matrices=False)[2],
        "random directions": normalize(torch.randn(n_directions, d_model, generator=generator), dim=1),
    }


class Fit(NamedTuple):
    """The share of the residuals' variance that K of some directions leave unexplained, and its 95 % interval."""

    share: float
    low: float
    high: float


def fits(z_ND: Tensor, dictionaries: Mapping[str, Tensor], k: int, document_N: Tensor, seed: int) -> dict[str, Fit]:
    """How well k directions of each dictionary rebuild residuals, by name.

    The mean is taken off first, as every dictionary may. Intervals are a bootstrap over documents, since tokens of one
    are alike; `document_N` (N) int64 tells whose a token is.
    """
    centred_ND = z_ND.float() - z_ND.float().mean(dim=0)
    ids, document_N = document_N.unique(return_inverse=True)
    weights_SG = resamples(torch.ones(len(ids), dtype=torch.bool), seed, RESAMPLES)
    total_G = _by_document(centred_ND.square().sum(dim=1), document_N, len(ids))
    found = {}
    for name, rows_FD in dictionaries.items():
        error_G = _by_document(unexplained(centred_ND, rows_FD, k), document_N, len(ids))
        low, high = interval((weights_SG @ error_G) / (weights_SG @ total_G))
        found[name] = Fit(float(error_G.sum() / total_G.sum()), low, high)
    return found


def _by_document(values_N: Tensor, document_N: Tensor, count: int) -> Tensor:
    return torch.zeros(count).index_add_(0, document_N, values_N.cpu())


# ---- what features that fire together do to each other ----


class Interference(NamedTuple):
    """Squared cosines of features that fire on the same token, and how much they add to each other's reading."""

    together: float  # mean cos^2 over pairs of features that fire on one token
    apart: float  # the same for pairs of different tokens: as frequent features, which need not meet
    random: float  # 1/D, of random directions
    noise: float  # root mean square of what the others on its token add to a feature's reading, beside its activation
    noise_random: float  # the same with random directions in the place of the decoder rows


@torch.no_grad()
def interference(W_dec_FD: Tensor, values_NK: Tensor, indices_NK: Tensor, seed: int) -> Interference:
    """How far features that are active at once are kept apart, from the active features of some tokens (N, K).

    A value of 0 does not count. Superposition costs nothing for features that never meet, so where the model arranges
    them by use, those that do meet lie closer to right angles than those that do not (Elhage et al. 2022).
    """
    rows_FD = normalize(W_dec_FD.detach().float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    elsewhere_N = torch.randperm(len(values_NK), generator=generator)
    strange_FD = normalize(torch.randn(rows_FD.shape, generator=generator), dim=1).to(rows_FD.device)
    sums = torch.zeros(7, dtype=torch.float64)
    for some in torch.arange(len(values_NK)).split(CHUNK_TOKENS):
        values, indices, other = values_NK[some].float(), indices_NK[some], indices_NK[elsewhere_N[some]]
        pairs_NKK = _pairs(values, indices, values, indices)
        crossed_NKK = _pairs(values, indices, values_NK[elsewhere_N[some]], other)
        cosines_NKK = pairs_NKK * (rows_FD[indices] @ rows_FD[indices].mT)
        crossed_cosines_NKK = crossed_NKK * (rows_FD[indices] @ rows_FD[other].mT)
        strange_NKK = pairs_NKK * (strange_FD[indices] @ strange_FD[indices].mT)
        added, added_by_strange = (each @ values.unsqueeze(2) for each in (cosines_NKK, strange_NKK))
        squared = (cosines_NKK, crossed_cosines_NKK, added, added_by_strange, values)
        sums += torch.stack([*(each.square().sum() for each in squared), pairs_NKK.sum(), crossed_NKK.sum()]).cpu()
    together, apart, noise, noise_by_strange, signal, n_pairs, n_crossed = sums.tolist()
    return Interference(
        together / max(1, n_pairs),
        apart / max(1, n_crossed),
        1 / rows_FD.shape[1],
        math.sqrt(noise / signal),
        math.sqrt(noise_by_strange / signal),
    )


def _pairs(values: Tensor, indices: Tensor, other_values: Tensor, other_indices: Tensor) -> Tensor:
    """Which pairs (N, K, K) of two active features are two different ones."""
    both = (values > 0).unsqueeze(2) & (other_values > 0).unsqueeze(1)
    return both & (indices.unsqueeze(2) != other_indices.unsqueeze(1))


# ---- the answer ----


def verdict(geometry: Geometry, d_model: int, found: Mapping[str, Fit], dictionary: str) -> tuple[str, str]:
    """The answer in a word and in a sentence: "neurons", "basis", "superposition" or "unclear".

    `found` are the fits of the dictionary, by its name, and of its rivals.
    """
    own = found[dictionary]
    rival = min((name for name in found if name != dictionary), key=lambda name: found[name].share)
    best = found[rival]
    beats = own.share < CLEARLY * best.share and own.high < best.low
    beside = (
        f"the best few leave {own.share:.1%} of the variance unexplained ({own.low:.1%} to {own.high:.1%}), "
        f"as many of {rival} {best.share:.1%} ({best.low:.1%} to {best.high:.1%})"
    )
    if geometry.median_dimensionality >= OWN and geometry.participation < 2 and not own.share > best.share + 1e-6:
        return "neurons", f"No: {geometry.features:,} features lie along the neurons, one each; {beside}."
    if geometry.median_dimensionality >= OWN and beats:
        return "basis", (
            f"No: {geometry.features:,} features at right angles need no superposition, though each spreads over "
            f"{geometry.participation:.0f} of {d_model:,} neurons; {beside}."
        )
    if beats and geometry.features > d_model:
        return "superposition", (
            f"Yes, as far as a sparse code can tell: {geometry.features:,} features in {d_model:,} dimensions, each "
            f"with {geometry.median_dimensionality:.2f} of one to itself; {beside}."
        )
    return "unclear", f"Not shown: {beside}; so many directions do no more than {rival}."
