"""What is known of features, and which of them match words."""

from contextlib import nullcontext

import pytest
import torch
from test_steering import D, F, autoencoder, loaded_of

from mistral_sae.model.language_model import load
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import search, sweep
from mistral_sae.steer.steering import steer

PROMPT = [1, 50, 60, 70]


@pytest.fixture(scope="module")
def lm(mistral_folder):
    return load(mistral_folder, device="cpu")


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(autoencoder())


@pytest.fixture
def rows_RT():
    return torch.randint(20, 4096, (6, 16), generator=torch.Generator().manual_seed(3))


def knows_tokens(lm, rows_RT, ids: list[int]) -> LoadedSAE:
    """An autoencoder of layer 0 whose features 0, 1, ... fire on one token each, and whose others never do."""
    layer = Metadata("tiny", "blocks.0.hook_resid_post", 0, True, 32, "text")
    sae = SparseAutoencoder(D, F, 4, activation="relu", normalize="layer_norm").requires_grad_(False)
    torch.nn.init.normal_(sae.W_dec)
    sae.W_enc.zero_()
    sae.b_dec.zero_()
    sae.b_enc.fill_(-1.0)
    z, _, _ = sae.standardize(lm.residuals(rows_RT, 0)[:, 1:].flatten(0, 1))
    at = rows_RT[:, 1:].flatten()
    for feature, id in enumerate(ids):
        (mine,), others = z[at == id], z[at != id]  # it is there once; all z have one length, so none is nearer to it
        sae.W_enc[:, feature] = mine
        sae.b_enc[feature] = -(mine @ mine + (others @ mine).max()) / 2
    return LoadedSAE(sae, layer, torch.zeros(F), torch.full((F,), 3.0))


def test_other_features_are_as_many_random_ones_that_fire_now_and_then():
    maximum, density = torch.ones(F), torch.full((F,), 0.5)
    density[[5, 9, 20]] = 0.001
    maximum[20] = 0.0
    statistics = Statistics(maximum, density, None)
    assert {tuple(search.other_features(statistics, seed, [3])) for seed in range(20)} == {(5,), (9,)}
    assert {tuple(search.other_features(statistics, seed, [3, 4])) for seed in range(20)} == {(5, 9), (9, 5)}
    assert search.other_features(statistics, 0, [5]) == [9]
    assert search.other_features(statistics, 0, [5, 9]) == []
    assert search.other_features(statistics, 0, [3, 4, 5]) == []  # too few


# ---- what a feature promotes ----


def test_promotions_of_many_features_are_those_of_clamping_each_alone(lm, loaded, rows_RT, monkeypatch):
    monkeypatch.setattr(search, "AT_ONCE", 2)
    activations = {3: 4.0, 7: 2.0, 30: -1.0}
    found = search.promotion(lm, loaded, activations, rows_RT)
    assert found.shape == (3, lm.vocab_size)
    plain = lm.forward(rows_RT)[:, 1:].mean((0, 1))
    for row, (feature, c) in zip(found, activations.items(), strict=True):
        with steer(lm, loaded, {feature: c}):
            change = lm.forward(rows_RT)[:, 1:].mean((0, 1)) - plain
        torch.testing.assert_close(row, (change - change.mean()) / change.std(), rtol=1e-2, atol=1e-2)


def test_the_extremes_are_the_tokens_with_the_highest_and_the_lowest_scores(lm):
    scores = torch.zeros(lm.vocab_size)
    scores[500], scores[600], scores[700], scores[800] = 2.0, 3.0, -5.0, -1.0
    names = {id: lm.tokenizer.strings([id])[0] for id in (500, 600, 700, 800)}
    assert search.extremes(lm, scores, 2) == ([names[600], names[500]], [names[700], names[800]])


# ---- words ----


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        ("exception", "exceptions", True),
        ("exceptions", "except", True),
        ("import", "import", True),
        ("in", "in", True),
        ("in", "int", False),  # too short to stand for what it begins
        ("test", "text", False),
    ],
)
def test_words_are_alike_where_one_begins_with_the_other(a, b, alike):
    assert search.are_alike(a, b) is alike
    assert search.are_alike(b, a) is alike


def test_explanations_are_ranked_by_the_words_they_share_with_the_query_rare_ones_first():
    explanations = {
        1: "raised exceptions",
        2: "names of tests",
        3: "an exception in a test",
        4: "brackets",
        5: "Testing",
    }
    scores = search.by_explanation("Exception test", explanations)
    assert sorted(scores, key=scores.get, reverse=True)[0] == 3
    assert set(scores) == {1, 2, 3, 5}
    assert scores[1] > scores[2] == scores[5]  # two explanations have the one word, three the other
    assert search.by_explanation("unicode", explanations) == {}


def test_tokens_are_like_a_word_whatever_is_around_it(lm):
    found = lm.tokenizer.strings(search.tokens_like(lm.tokenizer, "exception"))
    assert {"Exception", " exception", ".exception", " exceptions", "(Exception"} <= set(found)
    assert not {"error", "\n", " ex", "e"} & set(found)
    assert search.tokens_like(lm.tokenizer, "xylophone") == []


