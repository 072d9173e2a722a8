"""Examples of features, against a search through all activations of a small corpus."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_benchmarks import smoke

from benchmarks.collect import operations
from mistral_sae.data.documents import Document
from mistral_sae.data.tokens import pack_with_documents
from mistral_sae.explain import collect as collecting
from mistral_sae.explain import scoring
from mistral_sae.explain.collect import FINE_BINS, STRATA, Collector, Settings, collect, encode
from mistral_sae.explain.examples import LISTS, FeatureRecords, inputs, load_collection, save_collection, token_ids
from mistral_sae.explain.firings import document_key, is_for_scoring
from mistral_sae.explain.pool import PoolIndex
from mistral_sae.explain.reservoir import EMPTY, drawn, mix
from mistral_sae.explain.types import BINS, INTERVALS
from mistral_sae.model.language_model import load
from mistral_sae.sae.autoencoder import SparseAutoencoder

T, F, K = 24, 12, 4
SETTINGS = Settings(top=4, spread=4, held_out=3, left=6, right=3, pool_rows=20, seed=5)


class Letters:
    """A tokenizer of one token a character, with the BOS that a test can see: 0."""

    bos_id = 0

    def encode(self, text):
        return [ord(letter) for letter in text]


class Corpus:
    """Random rows of documents of all lengths, and random activations, larger and larger ones as it goes on."""

    def __init__(self, n_documents=120, seed=0):
        random = np.random.default_rng(seed)
        contents = [
            "".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(1, 60, n_documents)
        ]
        documents = [Document(f"document {i}", text) for i, text in enumerate(contents)]
        self.rows = list(pack_with_documents(documents, Letters(), T))
        shape = (len(self.rows), T)
        # Feature 0 fires often, the last hardly ever
        weights = np.geomspace(1, 0.002, F)
        chance = random.exponential(size=(*shape, F)) / weights
        self.indices = torch.from_numpy(chance.argsort(axis=-1)[..., :K].copy())
        growth = np.geomspace(0.1, 8, len(self.rows))[:, None, None]
        values = growth * random.exponential(size=(*shape, K)) * (random.random((*shape, K)) < 0.7)
        values = np.ceil(8 * values) / 8  # so that some are equal
        values[:, 0] = 1000.0  # the first position, which has to be ignored
        values[values == 0] = -1.0  # as an encoder without relu may give
        self.values = torch.from_numpy(values).float()

    def collector(self, settings=SETTINGS, cuts=(5,), device="cpu"):
        """What has taken in all rows, in batches of these sizes by turns."""
        collector, start = Collector(F, 1000, settings, device), 0
        for size in itertools.cycle(cuts):
            if start >= len(self.rows):
                return collector
            part = slice(start, start + size)
            collector.add(self.rows[part], self.values[part].to(device), self.indices[part].to(device))
            start += size

    def activations(self, feature):
        """A feature's activations on all tokens that count, (rows, T), as float16 holds them."""
        values = torch.where(self.indices == feature, self.values, 0).clamp_min(0).half().float().sum(dim=-1).numpy()
        places = np.stack([row.places for row in self.rows])
        return np.where(places >= 0, values, 0.0)

    def window(self, row, position):
        """First and last position of the window around a token."""
        places = self.rows[row].places
        first = last = position
        while first > max(0, position - SETTINGS.left) and places[first - 1] == places[position]:
            first -= 1
        while last < min(T - 1, position + SETTINGS.right) and places[last + 1] == places[position]:
            last += 1
        return first, last

    def document(self, row, position):
        return self.rows[row].documents[self.rows[row].places[position]]

    def peaks(self, feature):
        """All (value, row, position) that are the largest of their windows, in the order of the text."""
        values = self.activations(feature)
        found = []
        for row, position in zip(*values.nonzero(), strict=True):
            first, last = self.window(row, position)
            if values[row, first : last + 1].max() == values[row, position]:
                found.append((values[row, position], int(row), int(position)))
        return found


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def collector(corpus):
    return corpus.collector()


@pytest.fixture(scope="module")
def collection(collector):
    return collector.finish()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_collects_exactly_what_a_cpu_does(corpus, collection):
    found = corpus.collector(device="cuda").finish()
    assert (found.tokens, found.names) == (collection.tokens, collection.names)
    for name in ("firings", "maximum", "histogram"):
        assert torch.equal(getattr(found, name), getattr(collection, name))
    for name in (*LISTS, "pool"):
        for mine, theirs in zip(getattr(found, name), getattr(collection, name), strict=True):
            assert torch.equal(mine, theirs)


def passages(windows, names, feature):
    """(document, start, tokens, activations) of each passage of a list."""
    for n, document, start, tokens, values in zip(*(x[feature].tolist() for x in order_of(windows)), strict=True):
        if n:
            yield names[document], start, tokens[:n], values[:n]


def order_of(windows):
    return windows.lengths, windows.documents, windows.starts, windows.tokens, windows.activations


def expected(corpus, row, position, feature):
    """The passage around a token, as `passages` gives it."""
    first, last = corpus.window(row, position)
    values = corpus.activations(feature)[row, first : last + 1].tolist()
    return corpus.document(row, position), first, corpus.rows[row].tokens[first : last + 1].tolist(), values


# ---- statistics ----


