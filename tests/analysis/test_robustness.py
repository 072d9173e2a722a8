"""The figures of benchmarks.robustness on planted cases: the same again, and something else."""

import pytest
import torch

from benchmarks.robustness import agreement, explained_twice, halves, share_with_twin
from mistral_sae.explain.offline import ANY, Rule
from mistral_sae.explain.types import Example, Feature

D = 64


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_planted_twins_are_counted_and_random_directions_are_none():
    planted = rows(100, 0)
    others = torch.cat([2 * planted[:30] + 0.1 * rows(30, 1), -planted[30:60], rows(100, 2)])  # a minus is no twin
    assert share_with_twin(planted, others) == pytest.approx(0.3)
    assert share_with_twin(planted, rows(1000, 3)) == 0


def passage(document: int, word: str) -> Example:
    return Example(f"{document}", 1, (f"{word}s ", word, " is"), (0.0, 1.0, 0.0))


def rule(word: str) -> Rule:
    return Rule(("core", word), ANY, 1.0)


def test_explanations_agree_on_the_tokens_that_both_say():
    passages = [passage(1, "cat"), passage(2, "dog"), passage(3, "cow")]
    assert agreement([rule("cat")], [rule("cat")], passages) == 1
    assert agreement([rule("cat")], [rule("dog")], passages) == 0
    assert agreement([rule("cat"), rule("dog")], [rule("dog"), rule("cow")], passages) == 1 / 3
    assert agreement([rule("bird")], [rule("bird")], passages) is None


def feature(index: int, word: str) -> Feature:
    passages = tuple(passage(document, word) for document in range(12))
    return Feature(index, 0.01, 1.0, (), top=passages, spread=passages[:4])


def test_halves_of_a_features_passages_share_none():
    first, second = ({each.document for each in half.top} for half in halves(feature(0, "cat")))
    assert (len(first), len(second)) == (6, 6)
    assert not first & second


def test_a_feature_that_is_one_word_is_explained_the_same_twice_and_unlike_another():
    found = explained_twice([feature(0, "cat"), feature(1, "dog"), feature(2, "cow")])
    assert found["explained both times"] == found["features"] == 3
    assert found["the same feature"]["mean"] == 1
    assert found["two features"]["mean"] == 0
