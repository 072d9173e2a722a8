"""What is known of each feature of an autoencoder: one definition of each figure, for all scripts and the report.

Density, maximum, nearest features, logit lens, and how the decoder rows share the model's dimensions. Nothing here
knows a language model or text: residuals come in as batches (B, D), the unembedding as a function.

Shapes: B tokens, D model width, F features, N some of them, K active features, V vocabulary.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_sae.distributed import ALONE, Group
from mistral_sae.files import SAEError, load_state, save_state
from mistral_sae.sae.autoencoder import SparseAutoencoder

RARE, COMMON = 1e-4, 1e-2  # densities between which most features lie; evaluations have some ten thousand tokens
SAMPLE = 8192  # decoder rows whose nearest neighbour the geometry looks for, among all; evenly spaced
CHUNK_BYTES = 2**28  # of cosines or logits at a time

Pairs = list[list[tuple[int, float]]]  # for each feature, (id, value), best first


# ---- density and maximum ----


class Statistics(NamedTuple):
    """How strongly and how often each feature fires."""

    maximum_F: Tensor  # largest activation, in the autoencoder's unit
    density_F: Tensor  # share of the tokens on which the feature fires
    tokens: int | None  # that were read to measure it; None if training did

    def mid_density(self) -> list[int]:
        """The features that fire on more than RARE and less than COMMON of the tokens."""
        found_F = (self.maximum_F > 0) & (self.density_F > RARE) & (self.density_F < COMMON)
        return found_F.nonzero().flatten().tolist()


class Counts:
    """On how many tokens each feature has fired, and its largest activation so far."""

    def __init__(self, n_features: int, device: torch.device | str = "cpu", shards: Group = ALONE.shards):
        """`n_features` are those of a shard: each counts its own, and all together say what they counted."""
        self.tokens, self.shards = 0, shards
        self.fired_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.maximum_F = torch.zeros(n_features, device=device)

    def add(self, values_BK: Tensor, indices_BK: Tensor) -> None:
        """Take in the active features of some tokens; a value of 0 does not count."""
        values, indices = values_BK.flatten(), indices_BK.flatten()
        self.tokens += len(values_BK)
        self.fired_F.scatter_add_(0, indices, (values > 0).long())
        self.maximum_F.scatter_reduce_(0, indices, values.float(), "amax")

    def density_F(self) -> Tensor:
        """Share of the tokens on which each feature of all shards has fired, float64, on the CPU."""
        return self.shards.gather(self.fired_F).cpu().double() / max(1, self.tokens)

    def statistics(self) -> Statistics:
        """Density and maximum of all shards' features, on the CPU."""
        return Statistics(self.shards.gather(self.maximum_F).cpu(), self.density_F().float(), self.tokens)