def test_firings_maximum_and_histogram_are_those_of_all_activations(corpus, collection):
    assert collection.tokens == sum(int((row.places >= 0).sum()) for row in corpus.rows)
    for feature in range(F):
        values = corpus.activations(feature)
        values = np.sort(values[values > 0]).astype(float)
        assert collection.firings[feature] == len(values)
        assert collection.maximum[feature].item() == (values.max() if len(values) else 0)
        histogram = collection.histogram[feature].numpy()
        assert histogram.sum() == len(values)
        assert (histogram >= 0).all()
        # How many values lie below an edge is known at the edges of fine bins, and in between them from both sides
        if len(values):
            fine = 2.0 ** (math.frexp(values.max())[1]) / FINE_BINS
            edges = np.arange(1, BINS) * values.max() / BINS
            below = histogram.cumsum()[:-1]
            assert (below >= np.searchsorted(values, np.floor(edges / fine) * fine)).all()
            assert (below <= np.searchsorted(values, np.ceil(edges / fine) * fine)).all()
    assert collection.firings.sum() > 2000


def test_the_histogram_has_its_counts_where_the_activations_are():
    values = torch.tensor([0.05] * 3 + [0.53] * 5 + [1.0] * 2)
    rows = list(pack_with_documents([Document("a", "b" * 10)], Letters(), 11))
    collector = Collector(2, 1000, SETTINGS, "cpu")
    collector.add(rows, torch.cat((values.new_zeros(1), values)).view(1, 11, 1), torch.ones(1, 11, 1, dtype=torch.long))
    histogram = collector.finish().histogram
    assert histogram[0].sum() == 0
    assert {i: n for i, n in enumerate(histogram[1].tolist()) if n} == {2: 3, 26: 5, 49: 2}


# ---- examples ----


def test_the_top_examples_are_the_strongest_of_all_with_one_a_document(corpus, collection):
    for feature in range(F):
        best = {}
        for _, row, position in sorted(corpus.peaks(feature), key=lambda p: -p[0]):
            if not is_for_scoring(corpus.document(row, position)):
                best.setdefault(corpus.document(row, position), (row, position))
        wanted = [expected(corpus, *place, feature) for place in list(best.values())[: SETTINGS.top]]
        assert list(passages(collection.top, collection.names, feature)) == wanted
    assert (collection.top.lengths > 0).sum() > 0.8 * F * SETTINGS.top


@pytest.mark.parametrize("name", ["spread", "held_out"])
def test_each_stratum_keeps_the_lowest_ranks_of_all_its_peaks_with_one_a_document(corpus, collector, name):
    reservoir = getattr(collector, name)
    scoring, places = name == "held_out", -(-getattr(SETTINGS, name) // 2)
    n_full = 0
    for feature in range(F):
        largest = corpus.activations(feature).max()
        strata = [{} for _ in range(STRATA)]
        for value, row, position in corpus.peaks(feature):
            document = corpus.document(row, position)
            if is_for_scoring(document) == scoring:
                rank = drawn(mix(torch.tensor([row * T + position])) ^ feature, SETTINGS.seed).item()
                stratum = strata[int(STRATA * value / 2.0 ** math.frexp(largest)[1])]
                stratum[document] = min(stratum.get(document, (EMPTY,)), (rank, document))
        for stratum, ranks in enumerate(reservoir.ranks[feature * STRATA : (feature + 1) * STRATA]):
            wanted = sorted(strata[stratum].values())[:places]
            n_full += len(wanted) == places
            assert sorted(rank for rank in ranks.tolist() if rank < EMPTY) == [rank for rank, _ in wanted]
            there = reservoir.windows.documents[feature * STRATA + stratum][ranks < EMPTY].tolist()
            assert sorted(there) == sorted(document_key(document) for _, document in wanted)
    assert n_full > 20


@pytest.mark.parametrize("name", ["spread", "held_out"])
def test_spread_and_held_out_fill_the_intervals_with_what_was_kept(collector, collection, name):
    windows, reservoir, per_interval = getattr(collection, name), getattr(collector, name), getattr(SETTINGS, name)
    for feature in range(F):
        maximum = collection.maximum[feature].item()
        found = list(passages(windows, collection.names, feature))
        documents = [document for document, *_ in found]
        assert len(set(documents)) == len(documents)
        assert [max(x[3]) for x in found] == sorted((max(x[3]) for x in found), reverse=True)
        counts = Counter(min(INTERVALS - 1, int(INTERVALS * max(x[3]) / maximum)) for x in found)
        assert all(count <= per_interval for count in counts.values())
        kept = slice(feature * STRATA, (feature + 1) * STRATA)
        there = reservoir.ranks[kept] < EMPTY
        strengths = reservoir.windows.activations[kept][there].amax(dim=1).tolist()
        for key, strength in zip(reservoir.windows.documents[kept][there].tolist(), strengths, strict=True):
            full = counts[min(INTERVALS - 1, int(INTERVALS * strength / maximum))] == per_interval
            assert full or collector.names[key] in documents  # else it should have been taken
        if feature < 4:  # which fire in most documents
            assert set(counts) == set(range(INTERVALS))


@pytest.mark.parametrize("name", LISTS)
def test_examples_are_windows_around_a_peak_within_one_document_and_row(corpus, collection, name):
    lengths = set()
    for feature in range(F):
        peaks = [expected(corpus, row, position, feature) for _, row, position in corpus.peaks(feature)]
        for passage in passages(getattr(collection, name), collection.names, feature):
            assert passage in peaks
            assert passage[1] > 0
            assert Letters.bos_id not in passage[2]
            lengths.add(len(passage[2]))
    assert max(lengths) == SETTINGS.left + 1 + SETTINGS.right
    assert min(lengths) < 5


def test_documents_to_explain_from_and_documents_to_score_on_are_different_ones(collection):
    def documents(name):
        return {d for feature in range(F) for d, *_ in passages(getattr(collection, name), collection.names, feature)}

    pooled = {collection.names[place] for place in collection.pool.documents.unique().tolist() if place >= 0}
    explaining, scoring = documents("top") | documents("spread"), documents("held_out") | pooled
    assert len(explaining) > 10
    assert len(scoring) > 10
    assert not explaining & scoring
    assert all(is_for_scoring(document) for document in scoring)


def test_half_of_the_documents_are_for_scoring_whether_or_not_they_were_held_out_of_training():
    from mistral_sae.data.tokens import is_held_out

    ids = [f"file {i}.py" for i in range(4000)]
    for held_out in (True, False):
        part = [is_for_scoring(i) for i in ids if is_held_out(i, 0.5) == held_out]
        assert 0.45 < np.mean(part) < 0.55


@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3, 17), (1000,)])
def test_the_result_does_not_depend_on_how_rows_are_batched(corpus, collection, cuts):
    other = corpus.collector(cuts=cuts).finish()
    assert other.names == collection.names
    assert other.tokens == collection.tokens
    for name in ("firings", "maximum", "histogram"):
        assert torch.equal(getattr(other, name), getattr(collection, name))
    for name in (*LISTS, "pool"):
        for mine, theirs in zip(getattr(collection, name), getattr(other, name), strict=True):
            assert torch.equal(mine, theirs)


