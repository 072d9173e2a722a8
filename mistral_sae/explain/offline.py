"""Explanations without a model: rules of where a feature fires, found by counting in its own examples.

    found = {index: find(features[index]) for index in indices}
    for label in score_all(found, features.__getitem__, seed=SEED): ...

A rule is a target (what the token is) in a context (where it stands), each a pair of a kind and a value:

    targets    any, core "self" (a token without the spaces around it), token " self" (as it is), class "numbers",
               concept "keys of dictionaries" (what is known of a token beside its text; `find` does not look at it)
    contexts   any, after "(" (the token before, or the two before), continuing "sel" (a word), line "import" (whose
               first word that is), starting (a line), early (in a row of tokens), before "self"

The rules that are found make the phrase, and the same rules make the predictor that is scored. They come from the
explaining examples (`top` and `spread`) alone; negatives are the tokens of these on which the feature is silent.

Shapes: P passages, N tokens of all of them, R candidate rules, L pairs of a token and a rule that holds on it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from mistral_sae.explain import scoring
from mistral_sae.explain.prompts import NO_PATTERN
from mistral_sae.explain.types import (
    Example,
    Explanation,
    Feature,
    Judgement,
    Label,
    Score,
    unexplained,
    without_passages,
)

EXPLAINER = "offline"
SUPPORT = 2  # passages that a rule must add to those that are accounted for
PRECISION = 0.5  # of the tokens on which a rule holds, the share on which the feature must fire
LEAST_SHARE = 0.2  # of a feature's passages; rules that account for fewer are no pattern
MOST_WORDS = 25  # of a phrase
STRONG = 0.5  # of the strength of a feature's strongest rule, from which on another one counts as strong
TRIED = 30  # rules that are looked at when the best ones do not fit into the phrase
EARLY = 8  # positions of a row, its BOS not counted
SPACE = "\u2423"  # shown for a space in a token, so that the words of a phrase can be counted

Part = tuple[str, str]  # a target or a context: its kind and its value
ANY: Part = ("any", "")


class Rule(NamedTuple):
    """A feature fires on `target` in `context`."""

    target: Part
    context: Part
    strength: float  # mean activation there, as a share of the feature's maximum


class Found(NamedTuple):
    """A feature's explanation, and the rules that it says in words."""

    explanation: Explanation
    rules: Sequence[Rule] = ()


class Parts(NamedTuple):
    """All targets and contexts that hold for one token of a passage."""

    targets: list[Part]  # ANY first, then from the general to the particular
    contexts: list[Part]  # ANY first


# ---- what can be said of a token ----


def parts_of(passage: Example) -> list[Parts]:
    """Return what holds for each token of a passage; all but "before" follows from the text up to the token."""
    tokens, cores = passage.tokens, [core(token) for token in passage.tokens]
    line, is_whole = "", False  # of the text so far; the passage may begin inside its first line
    found = []
    for i, token in enumerate(tokens):
        word = re.sub(r".*\W", "", line)  # that the text ends with
        continues = bool(word) and (token[:1].isalnum() or token[:1] == "_")
        contexts = [ANY]
        if i > 0:
            contexts.append(("after", cores[i - 1]))
        if i > 1:
            contexts.append(("after", (tokens[i - 2] + tokens[i - 1]).strip(" ")))
        if continues:
            contexts.append(("continuing", word))
        if is_whole:
            contexts.append(("line", words[0]) if (words := line.split(None, 1)) else ("starting", ""))
        if passage.start + i <= EARLY:
            contexts.append(("early", ""))
        if i + 1 < len(tokens):
            contexts.append(("before", cores[i + 1]))
        targets = [ANY, ("core", cores[i]), ("token", token), ("class", class_of(token, continues))]
        targets += [("concept", concept) for concept in (passage.concepts[i] if passage.concepts else ())]
        found.append(Parts(targets, contexts))
        line, is_whole = (line + token).rpartition("\n")[2], is_whole or "\n" in token
    return found


def core(token: str) -> str:
    """Return a token without the spaces around it, unless it is nothing else."""
    return token.strip(" ") or token


@lru_cache(maxsize=2**16)
def class_of(token: str, continues: bool) -> str:
    """Return what kind of token it is, in plural; `continues` if it is part of a word that began before it."""
    if not token.strip():
        return "line breaks" if "\n" in token else "indentation"
    if token.strip().isdigit():
        return "numbers"
    if re.fullmatch(r" *\w+ *", token):
        return "word parts" if continues else "words"
    return "words with punctuation" if re.search(r"\w", token) else "punctuation"


# ---- finding rules ----


