"""Collected examples on disk, and what they say of each feature.

    made_from = inputs(lm, sae, layer, corpus, settings)
    collection, why = load_collection(path, made_from)
    if collection is None:
        collection = collect(rows, lm, sae, layer, settings)
        save_collection(path, collection, made_from)
    for feature in FeatureRecords(collection, [3, 17, 42], lm, sae): ...

Shapes: F features, D model width, V vocabulary, n examples of a list, C features at a time.
"""

import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistral_sae.explain.collect import Collection, Settings
from mistral_sae.explain.pool import Pool, PoolIndex, Span
from mistral_sae.explain.reservoir import Windows
from mistral_sae.explain.types import Example, Feature
from mistral_sae.files import SAEError, hash_of, load_metadata, load_state, save_state
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.sae import features as sae_features
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import hash_of_sae

FORMAT = 1  # of the file and of what is collected: raised by whoever changes either
LISTS = ("top", "spread", "held_out")
NEGATIVES = 10  # random passages of a feature, and hard ones
NEIGHBORS = 10  # nearest and coactive features
TOKENS = 10  # promoted and suppressed
AROUND = 7  # tokens on either side of the peak by which two passages are the same
OTHER = {
    "autoencoder": "another autoencoder",
    "model": "another model",
    "corpus": "another corpus, or another part of it",
    "settings": "other settings",
}
CHUNK_BYTES = 2**28  # of cosines or logits at a time


# ---- on disk ----