def test_the_windows_of_many_passages_are_cut_out_some_at_a_time(corpus, collection, monkeypatch):
    monkeypatch.setattr(collecting, "MOST_WINDOWS", 7)
    assert torch.equal(corpus.collector().finish().held_out.activations, collection.held_out.activations)


def test_another_seed_chooses_other_examples_but_the_same_strongest(corpus, collection):
    other = corpus.collector(SETTINGS._replace(seed=6)).finish()
    strongest = [list(passages(c.top, c.names, 0)) for c in (collection, other)]
    spread = [list(passages(c.spread, c.names, 0)) for c in (collection, other)]
    assert strongest[0] == strongest[1]
    assert spread[0] != spread[1]


def test_early_and_late_documents_are_chosen_alike():
    n_features, n_documents = 400, 60
    rows = [row for i in range(n_documents) for row in pack_with_documents([Document(f"{i}", "abcd")], Letters(), 5)]
    collector = Collector(n_features, 1000, SETTINGS, "cpu")
    values, indices = torch.ones(1, 5, n_features), torch.arange(n_features).expand(1, 5, -1)
    for row in rows:
        collector.add([row], values, indices)
    collection = collector.finish()
    there = collection.spread.lengths > 0
    chosen = torch.bincount(collection.spread.documents[there].long(), minlength=len(collection.names))
    place = {name: i for i, name in enumerate(collection.names)}
    chosen = np.array([chosen[place[str(i)]] for i in range(n_documents) if not is_for_scoring(str(i))])
    even = chosen.sum() / len(chosen)
    assert chosen.sum() == n_features * SETTINGS.spread // 2  # they are of one stratum, which keeps half as many
    assert ((chosen - even) ** 2 / even).sum() < 2 * len(chosen)  # chi-squared; biased by age it would be hundreds


def test_zeros_beside_the_active_features_change_nothing(corpus, collection):
    """An autoencoder without a fixed K gives as many columns as a batch needs."""
    collector = Collector(F, 1000, SETTINGS, "cpu")
    for start in range(0, len(corpus.rows), 5):
        part, more = slice(start, start + 5), start % 3
        pad = torch.nn.functional.pad
        collector.add(corpus.rows[part], pad(corpus.values[part], (more, 0)), pad(corpus.indices[part], (more, 0)))
    other = collector.finish()
    assert torch.equal(other.held_out.activations, collection.held_out.activations)
    assert other.pool.values.shape[2] == K + 2
    for feature in range(F):
        assert torch.equal(pooled(other, feature), pooled(collection, feature))


def test_the_state_does_not_grow_with_the_corpus(monkeypatch):
    monkeypatch.setattr(collecting, "NAMES", 50)
    corpus = Corpus(40)
    collector = Collector(F, 1000, SETTINGS, "cpu")
    at_start = collector.bytes()
    names = set()
    for epoch in range(30):  # of other documents each time
        rows = [row._replace(documents=[f"{epoch} {name}" for name in row.documents]) for row in corpus.rows]
        names |= {name for row in rows for name in row.documents}
        collector.add(rows, corpus.values, corpus.indices)
    assert collector.bytes() == at_start
    in_use = len(collector._documents())
    assert len(collector.names) <= 2 * in_use + 50 + 40 < len(names)
    assert len(collector.finish().names) == in_use
    assert len(collector.finish().pool.tokens) == SETTINGS.pool_rows


