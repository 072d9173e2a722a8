"""How the directions of an autoencoder's features share the model's dimensions.

Shapes: F features, D model width, N sampled features.
"""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 8192  # decoder rows whose nearest neighbour is looked for, among all; evenly spaced


class Geometry(NamedTuple):
    """How the decoder rows of the features that fire share the model's D dimensions."""

    features: int  # that fire
    nearest_N: tuple[float, ...]  # cosine of a feature's decoder row with the nearest other one's
    nearest_random: float  # median of the same for as many directions drawn at random
    participation: float  # median over features of 1 / sum(w^4): over how many dimensions a row of unit norm spreads
    participation_random: float
    writers_D: tuple[int, ...]  # features that write to each dimension with more than an even share, |w| > 1/sqrt(D)
    effective_dimensions: float  # F^2 / |W^T W|^2, the participation of the rows' covariance: D if they fill the space

    @property
    def median_nearest(self) -> float:
        """Half of the features have a nearer neighbour."""
        return statistics.median(self.nearest_N)

    @property
    def median_writers(self) -> float:
        """Half of the dimensions are written to by more features."""
        return statistics.median(self.writers_D)


@torch.no_grad()
def decoder_geometry(W_dec_FD: Tensor, fired_F: Tensor | None = None, rows: int = 1024) -> Geometry | None:
    """The geometry of a decoder, `rows` rows at a time, of any norm; None with fewer than two features.

    `fired_F` (F) bool leaves out the features that never fired, whose rows say more of the initialisation. Nearest
    neighbours are looked for from SAMPLE features at most, among all; a nearest random direction is the median of the
    largest of F cosines, each normal with variance 1/D.
    """
    W, d_model = W_dec_FD.detach().float(), W_dec_FD.shape[1]  # at 7B two gigabytes: there is no second one of it
    norm_F = torch.linalg.vector_norm(W, dim=1)
    counts_F = norm_F > 0 if fired_F is None else (norm_F > 0) & fired_F.to(W.device)
    features = counts_F.nonzero().squeeze(1)
    n_features = len(features)
    if n_features < 2:
        return None

    sample_N = features[torch.arange(min(SAMPLE, n_features), device=W.device) * n_features // min(SAMPLE, n_features)]
    nearest = []
    for part in sample_N.split(rows):
        cosine = ((W[part] / norm_F[part].unsqueeze(1)) @ W.T / norm_F).where(counts_F, -1.0)
        cosine[torch.arange(len(part), device=W.device), part] = -1.0
        nearest.append(cosine.amax(dim=1))
    gram, participation, writers_D = W.new_zeros(d_model, d_model), [], W.new_zeros(d_model)
    for some in features.split(rows):
        part = W[some] / norm_F[some].unsqueeze(1)
        gram += part.T @ part
        participation.append(1 / part.pow(4).sum(dim=1))
        writers_D += (part.abs() > d_model**-0.5).sum(dim=0)
    expected_largest = statistics.NormalDist().inv_cdf(0.5 ** (1 / (n_features - 1)))
    return Geometry(
        features=n_features,
        nearest_N=tuple(torch.cat(nearest).tolist()),
        nearest_random=min(1.0, expected_largest / math.sqrt(d_model)),
        participation=torch.cat(participation).median().item(),
        participation_random=(d_model + 2) / 3,
        writers_D=tuple(int(n) for n in writers_D.tolist()),
        effective_dimensions=n_features**2 / gram.double().square().sum().item(),
    )
