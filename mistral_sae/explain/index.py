"""What a list of all features says of each, whether it is explained or not: from the cache and the weights, in seconds.

Shapes: F features, D model width.
"""

from collections.abc import Collection
from itertools import chain

import numpy as np

from mistral_sae.explain.cache import Cache
from mistral_sae.explain.report import INDEXED, NAMED_TOKENS, Index
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import Statistics, logit_lens

SHARDS = 16  # of the cache in which the strongest tokens are looked for, evenly spread


def index_of(
    model: LanguageModel,
    sae: SparseAutoencoder,
    statistics: Statistics,
    cache: Cache | None,
    without: Collection[int] = (),
) -> Index:
    """The columns of the list, INDEXED, for all features but some; None or "" for what only a record or a label has."""
    features = [feature for feature in range(sae.n_features) if feature not in set(without)]
    tokens, fires_on = model.tokenizer, strongest_tokens(cache) if cache else {}
    lens = logit_lens(model.unembed, sae.W_dec.detach()[features], NAMED_TOKENS, tokens.vocab_size)
    ids = {*chain.from_iterable(fires_on.values()), *(id for row in lens.promoted for id, _ in row)}
    texts = {id: tokens.strings([id])[0] for id in ids}
    columns: Index = {name: [None] * len(features) for name in INDEXED}
    return columns | {
        "feature": features,
        "explanation": [""] * len(features),
        "density": statistics.density_F[features].tolist(),
        "maximum": statistics.maximum_F[features].tolist(),
        "fires_on": [[texts[id] for id in fires_on.get(feature, [])] for feature in features],
        "logit_lens": [[texts[id] for id, _ in row] for row in lens.promoted],
    }


def strongest_tokens(cache: Cache) -> dict[int, list[int]]:
    """For each feature the tokens on which it is strongest in some shards, strongest first: NAMED_TOKENS at most."""
    found: dict[int, dict[int, float]] = {}
    n = len(cache.shards)
    for number in np.unique(np.linspace(0, n - 1, min(SHARDS, n)).round().astype(int)):
        shard = cache.shards[number]
        counts = np.diff(shard.offsets)
        (at,) = np.nonzero(shard.values == np.repeat(shard.maxima, counts))
        features, firsts = np.unique(np.repeat(np.arange(len(counts)), counts)[at], return_index=True)
        at = at[firsts]
        ids, values = shard.tokens[shard.positions[at]].tolist(), shard.values[at].tolist()
        for feature, id, value in zip(features.tolist(), ids, values, strict=True):
            of = found.setdefault(feature, {})
            of[id] = max(value, of.get(id, 0.0))
    return {feature: sorted(of, key=of.__getitem__, reverse=True)[:NAMED_TOKENS] for feature, of in found.items()}