def test_features_are_found_by_the_tokens_they_fire_on(lm, rows_RT):
    ids = [int(rows_RT[0, 3]), int(rows_RT[2, 8]), int(rows_RT[5, 9])]
    loaded = knows_tokens(lm, rows_RT, ids)
    for feature, id in enumerate(ids):
        assert search.by_firing(lm, loaded, [id], rows_RT.split(2), 3)[0] == feature
    after = int(rows_RT[2, 9])  # feature 1 fires right before it
    assert search.by_firing(lm, loaded, [after], rows_RT.split(2), 3)[0] == 1
    assert search.by_firing(lm, loaded, [4000], rows_RT.split(2), 3) == []


def test_of_features_that_match_equally_the_one_that_promotes_the_words_tokens_most_comes_first(lm, loaded, rows_RT):
    statistics = Statistics(loaded.maximum, torch.full((F,), 0.01), None)
    explanations = {feature: "an exception" for feature in (3, 7, 30, 31)} | {9: "brackets", 11: "an exception test"}
    found = search.find("exception", lm, loaded, statistics, explanations, lambda: rows_RT)
    found = [each for each in found if each.match]
    assert {each.feature for each in found} == {3, 7, 30, 31, 11}
    assert [each.strength for each in found] == sorted((each.strength for each in found), reverse=True)
    ids = search.tokens_like(lm.tokenizer, "exception")
    maxima = {each.feature: float(loaded.maximum[each.feature]) for each in found}
    promotion_NV = search.promotion(lm, loaded, maxima, search._text_of(lm))
    expected = promotion_NV[:, ids].topk(search.CLASS, dim=1).values.mean(1)
    assert [each.strength for each in found] == pytest.approx(expected.tolist(), rel=1e-2)
    both = search.find("exception test", lm, loaded, statistics, explanations, lambda: rows_RT)
    assert both[0].feature == 11


def test_without_a_matching_explanation_features_are_found_by_tokens(lm, rows_RT):
    rows_RT = rows_RT.clone()
    (id, *_) = search.tokens_like(lm.tokenizer, "exception")
    rows_RT[1, 4] = id
    loaded = knows_tokens(lm, rows_RT, [id])
    statistics = Statistics(loaded.maximum, torch.full((F,), 0.01), None)
    for explanations in ({}, {5: "brackets"}):
        found = search.find("exception", lm, loaded, statistics, explanations, lambda: rows_RT)
        assert [each.feature for each in found] == [0]
        assert found[0].match == 0
    assert search.find("xylophone", lm, loaded, statistics, {}, lambda: rows_RT) == []


def test_features_found_by_tokens_come_after_those_whose_explanations_match(lm, rows_RT):
    rows_RT = rows_RT.clone()
    (id, *_) = search.tokens_like(lm.tokenizer, "exception")
    rows_RT[1, 4] = id
    loaded = knows_tokens(lm, rows_RT, [id])
    statistics = Statistics(loaded.maximum, torch.full((F,), 0.01), None)
    found = search.find("exception", lm, loaded, statistics, {5: "an exception", 6: "brackets"}, lambda: rows_RT)
    assert [(each.feature, each.match > 0) for each in found] == [(5, True), (0, False)]
    every = dict.fromkeys(range(F), "brackets") | {5: "an exception"}  # then the explanations know best
    found = search.find("exception", lm, loaded, statistics, every, lambda: rows_RT)
    assert [each.feature for each in found] == [5]


def test_no_text_is_read_where_explanations_are_enough(lm, loaded):
    def none():
        raise AssertionError("no text is wanted")

    statistics = Statistics(loaded.maximum, torch.full((F,), 0.01), None)
    every = dict.fromkeys(range(F), "brackets") | {5: "an exception"}
    assert [each.feature for each in search.find("exception", lm, loaded, statistics, every, none)] == [5]


def test_the_most_visible_feature_is_the_one_that_fires_most_in_text_steered_with_it(lm, loaded, monkeypatch):
    monkeypatch.setattr(search, "TRIAL", (3, 10))
    monkeypatch.setattr(search, "TRIED", 3)
    statistics = Statistics(4 * loaded.maximum, torch.full((F,), 0.001), None)
    found = search.most_visible(lm, loaded, statistics, [3, 7, 11, 30, 40], PROMPT, 0.7)
    assert len(found) == 3
    clear = search._promoting(lm, loaded, statistics, [3, 7, 11, 30, 40], [])
    clearest = sorted(clear, key=lambda each: -each.strength)[:3]
    assert {each.feature for each in found} == {each.feature for each in clearest}
    own = [sweep.sample(lm, PROMPT, [seed], 10, 0.7)[0] for seed in range(3)]
    ranks = []
    for each in found:
        with steer(lm, loaded, {each.feature: float(statistics.maximum_F[each.feature])}):
            texts = [sweep.sample(lm, PROMPT, [seed], 10, 0.7)[0] for seed in range(3)]
        plain, steered = (
            sweep.pooled(sweep.measure(lm, loaded, [each.feature], PROMPT, some, nullcontext()))
            for some in (own, texts)
        )
        assert each.strength == pytest.approx(100 * (steered.rate - plain.rate), abs=1e-4)
        ranks.append((not sweep.is_fluent(steered, plain), -each.strength))
    assert ranks == sorted(ranks)


def test_features_that_never_fired_are_not_found(lm, loaded, rows_RT):
    statistics = Statistics(torch.zeros(F), torch.zeros(F), None)
    assert search.find("exception", lm, loaded, statistics, {3: "an exception"}, lambda: rows_RT) == []
