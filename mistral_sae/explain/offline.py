"""Explanations without a model: what a feature's own examples have in common, found by counting.

    found = {index: find(features[index]) for index in indices}
    for label in score_all(found, features.__getitem__, seed=SEED): ...

The rules that are found make the phrase, and the same rules, no more, make the predictor that is scored. They come from
the explaining examples (`top` and `spread`) alone; negatives are the tokens of these on which the feature is silent.

Shapes: P passages, N tokens of all of them, R candidate rules.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mistral_sae.explain import patterns, scoring
from mistral_sae.explain.patterns import ANY, Place, Rule, core, places
from mistral_sae.explain.prompts import MAX_WORDS, NO_PATTERN, visible
from mistral_sae.explain.types import Example, Feature, Judgement, Label, Status, without_passages

EXPLAINER = "offline"
SUPPORT = 2  # passages that a rule must add to those that are accounted for
PRECISION = 0.5  # of the tokens on which a rule holds, the share on which the feature must fire
LEAST_SHARE = 0.2  # of a feature's passages; rules that account for fewer are no pattern
TRIED = 30  # rules that are looked at when the best ones do not fit into the phrase

Pair = tuple[tuple[str, str], tuple[str, str]]  # a target and a context


class Findings(NamedTuple):
    """What was found of a feature."""

    status: Status  # "ok", "no pattern", "dead" or "rare", as in Label
    phrase: str  # at most MAX_WORDS words; "" unless the status is "ok"
    rules: tuple[Rule, ...]  # what the phrase says


class Candidates(NamedTuple):
    """The rules that hold on some token on which the feature fires, and where else they hold."""

    pairs: list[Pair]
    weight_P: np.ndarray  # of the passages; those of each interval weigh the same together
    hits_PR: np.ndarray  # whether the rule holds on a token on which the feature fires
    misses_PR: np.ndarray  # whether it holds on one on which the feature is silent
    precision_R: np.ndarray  # share of the tokens on which it holds on which the feature fires
    strength_R: np.ndarray  # mean activation on the tokens on which it holds, as a share of the maximum
    mass_R: np.ndarray  # share of all activation that is on the tokens on which it holds

    def rule(self, r: int) -> Rule:
        """A candidate as a rule."""
        return Rule(*self.pairs[r], float(self.strength_R[r]))

    def share(self, rules: Sequence[Rule]) -> float:
        """Weight of the passages in which one of the rules holds where the feature fires."""
        columns = [self.pairs.index((rule.target, rule.context)) for rule in rules]
        return float(self.weight_P @ self.hits_PR[:, columns].any(axis=1))


def find(feature: Feature) -> Findings:
    """The rules that together tell best where a feature fires.

    Passages that are in `top` and in `spread` count twice: without that, held-out passages are told apart less well.

    They are added one by one, the one with the most to gain first: the weight of the passages in which it newly holds
    where the feature fires, less the share of those in which it newly holds where it is silent. Of two with as much to
    gain, it is the one that holds on more of the activation. That ends when there is nothing to gain, or nothing that
    fits into the phrase.
    """
    passages = [visible(passage) for passage in (*feature.top, *feature.spread)]
    if not passages:
        return Findings(without_passages(feature).status, "", ())
    candidates = tabulate(passages, feature)
    rules = _choose(candidates)
    if candidates.share(rules) < LEAST_SHARE:
        return Findings(NO_PATTERN, "", ())
    return Findings("ok", patterns.phrase(rules, candidates.share), tuple(rules))


def _choose(candidates: Candidates) -> list[Rule]:
    hits_PR, misses_PR = candidates.hits_PR, candidates.misses_PR
    covered_P, wrong_P = np.zeros((2, len(hits_PR)), bool)
    rules: list[Rule] = []
    while True:
        new_PR = hits_PR & ~covered_P[:, None]
        gain_R = candidates.weight_P @ new_PR - (misses_PR & ~wrong_P[:, None]).mean(axis=0)
        gain_R[(new_PR.sum(axis=0) < SUPPORT) | (candidates.precision_R < PRECISION)] = 0
        order = np.lexsort((-candidates.mass_R, -gain_R.round(9)))[:TRIED]
        r = next((r for r in order if gain_R[r] > 0 and _fits([*rules, candidates.rule(r)])), None)
        if r is None:
            return rules
        rules.append(candidates.rule(r))
        covered_P |= hits_PR[:, r]
        wrong_P |= misses_PR[:, r]


def _fits(rules: Sequence[Rule]) -> bool:
    return len(patterns.phrase(rules, lambda _: 0).split()) <= MAX_WORDS


def tabulate(passages: Sequence[Example], feature: Feature) -> Candidates:
    """Count where the candidates hold. A context "before" is a candidate for the tokens that the feature promotes."""
    promoted = {core(token) for token, _ in feature.promoted}
    intervals_P = np.array([passage.interval(feature.maximum) for passage in passages])
    weight_P = 1 / np.bincount(intervals_P)[intervals_P]
    weight_P /= weight_P.sum()
    owner_N = np.repeat(np.arange(len(passages)), [len(passage.tokens) for passage in passages])
    activation_N = np.concatenate([passage.activations for passage in passages]) / feature.maximum
    fires_N = activation_N > 0

    places_N = [place for passage in passages for place in places(passage)]
    target_ids: dict[tuple[str, str], int] = {ANY: 0}
    context_ids: dict[tuple[str, str], int] = {ANY: 0}
    for n in np.flatnonzero(fires_N):
        for target in places_N[n].targets:
            target_ids.setdefault(target, len(target_ids))
        for context in places_N[n].contexts:
            if context[0] != "before" or context[1] in promoted:
                context_ids.setdefault(context, len(context_ids))

    # Pairs as numbers, those of all tokens one after another (L), then the ones that hold where the feature fires
    pairs_N = [_numbers(place, target_ids, context_ids) for place in places_N]
    token_L = np.repeat(np.arange(len(pairs_N)), [len(pairs) for pairs in pairs_N])
    pair_L = np.array([pair for pairs in pairs_N for pair in pairs])
    number_R = np.unique(pair_L[fires_N[token_L]])
    r_L = np.searchsorted(number_R, pair_L).clip(max=len(number_R) - 1)
    is_candidate_L = number_R[r_L] == pair_L
    token_L, r_L = token_L[is_candidate_L], r_L[is_candidate_L]
    fires_L, owner_L, R = fires_N[token_L], owner_N[token_L], len(number_R)
    hits_PR, misses_PR = np.zeros((2, len(passages), R), bool)
    hits_PR[owner_L[fires_L], r_L[fires_L]] = True
    misses_PR[owner_L[~fires_L], r_L[~fires_L]] = True
    held_R = np.bincount(r_L, weight_P[owner_L], R)
    precision_R = np.bincount(r_L, weight_P[owner_L] * fires_L, R) / held_R
    mass_R = np.bincount(r_L, weight_P[owner_L] * activation_N[token_L], R)
    strength_R, mass_R = mass_R / held_R, mass_R / (weight_P[owner_N] @ activation_N)
    targets, contexts = list(target_ids), list(context_ids)
    pairs = [(targets[number // len(contexts)], contexts[number % len(contexts)]) for number in number_R]
    return Candidates(pairs, weight_P, hits_PR, misses_PR, precision_R, strength_R, mass_R)


def _numbers(
    place: Place, target_ids: dict[tuple[str, str], int], context_ids: dict[tuple[str, str], int]
) -> list[int]:
    contexts = [context_ids[context] for context in place.contexts if context in context_ids]
    targets = [len(context_ids) * target_ids[target] for target in place.targets if target in target_ids]
    return [target + context for target in targets for context in contexts]


def predict(rules: Sequence[Rule], places_T: Sequence[Place]) -> list[float]:
    """The strength of the strongest rule that holds on each token, as a share of the maximum; 0 where none does."""
    by_target: dict[tuple[str, str], list[Rule]] = {}
    for rule in rules:
        by_target.setdefault(rule.target, []).append(rule)
    return [
        max([r.strength for target in targets for r in by_target.get(target, ()) if r.context in contexts], default=0.0)
        for targets, contexts in places_T
    ]


def score_all(found: Mapping[int, Findings], load: Callable[[int], Feature], *, seed: int = 0) -> Iterator[Label]:
    """The labels of features, each with the scores of its rules beside those of another feature's."""
    other = scoring.others(index for index, each in found.items() if each.status == "ok")
    for index, each in found.items():
        yield label(load(index), each, found.get(other.get(index)), seed=seed)


