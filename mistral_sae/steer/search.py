"""Which feature to steer with: by number, by words, or one whose effect shows in text.

Shapes: R rows, T positions, N features that are looked at, F features, V vocabulary.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_sae.cli import Progress, literal
from mistral_sae.data.activations import residuals_of
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.display import print_line
from mistral_sae.steer.steering import Coefficient, Edit, SteeringError, Subject, steer
from mistral_sae.steer.sweep import LOGITS_BYTES, MOST_NATS, MOST_REPETITION, Trial, Trials, is_fluent, read_back

SHORTEST_STEM = 4  # letters from which on the beginning of a word stands for the word
CLASS = 5  # tokens by which a class of raised tokens is judged
CANDIDATES = 64  # features by words whose effect on the words' tokens is measured
SAMPLE = (4, 32)  # rows and positions of the text on which it is measured
SCAN_ROWS, SCAN_AT_ONCE = 48, 16  # rows of text that are read to find features by their tokens
LOOKED_AT, TRIED, FINALISTS = 128, 24, 4  # features among which one is looked for that shows in text
VISIBLE = 0.1  # of the tokens, on which a feature must fire more to be taken before others are tried
LOOKED_AT_TOKENS = 16  # of the text on which those are measured, after the prompt
LISTED = 3  # features of a printed list

Rows = Callable[[int], Tensor]  # so many rows of text (R, T)


# ---- what the user asked for ----


def choose(wanted: int | str | dict, coefficient: Coefficient, subject: Subject, rows: Rows) -> dict[int, Coefficient]:
    """The features that FEATURE_INDEX means and their coefficients; words are looked up, and a list printed.

    Raises SteeringError.
    """
    wanted = parse(wanted) if isinstance(wanted, str) else wanted
    if isinstance(wanted, str):
        wanted = _look_up(wanted, subject, rows)
    if not isinstance(wanted, dict):
        wanted = {wanted: coefficient}
    if not wanted:
        raise SteeringError("found no feature in FEATURE_INDEX: expected one or more, as in {12: 2, 40: -1}")
    return wanted


def parse(words: str) -> int | str | dict:
    """The number or the dictionary that is written there, or the words themselves. Raises SteeringError."""
    value = literal(words)
    if type(value) is int or isinstance(value, dict):
        return value
    if words.lstrip()[:1] in tuple("{[(") or isinstance(value, float):
        raise SteeringError(f"found FEATURE_INDEX {words!r}: expected a number, words or several as {{12: 2, 40: -1}}")
    return words


def _look_up(words: str, subject: Subject, rows: Rows) -> int:
    """The feature that matches words best, from a ranked list that is printed."""
    found = find(words, subject, rows)
    if not found:
        raise SteeringError(
            f"found no feature for {words!r}: expected words or parts of words that the model's text has"
        )
    by_words, by_tokens = [each for each in found if each.match], [each for each in found if not each.match]
    explained = len(subject.explanations)
    if by_words:
        how = f"by explanation, of which {len(by_words):,} of {explained:,} match"
    elif explained:
        how = f"none of {explained:,} explanations matches: by tokens fired on"
    else:
        how = "no explanations of it (explain.py writes them): by tokens fired on"
    print(f"features for {words!r}, {how}; the number: by how much the words' tokens are raised when steered")
    for i, each in enumerate(by_words[:LISTED]):
        _print_ranked(i, each.feature, f"{each.strength:4.1f}", subject.explanations[each.feature].text)
    if by_words and by_tokens:
        print("and by tokens fired on, with no explanation that matches")
    for i, each in enumerate(by_tokens[:LISTED], start=len(by_words)):
        _print_ranked(i, each.feature, f"{each.strength:4.1f}", "raises " + "  ".join(map(repr, each.raised)))
    return found[0].feature


def _print_ranked(rank: int, feature: int, figure: str, what: str) -> None:
    print_line(f"  {' ' if rank else '→'} {feature:>6}  {figure}", what)


# ---- what a feature raises when it is clamped ----


@torch.no_grad()
def logit_changes(
    model: LanguageModel, loaded: LoadedSAE, activations: Mapping[int, float], tokens_RT: Tensor
) -> Tensor:
    """How far clamping each feature raises each token's logit (N, V), in standard deviations over the vocabulary.

    Measured: the mean change over the positions of some text (R, T), through the layers above, which the logit lens
    leaves out. `activations` are {feature: what it is clamped to}; each is clamped alone.
    """
    (R, T), plain_V = tokens_RT.shape, model.forward(tokens_RT)[:, 1:].mean(dim=(0, 1))
    at_once = max(1, LOGITS_BYTES // (4 * R * T * model.vocab_size))
    features, parts = list(activations), []
    with Progress(total=len(features), desc="what they raise", unit=" features", leave=False) as bar:
        for some in (features[i : i + at_once] for i in range(0, len(features), at_once)):
            with steer(model, loaded, each_alone([feature for feature in some for _ in range(R)], activations)):
                logits_NTV = model.forward(tokens_RT.repeat(len(some), 1))[:, 1:]
            parts.append(logits_NTV.unflatten(0, (len(some), R)).mean(dim=(1, 2)) - plain_V)
            bar.update(len(some))
    change_NV = torch.cat(parts)
    return ((change_NV - change_NV.mean(dim=1, keepdim=True)) / change_NV.std(dim=1, keepdim=True)).cpu()


def each_alone(of_row: Sequence[int], values: Mapping[int, float]) -> dict[int, Tensor]:
    """Coefficients by which each row of a batch has one feature clamped, and the others' left as they are."""
    return {
        feature: torch.tensor([values[feature] if own == feature else math.nan for own in of_row])
        for feature in dict.fromkeys(of_row)
    }