def test_a_document_is_left_to_the_interval_that_has_no_other():
    names = [name for name in map(str, range(100)) if not is_for_scoring(name)][:2]
    rows = list(pack_with_documents([Document(name, "a" * 39) for name in names], Letters(), 40))
    values = torch.zeros(2, 40, 1)
    values[0, 5], values[0, 30], values[1, 20] = 1.0, 0.1, 0.9
    collector = Collector(1, 1000, SETTINGS._replace(spread=1), "cpu")
    collector.add(rows, values, torch.zeros(2, 40, 1, dtype=torch.long))
    collection = collector.finish()
    found = [(name, max(activations)) for name, _, _, activations in passages(collection.spread, collection.names, 0)]
    assert found == [(names[1], pytest.approx(0.9, rel=1e-3)), (names[0], pytest.approx(0.1, rel=1e-3))]


def test_settings_that_keep_nothing_and_a_corpus_of_nothing_are_refused():
    with pytest.raises(ValueError, match="found held_out=0"):
        Collector(F, 1000, SETTINGS._replace(held_out=0), "cpu")
    with pytest.raises(ValueError, match="not one row"):
        Collector(F, 1000, SETTINGS, "cpu").finish()


# ---- passages on which a feature does not fire ----


@pytest.fixture(scope="module")
def index(collection):
    return PoolIndex(collection.pool, F, left=SETTINGS.left, right=SETTINGS.right, seed=SETTINGS.seed)


def pooled(collection, feature):
    """A feature's activations on the pool, (R, T)."""
    return torch.where(collection.pool.indices == feature, collection.pool.values.float(), 0).sum(dim=-1)


def check_silent(collection, feature, spans):
    values, documents = pooled(collection, feature), collection.pool.documents
    for row, start, stop, anchor in spans:
        assert 0 < start <= anchor < stop
        assert not values[row, start:stop].any()
        assert len(documents[row, start:stop].unique()) == 1
    found = [int(documents[row, start]) for row, start, _, _ in spans]
    assert len(set(found)) == len(found)
    assert min(found, default=0) >= 0


def test_the_pool_holds_whole_rows_with_all_their_activations(corpus, collection):
    by_tokens = {tuple(row.tokens.tolist()): i for i, row in enumerate(corpus.rows)}
    numbers = [by_tokens[tuple(tokens)] for tokens in collection.pool.tokens.tolist()]
    eligible = [i for i, row in enumerate(corpus.rows) if any(is_for_scoring(name) for name in row.documents)]
    chosen = sorted(eligible, key=drawn(torch.arange(len(corpus.rows)), SETTINGS.seed).tolist().__getitem__)
    assert len(chosen) > SETTINGS.pool_rows
    assert sorted(numbers) == sorted(chosen[: SETTINGS.pool_rows])
    for feature in range(F):
        there = torch.from_numpy(corpus.activations(feature)[numbers])
        for_scoring = collection.pool.documents >= 0
        assert torch.equal(pooled(collection, feature)[for_scoring], there[for_scoring])


def test_a_feature_does_not_fire_in_its_random_passages(collection, index):
    for feature in range(F):
        spans = index.random(feature, 6)
        check_silent(collection, feature, spans)
        assert spans == index.random(feature, 6)
    assert len(index.random(F - 1, 6)) == 6
    assert index.random(F - 1, 6) != index.random(F - 2, 6)


def test_random_passages_are_found_if_there_are_any(collection, index):
    """Feature 0 fires on most tokens: few windows are without it."""
    values, documents = pooled(collection, 0), collection.pool.documents
    silent = set()
    for row, position in (documents >= 0).nonzero().tolist():
        same = (documents[row] == documents[row, position]).nonzero().flatten()
        first, last = max(int(same.min()), position - SETTINGS.left), min(int(same.max()), position + SETTINGS.right)
        if not values[row, first : last + 1].any():
            silent.add(int(documents[row, position]))
    assert 0 < len(silent) < 20
    assert len(index.random(0, 100)) == len(silent)


def test_random_passages_leave_out_the_documents_of_others(collection, index):
    documents = collection.pool.documents
    for feature in range(3, F):
        hard = index.hard(feature, [ord("e"), ord("t")], [1, 2], 10)
        free = index.random(feature, 10)
        apart = index.random(feature, 10, without=hard)
        taken = {int(documents[span.row, span.anchor]) for span in hard}
        check_silent(collection, feature, apart)
        assert not taken & {int(documents[span.row, span.anchor]) for span in apart}
        kept = [span for span in free if int(documents[span.row, span.anchor]) not in taken]
        assert kept == apart[: len(kept)]
        assert len(kept) < len(free)


def test_half_of_the_hard_passages_have_a_token_to_mistake_and_half_a_near_feature(collection, index):
    tokens = collection.pool.tokens
    mistaken, near = [ord("e"), ord("t"), ord("t")], [3, 4]
    for feature in range(6, F):
        spans = index.hard(feature, mistaken, near, 6)
        assert len(spans) == 6
        check_silent(collection, feature, spans)
        assert all(tokens[row, anchor] in mistaken for row, _, _, anchor in spans[:3])
        fires = sum(pooled(collection, other) for other in near)
        assert all(fires[row, anchor] for row, _, _, anchor in spans[3:])
        assert spans == index.hard(feature, mistaken, near, 6)
        assert len(index.hard(feature, [], near, 4)) == len(index.hard(feature, mistaken, [], 4)) == 4
        assert index.hard(feature, [], [], 4) == []


