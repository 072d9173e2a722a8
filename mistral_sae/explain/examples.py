"""What a cache of activations says of single features: their passages, and the features that fire along with them.

    for feature in FeatureRecords(cache, [3, 17, 42], model, sae, Settings()): ...

All of it is a function of the cache, the settings and the weights: no text goes through the model. Documents are split
in two halves (`cache.is_for_scoring`), one to explain from and one to score on; no list of a feature's passages has two
of one document.

Shapes: F features, D model width, M passages, W tokens of the longest passage.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from mistral_sae.explain.cache import Cache, Passages, noted
from mistral_sae.explain.types import BINS, INTERVALS, Example, Feature
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.model.tokenizer import texts_of
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import logit_lens, nearest

NEGATIVES = 10  # random passages of a feature, and hard ones
NEIGHBORS = 10  # nearest and coactive features
TOKENS = 10  # promoted and suppressed
AROUND = 7  # tokens on either side of the peak by which two passages are the same
SAMPLE_SHARDS = 8  # evenly spread: half a million tokens, where negatives come from and coactive features are counted
DRAWN = 512  # passages of each kind among which hard ones are looked for
AT_ONCE = 256  # features for which weights and shards are gone through together, where all are wanted
RECORDS = 512  # that are kept, at 100 KB


class Settings(NamedTuple):
    """Which passages a feature is shown by."""

    top: int = 10  # strongest passages
    spread: int = 3  # passages of each interval of its range
    held_out: int = 5  # passages of each interval, to score on
    left: int = 48  # tokens of a passage before its peak, as far as row and document have them
    right: int = 15  # and after it
    seed: int = 0

    @classmethod
    def of(cls, constants: Any) -> "Settings":
        """Read from constants such as config.py's."""
        return cls(
            spread=constants.EXAMPLES_PER_INTERVAL,
            left=constants.TOKENS_BEFORE,
            right=constants.TOKENS_AFTER,
            seed=constants.SEED,
        )

    @classmethod
    def noted(cls, folder: Path, constants: Any) -> "Settings":
        """Those that the explanations beside a cache were made with; the constants', where nothing says so."""
        found = noted(folder) or {}
        is_whole = found.keys() == set(cls._fields) and all(type(value) is int for value in found.values())
        return cls(**found) if is_whole else cls.of(constants)

    def generator(self, feature: int, purpose: int) -> Generator:
        """Random numbers for one purpose of one feature."""
        return np.random.default_rng([self.seed, feature, purpose])


# ---- where a feature fires ----


def peaks(found: Passages, left: int, right: int) -> Passages:
    """The activations of a feature that are the largest within `left` tokens before and `right` after them.

    In the order of the text, with stretches of that extent, as far as document and row go.
    """
    first, last = np.maximum(found.tokens - left, found.first), np.minimum(found.tokens + right, found.last)
    begins, ends = np.searchsorted(found.tokens, first), np.searchsorted(found.tokens, last, side="right")
    bounds = np.stack((begins, ends), axis=1).ravel()  # every other stretch is the gap before the next passage
    largest = np.maximum.reduceat(np.append(found.values, 0), bounds)[::2] if len(bounds) else found.values
    return found._replace(first=first, last=last).at(found.values == largest)


def strongest(passages: Passages, count: int) -> Passages:
    """The `count` strongest, strongest first, one a document; of equals the first in the text."""
    order = np.argsort(-passages.values, kind="stable")
    return passages.at(_one_a_document(passages.documents, order)[:count])


def from_intervals(passages: Passages, maximum: float, count: int, generator: Generator) -> Passages:
    """Random ones, `count` of each of the INTERVALS of (0, maximum], strongest first, one a document.

    The interval with the fewest documents chooses first, so that a document is left to the one that has no other.
    """
    interval = np.minimum(INTERVALS * passages.values.astype(float) / maximum, INTERVALS - 1).astype(int)
    shuffled = generator.permutation(len(interval))
    choices = [_one_a_document(passages.documents, shuffled[interval[shuffled] == i]) for i in range(INTERVALS)]
    chosen = shuffled[:0]
    for choice in sorted(choices, key=len):
        free = ~np.isin(passages.documents[choice], passages.documents[chosen])
        chosen = np.concatenate((chosen, choice[free][:count]))
    return passages.at(chosen[np.argsort(-passages.values[chosen], kind="stable")])