def clearness(change_NV: Tensor) -> Tensor:
    """How clear the class of tokens is that each feature raises (N): the mean of its CLASS highest changes."""
    return change_NV.topk(min(CLASS, change_NV.shape[1]), dim=1).values.mean(dim=1)


def extremes(model: LanguageModel, scores_V: Tensor, count: int) -> tuple[list[str], list[str]]:
    """The tokens with the highest scores and those with the lowest, most extreme first."""
    names = [
        model.tokenizer.strings([id])[0] for sign in (1, -1) for id in (sign * scores_V).topk(count).indices.tolist()
    ]
    return names[:count], names[count:]


# ---- by words ----


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def are_alike(a: str, b: str) -> bool:
    """Whether two words are the same, or one begins with the other and that has SHORTEST_STEM letters or more."""
    return a == b or (min(len(a), len(b)) >= SHORTEST_STEM and (a.startswith(b) or b.startswith(a)))


def by_explanation(query: str, explanations: Mapping[int, str]) -> dict[int, float]:
    """Features whose explanations share words with the query, and their scores.

    The score is the sum over the query's words, of those that the explanation has, of log(1 + N / n): N explanations,
    n of which have the word. So a rare word counts for more than a frequent one, and all of them for more than some.
    """
    words = {feature: set(words_of(text)) for feature, text in explanations.items()}
    scores: defaultdict[int, float] = defaultdict(float)
    for wanted in set(words_of(query)):
        having = [feature for feature, own in words.items() if any(are_alike(wanted, word) for word in own)]
        for feature in having:
            scores[feature] += math.log(1 + len(words) / len(having))
    return dict(scores)


def tokens_like(tokenizer: Tokenizer, query: str) -> list[int]:
    """The tokens of the vocabulary that are words of the query, or begin with one, or begin one."""
    wanted = words_of(query)
    texts = ((id, words_of(tokenizer.strings([id])[0])) for id in range(tokenizer.vocab_size))
    return [id for id, words in texts if len(words) == 1 and any(are_alike(words[0], word) for word in wanted)]


@torch.no_grad()
def by_tokens(model: LanguageModel, loaded: LoadedSAE, ids: Sequence[int], rows_RT: Tensor, count: int) -> list[int]:
    """The features that tell some tokens apart best: those that fire on them, or right before them, and not elsewhere.

    By F1 of firing on a token of rows (R, T) as a prediction that it, or the one after it, is among `ids`.
    """
    sae, layer = loaded.sae, loaded.metadata.residual_layer
    wanted = torch.tensor(ids)
    fired_F = torch.zeros(sae.n_features)
    right_2F, there_2 = torch.zeros(2, sae.n_features), torch.zeros(2, 1)
    for tokens_RT in Progress(rows_RT.split(SCAN_AT_ONCE), "reading text", unit=" batches", leave=False):
        encoded = sae.encode(residuals_of(model, tokens_RT[:, :-1], layer))  # each with a token after it
        kept_RT = model.kept(tokens_RT[:, :-1])
        is_active = (encoded.values > 0).cpu()
        indices = encoded.indices.cpu()
        fired_F += torch.bincount(indices[is_active], minlength=sae.n_features)
        is_wanted = torch.isin(tokens_RT, wanted)
        for i, is_it in enumerate((is_wanted[:, :-1][kept_RT], is_wanted[:, 1:][kept_RT])):
            right_2F[i] += torch.bincount(indices[is_it][is_active[is_it]], minlength=sae.n_features)
            there_2[i] += is_it.sum()
    f1_F = (2 * right_2F / (fired_F + there_2).clamp_min(1)).amax(dim=0)
    best = f1_F.topk(min(count, len(f1_F)))
    return [feature for feature, f1 in zip(best.indices.tolist(), best.values.tolist(), strict=True) if f1 > 0]


