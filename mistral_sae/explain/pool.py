"""A choice of whole rows with all that is active on them: where a feature does not fire, and what fires along with it.

`PoolRows` collects them, `PoolIndex` answers.

Shapes: R rows, T positions, K active features a token, N tokens (R * T), W tokens of a window.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mistral_sae.explain.firings import Layout, runs
from mistral_sae.explain.reservoir import drawn


class Pool(NamedTuple):
    """Rows that hold a part of a document for scoring, chosen uniformly."""

    tokens: Tensor  # (R, T) int32
    documents: Tensor  # (R, T) int64, `document_key`, or a place among names; -1 where it is not for scoring
    values: Tensor  # (R, T, K) float16; 0 where fewer than K are active
    indices: Tensor  # (R, T, K) int32


class PoolRows:
    """The pool while it is collected: those rows whose number hashes lowest."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed = rows, seed
        self._heap: list[tuple[int, int]] = []  # (-hash, place) of each row kept: the first is to go next
        self._pool: Pool | None = None

    def add(self, layout: Layout, values_BTK: Tensor, indices_BTK: Tensor, first_row: int) -> None:
        """Take in rows, of which the first is number `first_row`."""
        documents_BT = torch.where(layout.scoring, layout.documents, -1).view(values_BTK.shape[:2])
        ranks = drawn(torch.arange(first_row, first_row + len(values_BTK)), self.seed).tolist()
        incoming: dict[int, int] = {}  # place -> row of this batch
        for row, eligible in enumerate((documents_BT >= 0).any(dim=1).tolist()):
            if not eligible:
                continue
            if len(self._heap) < self.rows:
                heapq.heappush(self._heap, (-ranks[row], len(self._heap)))
                incoming[len(self._heap) - 1] = row
            elif -ranks[row] > self._heap[0][0]:
                place = self._heap[0][1]
                heapq.heapreplace(self._heap, (-ranks[row], place))
                incoming[place] = row
        if not incoming:
            return
        self._make_room(values_BTK)
        on_host = torch.tensor([[*incoming.values()], [*incoming]])
        on_device = on_host.to(values_BTK.device)
        new = Pool(layout.tokens.view_as(documents_BT).int(), documents_BT, values_BTK, indices_BTK.int())
        for mine, theirs in zip(self._pool, new, strict=True):
            # A SAE without a fixed K has as many columns as a batch needs
            rows, places = on_device if mine.ndim == 3 else on_host
            if mine.ndim == 3:
                mine[places] = 0
            mine[(places, *(slice(0, n) for n in theirs.shape[1:]))] = theirs[rows]

    def _make_room(self, values_BTK: Tensor) -> None:
        """Tensors for all rows, as wide as this batch needs them."""
        _, length, k = values_BTK.shape
        device = values_BTK.device
        if self._pool is None:
            self._pool = Pool(
                torch.zeros(self.rows, length, dtype=torch.int32),
                torch.full((self.rows, length), -1),
                torch.zeros(self.rows, length, k, dtype=torch.float16, device=device),
                torch.zeros(self.rows, length, k, dtype=torch.int32, device=device),
            )
        more = k - self._pool.values.shape[2]
        if more > 0:
            pad = torch.nn.functional.pad
            self._pool = self._pool._replace(
                values=pad(self._pool.values, (0, more)), indices=pad(self._pool.indices, (0, more))
            )

    def finish(self) -> Pool:
        """The rows collected, on the CPU."""
        if self._pool is None:  # not one document is for scoring
            nothing = torch.zeros(0, 2, 1)
            return Pool(nothing[..., 0].int(), nothing[..., 0].long(), nothing.half(), nothing.int())
        return Pool(*(tensor[: len(self._heap)].cpu() for tensor in self._pool))


class Span(NamedTuple):
    """A passage of the pool."""

    row: int
    start: int  # position of its first token
    stop: int  # and after its last
    anchor: int  # of the token that it was drawn around


