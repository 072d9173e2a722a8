"""SELECT: which features are explained."""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mistral_sae.cli import UserError


class Selection(NamedTuple):
    """What SELECT says, before it is known which features there are."""

    words: str
    how: str  # "all", "random", "densest" or "listed"
    count: int = 0  # of "random" and "densest"
    listed: Sequence[int] = ()  # ascending

    def check(self, n_features: int) -> None:
        """Raise UserError where features are listed that the autoencoder does not have."""
        if self.listed and self.listed[-1] >= n_features:
            raise UserError(f"SELECT is {self.words!r}: expected features from 0 to {n_features - 1}")

    def choose(self, firings_F: Tensor, seed: int) -> list[int]:
        """The features, ascending; `firings_F` (F) counts firings. Dead ones only if they are listed, or with all."""
        if self.how == "listed":
            return list(self.listed)
        if self.how == "all":
            return list(range(len(firings_F)))
        living = firings_F.nonzero().squeeze(1).tolist()
        count = min(self.count, len(living))
        if self.how == "random":
            return sorted(random.Random(seed).sample(living, count))
        return sorted(firings_F.topk(count).indices.tolist())


def parse(words: str) -> Selection:
    """What the words say. Raises UserError."""
    words = str(words)
    text = words.strip().lower()
    if text == "all":
        return Selection(words, "all")
    if (match := re.fullmatch(r"(random|densest)\s+(\d+)", text)) and int(match[2]):
        return Selection(words, match[1], int(match[2]))
    if (match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", text)) and int(match[1]) <= int(match[2]):
        return Selection(words, "listed", 0, range(int(match[1]), int(match[2]) + 1))
    numbers = r"\d+(\s*,\s*\d+)*\s*,?"
    if re.fullmatch(rf"{numbers}|\[\s*{numbers}\s*\]|\(\s*{numbers}\s*\)", text):
        return Selection(words, "listed", 0, sorted({int(number) for number in re.findall(r"\d+", text)}))
    raise UserError(
        f"SELECT is {words!r}: expected all, random N, densest N, a range such as 0-99 or a list such as [3, 17]"
    )