def label(feature: Feature, found: Findings, other: Findings | None, *, seed: int = 0) -> Label:
    """The label of a feature, scored by detection and by simulation on the passages that detection asks for.

    As a detector, the predictor says that a feature fires in a passage if one of its rules holds there: which rules
    there are was settled on the explaining examples.
    """
    if found.status != "ok":
        is_seen = found.status == NO_PATTERN
        reason = "no rule accounts for enough of its passages" if is_seen else without_passages(feature).reason
        return Label(feature.feature, "", EXPLAINER, found.status, {}, (), reason)
    questions = scoring.detection_questions(feature, seed)
    places_of = [places(question.passage) for question in questions]

    def run(rules: Sequence[Rule]) -> tuple[list[Judgement], list[scoring.Simulated]]:
        predicted = [predict(rules, each) for each in places_of]
        pairs = list(zip(questions, predicted, strict=True))
        judgements = [Judgement("detection", q.kind, q.index, q.truth, any(values)) for q, values in pairs]
        unit = feature.maximum
        return judgements, [scoring.Simulated(q.passage.activations, [unit * v for v in values]) for q, values in pairs]

    judgements, simulated = run(found.rules)
    detection = scoring.verdict_score(judgements, seed)._replace(recall=scoring.recall(feature, judgements))
    simulation = scoring.simulation_score(simulated, len(questions), seed)
    baselines = {"top_token": (Rule(("core", core(scoring.strongest_token(feature))), ANY, 1.0),)}
    if other:
        baselines["other_feature"] = other.rules
    for name, rules in baselines.items():
        of_baseline, simulated = run(rules)
        detection = detection._replace(**{name: scoring.balanced_accuracy(of_baseline)})
        simulation = simulation._replace(**{name: scoring.correlation(simulated)[0]})
    scores = {"detection": detection, "simulation": simulation}
    return Label(feature.feature, found.phrase, EXPLAINER, "ok", scores, tuple(judgements))