class Candidates(NamedTuple):
    """The rules that hold on some token on which the feature fires, and where else they hold."""

    rules: list[Rule]
    weight_P: np.ndarray  # of the passages; those of each interval weigh the same together
    hits_PR: np.ndarray  # whether the rule holds on a token on which the feature fires
    misses_PR: np.ndarray  # whether it holds on one on which the feature is silent
    precision_R: np.ndarray  # share of the tokens on which it holds on which the feature fires
    mass_R: np.ndarray  # share of all activation that is on the tokens on which it holds

    def share(self, rules: Sequence[Rule]) -> float:
        """Return the weight of the passages in which one of the rules holds where the feature fires."""
        return float(self.weight_P @ self.hits_PR[:, [self.rules.index(rule) for rule in rules]].any(axis=1))


def find(feature: Feature) -> Found:
    """Return the rules that together tell best where a feature fires, and what they say in words.

    Passages that are in `top` and in `spread` count twice: without that, held-out passages are told apart less well.
    """
    passages = [*feature.top, *feature.spread]
    if not passages:
        return Found(without_passages(feature))
    candidates = tabulate(passages, feature)
    rules = _choose(candidates)
    if candidates.share(rules) < LEAST_SHARE:
        reason = "no rule accounts for enough of its passages"
        return Found(Explanation(feature.feature, NO_PATTERN, reason=reason))
    return Found(Explanation(feature.feature, "ok", phrase(rules)), rules)


def tabulate(passages: Sequence[Example], feature: Feature) -> Candidates:
    """Count where the candidates hold. A context "before" is a candidate for the tokens that the feature promotes."""
    promoted = {core(token) for token, _ in feature.promoted}
    interval_P = np.array([passage.interval(feature.maximum) for passage in passages])
    weight_P = 1 / np.bincount(interval_P)[interval_P]
    weight_P = weight_P / weight_P.sum()
    parts_N = [parts for passage in passages for parts in parts_of(passage)]
    passage_N = np.repeat(np.arange(len(passages)), [len(passage.tokens) for passage in passages])
    activation_N = np.concatenate([passage.activations for passage in passages]) / feature.maximum

    number: dict[tuple[Part, Part], int] = {}  # of each candidate
    for n in np.flatnonzero(activation_N):
        for pair in product(*parts_N[n]):
            (kind, _), (context_kind, context) = pair
            if kind != "concept" and (context_kind != "before" or context in promoted):
                number.setdefault(pair, len(number))
    targets = {target for target, _ in number}
    holds = [
        (n, number[target, context])
        for n, parts in enumerate(parts_N)
        for target in parts.targets
        if target in targets
        for context in parts.contexts
        if (target, context) in number
    ]
    token_L, r_L = np.array(holds).T
    passage_L, fires_L = passage_N[token_L], activation_N[token_L] > 0
    hits_PR, misses_PR = np.zeros((2, len(passages), len(number)), bool)
    hits_PR[passage_L[fires_L], r_L[fires_L]] = True
    misses_PR[passage_L[~fires_L], r_L[~fires_L]] = True
    weight_L = weight_P[passage_L]
    held_R = np.bincount(r_L, weight_L)
    mass_R = np.bincount(r_L, weight_L * activation_N[token_L])
    rules = [Rule(*pair, float(strength)) for pair, strength in zip(number, mass_R / held_R, strict=True)]
    precision_R = np.bincount(r_L, weight_L * fires_L) / held_R
    return Candidates(rules, weight_P, hits_PR, misses_PR, precision_R, mass_R / (weight_P[passage_N] @ activation_N))


def _choose(candidates: Candidates) -> list[Rule]:
    """Add rules one by one, the one with the most to gain first, while there is something to gain that fits the phrase.

    The gain of a rule is the weight of the passages in which it newly holds where the feature fires, less the share of
    those in which it newly holds where it is silent. Of two with as much to gain, it is the one that holds on more of
    the activation.
    """
    hits_PR, misses_PR = candidates.hits_PR, candidates.misses_PR
    covered_P, wrong_P = np.zeros((2, len(hits_PR)), bool)
    rules: list[Rule] = []

    def fits(r: int) -> bool:
        return len(phrase([*rules, candidates.rules[r]]).split()) <= MOST_WORDS

    while True:
        new_PR = hits_PR & ~covered_P[:, None]
        gain_R = candidates.weight_P @ new_PR - (misses_PR & ~wrong_P[:, None]).mean(axis=0)
        gain_R[(new_PR.sum(axis=0) < SUPPORT) | (candidates.precision_R < PRECISION)] = 0
        order = np.lexsort((-candidates.mass_R, -gain_R.round(9)))[:TRIED]
        r = next((r for r in order if gain_R[r] > 0 and fits(r)), None)
        if r is None:
            return rules
        rules.append(candidates.rules[r])
        covered_P |= hits_PR[:, r]
        wrong_P |= misses_PR[:, r]


# ---- in words ----