def inputs(
    lm: LanguageModel, sae: SparseAutoencoder, layer: int, corpus: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """All that a collection depends on: hashes of the autoencoder's and the layers' weights, corpus and settings.

    `corpus` is whatever names the rows: `text.fingerprint`, the part, the row's length, how many.
    """
    tensors = {f"{i}.{name}": tensor for i in range(layer + 1) for name, tensor in lm.block(i).state_dict().items()}
    found = {
        "autoencoder": hash_of_sae(sae),
        "model": hash_of((lm.name, layer, lm.vocab_size), tensors),
        "corpus": corpus,
        "settings": settings._asdict() | {"format": FORMAT},
    }
    return json.loads(json.dumps(found))  # as it will be read


def are_of(path: Path, autoencoder: str) -> bool:
    """Whether a file of examples, and so the explanations beside it, are of the autoencoder of this `hash_of_sae`.

    True where there is no such file.
    """
    try:
        made_from = load_metadata(path).get("made_from", {}).get("autoencoder")
    except SAEError:
        return True
    return made_from == autoencoder


def save_collection(path: Path, collection: Collection, made_from: dict[str, Any]) -> None:
    """Write a collection as one safetensors file; `made_from` are its `inputs`."""
    tensors = {name: getattr(collection, name) for name in ("firings", "maximum", "histogram")}
    for name in (*LISTS, "pool"):
        part = getattr(collection, name)
        tensors |= {f"{name}.{field}": tensor for field, tensor in part._asdict().items()}
    names = np.frombuffer(json.dumps(collection.names).encode(), dtype=np.uint8)
    tensors["names"] = torch.from_numpy(names.copy())  # JSON: there can be more of them than a header may hold
    save_state(path, tensors, {"made_from": made_from, "tokens": collection.tokens})


def load_collection(path: Path, made_from: dict[str, Any]) -> tuple[Collection | None, str]:
    """The collection in a file, or None and one line that says why it cannot be used; "" where there is no file."""
    if not Path(path).exists():
        return None, ""
    try:
        tensors, metadata = load_state(path, "cpu")
    except SAEError:
        return None, f"the examples in {path} are damaged: collecting anew"
    there = metadata.get("made_from", {})
    other = [OTHER[name] for name in made_from if there.get(name) != made_from[name]]
    if other:
        return None, f"the examples in {path} are of {' and '.join(other)}: collecting anew"
    settings = {name: value for name, value in there["settings"].items() if name != "format"}
    collection = Collection(
        Settings(**settings),
        metadata["tokens"],
        *(tensors[name] for name in ("firings", "maximum", "histogram")),
        *(Windows(*(tensors[f"{name}.{field}"] for field in Windows._fields)) for name in LISTS),
        Pool(*(tensors[f"pool.{field}"] for field in Pool._fields)),
        json.loads(tensors["names"].numpy().tobytes()),
    )
    return collection, ""


# ---- as records ----


class FeatureRecords:
    """The records of some features, made when they are asked for: `records[feature]`, or one after the other.

    Passages to score on lose a random number of tokens at both ends: their places in a window would tell the peak.
    Those that repeat a passage to explain from are left out: documents share licences, boilerplate, quotations.
    Iterating over many is a millisecond each, and holding all of them is 100 KB each. Raises ValueError for a feature
    that the autoencoder does not have, and ModelError unless the whole model is loaded: it says which tokens a feature
    promotes.
    """

    def __init__(self, collection: Collection, features: Sequence[int], lm: LanguageModel, sae: SparseAutoencoder):
        wrong = [feature for feature in features if not 0 <= feature < sae.n_features]
        if wrong:
            raise ValueError(f"found feature {wrong[0]}: expected 0 to {sae.n_features - 1}")
        self.features, self._collection, self._lm, self._sae = list(features), collection, lm, sae
        settings = collection.settings
        self._pool = PoolIndex(
            collection.pool, sae.n_features, left=settings.left, right=settings.right, seed=settings.seed
        )
        self._place = {feature: place for place, feature in enumerate(self.features)}
        self._texts = _Texts(lm.tokenizer)
        self._step = max(1, CHUNK_BYTES // (4 * max(sae.n_features, lm.vocab_size)))
        self._weights: list[tuple] = []  # of one chunk of the features
        self._weights_begin = -1  # its first one's place

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Feature]:
        return map(self.__getitem__, self.features)

    def __getitem__(self, feature: int) -> Feature:
        """The record of one of the features."""
        collection, pool = self._collection, self._pool
        nearest, promoted, suppressed = self._of_weights(feature)
        generator = np.random.default_rng([collection.settings.seed, feature, 2])  # 0 and 1 are the pool's
        peaks = [id for name in LISTS for id in self._peaks(getattr(collection, name), feature)]
        seen = {around for name in ("top", "spread") for around in self._arounds(getattr(collection, name), feature)}
        hard = pool.hard(feature, peaks, [other for other, _ in nearest], NEGATIVES)
        return Feature(
            feature=feature,
            density=int(collection.firings[feature]) / max(1, collection.tokens),
            maximum=float(collection.maximum[feature]),
            histogram=tuple(collection.histogram[feature].tolist()),
            promoted=promoted,
            suppressed=suppressed,
            nearest=nearest,
            coactive=tuple(pool.coactive(feature, NEIGHBORS)),
            top=self._examples(collection.top, feature),
            spread=self._examples(collection.spread, feature),
            held_out=self._examples(collection.held_out, feature, generator, without=seen),
            random=self._silent(pool.random(feature, NEGATIVES, without=hard), generator),
            hard=self._silent(hard, generator),
        )

    def _examples(
        self,
        windows: Windows,
        feature: int,
        generator: np.random.Generator | None = None,
        without: Set[tuple[int, ...] | None] = frozenset(),
    ) -> tuple[Example, ...]:
        """The passages of a list but those of certain `_arounds`; shortened if there is a generator."""
        lengths = windows.lengths[feature].tolist()
        rows = zip(
            lengths,
            windows.documents[feature].tolist(),
            windows.starts[feature].tolist(),
            token_ids(windows.tokens[feature]).tolist(),
            windows.activations[feature].tolist(),
            strict=True,
        )
        examples = []
        for around, (n, document, start, ids, activations) in zip(self._arounds(windows, feature), rows, strict=True):
            if n and around not in without:
                first, stop = 0, n
                if generator is not None:
                    first, stop = self._shortened(activations.index(max(activations[:n])), n, generator)
                texts, values = self._texts.of(ids[first:stop]), tuple(activations[first:stop])
                examples.append(Example(self._collection.names[document], start + first, texts, values))
        return tuple(examples)

    def _shortened(self, anchor: int, n: int, generator: np.random.Generator) -> tuple[int, int]:
        """Which of a passage's n tokens are left, first and last + 1, after each end has lost a random number.

        Evenly from 0 to `right` or to what stands on that side of the anchor, around which the passage was cut.
        """
        most = self._collection.settings.right
        first, last = generator.integers([min(anchor, most), min(n - 1 - anchor, most)], endpoint=True).tolist()
        return first, n - last

    def _peaks(self, windows: Windows, feature: int) -> list[int]:
        """The tokens on which the examples of a list are strongest."""
        there = windows.lengths[feature] > 0
        peaks = windows.activations[feature].float().argmax(dim=1, keepdim=True)
        return token_ids(windows.tokens[feature]).gather(1, peaks).squeeze(1)[there].tolist()

    def _arounds(self, windows: Windows, feature: int) -> list[tuple[int, ...] | None]:
        """The tokens at and around the peak of each place of a list, by which passages are the same; None for none."""
        lengths, peaks = windows.lengths[feature].tolist(), windows.activations[feature].float().argmax(dim=1).tolist()
        tokens = windows.tokens[feature].tolist()
        return [
            tuple(ids[max(0, peak - AROUND) : min(n, peak + AROUND + 1)]) if n else None
            for n, peak, ids in zip(lengths, peaks, tokens, strict=True)
        ]

    def _silent(self, spans: list[Span], generator: np.random.Generator) -> tuple[Example, ...]:
        """Passages of the pool in which the feature does not fire, shortened, as examples."""
        pool, names = self._collection.pool, self._collection.names
        examples = []
        for row, start, end, anchor in spans:
            first, stop = self._shortened(anchor - start, end - start, generator)
            texts = self._texts.of(pool.tokens[row, start + first : start + stop].tolist())
            examples.append(Example(names[pool.documents[row, start]], start + first, texts, (0.0,) * (stop - first)))
        return tuple(examples)

    def _of_weights(self, feature: int) -> tuple:
        """Nearest features, promoted and suppressed tokens; computed for as many features at once as have room."""
        begin = self._place[feature] // self._step * self._step
        if begin != self._weights_begin:
            chunk = self.features[begin : begin + self._step]
            W_dec, vocab_size = self._sae.W_dec, self._lm.tokenizer.vocab_size
            promoted, suppressed = (
                [tuple((self._texts.one(id), logit) for id, logit in tokens) for tokens in each]
                for each in sae_features.logit_lens(self._lm.unembed, W_dec[chunk], TOKENS, vocab_size)
            )
            nearest = sae_features.nearest(W_dec, chunk, NEIGHBORS)
            self._weights = list(zip(map(tuple, nearest), promoted, suppressed, strict=True))
            self._weights_begin = begin
        return self._weights[self._place[feature] - begin]


def token_ids(tokens: Tensor) -> Tensor:
    """Stored token ids as they are: 16 bits hold ids modulo 2**16."""
    return tokens.long() & 0xFFFF if tokens.dtype == torch.int16 else tokens.long()


class _Texts(dict):
    """The text of each token id that is whole characters, else None."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, id: int) -> str | None:
        try:
            self[id] = self.tokenizer.token_bytes(id).decode()
        except UnicodeDecodeError:
            self[id] = None
        return self[id]

    def one(self, id: int) -> str:
        """The text of one token."""
        return self.tokenizer.strings([id])[0] if self[id] is None else self[id]

    def of(self, ids: list[int]) -> tuple[str, ...]:
        """What `Tokenizer.strings` gives, for many passages."""
        texts = [self[id] for id in ids]
        return tuple(self.tokenizer.strings(ids) if None in texts else texts)