def test_coactive_features_are_those_that_share_tokens(collection, index):
    for feature in range(F):
        fires = (pooled(collection, feature) > 0) & (collection.pool.documents >= 0)
        shares = {
            other: ((pooled(collection, other) > 0) & fires).sum().item() / max(1, fires.sum().item())
            for other in range(F)
            if other != feature
        }
        best = sorted((other for other in shares if shares[other]), key=lambda other: (-shares[other], other))
        assert [share for _, share in index.coactive(feature, 3)] == pytest.approx([shares[o] for o in best[:3]])
        assert all(shares[other] == pytest.approx(share) for other, share in index.coactive(feature, 3))


def test_a_corpus_without_documents_for_scoring_gives_no_negatives():
    name = next(name for name in map(str, range(100)) if not is_for_scoring(name))
    rows = list(pack_with_documents([Document(name, "abcd")], Letters(), 5))
    collector = Collector(F, 1000, SETTINGS, "cpu")
    collector.add(rows, torch.ones(1, 5, 1), torch.zeros(1, 5, 1, dtype=torch.long))
    index = PoolIndex(collector.finish().pool, F, left=4, right=2, seed=0)
    assert index.random(3, 5) == index.hard(3, [97], [0], 5) == index.coactive(0, 5) == []


# ---- with a model ----

TEXTS = [f"def square_{i}(x):\n    return x * x + {i}  # größer als ∑ {'ab' * i}\n" * (i % 5 + 2) for i in range(40)]


@pytest.fixture(scope="module")
def parts(mistral_folder):
    lm = load(mistral_folder, device="cpu")
    sae = SparseAutoencoder(lm.d_model, 64, 4)
    sae.initialize(torch.randn(64, lm.d_model, generator=torch.Generator().manual_seed(0)), seed=0)
    sae.W_dec.data *= torch.linspace(0.5, 2, 64).unsqueeze(1)  # what others trained has rows of any norm
    documents = [Document(f"text {i}", text) for i, text in enumerate(TEXTS)]
    rows = list(pack_with_documents(documents, lm.tokenizer, 32))
    return lm, sae, rows


@pytest.fixture(scope="module")
def of_model(parts):
    lm, sae, rows = parts
    return collect(iter(rows), lm, sae, 1, SETTINGS, rows_per_forward=4)


def test_activations_are_those_of_the_autoencoder_on_the_layers_residuals(parts, of_model):
    lm, sae, rows = parts
    with torch.no_grad():
        acts = sae.encode(torch.cat([lm.residuals(torch.from_numpy(r.tokens)[None], 1) for r in rows])).dense(64)
    acts[torch.from_numpy(np.stack([row.places for row in rows])) < 0] = 0
    torch.testing.assert_close(of_model.maximum, acts.flatten(0, 1).amax(dim=0), rtol=1e-3, atol=1e-4)
    assert (of_model.firings - (acts > 0).flatten(0, 1).sum(dim=0)).abs().max() <= 1
    assert of_model.firings.sum() > 1000


@pytest.mark.parametrize("kind", [{"activation": "relu"}, {"activation": "jumprelu"}, {"normalize": "none"}])
def test_what_others_trained_is_encoded_as_it_encodes(parts, kind):
    lm, _, rows = parts
    sae = SparseAutoencoder(lm.d_model, 64, 4, **kind)
    sae.initialize(torch.zeros(1, lm.d_model), seed=0)
    x = lm.residuals(torch.from_numpy(rows[0].tokens)[None], 1)
    with torch.no_grad():
        values, indices = encode(sae, x)
        dense = torch.zeros(1, 32, 64).scatter_(-1, indices, values.relu())
        torch.testing.assert_close(dense, sae.encode(x).dense(64), rtol=1e-4, atol=1e-5)


def test_what_a_bos_activates_does_not_widen_what_is_kept_of_all_tokens(parts):
    """An autoencoder without a K may have all its features active on a first position."""
    lm, _, rows = parts
    x = lm.residuals(torch.from_numpy(np.stack([row.tokens for row in rows[:4]])), 1)
    counts = torch.from_numpy(np.stack([row.places for row in rows[:4]]) >= 0)
    counts[:, 0] = False
    clean = collecting.without_sinks(rows[:4], x)
    assert torch.equal(clean[counts], x[counts])
    assert (clean[~counts] == x[counts][0]).all()
    assert not torch.equal(clean[:, 0], x[:, 0])

    class Sinks:
        """Its residual at each first position is one that activates every feature."""

        def residuals(self, tokens, layer):
            x = lm.residuals(tokens, layer)
            x[:, 0] = 1000 * sae.W_enc.sum(dim=1)
            return x

        vocab_size, device = lm.vocab_size, lm.device

    sae = SparseAutoencoder(lm.d_model, 64, 4, activation="relu", normalize="none")
    sae.initialize(torch.zeros(1, lm.d_model), seed=0)
    sae.b_enc.data.fill_(-1.0)
    plain, widest = (collect(rows[:8], each, sae, 1, SETTINGS).pool.values for each in (lm, Sinks()))
    assert widest.shape == plain.shape