CONTEXTS = {  # as a phrase has them, after the target
    "any": "",
    "after": " after {}",
    "continuing": " after {} in a word",
    "line": " after {} in its line",
    "starting": " at the start of a line",
    "early": " near the start of the text",
    "before": " before {}",
}
TOKENS = {"after": "what comes", "continuing": "what comes", "line": "what comes"}  # after something; else "tokens"


def phrase(rules: Sequence[Rule]) -> str:
    """Return rules in words: what the feature is strong on, then what it is weak on.

    Rules are named together if they have the context in common, or the target and the kind of context: the phrase says
    what the rules say and no more.
    """
    strongest = max((rule.strength for rule in rules), default=0.0)
    strong, weak = ([r for r in rules if (r.strength >= STRONG * strongest) == is_it] for is_it in (True, False))
    return "; weakly ".join("; ".join(_in_words(some)) for some in (strong, weak) if some)


def _in_words(rules: Sequence[Rule]) -> Iterator[str]:
    left = list(rules)
    while left:
        (kind, value), (context_kind, _), _ = first = left[0]
        is_text = kind in ("core", "token")
        same_context = [r for r in left if r.context == first.context and r.target[0] in ("core", "token")]
        same_target = [r for r in left if r.target == first.target and r.context[0] == context_kind]
        together = same_context if is_text and len(same_context) >= len(same_target) else same_target
        left = [r for r in left if r not in together]
        what = _either(shown(r.target[1]) for r in together) if is_text else value or TOKENS.get(context_kind, "tokens")
        context = _either(shown(r.context[1]) for r in together)
        yield what + CONTEXTS[context_kind].format(context)


def _either(said: Iterable[str]) -> str:
    """Things in words, each once."""
    *most, last = dict.fromkeys(said)
    return f"{', '.join(most)} or {last}" if most else last


def shown(token: str) -> str:
    """Return a token in quotes as Python writes it, double ones where it can, but with SPACE for spaces."""
    written = repr(token)
    quote = written[0] if '"' in token else '"'
    return f"{quote}{written[1:-1].replace(' ', SPACE)}{quote}"


# ---- predictions and scores ----


def predict(rules: Sequence[Rule], parts_T: Sequence[Parts]) -> list[float]:
    """Return the strength of the strongest rule that holds on each token; 0 where none does."""
    return [max((rule.strength for rule in rules if holds(rule, parts)), default=0.0) for parts in parts_T]


def holds(rule: Rule, parts: Parts) -> bool:
    """Return whether a rule holds on a token."""
    return rule.target in parts.targets and rule.context in parts.contexts


def score_all(found: Mapping[int, Found], load: Callable[[int], Feature], *, seed: int = 0) -> Iterator[Label]:
    """Yield the labels of features, each with the scores of its rules, and those of another feature's to compare."""
    others = scoring.other_features(index for index, each in found.items() if each.explanation.status == "ok")
    for index, each in found.items():
        other = others.get(index)
        yield label(load(index), each, None if other is None else found[other], seed=seed)


def label(feature: Feature, found: Found, other: Found | None, *, seed: int = 0) -> Label:
    """Return the label of a feature, scored by detection and by simulation on the passages that detection asks for.

    As a detector, the predictor says that a feature fires in a passage if one of its rules holds there. A concept
    gives no answer for passages of which concepts are not known.
    """
    if found.explanation.status != "ok":
        return unexplained(found.explanation, EXPLAINER)
    asked = scoring.detection_questions(feature, seed)
    is_concept = found.rules[0].target[0] == "concept"
    questions = [question for question in asked if question.passage.concepts or not is_concept]
    parts = [parts_of(question.passage) for question in questions]

    def run(rules: Sequence[Rule]) -> tuple[list[Judgement], dict[str, Score]]:
        pairs = [(question, predict(rules, parts_T)) for question, parts_T in zip(questions, parts, strict=True)]
        judgements = [Judgement("detection", q.kind, q.index, q.truth, any(values)) for q, values in pairs]
        unit = feature.maximum
        simulated = [scoring.Simulated(q.passage.activations, [unit * v for v in values]) for q, values in pairs]
        detection = scoring.verdict_score(judgements, seed)._replace(unanswered=len(asked) - len(questions))
        return judgements, {
            "detection": detection,
            "simulation": scoring.simulation_score(simulated, len(asked), seed),
        }

    top_token = Rule(("core", core(scoring.strongest_token(feature))), ANY, 1.0)
    (judgements, own), (_, of_token) = run(found.rules), run([top_token])
    of_other = run(other.rules)[1] if other else {}
    scores = {
        method: score._replace(
            other_feature=of_other[method].value if other else None, top_token=of_token[method].value
        )
        for method, score in own.items()
    }
    scores["detection"] = scores["detection"]._replace(recall=scoring.recall(feature, judgements))
    return Label(feature.feature, found.explanation.text, EXPLAINER, "ok", scores, tuple(judgements))
