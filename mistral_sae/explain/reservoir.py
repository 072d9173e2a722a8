"""Lists of bounded length for very many groups at once: the passages of lowest rank, at most one a document.

What a list holds is a function of what it was offered and of nothing else: not of the order in which batches came, and
not of how they were cut. Each list keeps the lowest ranks, each document its lowest. With ranks drawn at random that is
a uniform choice of documents' passages; with ranks that fall as an activation rises it is the strongest.

Shapes: G groups, C places in a list, N passages offered, U groups touched, W tokens of a window.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = 2**31 - 1  # the rank of a place that holds nothing; true ones are lower, and 0 or more


class Windows(NamedTuple):
    """Passages of a feature; `...` is any leading shape."""

    documents: Tensor  # (...) int64, `document_key`
    starts: Tensor  # (...) int32, position of the first token in its row
    lengths: Tensor  # (...) int16, tokens; what follows them is 0
    tokens: Tensor  # (..., W) int16 (ids modulo 2**16) or int32
    activations: Tensor  # (..., W) float16

    def at(self, index) -> "Windows":
        """These passages of all."""
        return Windows(*(tensor[index] for tensor in self))


def token_dtype(vocab_size: int) -> torch.dtype:
    """Of stored ids: 16 bits where they suffice. int16, since few operations know uint16."""
    return torch.int16 if vocab_size <= 2**16 else torch.int32


class Reservoir:
    """The lists of G groups, on one device.

    Attributes:
        ranks: (G, C) int32, EMPTY where there is nothing.
        windows: Windows (G, C).
        worst: (G) int32, the highest rank of each list; EMPTY while it has room. A rank below it is worth offering.
    """

    def __init__(self, groups: int, places: int, window: int, tokens: torch.dtype, device: torch.device | str):
        shape = (groups, places)
        self.ranks = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
        self.worst = torch.full((groups,), EMPTY, dtype=torch.int32, device=device)
        self.windows = Windows(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int16, device=device),
            torch.zeros((*shape, window), dtype=tokens, device=device),
            torch.zeros((*shape, window), dtype=torch.float16, device=device),
        )

    def bytes(self) -> int:
        """Memory that the lists take."""
        return sum(tensor.nbytes for tensor in (self.ranks, self.worst, *self.windows))

    def offer(self, groups_N: Tensor, ranks_N: Tensor, windows: Windows) -> None:
        """Take the passages that belong into their groups' lists, and drop what they displace.

        Of equal ranks the one offered first stays. Waits for the device twice, for how many groups are touched and
        how many passages are new.
        """
        touched_U, which_N = torch.unique(groups_N, return_inverse=True)
        n_touched, places = len(touched_U), self.ranks.shape[1]
        present_UC = self.ranks[touched_U]
        every = torch.arange(n_touched, device=groups_N.device)

        # Those present and those offered, group by group in the order of their ranks
        group = torch.cat((every.repeat_interleave(places), which_N))
        rank = torch.cat((present_UC.flatten(), ranks_N))
        document = torch.cat((self.windows.documents[touched_U].flatten(), windows.documents))
        _, order = (group << 31 | rank).sort(stable=True)
        group, rank, document = group[order], rank[order], document[order]
        keep = (rank < EMPTY) & _first_of_its_kind(mix(group) ^ document)
        number = keep.cumsum(0)  # of those kept so far; in its group, from 1, once those before the group are taken off
        before_U = (number - keep.long())[torch.searchsorted(group, every)]
        keep &= number - before_U[group] <= places
        keep = torch.empty_like(keep).scatter_(0, order, keep)

        # Newcomers move into the free places of their lists; who stays does not move, since windows are large
        stays_UC = keep[: n_touched * places].view(n_touched, places)
        new = keep[n_touched * places :].nonzero().squeeze(1)
        group, by_group = which_N[new].sort(stable=True)
        new = new[by_group]
        number = torch.arange(len(new), device=new.device) - torch.searchsorted(group, group)
        free_first = stays_UC.to(torch.int8).argsort(dim=1, stable=True)
        place = free_first[group, number]
        ranks_UC = torch.where(stays_UC, present_UC, EMPTY)
        ranks_UC[group, place] = ranks_N[new]
        self.ranks[touched_U] = ranks_UC
        self.worst[touched_U] = ranks_UC.amax(dim=1)
        for mine, offered in zip(self.windows, windows, strict=True):
            mine[touched_U[group], place] = offered[new]

    def take(self, groups_N: Tensor) -> tuple[Tensor, Tensor, Windows]:
        """Empty the lists of these groups: each passage's group, rank and window. Waits for the device once."""
        which, place = (self.ranks[groups_N] < EMPTY).nonzero(as_tuple=True)
        taken = groups_N[which], place
        found = groups_N[which], self.ranks[taken], self.windows.at(taken)
        self.ranks[groups_N] = EMPTY
        self.worst[groups_N] = EMPTY
        return found


def mix(x: Tensor) -> Tensor:
    """A hash of each int64 (after the finalizer of splitmix64)."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47  # products wrap around, on every device alike
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def drawn(x: Tensor, seed: int) -> Tensor:
    """A random rank for each int64, int32: the same for the same number and seed."""
    return (mix(mix(x + seed * 0x9E3779B97F4A7C15 % 2**63)) & 2**30 - 1).int()


def _first_of_its_kind(keys: Tensor) -> Tensor:
    """Whether each key is the first of those equal to it."""
    ordered, order = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(first).scatter_(0, order, first)
