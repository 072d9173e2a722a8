"""The firings of a batch of rows in the order of feature and token, and windows cut out of them.

Shapes: B rows, T positions, K active features a token, N firings, M passages, W tokens of a window.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mistral_sae.data.tokens import Row
from mistral_sae.explain.reservoir import Windows


@lru_cache(maxsize=2**12)
def document_key(document_id: str) -> int:
    """63 bits of a hash of the id; not those that decide whether a document is held out of training."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[8:16], "big") >> 1


def is_for_scoring(document_id: str) -> bool:
    """Whether explanations are scored on a document; the others are what they are made from."""
    return document_key(document_id) % 2 == 1


class Layout(NamedTuple):
    """What the tokens of a batch of rows are, (B * T) each, row by row."""

    length: int  # T
    tokens: Tensor  # int64
    documents: Tensor  # int64, `document_key`; 0 at the first position of a row and at a BOS, of which nothing is kept
    first: Tensor  # int64, of the unbroken run of one document's tokens in one row: its first token's place
    last: Tensor  # int64, and its last's
    scoring: Tensor  # bool, whether the document is for scoring

    def to(self, device: torch.device) -> "Layout":
        """The same on a device."""
        return Layout(self.length, *(tensor.to(device, non_blocking=True) for tensor in self[1:]))


def layout_of(rows: list[Row]) -> Layout:
    """The layout of rows, on the CPU."""
    places = np.stack([row.places for row in rows])
    places[:, 0] = -1
    keys = [np.array([*map(document_key, row.documents), 0], dtype=np.int64) for row in rows]
    documents = np.stack([of_row[place] for of_row, place in zip(keys, places, strict=True)])
    first, last = runs(places)
    arrays = np.stack([row.tokens for row in rows]).ravel(), documents.ravel(), first, last, documents.ravel() % 2 == 1
    return Layout(places.shape[1], *map(torch.from_numpy, arrays))


def runs(labels_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each place (B * T) the first and the last of the unbroken run of its label within its row."""
    begins, every = np.ones(labels_BT.shape, dtype=bool), np.arange(labels_BT.size)
    begins[:, 1:] = labels_BT[:, 1:] != labels_BT[:, :-1]
    ends = np.append(begins.ravel()[1:], True)
    first = np.maximum.accumulate(np.where(begins.ravel(), every, 0))
    last = np.minimum.accumulate(np.where(ends, every, labels_BT.size)[::-1])[::-1]
    return first, last.copy()  # torch takes no negative strides


class Firings:
    """The firings of a batch on tokens that belong to a document, in the order of feature and token.

    Attributes:
        feature, token, value: (N) each; the token's place in the batch, row by row.
        layout: of the batch, on the same device.
    """

    def __init__(self, layout: Layout, values_BTK: Tensor, indices_BTK: Tensor, left: int, right: int):
        self.layout, self.width = layout, left + 1 + right
        n_tokens = len(layout.tokens)
        every = torch.arange(n_tokens, device=values_BTK.device)
        self._low, self._high = torch.maximum(every - left, layout.first), torch.minimum(every + right, layout.last)
        self._shift = n_tokens.bit_length()

        value = values_BTK.flatten()
        fires = ((value > 0).view(n_tokens, -1) & (layout.documents != 0).unsqueeze(1)).flatten()
        token = every.repeat_interleave(len(value) // n_tokens)
        # One sort of integers that hold both; firings that do not count go to the end
        key = torch.where(fires, indices_BTK.flatten().long() << self._shift | token, torch.iinfo(torch.int64).max)
        key, order = key.sort()
        count = int(fires.sum())  # waits for the device
        self._key, self.value = key[:count], value[order[:count]]
        self.feature, self.token = self._key >> self._shift, self._key & (1 << self._shift) - 1

    def unbeaten(self) -> Tensor:
        """Places (M) of the firings that are in the window of no stronger neighbor: all peaks, and a few more.

        Waits for the device.
        """
        token, value, low, high = self.token, self.value, self._low[self.token], self._high[self.token]
        same = self.feature[1:] == self.feature[:-1]
        beaten = torch.zeros_like(value, dtype=torch.bool)
        beaten[:-1] |= same & (token[1:] <= high[:-1]) & (value[1:] > value[:-1])
        beaten[1:] |= same & (token[:-1] >= low[1:]) & (value[:-1] > value[1:])
        return (~beaten).nonzero().squeeze(1)

    def windows(self, places_M: Tensor, ids: torch.dtype) -> Windows:
        """The passages around these firings, with the feature's activations on all their tokens; `ids` are tokens'."""
        token, offsets = self.token[places_M], torch.arange(self.width, device=places_M.device)
        low, high = self._low[token], self._high[token]
        position = low.unsqueeze(1) + offsets
        inside = position <= high.unsqueeze(1)
        position.clamp_(max=len(self.layout.tokens) - 1)
        tokens = torch.where(inside, self.layout.tokens[position], 0).to(ids)

        # The feature's firings within the window follow one another
        feature = self.feature[places_M] << self._shift
        begin, end = feature | low, feature | high
        firing = torch.searchsorted(self._key, begin).unsqueeze(1) + offsets
        key = self._key[firing.clamp_(max=max(0, len(self._key) - 1))]
        column = torch.where(key <= end.unsqueeze(1), key - begin.unsqueeze(1), self.width)
        activations = self.value.new_zeros(len(token), self.width + 1).scatter_(1, column, self.value[firing])
        return Windows(
            self.layout.documents[token],
            (low % self.layout.length).int(),
            (high - low + 1).to(torch.int16),
            tokens,
            activations[:, :-1].half(),
        )