class PoolIndex:
    """What a pool of rows says of single features. Tokens of documents that are not for scoring play no part.

    All draws are at random, by the seed and the feature; none of two passages drawn together is of one document.
    """

    def __init__(self, pool: Pool, n_features: int, *, left: int, right: int, seed: int):
        self.n_features, self.seed = n_features, seed
        self._length = pool.tokens.shape[1]
        documents = pool.documents.numpy()
        self._documents = documents.ravel()
        every, (first, last) = np.arange(documents.size), runs(documents)
        self._low, self._high = np.maximum(every - left, first), np.minimum(every + right, last)  # of windows

        scored = self._documents >= 0
        active = (pool.values.flatten(0, 1).numpy() > 0) & scored[:, None]
        self._active = np.where(active, pool.indices.flatten(0, 1).numpy(), n_features)  # (N, K)
        features, order = torch.from_numpy(self._active.ravel()).sort(stable=True)
        self._tokens = (order // self._active.shape[1]).numpy()  # of each firing, feature by feature
        self._begins = np.searchsorted(features.numpy(), np.arange(n_features + 1))
        self._anchors = np.random.default_rng(seed).permutation(every[scored])
        ids = np.where(scored, pool.tokens.numpy().ravel(), -1)
        self._by_id = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._by_id]

    def firing(self, feature: int) -> np.ndarray:
        """The tokens of the pool on which a feature fires, ascending."""
        return self._tokens[self._begins[feature] : self._begins[feature + 1]]

    def coactive(self, feature: int, count: int) -> list[tuple[int, float]]:
        """The features that fire most often along with this one, and on which share of its tokens they do."""
        tokens = self.firing(feature)
        if not len(tokens):
            return []
        counts = np.bincount(self._active[tokens].ravel(), minlength=self.n_features + 1)[: self.n_features]
        counts[feature] = 0
        most = np.argpartition(-counts, min(count, len(counts) - 1))[:count]
        most = most[np.lexsort((most, -counts[most]))]
        return [(int(other), float(counts[other] / len(tokens))) for other in most if counts[other]]

    def random(self, feature: int, count: int, without: Sequence[Span] = ()) -> list[Span]:
        """Up to `count` passages in which a feature does not fire, none of a document of the passages `without`."""
        taken = self._documents[[span.row * self._length + span.anchor for span in without]]
        n_anchors = len(self._anchors)
        first = self._generator(feature, 0).integers(max(1, n_anchors))  # of the shuffled anchors
        found, seen, step = self._anchors[:0], 0, 8 * count
        while len(found) < count and seen < n_anchors:
            some = self._anchors[(first + np.arange(seen, min(seen + step, n_anchors))) % n_anchors]
            silent = self._silent(feature, some)
            found = self._one_a_document(found, silent[~np.isin(self._documents[silent], taken)])
            seen, step = seen + step, 2 * step
        return [self._span(anchor) for anchor in found[:count]]

    def hard(self, feature: int, ids: list[int], nearest: list[int], count: int) -> list[Span]:
        """Up to `count` passages in which a feature does not fire, though one might think so.

        Half of them around a token of `ids` (the peaks of its examples; one that is there twice is drawn twice as
        often), half around one on which another feature of `nearest` fires; more of one kind where there are too few
        of the other.
        """
        generator = self._generator(feature, 1)
        unique, weights = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
        begins, ends = (np.searchsorted(self._sorted_ids, unique, side=side) for side in ("left", "right"))
        of_tokens = [(self._by_id[b:e], w) for b, e, w in zip(begins, ends, weights, strict=True)]
        of_nearest = [(self.firing(other), 1) for other in nearest]
        tokens, others = (
            self._one_a_document(self._silent(feature, _interleaved(choices, 4 * count, generator)))
            for choices in (of_tokens, of_nearest)
        )
        half = max(-(-count // 2), count - len(others))
        return [self._span(anchor) for anchor in self._one_a_document(tokens[:half], others, tokens[half:])[:count]]

    def _generator(self, feature: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, feature, purpose])

    def _silent(self, feature: int, anchors: np.ndarray) -> np.ndarray:
        """Those anchors in whose windows a feature does not fire."""
        firing = self.firing(feature)
        before = np.searchsorted(firing, self._low[anchors])
        return anchors[before == np.searchsorted(firing, self._high[anchors], side="right")]

    def _one_a_document(self, *anchors: np.ndarray) -> np.ndarray:
        """The first anchor of each document, in their order."""
        every = np.concatenate(anchors)
        _, firsts = np.unique(self._documents[every], return_index=True)
        return every[np.sort(firsts)]

    def _span(self, anchor: int) -> Span:
        row, position = divmod(int(anchor), self._length)
        first = row * self._length
        return Span(row, int(self._low[anchor]) - first, int(self._high[anchor]) - first + 1, position)


def _interleaved(choices: list[tuple[np.ndarray, int]], most: int, generator: np.random.Generator) -> np.ndarray:
    """Up to `most` items of each choice at random, mixed in proportion to the choices' weights."""
    items, turns = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for choice, weight in choices:
        few = len(choice) <= most
        items.append(generator.permutation(choice) if few else choice[generator.integers(len(choice), size=most)])
        turns.append((np.arange(len(items[-1])) + generator.random()) / weight)
    return np.concatenate(items)[np.argsort(np.concatenate(turns), kind="stable")]
