"""The features that tell concepts best: the tokens of a cache get the concepts of the Python that they are of.

    concepts = read_concepts(cache, corpus, tokenizer)
    labels = labels_of(records, concepts.best(), seed)

Shapes: N tokens of a cache, S of a shard, F features, C concepts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from mistral_sae.analysis.concepts import IN_WORDS, python_spans, share_of, tokens_inside, told_by_tokens
from mistral_sae.cli import Progress
from mistral_sae.data.documents import Document
from mistral_sae.data.tokens import Corpus
from mistral_sae.explain import offline
from mistral_sae.explain.cache import Cache
from mistral_sae.explain.examples import FeatureRecords
from mistral_sae.explain.offline import ANY, Found, Rule
from mistral_sae.explain.types import Concept, Explanation, Label
from mistral_sae.model.tokenizer import Tokenizer

LONGEST = 40_000  # characters of a document that is parsed; on the stand-in's corpus five of six are shorter
MOST_TOKENS = 500_000  # whose concepts are read
TRIED = 20  # documents, after which text of which less than half parses is not taken for Python
LEAST_F1 = 0.4  # of firing as a prediction of a concept; a feature of a lower one stands for something else
LEAST_LIFT = 5  # times as many as by chance; by F1 alone many a feature would tell a wide concept such as class bodies
CONCEPTS = list(IN_WORDS)


def read_concepts(cache: Cache, corpus: Corpus, tokenizer: Tokenizer) -> "PythonConcepts | None":
    """The concepts of the tokens of a cache; None where its documents are no Python. Prints how much is known."""
    concepts = PythonConcepts(cache, corpus.documents(held_out=False, epochs=False), tokenizer)
    if concepts.known:
        print(f"concepts  {concepts.known:,} of these tokens are of files that were parsed as Python")
    return concepts if concepts.known else None


class Named(NamedTuple):
    """The concept that a feature tells best of all features, and the explanation that says so."""

    concept: Concept
    found: Found


class PythonConcepts:
    """The concepts of a cache's tokens, and the features that tell them."""

    def __init__(self, cache: Cache, documents: Iterable[Document], tokenizer: Tokenizer):
        self.cache = cache
        n_tokens = sum(len(shard.tokens) for shard in cache.shards)
        self.labels_NC, self.known_N = np.zeros((n_tokens, len(CONCEPTS)), dtype=bool), np.zeros(n_tokens, dtype=bool)
        self._words: dict[bytes, tuple[str, ...]] = {}
        self._read(documents, tokenizer)

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

    def best(self) -> dict[int, Named]:
        """The feature that tells each concept best, by F1 of firing on its tokens, those that tell one best first.

        It is chosen on the documents to explain from, and must tell the concept on those to score on, too, of which the
        figures are. A feature that is the best for several concepts has the one that it tells best; concepts that no
        feature tells have none.
        """
        known_2, held_2C, fires_2F, both_2FC = self._counts()
        f1_2FC = 2 * both_2FC / np.maximum(fires_2F[:, :, None] + held_2C[:, None], 1)
        precision_2FC = both_2FC / np.maximum(fires_2F[:, :, None], 1)
        lift_2FC = precision_2FC * (known_2[:, None] / np.maximum(held_2C, 1))[:, None]
        tells_FC = ((f1_2FC >= LEAST_F1) & (lift_2FC >= LEAST_LIFT)).all(axis=0)
        found: dict[int, Named] = {}
        for c in np.argsort(-f1_2FC[0].max(axis=0)).tolist():
            f = int(f1_2FC[0, :, c].argmax())
            if tells_FC[f, c] and f not in found:
                recall = both_2FC[1, f, c] / held_2C[1, c]
                concept = Concept(CONCEPTS[c], float(precision_2FC[1, f, c]), float(lift_2FC[1, f, c]), float(recall))
                found[f] = Named(concept, self._found(f, c, float(held_2C[0, c])))
        return found

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """How many tokens are known (2), of each concept (2, C), fired on (2, F) and both (2, F, C).

        First of the documents to explain from, then of those to score on.
        """
        F, begin = len(self.cache.counts_F), 0
        sums = torch.zeros(F + 1, 2 * (1 + len(CONCEPTS)))  # the last row is of all tokens
        for numbers, shard in zip(self.cache.documents, self.cache.shards, strict=True):
            some = slice(begin, begin := begin + len(shard.tokens))
            documents_S = numbers[shard.documents]
            counts_S = self.known_N[some] & (documents_S >= 0)
            if not counts_S.any():
                continue
            labels = np.column_stack((counts_S, self.labels_NC[some]))  # (S, 1 + C), the first one for anything
            halves = [counts_S & (self.cache.for_scoring[documents_S] == is_it) for is_it in (False, True)]
            weight = torch.from_numpy(np.concatenate([labels & half[:, None] for half in halves], axis=1)).float()
            positions, offsets = (torch.from_numpy(a.astype(np.int64)) for a in (shard.positions, shard.offsets[:-1]))
            sums[:F] += embedding_bag(positions, weight, offsets, mode="sum")  # where a feature fires
            sums[F] += weight.sum(dim=0)
        of_2F1C1 = sums.view(F + 1, 2, -1).transpose(0, 1).numpy()
        return of_2F1C1[:, F, 0], of_2F1C1[:, F, 1:], of_2F1C1[:, :F, 0], of_2F1C1[:, :F, 1:]

    def _found(self, feature: int, c: int, held: float) -> Found:
        """The explanation by a concept that `held` tokens to explain from are of."""
        fires = self.cache.activations(feature)
        is_inside = self.labels_NC[fires.tokens, c] & ~self.cache.for_scoring[fires.documents]
        strength = float(fires.values[is_inside].sum() / held / self.cache.maxima_F[feature])
        words = IN_WORDS[CONCEPTS[c]]
        return Found(Explanation(feature, "ok", words), [Rule(("concept", words), ANY, strength)])


def labels_of(records: FeatureRecords, best: Mapping[int, Named], seed: int) -> dict[int, Label]:
    """Labels by counting: those of `best` by their concept, others by tokens. The records need the concepts."""
    by_tokens = [feature for feature in records.features if feature not in best]
    found = {f: offline.find(records[f]) for f in Progress(by_tokens, "explaining", unit=" features")}
    named = {f: best[f].found for f in records.features if f in best}
    scored = chain(*(offline.score_all(some, records.__getitem__, seed=seed) for some in (found, named)))
    labels = {each.feature: each for each in Progress(scored, "scoring", len(records), unit=" features")}
    return {f: labels[f]._replace(concept=best[f].concept if f in best else None) for f in records.features}


def shares_of(
    labels: Mapping[int, Label], tokenizer: Tokenizer, prompt: Sequence[int]
) -> dict[int, Callable[[Sequence[Sequence[int]]], float]]:
    """What gives the share of a feature's concept among the tokens of texts that continue a prompt.

    By feature, those that tell their concept best first; of concepts that Python's tokens tell.
    """
    named = [(label.feature, label.concept) for label in labels.values() if label.concept]
    named.sort(key=lambda each: each[1].f1, reverse=True)
    return {f: partial(share_of, each.name, tokenizer, prompt) for f, each in named if each.name in told_by_tokens()}
