"""Which feature to steer with, and how strongly: by number, by words, or one whose effect shows in text.

Shapes: R rows, T positions, N features that are looked at, F features, V vocabulary.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_sae.cli import Progress
from mistral_sae.constants import literal
from mistral_sae.data.activations import residuals_of
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer import sweep
from mistral_sae.steer.display import print_line
from mistral_sae.steer.effect import VISIBLE, Class, Effect, each_alone, effects_of, strengths_of
from mistral_sae.steer.steering import Coefficient, Edit, SteeringError, Subject, steer
from mistral_sae.steer.sweep import LOGITS_BYTES, Trials

SHORTEST_STEM = 4  # letters from which on the beginning of a word stands for the word
CLASS = 5  # tokens by which a class of raised tokens is judged
CANDIDATES = 24  # features by explanation, and as many by tokens, whose effect on the words' tokens is measured
SCAN_ROWS, SCAN_AT_ONCE = 48, 16  # rows of text that are read to find features by their tokens
LOOKED_AT = 64  # features among which one is looked for that shows in text
RAISED = 20  # words that a feature raises most, whose share of a text shows it
WORD = re.compile(r"[\s▁][^\W\d_]{3,}")  # a token that is one, or how one of several tokens begins
TEXT_TOKENS = 8  # of the text on which it is measured what they raise, after the prompt
TRIED, TRIED_BY_WORDS = 8, 8  # features of which short texts are made in a round, and by words
ROUNDS = 3  # at most, of features with an explanation and of those without
SHORT_TEXTS, SHORT_TOKENS = 32, 16  # of all of them together, and their length
FINALISTS, FINAL_TEXTS = 3, 2  # of which so many are made in full length, at four strengths

Rows = Callable[[int], Tensor]  # so many rows of text (R, T)


@dataclass(frozen=True)
class Search:
    """What features are looked for with."""

    subject: Subject
    trials: Trials  # texts in which they are tried
    rows: Rows  # of held-out text
    grid: Sequence[float] | None = None  # strengths to try, in the method's unit; None are those of `strengths_of`
    concepts: Mapping[int, Class] = field(default_factory=dict)  # features that stand for one, which shows in text
    shown_tokens: int = 0  # of the text that is shown in the end, the first of those, if it is to be longer

    @cached_property
    def text_1T(self) -> Tensor:
        """The prompt with a few tokens of the model's own after it (1, T)."""
        model, trials = self.subject.model, self.trials
        (ids,) = model.sample(trials.prompt_ids, trials.seeds[:1], TEXT_TOKENS, trials.temperature)
        return torch.tensor([[*trials.prompt_ids, *ids]])

    @cached_property
    def words(self) -> list[int]:
        """The tokens of the vocabulary that are words, or how one begins."""
        tokenizer = self.subject.model.tokenizer
        return [id for id in range(tokenizer.vocab_size) if WORD.fullmatch(tokenizer.strings([id])[0])]

    def strengths(self, units: Sequence[Edit]) -> list[list[float]]:
        """The multiples of each edit that are tried, from weak to strong."""
        if self.grid is not None:
            return [list(self.grid) for _ in units]
        model, layer = self.subject.model, self.subject.loaded.metadata.residual_layer
        x_TD = model.residuals(self.text_1T, layer)[model.kept(self.text_1T)].float()
        return [strengths_of(self.subject, unit, x_TD) for unit in units]


# ---- what the user asked for ----


def choose(search: Search, edit: Edit, wanted: int | str | dict | None, coefficient: float | None) -> Edit:
    """The edit with the features that FEATURE_INDEX means and their coefficients; prints how they were found.

    Without a coefficient it is the strongest at which a few texts stay fluent. Raises SteeringError.
    """
    return choose_and_begin(search, edit, wanted, coefficient)[0]


