"""Features that fire by a rule known to the test, with passages made of words drawn at random."""

import random
from collections.abc import Callable, Sequence

from mistral_sae.explain.types import INTERVALS, Example, Feature

WORDS = [
    " return",
    " x",
    " self",
    "(",
    ")",
    ":\n",
    " =",
    " 1",
    " if",
    " name",
    ".",
    "items",
    ",",
    " for",
    " in",
    "\n",
    " not",
]

Fires = Callable[[Sequence[str], int], float]  # tokens and a place among them -> activation there


def on(token: str) -> Fires:
    """A feature that fires on a token, with an activation of 1 to 8 that its place decides."""
    return lambda tokens, i: 1.0 + i % 8 if tokens[i] == token else 0.0


def passage(tokens: Sequence[str], fires: Fires, document: str) -> Example:
    return Example(document, 20, tuple(tokens), tuple(fires(tokens, i) for i in range(len(tokens))))


def make_feature(index: int, fires: Fires, words: Sequence[str] = WORDS, length: int = 24, seed: int = 0) -> Feature:
    """Passages of `words` in all fields, each of a document of its own."""
    generator = random.Random(f"{index} {seed}")
    firing: list[Example] = []
    silent: list[Example] = []
    while len(firing) < 200 or len(silent) < 24:
        tokens = generator.choices(words, k=length)
        if generator.random() < 0.5:
            tokens = [token for token in tokens if not fires([token], 0)] or [words[0]]
        example = passage(tokens, fires, f"document {len(firing)} {len(silent)}")
        (firing if example.strength > 0 else silent).append(example)
    maximum = max(example.strength for example in firing)
    firing.sort(key=lambda example: -example.strength)
    by_interval = [[e for e in firing[10:] if e.interval(maximum) == q] for q in range(INTERVALS)]
    return Feature(
        feature=index,
        density=0.01,
        maximum=maximum,
        histogram=(0,) * 50,
        promoted=((" items", 3.0), (" =", 2.0)),
        suppressed=((" if", -2.0),),
        top=tuple(firing[:10]),
        spread=tuple(e for each in by_interval for e in each[::2][:5]),
        held_out=tuple(e for each in by_interval for e in each[1::2][:5]),
        random=tuple(silent[:10]),
        hard=tuple(silent[10:20]),
    )