def test_records_of_many_features_are_those_of_each(parts, of_model, monkeypatch):
    """What the weights say is computed for some features at a time, in whatever order they are asked for."""
    lm, sae, _ = parts
    whole = {record.feature: record for record in FeatureRecords(of_model, range(64), lm, sae)}
    monkeypatch.setattr("mistral_sae.explain.examples.CHUNK_BYTES", 4 * lm.vocab_size * 3)
    few = FeatureRecords(of_model, [40, 3, 9, 11, 60, 2, 63], lm, sae)
    for feature in (63, 3, 40, 60, 9):
        mine, its = few[feature], whole[feature]
        assert (mine.top, mine.held_out, mine.random, mine.hard) == (its.top, its.held_out, its.random, its.hard)
        assert [text for text, _ in mine.promoted] == [text for text, _ in its.promoted]
        assert [other for other, _ in mine.nearest] == [other for other, _ in its.nearest]


def test_held_out_passages_that_repeat_an_explaining_one_are_left_out(parts, of_model):
    lm, sae, _ = parts
    record = FeatureRecords(of_model, [5], lm, sae)[5]
    assert len(record.held_out) > 3
    windows, repeated = of_model.held_out, of_model.top
    changed = windows._replace(
        **{name: getattr(windows, name).clone() for name in ("lengths", "tokens", "activations")}
    )
    for name in (
        "lengths",
        "tokens",
        "activations",
    ):  # the first one becomes a passage that explains, of another document
        getattr(changed, name)[5, 0] = getattr(repeated, name)[5, 0]
    found = FeatureRecords(of_model._replace(held_out=changed), [5], lm, sae)[5]
    assert len(found.held_out) == len(record.held_out) - 1
    assert {passage.document for passage in found.held_out} < {passage.document for passage in record.held_out}
    assert (found.top, found.spread) == (record.top, record.spread)


def test_activations_beyond_float16_are_taken_for_its_largest(corpus):
    collector = Collector(F, 1000, SETTINGS, "cpu")
    collector.add(corpus.rows[:5], 1e6 * corpus.values[:5], corpus.indices[:5])
    collection = collector.finish()
    assert collection.maximum.max() == torch.finfo(torch.float16).max
    assert torch.equal(collection.histogram.sum(dim=1), collection.firings)


def test_a_collection_counts_the_documents_of_either_kind(collection):
    explaining, scoring = collection.documents()
    assert explaining + scoring == len(collection.names)
    assert scoring == sum(is_for_scoring(name) for name in collection.names) > 0


def test_records_hold_passages_of_the_text_and_what_the_weights_say(parts, of_model):
    lm, sae, _ = parts
    records = FeatureRecords(of_model, [5, 0, 63], lm, sae)
    assert [record.feature for record in records] == [5, 0, 63]
    assert len(records) == 3
    record = records[63]
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = rows[63] @ rows.T
    cosines[63] = -1
    assert [other for other, _ in record.nearest] == cosines.argsort(descending=True)[:10].tolist()
    assert record.nearest[0][1] == pytest.approx(cosines.max().item(), rel=1e-5)
    logits = lm.unembed(sae.W_dec[63:64].detach())[0]
    logits -= logits.mean()
    for found, order in ((record.promoted, logits.argsort(descending=True)), (record.suppressed, logits.argsort())):
        assert [text for text, _ in found] == [lm.tokenizer.strings([i])[0] for i in order[:10].tolist()]
        assert [value for _, value in found] == pytest.approx(logits[order[:10]].tolist(), rel=1e-4)

    texts = {f"text {i}": text for i, text in enumerate(TEXTS)}
    for record in records:
        assert record.density == of_model.firings[record.feature].item() / of_model.tokens
        assert record.maximum >= max(e.strength for e in (*record.top, *record.held_out))
        assert len(record.histogram) == BINS
        examples = (*record.top, *record.spread, *record.held_out)
        assert len(examples) > 5
        for example in (*examples, *record.random, *record.hard):
            assert len(example.tokens) == len(example.activations)
            assert "".join(example.tokens).strip("\ufffd") in texts[example.document]
        assert all(example.strength > 0 for example in examples)
        assert record.random
        assert not any(example.strength for example in (*record.random, *record.hard))
        documents = [example.document for example in (*record.random, *record.hard)]
        assert len(set(documents)) == len(documents)
        explaining = {example.document for example in (*record.top, *record.spread)}
        assert not explaining & {e.document for e in (*record.held_out, *record.random, *record.hard)}


@pytest.fixture(scope="module")
def sparse(parts):
    """What was collected from long documents, at random places, by 64 features, and the records."""
    lm, sae, _ = parts
    random = np.random.default_rng(0)
    texts = ("".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(50, 700, 300))
    documents = [Document(f"text {i}", text) for i, text in enumerate(texts)]
    rows = list(pack_with_documents(documents, lm.tokenizer, 256))
    values = random.exponential(size=(len(rows), 256, 2)) * (random.random((len(rows), 256, 2)) < 0.15)
    indices = random.integers(0, 32, values.shape) + np.array([0, 32])
    collector = Collector(64, lm.vocab_size, Settings(spread=5, pool_rows=100), "cpu")
    collector.add(rows, torch.from_numpy(values).float(), torch.from_numpy(indices))
    collection = collector.finish()
    return collection, list(FeatureRecords(collection, range(64), lm, sae))


