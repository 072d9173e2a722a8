"""Examples of features, against a search through all activations of a small corpus."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from synthetic_activations import SETTINGS, Corpus, F, Letters, T, cache_of

from mistral_sae.data.records import Document
from mistral_sae.data.tokens import pack
from mistral_sae.explain import cache, examples, scoring
from mistral_sae.explain.cache import is_for_scoring
from mistral_sae.explain.examples import (
    FeatureRecords,
    Sample,
    Settings,
    from_intervals,
    peaks,
    strongest,
    without_empty,
)
from mistral_sae.explain.types import BINS, INTERVALS
from mistral_sae.model.language_model import load_model
from mistral_sae.model.tokenizer import LONGEST_TOKEN
from mistral_sae.sae.autoencoder import SparseAutoencoder


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_TOKENS", 30 * T)
        yield


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def cached(corpus, tmp_path_factory):
    return corpus.cached(tmp_path_factory.mktemp("activations"))


def peaks_of(cached, feature, scoring):
    """The peaks of a feature in the documents to score on, or in the others."""
    found = peaks(cached.activations(feature), SETTINGS.left, SETTINGS.right)
    return found.at(cached.for_scoring[found.documents] == scoring)


def as_tuples(passages):
    """(value, row, position) of each passage."""
    return [(value, *divmod(token, T)) for value, token in zip(passages.values, passages.tokens.tolist(), strict=True)]


# ---- where a feature fires ----


def test_peaks_are_the_largest_of_their_windows_within_one_document_and_row(corpus, cached):
    lengths = set()
    for feature in range(F):
        found = peaks(cached.activations(feature), SETTINGS.left, SETTINGS.right)
        assert as_tuples(found) == corpus.peaks(feature)
        for token, first, last in zip(found.tokens.tolist(), found.first.tolist(), found.last.tolist(), strict=True):
            assert (first % T, last % T) == corpus.window(*divmod(token, T))
            assert Letters.bos_id not in cached.ids(first, last)
            lengths.add(last - first + 1)
    assert max(lengths) == SETTINGS.left + 1 + SETTINGS.right
    assert min(lengths) < 5


def test_the_strongest_are_the_strongest_of_all_with_one_a_document(corpus, cached):
    for feature in range(F):
        best = {}
        for peak in sorted(corpus.peaks(feature, scoring=False), key=lambda peak: -peak[0]):
            best.setdefault(corpus.document(*peak[1:]), peak)
        assert as_tuples(strongest(peaks_of(cached, feature, False), 4)) == list(best.values())[:4]


@pytest.mark.parametrize("scoring", [False, True])
def test_each_interval_of_the_range_is_filled_as_far_as_documents_go(corpus, cached, scoring):
    for feature in range(F):
        maximum, passages = float(cached.maxima_F[feature]), peaks_of(cached, feature, scoring)
        found = from_intervals(passages, maximum, 4, np.random.default_rng(0))
        assert set(as_tuples(found)) <= set(corpus.peaks(feature, scoring))
        assert len(set(found.documents)) == len(found.documents)
        assert found.values.tolist() == sorted(found.values, reverse=True)

        def interval(value, maximum=maximum):
            return min(INTERVALS - 1, int(INTERVALS * float(value) / maximum))

        counts = Counter(map(interval, found.values))
        for value, document in zip(passages.values, passages.documents, strict=True):
            assert counts[interval(value)] == 4 or document in found.documents  # else it should have been taken
        if feature < 4:  # which fire in most documents
            assert set(counts) == set(range(INTERVALS))


def test_a_document_is_left_to_the_interval_that_has_no_other(tmp_path):
    rows = list(pack([Document(name, "a" * 39) for name in "ab"], Letters(), 40))
    values = torch.zeros(2, 40, 1)
    values[0, 5], values[0, 30], values[1, 20] = 1.0, 0.1, 0.9
    found = cache_of(tmp_path, rows, values, torch.zeros(2, 40, 1, dtype=torch.long), 1).activations(0)
    for seed in range(10):
        chosen = from_intervals(peaks(found, 3, 3), 1.0, 1, np.random.default_rng(seed))
        assert chosen.tokens.tolist() == [60, 30]


def test_early_and_late_documents_are_chosen_alike(tmp_path):
    n_documents, chosen = 60, Counter()
    rows = [row for i in range(n_documents) for row in pack([Document(f"{i}", "abcd")], Letters(), 5)]
    found = cache_of(tmp_path, rows, torch.ones(60, 5, 1), torch.zeros(60, 5, 1, dtype=torch.long), 1)
    passages = peaks(found.activations(0), 3, 3)
    for seed in range(400):
        chosen.update(from_intervals(passages, 1.0, 4, np.random.default_rng(seed)).documents.tolist())
    even = 400 * 4 / n_documents
    assert chosen.total() == 400 * 4
    assert sum((chosen[i] - even) ** 2 / even for i in range(n_documents)) < 2 * n_documents  # chi-squared


# ---- where it does not fire, and what fires along with it ----


@pytest.fixture(scope="module")
def sample(cached):
    return Sample(cached, SETTINGS)


def fires(cached, feature):
    return cached.activations(feature).tokens


def check_silent(corpus, cached, feature, passages):
    values = corpus.activations(feature).ravel()
    for token, first, last, document in zip(*(array.tolist() for array in passages[:4]), strict=True):
        assert first <= token <= last
        assert not values[first : last + 1].any()
        assert (first % T, last % T) == corpus.window(*divmod(token, T))
        assert cached.names[document] == corpus.document(*divmod(token, T))
        assert is_for_scoring(cached.names[document])
    assert len(set(passages.documents)) == len(passages.documents)


def random(sample, cached, feature, count, without=()):
    return sample.random(feature, fires(cached, feature), count, np.array(without, dtype=int))


def test_a_feature_does_not_fire_in_its_random_passages(corpus, cached, sample):
    for feature in range(F):
        passages = random(sample, cached, feature, 6)
        check_silent(corpus, cached, feature, passages)
        assert as_tuples(passages) == as_tuples(random(sample, cached, feature, 6))
    drawn = [as_tuples(random(sample, cached, feature, 6)) for feature in (F - 2, F - 1)]
    assert len(drawn[0]) == len(drawn[1]) == 6
    assert drawn[0] != drawn[1]


def test_random_passages_are_found_if_there_are_any(corpus, cached, sample):
    """Feature 0 fires on most tokens: few windows are without it."""
    values, silent = corpus.activations(0), set()
    for row, position in itertools.product(range(len(corpus.rows)), range(1, T)):
        if corpus.rows[row].document_of[position] >= 0 and is_for_scoring(corpus.document(row, position)):
            first, last = corpus.window(row, position)
            if not values[row, first : last + 1].any():
                silent.add(corpus.document(row, position))
    assert 0 < len(silent) < 20
    assert len(random(sample, cached, 0, 100).tokens) == len(silent)


def test_random_passages_leave_out_the_documents_of_others(corpus, cached, sample):
    for feature in range(3, F):
        free = random(sample, cached, feature, 10)
        apart = random(sample, cached, feature, 10, without=free.documents[::2])
        check_silent(corpus, cached, feature, apart)
        assert not set(apart.documents) & set(free.documents[::2])
        kept = as_tuples(free.at(np.arange(len(free.tokens)) % 2 == 1))
        assert as_tuples(apart)[: len(kept)] == kept


def test_half_of_the_hard_passages_have_a_token_to_mistake_and_half_a_near_feature(corpus, cached, sample):
    mistaken, near = [ord("e"), ord("t"), ord("t")], [3, 4]

    def hard(feature, ids, near, count):
        return sample.hard(feature, fires(cached, feature), ids, near, count)

    for feature in range(6, F):
        passages = hard(feature, mistaken, near, 6)
        check_silent(corpus, cached, feature, passages)
        assert len(passages.tokens) == 6
        assert all(cached.ids(token, token)[0] in mistaken for token in passages.tokens[:3].tolist())
        near_fires = sum(corpus.activations(other).ravel() for other in near)
        assert all(near_fires[passages.tokens[3:]])
        assert as_tuples(passages) == as_tuples(hard(feature, mistaken, near, 6))
        assert len(hard(feature, [], near, 4).tokens) == len(hard(feature, mistaken, [], 4).tokens) == 4
        assert len(hard(feature, [], [], 4).tokens) == 0


def test_coactive_features_are_those_that_share_tokens(corpus, cached, sample):
    activations = np.stack([corpus.activations(feature) > 0 for feature in range(F)])
    for feature, found in zip(range(F), sample.coactive(range(F), 3), strict=True):
        own = activations[feature]
        shares = {other: (activations[other] & own).sum() / own.sum() for other in range(F) if other != feature}
        best = sorted((other for other in shares if shares[other]), key=lambda other: (-shares[other], other))
        assert [other for other, _ in found] == best[:3]
        assert [share for _, share in found] == pytest.approx([shares[other] for other in best[:3]])


def test_a_sample_is_of_shards_all_over_the_corpus(cached, monkeypatch):
    monkeypatch.setattr(examples, "SAMPLE_SHARDS", 3)
    n_shards = len(cached.shards)
    assert n_shards > 4
    assert Sample(cached, SETTINGS).shards == [0, round((n_shards - 1) / 2), n_shards - 1]


def test_a_corpus_without_documents_for_scoring_gives_no_negatives(tmp_path):
    name = next(name for name in map(str, range(100)) if not is_for_scoring(name))
    rows = list(pack([Document(name, "abcd")], Letters(), 5))
    found = cache_of(tmp_path, rows, torch.ones(1, 5, 1), torch.zeros(1, 5, 1, dtype=torch.long), 4)
    sample, none = Sample(found, SETTINGS), np.zeros(0, dtype=int)
    assert len(sample.random(3, none, 5, none).tokens) == 0
    assert len(sample.hard(3, none, [97], [0], 5).tokens) == 0
    assert sample.coactive([0, 3], 5) == [[], []]


# ---- records ----

TEXTS = [f"def square_{i}(x):\n    return x * x + {i}  # größer als ∑ {'ab' * i}\n" * (i % 5 + 2) for i in range(40)]


@pytest.fixture(scope="module")
def parts(mistral_folder):
    model = load_model(mistral_folder, device="cpu")
    sae = SparseAutoencoder(model.d_model, 64, 4)
    sae.initialize(torch.randn(64, model.d_model, generator=torch.Generator().manual_seed(0)), seed=0)
    sae.W_dec.data *= torch.linspace(0.5, 2, 64).unsqueeze(1)  # what others trained has rows of any norm
    documents = [Document(f"text {i}", text) for i, text in enumerate(TEXTS)]
    rows = list(pack(documents, model.tokenizer, 32))
    return model, sae, rows


@pytest.fixture(scope="module")
def of_model(parts, tmp_path_factory):
    model, sae, rows = parts
    return cache_of_model(tmp_path_factory.mktemp("activations"), model, sae, rows)


def cache_of_model(folder, model, sae, rows):
    described = cache.made_from(model, sae, 1, {})
    cache.write(folder, described, rows, model, sae, 1)
    return cache.open_cache(folder, described)[0]


def records_of(of_model, features, parts, settings=SETTINGS):
    model, sae, _ = parts
    return FeatureRecords(of_model, features, model, sae, settings)


def test_records_of_many_features_are_those_of_each(parts, of_model, monkeypatch):
    """What weights and shards say is looked up for some features at a time, in whatever order they are asked for."""
    whole = {record.feature: record for record in records_of(of_model, range(64), parts)}
    monkeypatch.setattr(examples, "AT_ONCE", 3)
    few = records_of(of_model, [40, 3, 9, 11, 60, 2, 63], parts)
    for feature in (63, 3, 40, 60, 9):
        mine, its = few[feature], whole[feature]
        assert (mine.top, mine.held_out, mine.random, mine.hard) == (its.top, its.held_out, its.random, its.hard)
        assert [text for text, _ in mine.promoted] == [text for text, _ in its.promoted]
        assert [other for other, _ in mine.nearest] == [other for other, _ in its.nearest]
        assert mine.coactive == its.coactive


def test_other_features_and_other_settings_run_no_model(parts, of_model, monkeypatch):
    model, _, _ = parts
    monkeypatch.setattr(model, "_run", None)  # any forward would fail
    before = records_of(of_model, [3], parts)[3]
    changes = {"spread": 1, "held_out": 1, "top": 2, "left": 3, "right": 1, "seed": 1}
    for name, value in changes.items():
        record = records_of(of_model, [3, 20], parts, SETTINGS._replace(**{name: value}))[3]
        assert record != before
        assert (record.density, record.maximum, record.histogram) == (before.density, before.maximum, before.histogram)
        assert record.top[0].strength == before.top[0].strength


def test_another_seed_chooses_other_examples_but_the_same_strongest(parts, of_model):
    a, b = (records_of(of_model, [5], parts, SETTINGS._replace(spread=1, seed=seed))[5] for seed in (1, 2))
    assert a.top == b.top
    assert a.spread != b.spread
    assert a.random != b.random


def test_held_out_passages_that_repeat_an_explaining_one_are_left_out(parts, tmp_path):
    """Two documents are copies of explaining ones, under names that are for scoring."""
    model, sae, _ = parts
    names = map(str, itertools.count())
    scoring = (name for name in names if is_for_scoring(name))
    explaining = (name for name in map(str, itertools.count()) if not is_for_scoring(name))
    documents = [Document(next(explaining), text) for text in TEXTS[:20]]
    copies, others = TEXTS[:20], [text.replace("square", "cube") for text in TEXTS[20:]]
    documents += [Document(next(scoring), text) for text in (*copies, *others)]
    rows = [row for each in documents for row in pack([each], model.tokenizer, 32)]
    found = cache_of_model(tmp_path, model, sae, rows)
    everything = SETTINGS._replace(top=100, spread=100, held_out=100, right=0)
    records = list(records_of(found, range(64), parts, everything))

    def around(passage):
        return passage.tokens[max(0, passage.peak - 7) :]

    held_out = [passage for record in records for passage in record.held_out]
    assert len(held_out) > 100
    for record in records:
        seen = {around(passage) for passage in (*record.top, *record.spread) if passage.peak >= 6}
        assert not seen & {around(passage) for passage in record.held_out if passage.peak >= 6}
    names_held_out = Counter(int(passage.document) for passage in held_out)
    copied = {int(document.id) for document in documents[20:40]}
    assert sum(names_held_out[name] for name in copied) < 0.3 * len(held_out)


def test_records_hold_passages_of_the_text_and_what_the_weights_say(parts, of_model):
    model, sae, _ = parts
    records = records_of(of_model, [5, 0, 63], parts)
    assert [record.feature for record in records] == [5, 0, 63]
    assert len(records) == 3
    record = records[63]
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines = rows[63] @ rows.T
    cosines[63] = -1
    assert [other for other, _ in record.nearest] == cosines.argsort(descending=True)[:10].tolist()
    assert record.nearest[0][1] == pytest.approx(cosines.max().item(), rel=1e-5)
    logits = model.unembed(sae.W_dec[63:64].detach())[0]
    logits -= logits.mean()
    for found, order in ((record.promoted, logits.argsort(descending=True)), (record.suppressed, logits.argsort())):
        assert [text for text, _ in found] == [model.tokenizer.strings([i])[0] for i in order[:10].tolist()]
        assert [value for _, value in found] == pytest.approx(logits[order[:10]].tolist(), rel=1e-4)

    texts = {f"text {i}": text for i, text in enumerate(TEXTS)}
    for record in records:
        assert record.density == of_model.counts_F[record.feature].item() / of_model.tokens
        assert record.maximum >= max(e.strength for e in (*record.top, *record.held_out))
        values = of_model.activations(record.feature).values
        bins = np.minimum(BINS * values.astype(float) / record.maximum, BINS - 1).astype(int)
        assert record.histogram == tuple(np.bincount(bins, minlength=BINS).tolist())
        passages = (*record.top, *record.spread, *record.held_out)
        assert len(passages) > 5
        for example in (*passages, *record.random, *record.hard):
            assert len(example.tokens) == len(example.activations)
            assert "".join(example.tokens).strip("\ufffd") in texts[example.document]
        assert all(example.strength > 0 for example in passages)
        assert record.random
        assert not any(example.strength for example in (*record.random, *record.hard))
        documents = [example.document for example in (*record.random, *record.hard)]
        assert len(set(documents)) == len(documents)
        explaining = {example.document for example in (*record.top, *record.spread)}
        assert not explaining & {e.document for e in (*record.held_out, *record.random, *record.hard)}


def test_a_brief_record_is_the_record_without_what_takes_time(parts, of_model):
    whole, brief = (
        each(5) for each in (records_of(of_model, [5], parts).__getitem__, records_of(of_model, [5], parts).brief)
    )
    assert brief == whole._replace(
        **dict.fromkeys(("promoted", "suppressed", "nearest", "coactive", "held_out", "random", "hard"), ())
    )


def test_a_dead_feature_has_a_record(parts, tmp_path):
    rows = list(pack([Document("a", "abcd")], Letters(), 5))
    found = cache_of(tmp_path, rows, torch.ones(1, 5, 1), torch.zeros(1, 5, 1, dtype=torch.long), 64)
    record = records_of(found, [7], parts)[7]
    assert (record.density, record.maximum, sum(record.histogram)) == (0, 0, 0)
    assert record.top == record.spread == record.held_out == record.coactive == ()


@pytest.fixture(scope="module")
def sparse(parts, tmp_path_factory):
    """The cache of long documents in which 64 features fire at random places, and their records."""
    model, sae, _ = parts
    random = np.random.default_rng(0)
    texts = ("".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(50, 700, 300))
    documents = [Document(f"text {i}", text) for i, text in enumerate(texts)]
    rows = list(pack(documents, model.tokenizer, 256))
    values = random.exponential(size=(len(rows), 256, 2)) * (random.random((len(rows), 256, 2)) < 0.15)
    indices = random.integers(0, 32, values.shape) + np.array([0, 32])
    folder = tmp_path_factory.mktemp("activations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_TOKENS", 2**16)
        found = cache_of(folder, rows, torch.from_numpy(values).float(), torch.from_numpy(indices), 64)
    return found, list(FeatureRecords(found, range(64), model, sae, Settings(spread=5)))


def window_of(found, example, every):
    """First and last token of the window that an example is a part of, of all windows of a feature."""
    same = (every.values == example.strength) & np.array([found.names[d] == example.document for d in every.documents])
    peak = example.start + example.peak
    (which,) = (same & (every.tokens % found.row_tokens == peak)).nonzero()[0][:1]
    return int(every.first[which]), int(every.last[which])


def test_passages_to_score_on_are_a_part_of_their_windows_with_its_peak(parts, sparse):
    model, sae, _ = parts
    found, records = sparse
    assert records == list(FeatureRecords(found, range(64), model, sae, Settings(spread=5)))
    for record in records:
        every = peaks(found.activations(record.feature), 48, 15)
        for name in ("top", "spread", "held_out"):
            for example in getattr(record, name):
                first, last = window_of(found, example, every)
                ids, skipped = found.ids(first, last), example.start - first % 256
                stop = skipped + len(example.tokens)
                assert example.tokens == tuple(model.tokenizer.strings(ids[skipped:stop]))
                assert 0 <= skipped <= 15
                assert 0 <= len(ids) - stop <= 15
                assert name == "held_out" or len(example.tokens) == len(ids)


def test_where_the_peak_of_a_passage_to_score_on_stands_tells_nothing(sparse):
    """Windows end 15 tokens after their peak; what is left of them does as often as it ends 0 to 14 after it."""
    found, records = sparse
    places = []
    for record in records:
        every = peaks(found.activations(record.feature), 48, 15)
        for example in record.held_out:
            first, last = window_of(found, example, every)
            if last - first == 63:
                places.append((example.peak, len(example.tokens) - 1 - example.peak))
    assert len(places) > 500
    for distances, possible in zip(zip(*places, strict=True), (range(33, 49), range(16)), strict=True):
        counts = Counter(distances)
        assert set(counts) == set(possible)
        even = len(places) / 16
        assert sum((count - even) ** 2 / even for count in counts.values()) < 45  # chi-squared of 15 degrees
    assert abs(np.corrcoef(np.array(places).T)[0, 1]) < 0.1
    lengths = [
        np.mean([len(example.tokens) for record in records for example in getattr(record, kind)])
        for kind in ("held_out", "random", "hard")
    ]
    assert max(lengths) - min(lengths) < 2.5


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
        pairs = list(zip((passage.activations for passage in simulated), blind, strict=True))
        assert scoring.simulation_score([scoring.Simulated(*pair) for pair in pairs], len(pairs), 0).value < 0.2


def test_hard_passages_of_a_record_hold_a_peak_token_or_a_near_feature(parts, of_model):
    kinds = Counter()
    for record in records_of(of_model, range(64), parts):
        mistaken = {example.tokens[example.peak] for example in (*record.top, *record.spread, *record.held_out)}
        near = {token for other, _ in record.nearest for token in of_model.activations(other).tokens.tolist()}
        documents = np.concatenate([of_model.documents[i][shard.documents] for i, shard in enumerate(of_model.shards)])
        for example in record.hard:
            name = of_model.names.index(example.document)
            starts = [t for t in (documents == name).nonzero()[0].tolist() if t % 32 == example.start]
            near_fires = any(t + i in near for t in starts for i in range(len(example.tokens)))
            has_peak = bool(mistaken & set(example.tokens))
            assert has_peak or near_fires
            kinds[has_peak, near_fires] += 1
    assert kinds.total() > 64
    assert kinds[True, True]
    assert kinds[False, True]


def test_documents_to_explain_from_and_documents_to_score_on_are_different_ones(parts, of_model):
    explaining, scoring = set(), set()
    for record in records_of(of_model, range(64), parts):
        explaining |= {example.document for example in (*record.top, *record.spread)}
        scoring |= {example.document for example in (*record.held_out, *record.random, *record.hard)}
    assert len(explaining) > 10
    assert len(scoring) > 10
    assert not any(map(is_for_scoring, explaining))
    assert all(map(is_for_scoring, scoring))


def test_characters_that_tokens_share_come_out_whole(parts, of_model):
    tokenizer, texts = parts[0].tokenizer, records_of(of_model, [0], parts)._texts
    ids = tokenizer.encode("größer ∑ x")
    assert texts(ids) == tokenizer.strings(ids)
    assert "".join(texts(ids)) == "größer ∑ x"


def test_bytes_of_a_character_spread_over_tokens_are_one_token():
    texts, values = ("a", "", "", "é", "b", ""), (0.0, 2.0, 0.0, 1.0, 0.0, 3.0)
    assert without_empty(texts, values) == (("a", "é", "b"), (0.0, 2.0, 3.0))


def test_a_token_of_megabytes_is_shown_by_its_beginning(parts, of_model, monkeypatch):
    records = records_of(of_model, [0], parts)
    tokens = [b"a" * 10_000_000, b"b" * 10_000_000 + b"\xc3", b"\xa9", b"c"]
    monkeypatch.setattr(records, "_bytes", tokens.__getitem__)
    for ids in ([0, 3], [0, 1, 2, 3]):
        shown = records._texts(ids)
        assert len(shown) == len(ids)
        assert max(map(len, shown)) == LONGEST_TOKEN + 1
        assert (shown[0][:3], shown[-1]) == ("aaa", "c")