def choose_and_begin(
    search: Search, edit: Edit, wanted: int | str | dict | None, coefficient: float | None
) -> tuple[Edit, Sequence[list[int]]]:
    """The same, and how the first of the model's own texts begins and of the steered ones, where they have been made.

    The second is empty where no text was made with just this edit.
    """
    wanted = parse(wanted) if isinstance(wanted, str) else wanted
    if isinstance(wanted, dict):
        if not wanted:
            raise SteeringError("found no feature in FEATURE_INDEX: expected one or more, as in {12: 2, 40: -1}")
        return replace(edit, coefficients=wanted), ()
    found, trial = None, edit
    if not isinstance(wanted, int):
        trial, given = replace(edit, exact=False), coefficient
        if edit.method == "ablate" or (given is not None and given <= 0):  # which push away: it must show before
            trial, given = replace(trial, method="clamp"), None
        found = _by_words(search, trial, wanted, given) if wanted else _most_visible(search, trial, given)
        wanted = found.feature
    if coefficient is None and edit.method == "ablate":
        coefficient = 1.0  # it has no strength
    if coefficient is None:
        if found is None:
            (strengths,) = search.strengths([replace(edit, coefficients={wanted: 1.0})])
            (found,) = effects_of(search.subject, edit, {wanted: strengths}, {}, search.trials)
        print(f"coefficient: {found.why()}")
        if trial == edit and search.shown_tokens > search.trials.max_tokens:
            found = _to_the_end(search, edit, found)
        coefficient = found.strength
    chosen = replace(edit, coefficients={wanted: coefficient})
    is_it = found is not None and replace(trial, coefficients={found.feature: found.strength}) == chosen
    return chosen, found.texts if found and is_it else ()


def _to_the_end(search: Search, edit: Edit, found: Effect) -> Effect:
    """The same at the strongest strength, up to its own, at which the text that is shown stays fluent to its end."""
    (model, loaded, *_), ids, seeds = search.subject, search.trials.prompt_ids, 2 * [search.trials.seeds[0]]
    (own_begins, steered_begins), tokens = found.texts, search.shown_tokens
    for strength in reversed(found.tried[: found.tried.index(found.strength) + 1]):
        begun = own_begins, steered_begins if strength == found.strength else []
        chosen = replace(edit, coefficients={found.feature: strength})
        with chosen.alone_in(1, rows=2).context(search.subject, len(ids)):
            texts = model.sample(ids, seeds, tokens, search.trials.temperature, begun=begun)
        own, steered = sweep.measure(model, loaded, [found.feature], ids, texts)
        if sweep.is_fluent(steered, own):
            break
    if strength != found.strength:
        print(f"             then {strength:g}: at more the text below, which is longer, is not fluent to its end")
    return found._replace(strength=strength, texts=texts)


def parse(words: str) -> int | str | dict[int, Coefficient]:
    """The number or the dictionary that is written there, or the words themselves. Raises SteeringError."""
    value = literal(words)
    if type(value) is int or isinstance(value, dict):
        return value
    if words.lstrip()[:1] in tuple("{[(") or isinstance(value, float):
        raise SteeringError(f"found FEATURE_INDEX {words!r}: expected a number, words or several as {{12: 2, 40: -1}}")
    return words


# ---- trying features in text ----