class Found(NamedTuple):
    """A feature that was found by words."""

    feature: int
    match: float  # of its explanation with the words, as `by_explanation` scores it; 0 for one found by tokens
    strength: float  # mean change of the CLASS tokens among the words' that it raises most; of all, if there are none
    raised: list[str]  # the tokens it raises most when steered


def find(query: str, subject: Subject, rows: Rows) -> list[Found]:
    """Features for words, best first: those whose explanations match, then those that fire on the words' tokens.

    The latter are looked for in rows of text, unless an explanation matches and every feature has one. Of features that
    match equally well, first the one that raises the words' tokens most when steered. Empty where no explanation
    matches and no token of the vocabulary does, or none of the features fires on it.
    """
    model, loaded, statistics, explanations = subject
    ids = tokens_like(model.tokenizer, query)
    matches = by_explanation(query, {feature: each.text for feature, each in explanations.items()})
    candidates = sorted(matches, key=matches.__getitem__, reverse=True)[:CANDIDATES]
    if ids and not (matches and len(explanations) == loaded.sae.n_features):
        others = by_tokens(model, loaded, ids, rows(SCAN_ROWS), CANDIDATES)
        candidates += [feature for feature in others if feature not in matches]
    activations = {f: float(statistics.maximum_F[f]) for f in candidates if statistics.maximum_F[f] > 0}
    if not activations:
        return []
    changes_NV = logit_changes(model, loaded, activations, own_text(model))
    strengths = clearness(changes_NV[:, ids] if ids else changes_NV).tolist()
    found = [
        Found(feature, matches.get(feature, 0.0), strength, extremes(model, change_V, CLASS)[0])
        for feature, strength, change_V in zip(activations, strengths, changes_NV, strict=True)
    ]
    return sorted(found, key=lambda each: (-each.match, -each.strength))


def own_text(model: LanguageModel) -> Tensor:
    """Text of the model's own (R, T), of SAMPLE's size and the same each time: this needs no corpus."""
    (R, T), bos, eos = SAMPLE, model.tokenizer.bos_id, model.tokenizer.eos_id
    texts = model.sample([bos], range(R), T - 1, temperature=1.0)
    return torch.tensor([[bos, *text, *[eos] * (T - 1 - len(text))] for text in texts])


# ---- by what shows in text ----


class Shown(NamedTuple):
    """A feature that was tried, and how far it shows in text steered with it."""

    feature: int
    rate: float  # share of the steered texts' tokens on which it fires when they are read back without the edit
    own_rate: float  # the same of the model's own texts
    is_fluent: bool  # the steered texts, each by itself

    @property
    def gain(self) -> float:
        """The share of the tokens on which steering makes it fire."""
        return self.rate - self.own_rate

    def rank(self) -> tuple[bool, float, int]:
        """What sorts the most visible first, and those that leave a text not fluent last."""
        return (not self.is_fluent, -self.gain, self.feature)