def _one_a_document(documents: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The items of `order` without those whose document comes earlier in it."""
    _, firsts = np.unique(documents[order], return_index=True)
    return order[np.sort(firsts)]


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... (lengths[0] of them), begins[1], ...: one array."""
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + lengths, lengths)


# ---- where it does not fire, and what fires along with it ----


class Sample:
    """Some of a cache's shards, in which all features are looked at together."""

    def __init__(self, cache: Cache, settings: Settings):
        self.cache, self._settings = cache, settings
        self.shards = cache.spread(SAMPLE_SHARDS)
        parts = []
        for number in self.shards:
            shard, start = cache.shards[number], number * cache.shard_tokens
            documents = cache.documents[number][shard.documents]
            (at,) = cache.for_scoring[documents].nonzero()
            first = np.maximum(at - settings.left, shard.first[at].astype(np.int64))
            last = np.minimum(at + settings.right, shard.last[at].astype(np.int64))
            parts.append((at + start, first + start, last + start, documents[at], shard.tokens[at]))
        tokens, first, last, documents, ids = map(np.concatenate, zip(*parts, strict=True))
        # Passages around every token of the documents to score on
        self.passages = Passages(tokens, first, last, documents, np.zeros(len(tokens), dtype=np.float32))
        self._shuffled = np.random.default_rng(settings.seed).permutation(len(tokens))
        self._by_id = np.argsort(ids, kind="stable")
        self._by_token = lru_cache(SAMPLE_SHARDS)(self._sort)
        self._ids = ids[self._by_id]

    def random(self, feature: int, fires: np.ndarray, count: int, without: np.ndarray) -> Passages:
        """Up to `count` passages that hold none of the tokens `fires`, and are of none of the documents `without`."""
        documents, n = self.passages.documents, len(self._shuffled)
        start = self._settings.generator(feature, 0).integers(max(1, n))
        found, seen, step = self._shuffled[:0], 0, 8 * count
        while len(found) < count and seen < n:
            silent = self._silent(self._shuffled[(start + np.arange(seen, min(seen + step, n))) % n], fires)
            new = silent[~np.isin(documents[silent], without)]
            found = _one_a_document(documents, np.concatenate((found, new)))
            seen, step = seen + step, 2 * step
        return self.passages.at(found[:count])

    def hard(self, feature: int, fires: np.ndarray, ids: Sequence[int], near: Sequence[int], count: int) -> Passages:
        """Up to `count` passages that hold none of the tokens `fires`, though the feature might be thought to fire.

        Half of them around a token of `ids` (the peaks of its examples; one that is there twice is drawn twice as
        often), half around one on which another feature of `near` fires; more of one kind where there are too few of
        the other.
        """
        generator, documents = self._settings.generator(feature, 1), self.passages.documents
        drawn = generator.choice(ids, DRAWN) if len(ids) else np.zeros(0, dtype=np.int64)
        begins, ends = (np.searchsorted(self._ids, drawn, side=side) for side in ("left", "right"))
        at = (begins + generator.random(len(drawn)) * (ends - begins)).astype(int)[begins < ends]
        fires_near = [places for other in near if len(places := self._places(other))]
        around = [generator.choice(places, DRAWN // len(fires_near)) for places in fires_near]
        of_ids, of_near = (
            _one_a_document(documents, self._silent(places, fires))
            for places in (self._by_id[at], generator.permutation(np.concatenate((at[:0], *around))))
        )
        half = max(-(-count // 2), count - len(of_near))
        mixed = np.concatenate((of_ids[:half], of_near, of_ids[half:]))
        return self.passages.at(_one_a_document(documents, mixed)[:count])

    def coactive(self, features: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
        """For each feature those that fire most often along with it, and on which share of its tokens they do."""
        n_features = len(self.cache.counts_F)
        together = np.zeros((len(features), n_features), dtype=np.int32)
        for number in self.shards:
            shard, (by_token, begins, lengths) = self.cache.shards[number], self._by_token(number)
            for counts, feature in zip(together, features, strict=True):
                at = shard.positions[slice(*shard.offsets[feature : feature + 2])]
                counts += np.bincount(by_token[_ranges(begins[at], lengths[at])], minlength=n_features)
        found = []
        for counts, feature in zip(together, features, strict=True):
            own, counts[feature] = int(counts[feature]), 0
            most = np.argpartition(-counts, min(count, n_features - 1))[:count]
            most = most[np.lexsort((most, -counts[most]))]
            found.append([(int(other), float(counts[other] / own)) for other in most if counts[other]])
        return found

    def _sort(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features of a shard's activations by token, and where those of each token begin and how many they are."""
        shard = self.cache.shards[number]
        order = np.argsort(shard.positions, kind="stable")  # a radix sort, as they have 16 bits
        by_token = np.repeat(np.arange(len(self.cache.counts_F), dtype=np.int32), np.diff(shard.offsets))[order]
        lengths = np.bincount(shard.positions, minlength=len(shard.tokens))
        return by_token, lengths.cumsum() - lengths, lengths

    def _places(self, feature: int) -> np.ndarray:
        """The passages around tokens on which a feature fires."""
        found = self.cache.activations(feature, self.shards)
        return np.searchsorted(self.passages.tokens, found.tokens[self.cache.for_scoring[found.documents]])

    def _silent(self, places: np.ndarray, fires: np.ndarray) -> np.ndarray:
        """Those of some passages that hold none of the tokens `fires`, which ascend."""
        before = np.searchsorted(fires, self.passages.first[places])
        return places[before == np.searchsorted(fires, self.passages.last[places], side="right")]


# ---- records ----


class FeatureRecords:
    """The records of some features, made when they are asked for: `records[feature]`, or one after the other.

    `concepts` gives those of each of the cache's tokens from one place to another, () where they are not known.
    Passages to score on lose a random number of tokens at both ends: their places in a window would tell the peak.
    Those that repeat a passage to explain from are left out: documents share licences, boilerplate, quotations. Raises
    ModelError unless the model is loaded with its head.
    """

    def __init__(
        self, cache: Cache, features: Sequence[int], model: LanguageModel, sae: SparseAutoencoder, settings: Settings,
        concepts: Callable[[int, int], Sequence[tuple[str, ...]]] | None = None, at_once: int = AT_ONCE,
    ):  # fmt: skip
        self.features, self._settings = list(features), settings
        self._cache, self._model, self._sae, self._concepts = cache, model, sae, concepts
        self._at_once = at_once
        self._place = {feature: place for place, feature in enumerate(self.features)}
        self._bytes = lru_cache(2**17)(model.tokenizer.token_bytes)
        self._record = lru_cache(RECORDS)(self._make)
        self._related = lru_cache(1)(self._relate)

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Feature]:
        return map(self.__getitem__, self.features)

    def __getitem__(self, feature: int) -> Feature:
        """The record of one of the features."""
        return self._record(feature)

    def brief(self, feature: int) -> Feature:
        """The record without what takes time: passages to score on, and what weights and other features say."""
        return self._brief(feature, *self._select(feature)[:3])

    def _brief(self, feature: int, found: Passages, top: Passages, spread: Passages) -> Feature:
        maximum = float(self._cache.maxima_F[feature])
        return Feature(
            feature=feature,
            density=len(found.tokens) / max(1, self._cache.tokens),
            maximum=maximum,
            histogram=tuple(np.histogram(found.values, BINS, (0, maximum or 1))[0].tolist()),
            top=self._examples(top, found),
            spread=self._examples(spread, found),
        )

    def _make(self, feature: int) -> Feature:
        found, top, spread, held_out = self._select(feature)
        related = self._related(self._place[feature] // self._at_once)[feature]
        peak_ids = [self._cache.ids(token, token)[0] for part in (top, spread, held_out) for token in part.tokens]
        near = [other for other, _ in related["nearest"]]
        hard = self._sample.hard(feature, found.tokens, peak_ids, near, NEGATIVES)
        random = self._sample.random(feature, found.tokens, NEGATIVES, without=hard.documents)
        seen = {*self._around(top), *self._around(spread)}
        held_out = held_out.at(np.array([around not in seen for around in self._around(held_out)], dtype=bool))
        generator = self._settings.generator(feature, 3)
        return self._brief(feature, found, top, spread)._replace(
            **related,
            held_out=self._examples(self._shortened(held_out, generator), found),
            random=self._examples(self._shortened(random, generator), found),
            hard=self._examples(self._shortened(hard, generator), found),
        )

    def _select(self, feature: int) -> tuple[Passages, Passages, Passages, Passages]:
        """All activations of a feature, and passages around some of them: `top`, `spread` and `held_out`."""
        settings, maximum = self._settings, float(self._cache.maxima_F[feature])
        found = self._cache.activations(feature)
        passages = peaks(found, settings.left, settings.right)
        for_scoring = self._cache.for_scoring[passages.documents]
        explaining, scoring = passages.at(~for_scoring), passages.at(for_scoring)
        generator = settings.generator(feature, 2)  # 0 and 1 are the sample's
        spread = from_intervals(explaining, maximum, settings.spread, generator)
        held_out = from_intervals(scoring, maximum, settings.held_out, generator)
        return found, strongest(explaining, settings.top), spread, held_out

    @cached_property
    def _sample(self) -> Sample:
        return Sample(self._cache, self._settings)

    def _relate(self, number: int) -> dict[int, dict[str, Any]]:
        """Fields of the `number`th part of the features: what weights and other features say of each."""
        some = self.features[number * self._at_once :][: self._at_once]
        coactive = self._sample.coactive(some, NEIGHBORS)
        related = related_by_weights(self._model, self._sae, some)
        return {f: related[f] | {"coactive": tuple(c)} for f, c in zip(some, coactive, strict=True)}

    def _shortened(self, passages: Passages, generator: Generator) -> Passages:
        """The passages after each end has lost a random number of tokens.

        Evenly from 0 to `right` or to what stands on that side of the token that the passage was cut around.
        """
        sides = np.stack((passages.tokens - passages.first, passages.last - passages.tokens))
        less_first, less_last = generator.integers(np.minimum(sides, self._settings.right), endpoint=True)
        return passages._replace(first=passages.first + less_first, last=passages.last - less_last)

    def _around(self, passages: Passages) -> list[tuple[int, ...]]:
        """The tokens at and around each peak, by which passages are the same."""
        first = np.maximum(passages.tokens - AROUND, passages.first).tolist()
        last = np.minimum(passages.tokens + AROUND, passages.last).tolist()
        return [tuple(self._cache.ids(*ends)) for ends in zip(first, last, strict=True)]

    def _examples(self, passages: Passages, found: Passages) -> tuple[Example, ...]:
        """The passages with the activations of a feature, all of which are `found`."""
        begins, lengths = np.searchsorted(found.tokens, passages.first), passages.last - passages.first + 1
        within = np.searchsorted(found.tokens, passages.last, side="right") - begins
        at, which = _ranges(begins, within), np.repeat(np.arange(len(lengths)), within)
        values_MW = np.zeros((len(lengths), lengths.max(initial=0)), dtype=np.float32)
        values_MW[which, found.tokens[at] - passages.first[which]] = found.values[at]
        examples = []
        for document, first, last, values in zip(
            *(array.tolist() for array in (passages.documents, passages.first, passages.last, values_MW)), strict=True
        ):
            texts, start = self._texts(self._cache.ids(first, last)), first % self._cache.row_tokens
            tokens, activations = without_empty(texts, values[: len(texts)])
            concepts = tuple(compress(self._concepts(first, last), texts)) if self._concepts else ()
            examples.append(Example(self._cache.names[document], start, tokens, activations, concepts))
        return tuple(examples)

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, as `Tokenizer.strings` gives it."""
        return texts_of(map(self._bytes, ids))


def related_by_weights(
    model: LanguageModel, sae: SparseAutoencoder, features: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """The tokens that each of some features promotes and suppresses, and its nearest features: fields of a Feature."""
    W_dec_FD, strings = sae.W_dec.detach(), model.tokenizer.strings
    lens = logit_lens(model.unembed, W_dec_FD[features], TOKENS, model.tokenizer.vocab_size)
    near = nearest(W_dec_FD, features, NEIGHBORS)
    sides = ([tuple((strings([id])[0], by) for id, by in row) for row in side] for side in lens)
    return {
        feature: {"promoted": up, "suppressed": down, "nearest": tuple(n)}
        for feature, up, down, n in zip(features, *sides, near, strict=True)
    }


def without_empty(texts: Sequence[str], values: Sequence[float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Tokens and activations without the empty tokens, those of characters whose bytes are spread over several tokens.

    The last of these, which has the character, gets the largest of their activations.
    """
    if all(texts):
        return tuple(texts), tuple(values)
    tokens, activations, pending = [], [], 0.0
    for text, value in zip(texts, values, strict=True):
        pending = max(pending, value)
        if text:
            tokens.append(text)
            activations.append(pending)
            pending = 0.0
    if tokens:
        activations[-1] = max(activations[-1], pending)
    return tuple(tokens), tuple(activations)
