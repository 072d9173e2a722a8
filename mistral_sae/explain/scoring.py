"""How well an explanation predicts where a feature fires: the questions asked, and scores of the answers.

Questions are chosen at random from a seed and the feature's index, and bootstrap samples from the seed alone, so that a
run that starts again makes the same. All passages are of documents that the explanation was not made from.

Shapes: P passages, S bootstrap samples.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from mistral_sae.explain.prompts import evenly
from mistral_sae.explain.types import INTERVALS, Example, Feature, Judgement, Question, Score

METHODS = ("detection", "fuzzing", "simulation")
RESAMPLES = 1000  # of the bootstrap
LETTERS = "bcdfghjkmnpqrstvwxz"  # of ids: three of them make no word
SLACK = 2  # tokens, counted from both ends together, by which wrong marks may miss the place they are to have
ACTIVE_SIMULATED, SILENT_SIMULATED = 4, 4  # passages a simulation asks for

Item = TypeVar("Item")


class Simulated(NamedTuple):
    """A passage's activations as they are and as they were predicted, in the same units."""

    true: Sequence[float]
    predicted: Sequence[float]


# ---- what is asked ----


def detection_questions(feature: Feature, seed: int) -> list[Question]:
    """Return as many passages in which the feature fires as passages in which it does not, shuffled.

    The former from all its intervals; the latter half random and half hard, as far as there are hard ones. The number
    of each in a batch is left to chance, so that it tells nothing.
    """
    count = min(len(feature.held_out), len(feature.random) + len(feature.hard))
    questions = [
        Question("", kind, index, kind == "held_out", getattr(feature, kind)[index])
        for kind, n in _counts_by_kind(feature, count, count).items()
        for index in evenly(range(len(getattr(feature, kind))), n)
    ]
    _generator(feature, seed, "detection").shuffle(questions)
    ids = opaque_ids(feature, seed, "detection", len(questions))
    return [question._replace(id=id) for question, id in zip(questions, ids, strict=True)]


def fuzzing_questions(feature: Feature, seed: int) -> list[list[Question]]:
    """Return two rounds over the passages in which the feature fires, marked rightly in one and wrongly in the other.

    Wrong marks are the right ones moved as a whole, to silent tokens, near to where the peak of another of the passages
    is, so that their places tell nothing. Which round has the right marks of a passage is random, and no request should
    mix rounds: marks of one passage side by side would give each other away. A passage in which the marks fit nowhere
    else is left out.
    """
    generator = _generator(feature, seed, "fuzzing")
    rounds: tuple[list[Question], list[Question]] = ([], [])
    passages = feature.held_out
    for index, passage in enumerate(passages):
        right = frozenset(i for i, activation in enumerate(passage.activations) if activation > 0)
        wrong = _moved(right, passage, passages[:index] + passages[index + 1 :], generator)
        if wrong is None:
            continue
        pair = [Question("", "held_out", index, marked is right, passage, marked) for marked in (right, wrong)]
        generator.shuffle(pair)
        for questions, question in zip(rounds, pair, strict=True):
            questions.append(question)
    for questions in rounds:
        generator.shuffle(questions)
    ids = iter(opaque_ids(feature, seed, "fuzzing", sum(map(len, rounds))))
    return [[question._replace(id=next(ids)) for question in questions] for questions in rounds]


def simulation_passages(feature: Feature) -> list[Example]:
    """Return passages to simulate: from all intervals of the feature, and random and hard ones in equal parts."""
    chosen = _counts_by_kind(feature, ACTIVE_SIMULATED, SILENT_SIMULATED)
    return [passage for kind, count in chosen.items() for passage in evenly(getattr(feature, kind), count)]


def opaque_ids(feature: Feature, seed: int, method: str, count: int) -> list[str]:
    """Return `count` different ids, which tell nothing of what they stand for."""
    generator = _generator(feature, seed, f"ids of {method}")
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids["".join(generator.choices(LETTERS, k=3))] = None
    return list(ids)