def test_passages_to_score_on_are_a_part_of_what_was_collected_with_its_peak(parts, sparse):
    lm, sae, _ = parts
    collection, records = sparse
    assert records == list(FeatureRecords(collection, range(64), lm, sae))
    for record in records:
        for name in LISTS:
            found = list(passages(getattr(collection, name), collection.names, record.feature))
            examples = getattr(record, name)
            assert [example.document for example in examples] == [document for document, *_ in found]
            for example, (_, start, tokens, values) in zip(examples, found, strict=True):
                part = slice(example.start - start, example.start - start + len(example.tokens))
                assert example.tokens == tuple(lm.tokenizer.strings(tokens[part]))
                assert list(example.activations) == values[part]
                assert example.strength == max(values)
                assert part.start <= 15
                assert len(values) - part.stop <= 15
                assert name == "held_out" or len(example.tokens) == len(tokens)


def test_where_the_peak_of_a_passage_to_score_on_stands_tells_nothing(sparse):
    """Windows end 15 tokens after their peak; what is left of them does as often as it ends 0 to 14 after it."""
    collection, records = sparse
    examples = [
        (example, len(values))
        for record in records
        for example, (*_, values) in zip(
            record.held_out, passages(collection.held_out, collection.names, record.feature), strict=True
        )
    ]
    peaks = [(example.peak, len(example.tokens) - 1 - example.peak) for example, n in examples if n == 64]
    assert len(peaks) > 500
    for distances, places in zip(zip(*peaks, strict=True), (range(33, 49), range(16)), strict=True):
        counts = Counter(distances)
        assert set(counts) == set(places)
        even = len(peaks) / 16
        assert sum((count - even) ** 2 / even for count in counts.values()) < 45  # chi-squared of 15 degrees
    assert abs(np.corrcoef(np.array(peaks).T)[0, 1]) < 0.1
    lengths = [
        np.mean([len(example.tokens) for record in records for example in getattr(record, kind)])
        for kind in ("held_out", "random", "hard")
    ]
    assert max(lengths) - min(lengths) < 1.5


def places_of(passage):
    """What a judge who sees no text can go by: each token's place from the start and from the end."""
    n = len(passage.tokens)
    return [(i, i - n) for i in range(n)]


def test_marks_cannot_be_judged_by_their_places(sparse):
    _, records = sparse
    questions = [q for record in records for each in scoring.fuzzing_questions(record, 0) for q in each]
    assert len(questions) > 2000
    truths = np.array([q.truth for q in questions])

    def accuracy(verdicts):
        """Balanced, of a judge or of one who says the contrary."""
        verdicts = np.array(verdicts)
        return 0.5 + abs(verdicts[truths].mean() - verdicts[~truths].mean()) / 2

    marked = [[places_of(q.passage)[i] for i in sorted(q.marked)] for q in questions]
    for side in (0, 1):
        for place in range(64) if side == 0 else range(-64, 0):
            assert accuracy([place in (each[side] for each in marks) for marks in marked]) < 0.55
            assert accuracy([marks[0][side] < place for marks in marked]) < 0.55
            assert accuracy([marks[-1][side] < place for marks in marked]) < 0.55


def test_activations_cannot_be_foretold_by_their_places(sparse):
    _, records = sparse
    simulated = [p for record in records for p in scoring.simulation_passages(record)]
    for side in (0, 1):
        sums, counts = Counter(), Counter()
        for passage in simulated:
            for places, activation in zip(places_of(passage), passage.activations, strict=True):
                sums[places[side]] += activation
                counts[places[side]] += 1
        blind = [[sums[places[side]] / counts[places[side]] for places in places_of(passage)] for passage in simulated]
        pairs = zip((passage.activations for passage in simulated), blind, strict=True)
        assert scoring.correlation([scoring.Simulated(*pair) for pair in pairs])[0] < 0.2


def test_hard_passages_of_a_record_hold_a_peak_token_or_a_near_feature(parts, of_model):
    lm, sae, _ = parts
    pool, kinds = of_model.pool, Counter()
    for record in FeatureRecords(of_model, range(64), lm, sae):
        peaks = {example.tokens[example.peak] for example in (*record.top, *record.spread, *record.held_out)}
        near = torch.isin(pool.indices, torch.tensor([other for other, _ in record.nearest])) & (pool.values > 0)
        for example in record.hard:
            place, window = of_model.names.index(example.document), slice(example.start, None)
            rows = (pool.documents[:, example.start] == place).nonzero().flatten().tolist()
            near_fires = any(near[row, window][: len(example.tokens)].any() for row in rows)
            has_peak = bool(peaks & set(example.tokens))
            assert has_peak or near_fires
            kinds[has_peak, near_fires] += 1
    assert kinds.total() > 64
    assert kinds[True, False]
    assert kinds[False, True]


def test_characters_that_tokens_share_come_out_whole(parts):
    lm, sae, rows = parts
    texts = FeatureRecords(collect(rows, lm, sae, 1, SETTINGS), [0], lm, sae)._texts
    ids = lm.tokenizer.encode("größer ∑ x")
    assert texts.of(ids) == tuple(lm.tokenizer.strings(ids))
    assert "".join(texts.of(ids)) == "größer ∑ x"


def test_a_feature_that_does_not_exist_is_refused(parts, of_model):
    lm, sae, _ = parts
    with pytest.raises(ValueError, match="found feature 64: expected 0 to 63"):
        FeatureRecords(of_model, [3, 64], lm, sae)