def most_visible(subject: Subject, edit: Edit, coefficient: float, trials: Trials) -> int:
    """A feature whose effect on text shows, from a ranked list that is printed.

    Explained features of middle density are tried first, then others, until one fires on VISIBLE more of the tokens of
    its texts than of the model's own while the texts stay fluent; else the best is taken. Of LOOKED_AT random ones the
    TRIED that raise the clearest classes of tokens are tried in one text, the best FINALISTS in all, as they will be
    shown. Raises SteeringError if no feature ever fired.
    """
    found: list[Shown] = []
    for kind, among in _pools(subject):
        looked_at = random.Random(0).sample(sorted(among), min(LOOKED_AT, len(among)))
        tried = _clearest(subject, looked_at, trials)
        print(
            f"choosing a feature: of {len(looked_at):,} {kind} the {len(tried)} that raise the clearest class of "
            f"tokens are tried in a text each, the best {min(FINALISTS, len(tried))} in {len(trials.seeds)}"
        )
        first = _shown(subject, edit, coefficient, tried, trials._replace(seeds=trials.seeds[:1]))
        finalists = [each.feature for each in first[:FINALISTS]]
        found = sorted([*found, *_shown(subject, edit, coefficient, finalists, trials)], key=Shown.rank)
        if found[0].is_fluent and found[0].gain >= VISIBLE:
            break
    bounds = f"together at most {MOST_NATS:g} nat a token and {MOST_REPETITION:.0%} repetition more"
    how = f" and leaves them fluent ({bounds})" if found[0].is_fluent else "; none leaves them fluent"
    print(f"→ fires on most more tokens of its texts than of the model's own{how}")
    for i, each in enumerate(found[:LISTED]):
        explanation = subject.explanations.get(each.feature)
        rates = f"fires on {each.own_rate:3.0%}, steered {each.rate:4.0%} "
        _print_ranked(i, each.feature, rates, explanation.text if explanation else "no explanation")
    return found[0].feature


def _pools(subject: Subject) -> list[tuple[str, list[int]]]:
    """The features to look among, and what they are, those to begin with first."""
    statistics = subject.statistics
    middle = statistics.mid_density()
    explained = [feature for feature in middle if feature in subject.explanations]
    others = [feature for feature in middle if feature not in subject.explanations]
    pools = [("explained features", explained), ("features that fire now and then", others)]
    if not middle:
        pools = [("features", (statistics.maximum_F > 0).nonzero().flatten().tolist())]
    if not any(among for _, among in pools):
        raise SteeringError("found no feature that ever fired: expected an autoencoder of this model")
    return [(kind, among) for kind, among in pools if among]


def _clearest(subject: Subject, candidates: Sequence[int], trials: Trials) -> list[int]:
    """The TRIED of the candidates that raise the clearest classes of tokens in a text of the model's own."""
    text = subject.model.sample(trials.prompt_ids, trials.seeds[:1], LOOKED_AT_TOKENS, trials.temperature)[0]
    activations = {feature: float(subject.statistics.maximum_F[feature]) for feature in candidates}
    changes_NV = logit_changes(subject.model, subject.loaded, activations, torch.tensor([[*trials.prompt_ids, *text]]))
    order = clearness(changes_NV).argsort(descending=True).tolist()
    return [candidates[i] for i in order[:TRIED]]


def _shown(subject: Subject, edit: Edit, coefficient: float, tried: Sequence[int], trials: Trials) -> list[Shown]:
    """The features tried, the most visible first; those that leave a text not fluent come last."""
    ids = trials.prompt_ids

    def context(of_text: list[int]) -> AbstractContextManager:
        alone = each_alone(of_text, dict.fromkeys(of_text, coefficient))
        return replace(edit, coefficients=alone).context(subject, len(ids))

    own, of = trials.unsteered(tried[:1]), torch.tensor(tried)
    texts = [torch.tensor([[*ids, *text]]) for text in own.texts if text]
    fired = [read_back(subject.model, subject.loaded, of, text, len(ids))[0] > 0 for text in texts]
    own_rates = torch.cat(fired or [torch.zeros(1, len(tried))]).float().mean(dim=0).tolist()
    steered = trials.steered(tried, context, lambda feature: [feature], with_kl=False)
    bar = Progress(steered, "steered texts", len(tried), unit=" features", leave=False)
    found = [
        Shown(feature, trial.pooled.rate, own_rate, _stays_fluent(trial, own))
        for feature, own_rate, trial in zip(tried, own_rates, bar, strict=True)
    ]
    return sorted(found, key=Shown.rank)


def _stays_fluent(trial: Trial, own: Trial) -> bool:
    """Whether the texts are fluent together, and none repeats itself more than the model's own do."""
    most = max(each.repetition for each in own.measured) + MOST_REPETITION
    return is_fluent(trial.pooled, own.pooled) and all(each.repetition <= most for each in trial.measured)