def _tried(
    search: Search, edit: Edit, classes: Mapping[int, Class], given: float | None
) -> tuple[list[Effect], list[Effect]]:
    """What the finalists among features do to text, the most visible first, and what the others do.

    Each makes a few short texts at a middle strength; the best FINALISTS, which come first, make FINAL_TEXTS of full
    length at one strength below it, at that one, and at two above. `classes` are what shows each feature.
    """
    subject, trials = search.subject, search.trials
    units = [replace(edit, coefficients={feature: 1.0}) for feature in classes]
    strengths = dict(zip(classes, search.strengths(units) if given is None else [[given]] * len(units), strict=True))
    middle = _middle(next(iter(strengths.values())))
    seeds = trials.seeds[: max(1, SHORT_TEXTS // len(classes))]
    short = trials._replace(seeds=seeds, max_tokens=min(SHORT_TOKENS, trials.max_tokens))
    first = effects_of(subject, edit, {f: [some[middle]] for f, some in strengths.items()}, classes, short)
    first.sort(key=lambda each: each.rank()[1:])  # one that is not fluent here may be at less
    around = {f: strengths[f][max(0, middle - 1) : middle + 3] for f, *_ in first[:FINALISTS]}
    in_full = trials._replace(seeds=trials.seeds[:FINAL_TEXTS])
    return sorted(effects_of(subject, edit, around, classes, in_full), key=Effect.rank), first[FINALISTS:]


def _middle(strengths: Sequence[float]) -> int:
    """The index of the strength that is tried first."""
    return 3 * len(strengths) // 8


def _print_tried(tried: Sequence[Effect], what: Callable[[int], str], match: Mapping[int, float] | None = None) -> None:
    """A list of features with what is seen of them, of which the first is taken."""
    labels = "" if match is None else "label  "
    print(f"     feature  {labels}its tokens   fires on")
    for i, each in enumerate(tried):
        shares = (each.own_shown, each.shown), (each.own.rate, each.steered.rate)
        figures = "  ".join(f"{own:3.0%} → {steered:4.0%}" for own, steered in shares)
        label = "" if match is None else f"{match.get(each.feature, 0.0):5.1f}  "
        seen = (
            "not fluent: "
            if not each.is_fluent
            else ""
            if each.is_visible
            else "repeats itself: "
            if each.gain >= VISIBLE
            else "no visible effect: "
        )
        print_line(f"  {' ' if i else '→'} {each.feature:>8}  {label}{figures} ", seen + what(each.feature))


# ---- what a feature raises when it is clamped ----


class Changes(NamedTuple):
    """How far clamping raises each token, for N features: the mean over the positions of some text."""

    logits_NV: Tensor  # in standard deviations over the vocabulary
    probabilities_NV: Tensor


@torch.no_grad()
def changes_of(model: LanguageModel, loaded: LoadedSAE, activations: Mapping[int, float], tokens_RT: Tensor) -> Changes:
    """What clamping each feature does to the prediction of the tokens after those of some text (R, T).

    Measured through the layers above, which the logit lens leaves out. `activations` are {feature: what it is clamped
    to}; each is clamped alone.
    """
    R, T, n_ids = *tokens_RT.shape, model.tokenizer.vocab_size  # the output matrix may have more rows
    plain_RTV = model.forward(tokens_RT)[:, 1:, :n_ids]
    plain_V, likely_V = plain_RTV.mean(dim=(0, 1)), plain_RTV.softmax(dim=-1).mean(dim=(0, 1))
    at_once = max(1, LOGITS_BYTES // (4 * R * T * model.vocab_size))
    features, raised, likelier = list(activations), [], []
    with Progress(total=len(features), desc="what they raise", unit=" features", leave=False) as bar:
        for some in (features[i : i + at_once] for i in range(0, len(features), at_once)):
            with steer(model, loaded, each_alone([(f, activations[f]) for f in some for _ in range(R)])):
                logits = model.forward(tokens_RT.repeat(len(some), 1))[:, 1:, :n_ids].unflatten(0, (len(some), R))
            raised.append(logits.mean(dim=(1, 2)) - plain_V)
            likelier.append(logits.softmax(dim=-1).mean(dim=(1, 2)) - likely_V)
            bar.update(len(some))
    change_NV = torch.cat(raised)
    change_NV = (change_NV - change_NV.mean(dim=1, keepdim=True)) / change_NV.std(dim=1, keepdim=True)
    return Changes(change_NV.cpu(), torch.cat(likelier).cpu())


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


class Matches(NamedTuple):
    """What is found for words."""

    by_label: dict[int, float]  # features whose explanations match, best first, with their scores
    by_token: dict[int, float]  # others that fire on the words' tokens, best first, and how far they raise these
    explanations: int  # that match, of features that never fire too
    ids: list[int]  # the words' tokens


def find(query: str, search: Search) -> Matches:
    """Features for words: those whose explanations match, and those that fire on the words' tokens.

    The former by `by_explanation`'s scores; of equal ones the one comes first that raises the words' tokens most when
    steered. The latter are looked for in rows of text, unless an explanation matches and every feature has one.
    """
    model, loaded, statistics, explanations = search.subject
    ids = tokens_like(model.tokenizer, query)
    matches = by_explanation(query, {feature: each.text for feature, each in explanations.items()})
    labelled = sorted(matches, key=matches.__getitem__, reverse=True)[:CANDIDATES]
    others: list[int] = []
    if ids and not (matches and len(explanations) == loaded.sae.n_features):
        others = [f for f in by_tokens(model, loaded, ids, search.rows(SCAN_ROWS), CANDIDATES) if f not in matches]
    activations = {f: float(statistics.maximum_F[f]) for f in labelled + others if statistics.maximum_F[f] > 0}
    if not activations:
        return Matches({}, {}, len(matches), ids)
    changes_NV = changes_of(model, loaded, activations, search.text_1T).logits_NV
    strengths = dict(zip(activations, clearness(changes_NV[:, ids] if ids else changes_NV).tolist(), strict=True))
    ranked = sorted(strengths, key=lambda feature: (-matches.get(feature, 0.0), -strengths[feature]))
    by_label = {feature: matches[feature] for feature in ranked if feature in matches}
    by_token = {feature: strengths[feature] for feature in ranked if feature not in matches}
    return Matches(by_label, by_token, len(matches), ids)


def _by_words(search: Search, edit: Edit, words: str, given: float | None) -> Effect:
    """The feature for words that shows most in text, of those that match best; prints them."""
    by_label, by_token, n_matching, ids = find(words, search)
    if not by_label and not by_token:
        raise SteeringError(
            f"found no feature for {words!r}: expected words or parts of words that the model's text has"
        )
    explanations, half = search.subject.explanations, TRIED_BY_WORDS // 2
    candidates = [*list(by_label)[: max(half, TRIED_BY_WORDS - len(by_token))], *by_token][:TRIED_BY_WORDS]
    if explanations:
        how = f"{n_matching} of {len(explanations):,} explanations match"
    else:
        how = "no explanations of it (explain.py writes them)"
    print(
        f"features for {words!r}: {how}, {len(by_token)} others fire on its tokens; {len(candidates)} are tried in text"
    )
    finalists, others = _tried(search, edit, dict.fromkeys(candidates, frozenset(ids)), given)
    _print_tried(finalists + others, lambda feature: _explained(search.subject, feature), by_label)
    return finalists[0]


def _explained(subject: Subject, feature: int) -> str:
    explanation = subject.explanations.get(feature)
    return explanation.text if explanation else "no explanation"


# ---- by what shows in text ----


def _most_visible(search: Search, edit: Edit, given: float | None) -> Effect:
    """A feature whose effect on text shows, from a ranked list that is printed.

    They are tried in rounds, of those that stand for a concept first, until the effect of one is visible; else the best
    is taken. Raises SteeringError if no feature ever fired.
    """
    tried: list[Effect] = []
    for classes in _rounds(search):
        tried = sorted(tried + _tried(search, edit, classes, given)[0], key=Effect.rank)
        if tried[0].is_visible:
            break
    _print_tried(tried[:FINALISTS], lambda feature: _explained(search.subject, feature))
    return tried[0]


def _rounds(search: Search) -> Iterator[Mapping[int, Class]]:
    """Features to try together, and what shows each."""
    for kind, classes in _ranked(search):
        ranked = list(classes.items())[: ROUNDS * TRIED]
        for start in range(0, len(ranked), TRIED):
            some = dict(ranked[start : start + TRIED])
            print(f"choosing a feature: {kind}, numbers {start + 1} to {start + len(some)} are tried in text")
            yield some


def _ranked(search: Search) -> Iterator[tuple[str, Mapping[int, Class]]]:
    """Features and what shows each, with what they are: those of a concept, explained ones by their words, others."""
    if search.concepts:
        yield f"of {len(search.concepts)} that stand for a concept", search.concepts
    for kind, among in pools_of(search.subject):
        looked_at = random.Random(0).sample(sorted(among), min(LOOKED_AT, len(among)))
        yield f"of {len(looked_at)} {kind}, by the words that they raise", most_promising(search, looked_at)


def pools_of(subject: Subject) -> list[tuple[str, list[int]]]:
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


def most_promising(search: Search, candidates: Sequence[int]) -> dict[int, list[int]]:
    """The candidates and the words that each raises, first those whose effect promises most.

    Of the half that raises the clearest classes of words, those come first that make their words likeliest in a text of
    the model's own, clamped as strongly as they are then tried.
    """
    model, loaded, statistics, _ = search.subject
    units = [Edit({feature: 1.0}, exact=False) for feature in candidates]
    middles = [strengths[_middle(strengths)] for strengths in search.strengths(units)]
    activations = {f: middle * float(statistics.maximum_F[f]) for f, middle in zip(candidates, middles, strict=True)}
    raised_NV, likelier_NV = changes_of(model, loaded, activations, search.text_1T)
    words = search.words
    raised_NW = raised_NV[:, words]
    class_NR = raised_NW.topk(min(RAISED, len(words)), dim=1).indices
    share_N = likelier_NV[:, words].gather(1, class_NR).sum(dim=1)
    clear_N = clearness(raised_NW)
    is_clear_N = clear_N >= clear_N.median()
    ranked = sorted(range(len(candidates)), key=lambda i: (bool(is_clear_N[i]), float(share_N[i])), reverse=True)
    return {candidates[i]: [words[w] for w in class_NR[i].tolist()] for i in ranked}
