"""Concepts name features: "ED" inside round brackets, numbers in subscripts.

    names = read_names(cache, corpus, tokenizer)
    found = names.name(offline.find(feature), feature)

The tokens of a cache get the concepts of the documents they are of, as far as these are Python. The concepts are found
on one half of the documents to explain from and must hold on the other; those to score on are not looked at.

Shapes: N tokens of a cache, n of those to choose on, C concepts, and one more column for "anything".
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mistral_sae.analysis.concepts import IN_WORDS, OPERATORS, python_spans, tokens_inside
from mistral_sae.cli import Progress
from mistral_sae.data.documents import Document
from mistral_sae.data.tokens import Corpus
from mistral_sae.explain import offline
from mistral_sae.explain.cache import Cache
from mistral_sae.explain.offline import ANY, STRONG, Found, Part, Parts, Rule, place_of
from mistral_sae.explain.types import Example, Feature
from mistral_sae.model.tokenizer import Tokenizer

LONGEST = 40_000  # characters of a document that is parsed; on the stand-in's corpus five of six are shorter
MOST_TOKENS = 500_000  # whose concepts are read
TRIED = 20  # documents, after which text of which less than half parses is not taken for Python
ENOUGH = 10  # tokens on which a feature fires, for its concept to be counted
GAIN, LEAST_F1 = 0.02, 0.15  # of F1: by which it rises with a place; of a concept by itself
CONCEPTS = list(IN_WORDS)
NO_PLACES = {*OPERATORS, "keyword", "None, True, False", "number", "negative number", "indentation"}  # but things
IS_THING = np.array([True, *(place_of(words) != words for words in IN_WORDS.values())])  # (1 + C), "anything" first
IS_PLACE = np.array([True, *(concept not in NO_PLACES for concept in CONCEPTS)])
CAN_BE_SAID = IS_THING[:, None] & IS_PLACE & ~np.eye(1 + len(CONCEPTS), dtype=bool)  # a thing, and where it stands
CAN_BE_SAID[0] = IS_PLACE & ~IS_THING


def read_names(cache: Cache, corpus: Corpus, tokenizer: Tokenizer) -> "Names | None":
    """The names that the documents of a cache give; None where they are no Python. Prints how much is known."""
    names = Names(cache, corpus.documents(held_out=False, epochs=False), tokenizer)
    if names.known:
        print(f"concepts  {names.known:,} of these tokens are of files that were parsed as Python")
    return names if names.known else None


class Half(NamedTuple):
    """The tokens of some documents whose concepts are known."""

    places: np.ndarray  # (n) of the tokens in the cache, ascending
    ids: np.ndarray  # (n) of the tokens in the vocabulary
    labels: np.ndarray  # (n, 1 + C) float32; the first column is 1
    together: np.ndarray  # (1 + C, 1 + C) on how many of the tokens two labels hold

    def firings(self, cache: Cache, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """At which of its tokens a feature fires, and how strongly."""
        found = cache.activations(feature)
        at = np.searchsorted(self.places, found.tokens)
        is_mine = (at < len(self.places)) & (self.places[np.minimum(at, len(self.places) - 1)] == found.tokens)
        return at[is_mine], found.values[is_mine]


class Counts(NamedTuple):
    """How well some descriptions tell where a feature fires, on one half: arrays of one shape."""

    hits: np.ndarray  # tokens that they hold on, on which it fires
    mass: np.ndarray  # the share of its activation that is on these
    held: np.ndarray  # tokens that they hold on

    @property
    def f1(self) -> np.ndarray:
        """Of the share of those tokens on which it fires, and the share of its activation."""
        precision = self.hits / np.maximum(self.held, 1)
        return np.where(self.hits < ENOUGH, 0.0, 2 * precision * self.mass / np.maximum(precision + self.mass, 1e-9))


class Names:
    """The concepts of a cache's tokens, and the features' names made of them."""

    def __init__(self, cache: Cache, documents: Iterable[Document], tokenizer: Tokenizer):
        self.cache = cache
        n_tokens = sum(len(shard.tokens) for shard in cache.shards)
        self.labels_NC, self.known_N = np.zeros((n_tokens, len(CONCEPTS)), dtype=bool), np.zeros(n_tokens, dtype=bool)
        self._read(documents, tokenizer)
        self._words: dict[bytes, tuple[str, ...]] = {}
        ids = np.concatenate([shard.tokens for shard in cache.shards])
        documents_N = np.concatenate([of[s.documents] for of, s in zip(cache.documents, cache.shards, strict=True)])
        chosen_N = self.known_N & (documents_N >= 0) & ~cache.for_scoring[documents_N]
        self._halves = []
        for half in range(2):
            (places,) = (chosen_N & (documents_N % 2 == half)).nonzero()
            labels = np.column_stack((np.ones(len(places)), self.labels_NC[places])).astype(np.float32)
            self._halves.append(Half(places, ids[places], labels, labels.T @ labels))
        self._ids: dict[Part, list[int]] = {}  # of the tokens that each target stands for
        for i in np.unique(ids).tolist():
            text = tokenizer.token_bytes(i).decode(errors="replace")
            for target in (("token", text), ("core", offline.core(text))):
                self._ids.setdefault(target, []).append(i)

    def _read(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        """Fill in what is known of the cache's tokens, until enough is or what is read is no Python."""
        stretches, tried, parsed = self.cache.stretches(), 0, 0
        bar = Progress(desc="concepts", total=len(stretches), unit=" documents", leave=False)
        for document in documents:
            mine = stretches.pop(document.id, ())
            bar.update(bool(mine))
            if mine and len(document.text) <= LONGEST:
                spans = python_spans(document.text)
                tried, parsed, end = tried + 1, parsed + (spans is not None), 0
                for first, last in mine if spans is not None else ():
                    strings = tokenizer.strings(self.cache.ids(first, last))
                    begin = document.text.find("".join(strings), end)
                    if begin >= 0:
                        ends = np.cumsum([begin, *map(len, strings)])
                        self.labels_NC[first : last + 1] = tokens_inside(spans or {}, CONCEPTS, document.text, ends)
                        self.known_N[first : last + 1], end = True, ends[-1]
            is_no_python = tried >= TRIED and 2 * parsed < tried
            if not stretches or is_no_python or self.known_N.sum() > MOST_TOKENS:
                break
        bar.close()

    @property
    def known(self) -> int:
        """How many tokens' concepts are known."""
        return int(self.known_N.sum())

    def of(self, first: int, last: int) -> tuple[tuple[str, ...], ...]:
        """The concepts of each token from one place to another, in words; () where they are not known."""
        return tuple(map(self._in_words, self.labels_NC[first : last + 1])) if self.known_N[first] else ()

    def _in_words(self, label_C: np.ndarray) -> tuple[str, ...]:
        key = label_C.tobytes()
        if key not in self._words:
            self._words[key] = tuple(IN_WORDS[CONCEPTS[c]] for c in label_C.nonzero()[0])
        return self._words[key]

    # ---- names ----

    def name(self, found: Found, feature: Feature) -> Found:
        """The rules of a feature with a concept where that tells better where it fires, on either half.

        A rule of a token gets the place that the feature distinguishes; all rules give way to a concept, or two that
        hold together, which simulates the passages that the rules were made from better than these do.
        """
        if found.explanation.status != "ok" or not all(len(half.places) for half in self._halves):
            return found
        fires = [half.firings(self.cache, feature.feature) for half in self._halves]
        if min(len(at) for at, _ in fires) < ENOUGH:
            return found
        least = STRONG * max(rule.strength for rule in found.rules)
        rules = [self._placed(rule, fires) if rule.strength >= least else rule for rule in found.rules]
        concept = self._concept(fires, feature.maximum)
        if concept:
            passages = (*feature.top, *feature.spread)
            parts = [offline.parts_of(passage) for passage in passages]
            rules = max(rules, [concept], key=lambda some: correlation(some, passages, parts))
        return Found(found.explanation._replace(text=offline.phrase(rules)), rules)

    def _placed(self, rule: Rule, fires: list[tuple[np.ndarray, np.ndarray]]) -> Rule:
        """A rule of a token, with the place where the feature fires on it if F1 is higher so on both halves."""
        if rule.context != ANY or rule.target not in self._ids:
            return rule
        ids, counted = self._ids[rule.target], []
        for half, (at, values) in zip(self._halves, fires, strict=True):
            is_it, held = np.isin(half.ids[at], ids), half.labels[np.isin(half.ids, ids)].sum(axis=0)
            labels, weights = half.labels[at[is_it]], values[is_it]
            counted.append(Counts(labels.sum(axis=0), weights @ labels / max(weights.sum(), 1e-9), held))
        tells = np.all([each.f1 >= each.f1[0] + GAIN for each in counted], axis=0) & IS_PLACE
        if not tells.any():
            return rule
        best = int(np.where(tells, counted[0].f1, -1).argmax())
        return rule._replace(context=("where", place_of(IN_WORDS[CONCEPTS[best - 1]])))

    def _concept(self, fires: list[tuple[np.ndarray, np.ndarray]], maximum: float) -> Rule | None:
        """The concept, or two, whose tokens are those on which a feature fires, as far as there are such."""
        counted = []
        for half, (at, values) in zip(self._halves, fires, strict=True):
            labels = half.labels[at]
            mass = (labels * values[:, None]).T @ labels
            counted.append(Counts(labels.T @ labels, mass / values.sum(), half.together))
        f1 = np.where(CAN_BE_SAID, counted[0].f1, 0)
        thing, place = map(int, np.unravel_index(f1.argmax(), f1.shape))
        if min(each.f1[thing, place] for each in counted) < LEAST_F1:
            return None
        mass, held = counted[0].mass[thing, place], counted[0].held[thing, place]
        target = ("concept", IN_WORDS[CONCEPTS[thing - 1]]) if thing else ANY
        context = ("where", place_of(IN_WORDS[CONCEPTS[place - 1]])) if place else ANY
        return Rule(target, context, float(mass * fires[0][1].sum() / held / maximum))


def correlation(rules: Sequence[Rule], passages: Sequence[Example], parts: Sequence[Sequence[Parts]]) -> float:
    """Of what rules predict with a feature's activations, over the tokens of passages with these parts."""
    true = np.concatenate([passage.activations for passage in passages])
    predicted = np.concatenate([offline.predict(rules, parts_T) for parts_T in parts])
    return float(np.corrcoef(true, predicted)[0, 1]) if predicted.std() > 0 else 0.0
