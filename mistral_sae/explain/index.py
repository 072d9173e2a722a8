"""What a list of all features says of each, whether it is explained or not: from the cache and the weights, in seconds.

Shapes: F features, D model width.
"""

from collections.abc import Collection
from itertools import chain

import numpy as np

from mistral_sae.cli import Progress
from mistral_sae.explain.cache import Cache
from mistral_sae.explain.report import INDEXED, NAMED_TOKENS, Index
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import Statistics, logit_lens

AT_ONCE = 4096  # decoder rows
SHARDS = 16  # of the cache in which the strongest tokens are looked for, evenly spread


def index_of(
    model: LanguageModel,
    sae: SparseAutoencoder,
    statistics: Statistics,
    cache: Cache | None,
    without: Collection[int] = (),
) -> Index:
    """The columns of the list, INDEXED, for all features but some; None or "" for what only a record or a label has."""
    features, tokenizer = sorted({*range(sae.n_features)} - {*without}), model.tokenizer
    fires_on = strongest_tokens(cache) if cache else {}
    lenses = (  # of some rows at a time: there is no second decoder
        logit_lens(model.unembed, sae.W_dec.detach()[features[i : i + AT_ONCE]], NAMED_TOKENS, tokenizer.vocab_size)
        for i in Progress(range(0, len(features), AT_ONCE), "listing", unit=" parts", leave=False)
    )
    raises = [[id for id, _ in row] for lens in lenses for row in lens.promoted]
    texts = {id: tokenizer.strings([id])[0] for id in {*chain(*fires_on.values(), *raises)}}
    columns: Index = {name: [None] * len(features) for name in INDEXED}
    return columns | {
        "feature": features,
        "explanation": [""] * len(features),
        "density": statistics.density_F[features].tolist(),
        "maximum": statistics.maximum_F[features].tolist(),
        "fires_on": [[texts[id] for id in fires_on.get(feature, [])] for feature in features],
        "logit_lens": [[texts[id] for id in ids] for ids in raises],
    }


def strongest_tokens(cache: Cache) -> dict[int, list[int]]:
    """For each feature the tokens on which it is strongest in some shards, strongest first: NAMED_TOKENS at most."""
    found: dict[int, dict[int, float]] = {}
    for number in cache.spread(SHARDS):
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