@pytest.mark.parametrize(("vocab_size", "ids"), [(65_536, [40_000, 65_535, 32_768]), (131_072, [70_000, 131_071, 7])])
def test_large_vocabularies_keep_their_token_ids(vocab_size, ids):
    row = next(pack_with_documents([Document("b", "abc")], Letters(), 4))._replace(tokens=np.array([0, *ids]))
    collector = Collector(1, vocab_size, SETTINGS, "cpu")
    collector.add([row], torch.ones(1, 4, 1), torch.zeros(1, 4, 1, dtype=torch.long))
    collection = collector.finish()
    (windows,) = (x for x in (collection.top, collection.held_out) if x.lengths.any())
    assert token_ids(windows.tokens[0, 0, :3]).tolist() == ids


# ---- the cache ----


def test_what_was_collected_is_read_as_it_was_written(parts, of_model, tmp_path):
    lm, sae, _ = parts
    path, made_from = tmp_path / "examples.safetensors", inputs(lm, sae, 1, {"path": "x"}, SETTINGS)
    assert load_collection(path, made_from) == (None, "")
    save_collection(path, of_model, made_from)
    loaded, why = load_collection(path, inputs(lm, sae, 1, {"path": "x"}, SETTINGS))
    assert why == ""
    assert (loaded.settings, loaded.tokens, loaded.names) == (of_model.settings, of_model.tokens, of_model.names)
    assert list(FeatureRecords(loaded, range(64), lm, sae)) == list(FeatureRecords(of_model, range(64), lm, sae))


def test_what_was_collected_from_anything_else_is_not_used(parts, of_model, tmp_path):
    lm, sae, _ = parts
    path, corpus = tmp_path / "examples.safetensors", {"path": "x", "rows": 10}
    save_collection(path, of_model, inputs(lm, sae, 1, corpus, SETTINGS))

    def refused(sae=sae, layer=1, corpus=corpus, settings=SETTINGS):
        found, why = load_collection(path, inputs(lm, sae, layer, corpus, settings))
        assert found is None
        assert "\n" not in why
        return why

    other = SparseAutoencoder(lm.d_model, 64, 4)
    other.load_state_dict(sae.state_dict())
    assert load_collection(path, inputs(lm, other, 1, corpus, SETTINGS))[0] is not None
    other.W_enc.data[3, 60] += 1e-4
    assert refused(sae=other) == f"the examples in {path} are of another autoencoder: collecting anew"
    wider = SparseAutoencoder(lm.d_model, 64, 5)
    wider.load_state_dict(sae.state_dict())
    assert "another autoencoder:" in refused(sae=wider)
    assert "another model:" in refused(layer=0)
    assert "another corpus, or another part of it:" in refused(corpus=corpus | {"rows": 11})
    assert "other settings:" in refused(settings=SETTINGS._replace(left=7))
    assert "part of it and other settings:" in refused(corpus={}, settings=SETTINGS._replace(seed=1))
    weight = next(iter(lm.block(1).parameters()))
    before = weight.data.flatten()[-1].clone()
    weight.data.view(-1)[-1] += 1
    try:
        assert "another model:" in refused()
    finally:
        weight.data.view(-1)[-1] = before
    path.write_bytes(path.read_bytes()[:-100])
    assert "are damaged:" in refused()


def test_an_interrupted_pass_leaves_the_model_as_it_was(parts, of_model):
    lm, sae, rows = parts

    def interrupted():
        yield from rows[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(interrupted(), lm, sae, 1, SETTINGS, rows_per_forward=2)
    again = collect(rows, lm, sae, 1, SETTINGS, rows_per_forward=4)
    assert torch.equal(again.firings, of_model.firings)


# ---- benchmark ----


def test_the_benchmark_of_collecting_shows_cost_and_memory():
    printed = smoke("collect")
    (state,) = re.findall(r"bookkeeping alone, F=512, K=8: state ([\d,]+) MB", printed)
    assert int(state) > 0
    assert len(re.findall(r"tokens +[\d.]+ us a token since the line before +[\d,]+ MB resident", printed)) == 2
    stages = dict(re.findall(r"^  ([a-z].*?) +([\d.]+) us a token$", printed, re.M))
    assert list(stages)[:4] == ["reading and tokenizing", "language model to layer 2", "encoder", "bookkeeping"]
    assert all(float(value) > 0 for value in stages.values())
    shares = re.search(r"adds ([\d.]+)%, of the last quarter ([\d.]+)%", printed).groups()
    assert all(float(share) > 0 for share in shares)
    at_7b = re.search(r"at F=131,072, K=128: state ([\d.]+) GB.+ (\d+) operations a batch", printed)
    assert 2 < float(at_7b[1]) < 4
    assert int(at_7b[2]) > 100


def test_config_says_what_one_more_example_costs_at_7b():
    few, more = (Collector(131_072, 32_768, Settings(spread=n), "meta").bytes() for n in (3, 5))
    assert (more - few) / 2 == pytest.approx(0.3e9, rel=0.2)


def test_a_batch_is_as_many_operations_whatever_its_size_and_the_number_of_features():
    """Each costs a GPU microseconds, however little it does: a loop over features or rows would be felt."""
    counts = {operations({"F": F, "K": 8, "rows": rows}, batches=8) for F, rows in ((64, 4), (4096, 4), (64, 16))}
    assert len(counts) == 1
    assert 100 < counts.pop() < 1000