def batches(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Return the items in their order, in as few batches of at most `most` as there can be, about equal in size."""
    count = math.ceil(len(items) / most)
    edges = [i * len(items) // count for i in range(count + 1)] if count else []
    return [list(items[start:end]) for start, end in itertools.pairwise(edges)]


def strongest_token(feature: Feature) -> str:
    """Return the token on which a feature is strongest; a baseline's explanation is just this."""
    return feature.top[0].tokens[feature.top[0].peak]


def other_features(explained: Iterable[int]) -> dict[int, int]:
    """Return for each feature another one, whose explanation is its baseline: the next in a fixed random order.

    So one that is added changes the baseline of one other. A feature that is the only one has none.
    """
    features = sorted(explained, key=lambda feature: random.Random(feature).random())
    return dict(zip(features, features[1:] + features[:1], strict=True)) if len(features) > 1 else {}


def _counts_by_kind(feature: Feature, active: int, silent: int) -> dict[str, int]:
    """How many passages of each kind to take; half of the silent ones are hard, or what there is."""
    hard = min(len(feature.hard), max(silent // 2, silent - len(feature.random)))
    return {"held_out": active, "random": silent - hard, "hard": hard}


def _generator(feature: Feature, seed: int, purpose: str) -> random.Random:
    return random.Random(f"{seed} {feature.feature} {purpose}")


def _moved(
    marked: frozenset[int], passage: Example, others: Sequence[Example], generator: random.Random
) -> frozenset[int] | None:
    """The marks of a passage moved as a whole to silent tokens; None if they fit nowhere else.

    The peak comes near to the place that another's peak has, counted from both ends together: so it is the peak of a
    passage of about the same length, and no place is likelier for right marks than for wrong ones. Of the nearest
    places, up to SLACK beyond the best, it is one where as many of the marked tokens stand in the passage
    without a mark, too, as of the right ones: a judge without an explanation could count those.
    """
    end = len(passage.tokens) - 1
    peaks = [(other.peak, len(other.tokens) - 1 - other.peak) for other in others]
    distances: dict[frozenset[int], int] = {}
    for shift in range(-min(marked), end - max(marked) + 1):
        at, moved = passage.peak + shift, frozenset(i + shift for i in marked)
        if not moved & marked:
            distances[moved] = min((abs(at - before) + abs(end - at - after) for before, after in peaks), default=0)
    if not distances:
        return None
    near = [moved for moved, distance in distances.items() if distance <= min(distances.values()) + SLACK]
    repeated = _repeated_unmarked(passage, marked)
    gaps = [abs(_repeated_unmarked(passage, moved) - repeated) for moved in near]
    return generator.choice([moved for moved, gap in zip(near, gaps, strict=True) if gap == min(gaps)])


def _repeated_unmarked(passage: Example, marked: frozenset[int]) -> int:
    """How many of the marked tokens stand in the passage without a mark, too, whatever spaces are around them."""
    unmarked = {token.strip() for i, token in enumerate(passage.tokens) if i not in marked}
    return sum(passage.tokens[i].strip() in unmarked for i in marked)


# ---- what the answers are worth ----


def verdict_score(judgements: Sequence[Judgement], seed: int) -> Score:
    """Return the balanced accuracy of verdicts, without baselines and recall.

    It is the mean of the shares of true and of false items answered rightly; None if one kind has no answers.
    """
    answered = sum(j.verdict is not None for j in judgements)
    estimate = _estimate(_accuracy, _counts(judgements), seed)
    return Score(*estimate, answered=answered, unanswered=len(judgements) - answered)


def simulation_score(simulated: Sequence[Simulated], asked: int, seed: int) -> Score:
    """Return the correlation of those of the `asked` passages that were simulated, without baselines.

    It is Pearson's r of the predicted activations with the true ones, over the tokens of all passages; R2 is
    1 - |true - predicted|^2 / |true - mean(true)|^2. A prediction that is the same everywhere has r = 0. Both are None
    where the truth is the same everywhere. With few passages the bootstrap interval is too narrow: with 8 it covers the
    truth in about 80 % of cases.
    """
    rows = _moments(simulated)
    estimate, r2 = _estimate(_r, rows, seed), _value(_r2, rows)
    return Score(*estimate, answered=len(simulated), unanswered=asked - len(simulated), r2=r2)


def recall(feature: Feature, judgements: Sequence[Judgement]) -> tuple[float | None, ...]:
    """Return for each interval the share of its judged passages that detection found; None without any."""
    found: list[list[bool]] = [[] for _ in range(INTERVALS)]
    for j in judgements:
        if j.kind == "held_out" and j.verdict is not None:
            found[feature.held_out[j.index].interval(feature.maximum)].append(j.verdict)
    return tuple(sum(each) / len(each) if each else None for each in found)


# A score is a statistic of sums over passages, of each of which there is a row of terms
Rows = Sequence[np.ndarray]
Statistic = Callable[[np.ndarray], np.ndarray]  # of sums (S, terms): (S), nan where it is not defined


def _counts(judgements: Sequence[Judgement]) -> Rows:
    """For each passage: right and all answers to true items, right and all answers to false items."""
    passages: dict[tuple[str, int], np.ndarray] = {}
    for j in judgements:
        terms = passages.setdefault((j.kind, j.index), np.zeros(4))
        if j.verdict is not None:
            terms[0 if j.truth else 2] += j.verdict == j.truth
            terms[1 if j.truth else 3] += 1
    return list(passages.values())


def _accuracy(sums_S4: np.ndarray) -> np.ndarray:
    right_true, true, right_false, false = sums_S4.T
    return (right_true / true + right_false / false) / 2


def _moments(simulated: Sequence[Simulated]) -> Rows:
    """For each passage: tokens, and sums of x, y, xx, yy and xy, for x the true and y the predicted activations."""
    pairs = [(np.asarray(each.true, dtype=float), np.asarray(each.predicted, dtype=float)) for each in simulated]
    return [np.array([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y]) for x, y in pairs]


def _r(moments_S6: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = moments_S6.T
    var_x, var_y, covariance = xx - x * x / n, yy - y * y / n, xy - x * y / n
    r = np.where(var_y > 1e-9 * yy, covariance / np.sqrt(var_x * var_y), 0.0)
    return np.where(var_x > 1e-9 * xx, r, np.nan)  # else it varies only by rounding


def _r2(moments_S6: np.ndarray) -> np.ndarray:
    n, x, _, xx, yy, xy = moments_S6.T
    var_x = xx - x * x / n
    return np.where(var_x > 1e-9 * xx, 1 - (xx - 2 * xy + yy) / var_x, np.nan)


def _value(statistic: Statistic, rows: Rows) -> float | None:
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(np.sum(rows, axis=0, keepdims=True))[0]) if rows else math.nan
    return None if math.isnan(value) else value


def _estimate(statistic: Statistic, rows: Rows, seed: int) -> tuple[float | None, float | None, float | None]:
    """The value and its 95 % bootstrap interval, for which passages are resampled whole."""
    value = _value(statistic, rows)
    if value is None:
        return None, None, None
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanpercentile(statistic(_resamples(len(rows), seed) @ np.stack(rows)), [2.5, 97.5])
    return value, float(low), float(high)


@lru_cache(maxsize=16)
def _resamples(n: int, seed: int) -> np.ndarray:
    """How often each of `n` passages is in each of the samples (S, P)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)


# ---- over features ----


class ScoreSummary(NamedTuple):
    """One method's scores over the features that have one."""

    method: str
    features: int
    value: float  # means over those features
    other_feature: float | None
    top_token: float | None
    recall: tuple[float | None, ...]  # by interval of the activation, weakest first
    values: tuple[float, ...]


def summarize_scores(scores: Iterable[dict[str, Score]]) -> list[ScoreSummary]:
    """Return a summary for each method that scored at least one feature; `scores` are those of each feature's label."""
    scored: dict[str, list[Score]] = {method: [] for method in METHODS}
    for method, score in itertools.chain.from_iterable(each.items() for each in scores):
        if score.value is not None:
            scored.setdefault(method, []).append(score)
    return [
        ScoreSummary(
            method,
            features=len(each),
            value=statistics.fmean(score.value for score in each if score.value is not None),
            other_feature=_mean(score.other_feature for score in each),
            top_token=_mean(score.top_token for score in each),
            recall=tuple(map(_mean, itertools.zip_longest(*(score.recall for score in each)))),
            values=tuple(score.value for score in each if score.value is not None),
        )
        for method, each in scored.items()
        if each
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
