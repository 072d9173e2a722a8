"""What the list of all features says of each."""

import numpy as np
import pytest
from synthetic_activations import Corpus, F

from mistral_sae.explain import cache as cache_module
from mistral_sae.explain.index import strongest_tokens


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_TOKENS", 500)
    return Corpus()


def test_the_tokens_of_a_feature_are_those_of_its_maxima_in_each_shard(corpus, tmp_path):
    cache = corpus.cached(tmp_path)
    rows = np.concatenate([row.tokens for row in corpus.rows])
    found = strongest_tokens(cache)
    assert len(cache.shards) > 3
    for feature in range(F):
        values, expected = corpus.activations(feature).ravel(), {}
        for start in range(0, len(values), cache.shard_tokens):
            shard = values[start : start + cache.shard_tokens]
            if shard.max() > 0:
                id = int(rows[start + shard.argmax()])
                expected[id] = max(shard.max(), expected.get(id, 0))
        best = sorted(expected, key=expected.get, reverse=True)[:5]
        assert [expected[id] for id in found.get(feature, [])] == [expected[id] for id in best]


def test_a_cache_counts_how_often_and_how_strongly_each_feature_fires(corpus, tmp_path):
    statistics = corpus.cached(tmp_path).statistics()
    values_FN = np.stack([corpus.activations(feature).ravel() for feature in range(F)])
    assert statistics.maximum_F.tolist() == values_FN.max(axis=1).tolist()
    assert (statistics.density_F * statistics.tokens).round().tolist() == (values_FN > 0).sum(axis=1).tolist()
