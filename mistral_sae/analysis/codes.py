"""What directions read of tokens: sparse codes of autoencoders, and dense projections, which may have either sign.

Both give their readings sorted, so that one search serves all: from the highest reading of a direction down, each cut
is a classifier.

Shapes: N tokens, M directions, K readings a token, C concepts, E readings above a code's floor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2**21  # readings of a dense code that are sorted together


class Sorted(NamedTuple):
    """The readings of some directions, direction by direction, the highest first."""

    first: int  # the first direction's number
    offsets: Tensor  # (directions + 1) where each one's begin, and where the last one's end
    token_E: Tensor  # int64, among the tokens that were asked for
    value_E: Tensor


class Sparse:
    """Readings (N, K) above 0 of some of M directions; the others read 0."""

    def __init__(self, values_NK: Tensor, indices_NK: Tensor, n_directions: int):
        self.values_NK, self.indices_NK, self.n_directions = values_NK, indices_NK, n_directions

    def parts(self, some: Tensor) -> Iterator[Sorted]:
        """The readings of some tokens (indices), all directions at once."""
        values, indices = self.values_NK[some], self.indices_NK[some]
        token_E, column = (values > 0).nonzero(as_tuple=True)
        value_E, direction_E = values[token_E, column], indices[token_E, column]
        by_value = value_E.argsort(descending=True, stable=True)
        order = by_value[direction_E[by_value].argsort(stable=True)]
        ends = torch.bincount(direction_E, minlength=self.n_directions).cumsum(0)
        yield Sorted(0, torch.cat([ends.new_zeros(1), ends]), token_E[order], value_E[order])

    def readings(self, directions: Tensor) -> Tensor:
        """What directions (C, K) read of all tokens, (N, C, K)."""
        wanted, place = directions.flatten().unique(return_inverse=True)
        column_M = torch.full((self.n_directions,), len(wanted))
        column_M[wanted] = torch.arange(len(wanted))
        found = torch.zeros(len(self.values_NK), len(wanted) + 1)  # and what is not wanted
        found.scatter_add_(1, column_M[self.indices_NK], self.values_NK)
        return found[:, place].view(-1, *directions.shape)

    def sums(self, some: Tensor, labels_nC: Tensor) -> Tensor:
        """The sum of each direction's readings over the tokens of each concept, (M, C)."""
        return self._gathered(self.values_NK[some], some, labels_nC)

    def counts(self, some: Tensor, labels_nC: Tensor) -> Tensor:
        """On how many tokens of each concept each direction fires, (M, C)."""
        return self._gathered((self.values_NK[some] > 0).float(), some, labels_nC)

    def _gathered(self, weights_nK: Tensor, some: Tensor, labels_nC: Tensor) -> Tensor:
        found, indices_nK = torch.zeros(self.n_directions, labels_nC.shape[1]), self.indices_NK[some]
        for column in range(weights_nK.shape[1]):
            found.index_add_(0, indices_nK[:, column], weights_nK[:, column : column + 1] * labels_nC.float())
        return found


class Dense:
    """Readings (N, M / 2) of directions, each of which may be read with either sign: the second half has a minus.

    They have no zero to be silent at, so each fires on the `density` of the tokens that it reads highest.
    """

    def __init__(self, x_NM: Tensor, density: float):
        self.x_NM, self.n_directions, self.density = x_NM, 2 * x_NM.shape[1], density

    def parts(self, some: Tensor) -> Iterator[Sorted]:
        """The readings of some tokens (indices), a few directions at a time."""
        half, n = self.x_NM.shape[1], len(some)
        for sign in (1, -1):
            for first, x_nm in zip(*self._split(some), strict=True):
                value, token = (sign * x_nm.T).sort(dim=1, descending=True)
                offsets = n * torch.arange(len(value) + 1)
                yield Sorted(first + (0 if sign == 1 else half), offsets, token.flatten(), value.flatten())

    def _split(self, some: Tensor) -> tuple[range, tuple[Tensor, ...]]:
        width = max(1, AT_ONCE // len(some))
        return range(0, self.x_NM.shape[1], width), self.x_NM[some].split(width, dim=1)

    def readings(self, directions: Tensor) -> Tensor:
        """What directions (C, K) read of all tokens, (N, C, K)."""
        half = self.x_NM.shape[1]
        signs = 1 - 2 * (directions >= half).float()
        return self.x_NM[:, (directions % half).flatten()].view(-1, *directions.shape) * signs

    def sums(self, some: Tensor, labels_nC: Tensor) -> Tensor:
        """The sum of each direction's readings over the tokens of each concept, (M, C)."""
        found = self.x_NM[some].T @ labels_nC.float()
        return torch.cat([found, -found])

    def counts(self, some: Tensor, labels_nC: Tensor) -> Tensor:
        """On how many tokens of each concept each direction fires, (M, C)."""
        x_nM = self.x_NM[some]
        count = max(1, round(self.density * len(self.x_NM)))
        low, high = (self.x_NM.kthvalue(k, dim=0).values for k in (count, len(self.x_NM) - count + 1))
        return torch.cat([(fires.float().T @ labels_nC.float()) for fires in (x_nM >= high, x_nM <= low)])


Code = Sparse | Dense


@torch.no_grad()
def strongest(z_ND: Tensor, rows_FD: Tensor, k: int) -> Sparse:
    """The k rows with the largest dot products with each token, as an untrained autoencoder would have them."""
    found = [(z @ rows_FD.T).topk(k) for z in z_ND.split(4096)]
    values, indices = (torch.cat(each) for each in zip(*found, strict=True))
    return Sparse(values.relu(), indices, len(rows_FD))