@torch.no_grad()
def measure_statistics(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> Statistics:
    """Statistics from residuals (B, D), for an autoencoder that comes without."""
    counts = Counts(sae.n_features, sae.W_dec.device)
    for x_BD in batches:
        encoded = sae.encode(x_BD)
        counts.add(encoded.values, encoded.indices)
    return counts.statistics()


def cached_statistics(path: Path, made_from: dict[str, Any], measure: Callable[[], Statistics]) -> Statistics:
    """The statistics in a file if they were made from the same (JSON), else `measure()`, which is written there."""
    with contextlib.suppress(SAEError, KeyError):  # not there, or damaged: measured again
        tensors, found = load_state(path)
        maximum_F, density_F, tokens = tensors["maximum"], tensors["density"], found["tokens"]
        are_figures = maximum_F.dtype == density_F.dtype == torch.float32 and maximum_F.shape == density_F.shape
        if found["of"] == made_from and are_figures and isinstance(tokens, int):
            return Statistics(maximum_F, density_F, tokens)
    measured = measure()
    tensors = {"maximum": measured.maximum_F, "density": measured.density_F}
    save_state(path, tensors, {"of": made_from, "tokens": measured.tokens})
    return measured


# ---- what a decoder row is near, and what it promotes ----


@torch.no_grad()
def nearest(W_dec_FD: Tensor, features: Sequence[int], count: int, among_F: Tensor | None = None) -> Pairs:
    """For each feature the `count` others whose decoder rows have the largest cosine with its own, and the cosines.

    Rows may have any norm. `among_F` (F) bool says which features may be a neighbour.
    """
    W_FD = W_dec_FD.detach().float()  # at 7B two gigabytes: there is no second one of it
    norm_F = torch.linalg.vector_norm(W_FD, dim=1).clamp_min(1e-12)
    ids_N = torch.tensor(features, dtype=torch.int64, device=W_FD.device)
    found: Pairs = []
    for ids in ids_N.split(max(1, CHUNK_BYTES // (4 * len(W_FD)))):
        cosine_NF = W_FD[ids] @ W_FD.T / norm_F / norm_F[ids].unsqueeze(1)
        if among_F is not None:
            cosine_NF.masked_fill_(~among_F.to(W_FD.device), -torch.inf)
        cosine_NF.scatter_(1, ids.unsqueeze(1), -torch.inf)
        found += _pairs(cosine_NF, count)
    return found


class LogitLens(NamedTuple):
    """What decoder rows do to the logits directly, leaving out the layers between (nostalgebraist 2020)."""

    promoted: Pairs  # for each row the token ids whose logits it raises most, and by how much
    suppressed: Pairs  # those whose logits it lowers most


@torch.no_grad()
def logit_lens(unembed: Callable[[Tensor], Tensor], rows_ND: Tensor, count: int, vocab_size: int) -> LogitLens:
    """The `count` tokens that each decoder row promotes most, and those that it suppresses most.

    A logit is taken from the mean over the vocabulary, which no probability depends on: 0 is a token that the feature
    neither promotes nor suppresses.

    Args:
        unembed: residuals (N, D) -> logits (N, V), as `LanguageModel.unembed`.
        vocab_size: tokens of the tokenizer; some models' matrices are padded beyond it.
    """
    found = LogitLens([], [])
    for rows in rows_ND.split(max(1, CHUNK_BYTES // (4 * vocab_size))):
        logits_NV = unembed(rows)[:, :vocab_size]
        logits_NV = logits_NV - logits_NV.mean(dim=1, keepdim=True)
        found.promoted.extend(_pairs(logits_NV, count))
        found.suppressed.extend(_pairs(logits_NV, count, largest=False))
    return found


def _pairs(scores: Tensor, count: int, largest: bool = True) -> Pairs:
    """(index, value) of the most extreme finite values of each row, most extreme first."""
    values, indices = scores.topk(min(count, scores.shape[1]), dim=1, largest=largest)
    return [
        [(i, v) for i, v in zip(ids, vs, strict=True) if math.isfinite(v)]
        for ids, vs in zip(indices.tolist(), values.tolist(), strict=True)
    ]


# ---- the decoder as a whole ----


class Geometry(NamedTuple):
    """How the decoder rows of the features that fire share the model's D dimensions."""

    features: int  # that fire
    nearest_N: tuple[float, ...]  # cosine of a feature's decoder row with the nearest other one's
    nearest_random: float  # median of the same for as many directions drawn at random
    participation: float  # median over features of 1 / sum(w^4): over how many dimensions a row of unit norm spreads
    participation_random: float
    writers_D: tuple[int, ...]  # features that write to each dimension with more than an even share, |w| > 1/sqrt(D)
    effective_dimensions: float  # F^2 / |W^T W|^2, the participation of the rows' covariance: D if they fill the space
    dimensionality_F: tuple[float, ...]  # 1 / sum_j cos_ij^2 (Elhage et al. 2022): 1 for a feature that shares nothing
    welch: float  # the largest cosine that any packing of as many rows must have (Welch 1974); 0 for D or fewer

    @property
    def median_dimensionality(self) -> float:
        """Median over features of the share of a dimension that each has to itself."""
        return statistics.median(self.dimensionality_F)

    @property
    def median_nearest(self) -> float:
        """Median over features of the cosine with the nearest other feature."""
        return statistics.median(self.nearest_N)

    @property
    def median_writers(self) -> float:
        """Median over dimensions of the number of features that write to each."""
        return statistics.median(self.writers_D)


@torch.no_grad()
def decoder_geometry(W_dec_FD: Tensor, fired_F: Tensor | None = None) -> Geometry | None:
    """The geometry of a decoder whose rows may have any norm; None with fewer than two features.

    `fired_F` (F) bool leaves out the features that never fired, whose rows say more of the initialisation. Nearest
    neighbours are looked for from SAMPLE features at most, among all; a nearest random direction is the median of the
    largest of F cosines, each normal with variance 1/D.
    """
    W_FD, d_model = W_dec_FD.detach().float(), W_dec_FD.shape[1]
    norm_F = torch.linalg.vector_norm(W_FD, dim=1)
    counts_F = norm_F > 0 if fired_F is None else (norm_F > 0) & fired_F.to(W_FD.device)
    features = counts_F.nonzero().squeeze(1)
    n_features, n_sample = len(features), min(SAMPLE, len(features))
    if n_features < 2:
        return None

    sample_N = features[torch.arange(n_sample, device=features.device) * n_features // n_sample]
    gram_DD, writers_D = W_FD.new_zeros(d_model, d_model), W_FD.new_zeros(d_model)
    participation, parts = [], features.split(max(1, CHUNK_BYTES // (4 * d_model)))
    for some in parts:
        rows_ND = W_FD[some] / norm_F[some].unsqueeze(1)
        gram_DD += rows_ND.T @ rows_ND
        participation.append(1 / rows_ND.pow(4).sum(dim=1))
        writers_D += (rows_ND.abs() > d_model**-0.5).sum(dim=0)
    shared = []  # sum over all features of the squared cosine with each, its own included
    for some in parts:
        rows_ND = W_FD[some] / norm_F[some].unsqueeze(1)
        shared.append(((rows_ND @ gram_DD) * rows_ND).sum(dim=1))
    expected_largest = statistics.NormalDist().inv_cdf(0.5 ** (1 / (n_features - 1)))
    return Geometry(
        features=n_features,
        nearest_N=tuple(cosine for ((_, cosine),) in nearest(W_FD, sample_N.tolist(), 1, counts_F)),
        nearest_random=min(1.0, expected_largest / math.sqrt(d_model)),
        participation=torch.cat(participation).median().item(),
        participation_random=(d_model + 2) / 3,
        writers_D=tuple(int(n) for n in writers_D.tolist()),
        effective_dimensions=n_features**2 / gram_DD.cpu().double().square().sum().item(),
        dimensionality_F=tuple((1 / torch.cat(shared)).tolist()),
        welch=math.sqrt(max(0, n_features - d_model) / (d_model * (n_features - 1))),
    )
