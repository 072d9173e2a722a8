"""What is known of features, and which of them match words."""

import re

import pytest
import torch
from test_steering import D, F, autoencoder, loaded_of

from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import search, sweep
from mistral_sae.steer.steering import Edit, Explanation, SteeringError, Subject, steer
from mistral_sae.steer.sweep import Measured, Trial, Trials

PROMPT = [1, 50, 60, 70]


@pytest.fixture(scope="module")
def lm(mistral_folder):
    return load_model(mistral_folder, device="cpu")


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(autoencoder())


@pytest.fixture
def rows_RT():
    return torch.randint(20, 4096, (6, 16), generator=torch.Generator().manual_seed(3))


def explained(texts) -> dict[int, Explanation]:
    return {feature: Explanation(text, "offline") for feature, text in texts.items()}


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
    return LoadedSAE(sae, layer, torch.ones(F), torch.full((F,), 3.0))


# ---- what a feature raises when it is clamped ----


def test_changes_of_many_features_are_those_of_clamping_each_alone(lm, loaded, rows_RT, monkeypatch):
    monkeypatch.setattr(search, "LOGITS_BYTES", 4 * rows_RT.numel() * lm.vocab_size * 2)  # two at once
    activations = {3: 4.0, 7: 2.0, 30: -1.0}
    found = search.logit_changes(lm, loaded, activations, rows_RT)
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


def test_explanations_are_ranked_by_the_words_of_the_query_they_hold_rare_ones_first():
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


def test_features_are_found_by_the_tokens_they_fire_on(lm, rows_RT, monkeypatch):
    ids = [int(rows_RT[0, 3]), int(rows_RT[2, 8]), int(rows_RT[5, 9])]
    loaded = knows_tokens(lm, rows_RT, ids)
    monkeypatch.setattr(search, "SCAN_AT_ONCE", 2)
    for feature, id in enumerate(ids):
        assert search.by_tokens(lm, loaded, [id], rows_RT, 3)[0] == feature
    after = int(rows_RT[2, 9])  # feature 1 fires right before it
    assert search.by_tokens(lm, loaded, [after], rows_RT, 3)[0] == 1
    assert search.by_tokens(lm, loaded, [4000], rows_RT, 3) == []


def test_between_equal_matches_the_one_that_raises_the_words_tokens_most_comes_first(lm, loaded, rows_RT):
    statistics = Statistics(loaded.maximum_F, torch.full((F,), 0.01), None)
    explanations = {feature: "an exception" for feature in (3, 7, 30, 31)} | {9: "brackets", 11: "an exception test"}
    found = search.find("exception", Subject(lm, loaded, statistics, explained(explanations)), lambda n: rows_RT)
    found = [each for each in found if each.match]
    assert {each.feature for each in found} == {3, 7, 30, 31, 11}
    assert [each.strength for each in found] == sorted((each.strength for each in found), reverse=True)
    ids = search.tokens_like(lm.tokenizer, "exception")
    maxima = {each.feature: float(loaded.maximum_F[each.feature]) for each in found}
    changes_NV = search.logit_changes(lm, loaded, maxima, search.own_text(lm))
    expected = changes_NV[:, ids].topk(search.CLASS, dim=1).values.mean(1)
    assert [each.strength for each in found] == pytest.approx(expected.tolist(), rel=1e-2)
    both = search.find("exception test", Subject(lm, loaded, statistics, explained(explanations)), lambda n: rows_RT)
    assert both[0].feature == 11


def test_without_a_matching_explanation_features_are_found_by_tokens(lm, rows_RT):
    rows_RT = rows_RT.clone()
    (id, *_) = search.tokens_like(lm.tokenizer, "exception")
    rows_RT[1, 4] = id
    loaded = knows_tokens(lm, rows_RT, [id])
    statistics = Statistics(loaded.maximum_F, torch.full((F,), 0.01), None)
    for explanations in ({}, {5: "brackets"}):
        found = search.find("exception", Subject(lm, loaded, statistics, explained(explanations)), lambda n: rows_RT)
        assert [each.feature for each in found] == [0]
        assert found[0].match == 0
    assert search.find("xylophone", Subject(lm, loaded, statistics, {}), lambda n: rows_RT) == []


def test_features_found_by_tokens_come_after_those_whose_explanations_match(lm, rows_RT):
    rows_RT = rows_RT.clone()
    (id, *_) = search.tokens_like(lm.tokenizer, "exception")
    rows_RT[1, 4] = id
    loaded = knows_tokens(lm, rows_RT, [id])
    statistics = Statistics(loaded.maximum_F, torch.full((F,), 0.01), None)
    found = search.find(
        "exception", Subject(lm, loaded, statistics, explained({5: "an exception", 6: "brackets"})), lambda n: rows_RT
    )
    assert [(each.feature, each.match > 0) for each in found] == [(5, True), (0, False)]
    every = dict.fromkeys(range(F), "brackets") | {5: "an exception"}  # then the explanations know best
    found = search.find("exception", Subject(lm, loaded, statistics, explained(every)), lambda n: rows_RT)
    assert [each.feature for each in found] == [5]


def test_no_text_is_read_where_explanations_are_enough(lm, loaded):
    def none(n):
        raise AssertionError("no text is wanted")

    statistics = Statistics(loaded.maximum_F, torch.full((F,), 0.01), None)
    every = dict.fromkeys(range(F), "brackets") | {5: "an exception"}
    assert [
        each.feature for each in search.find("exception", Subject(lm, loaded, statistics, explained(every)), none)
    ] == [5]


def test_features_that_never_fired_are_not_found(lm, loaded, rows_RT):
    statistics = Statistics(torch.zeros(F), torch.zeros(F), None)
    assert (
        search.find("exception", Subject(lm, loaded, statistics, explained({3: "an exception"})), lambda n: rows_RT)
        == []
    )


# ---- what was asked for ----


def test_numbers_and_several_features_are_taken_as_they_are(lm, loaded):
    subject = Subject(lm, loaded, Statistics(loaded.maximum_F, torch.full((F,), 0.01), None), {})
    assert search.choose(3, 2.0, subject, no_rows) == search.choose("3", 2.0, subject, no_rows) == {3: 2.0}
    assert search.choose("{3: 1, 7: -2}", 2.0, subject, no_rows) == {3: 1, 7: -2}
    for wrong in ("{}", "[3]", "4.5"):
        with pytest.raises(SteeringError):
            search.choose(wrong, 2.0, subject, no_rows)


def no_rows(n):
    raise AssertionError("no text is wanted")


# ---- what shows in text ----


@pytest.fixture
def trials(lm, loaded):
    return Trials(lm, loaded, PROMPT, range(3), max_tokens=10, temperature=0.7)


def subject_of(lm, loaded, density=0.001, explanations=()):
    statistics = Statistics(4 * loaded.maximum_F, torch.full((F,), density), None)
    return Subject(lm, loaded, statistics, explained(dict.fromkeys(explanations, "an explanation")))


def test_the_most_visible_feature_fires_on_more_of_its_texts_than_of_the_models_own(
    lm, loaded, trials, monkeypatch, capsys
):
    monkeypatch.setattr(search, "TRIED", 4)
    monkeypatch.setattr(search, "MOST_REPETITION", 1.0)  # that random weights repeat themselves says nothing
    monkeypatch.setattr(sweep, "MOST_REPETITION", 1.0)
    subject = subject_of(lm, loaded, explanations=[3, 7, 11, 30, 40])
    chosen = search.most_visible(subject, Edit({}), 0.5, trials)
    printed = capsys.readouterr().out
    listed = [int(feature) for feature in re.findall(r"^  [→ ] +(\d+) ", printed, re.M)]
    assert listed[0] == chosen
    assert "of 5 explained features" in printed
    more = {}
    for feature in listed:
        with steer(lm, loaded, {feature: 0.5 * float(subject.statistics.maximum_F[feature])}):
            texts = [list(lm.generate(PROMPT, 10, 0.7, seed=seed)) for seed in range(3)]
        own = [list(lm.generate(PROMPT, 10, 0.7, seed=seed)) for seed in range(3)]
        steered, plain = (sweep.pooled(sweep.measure(lm, loaded, [feature], PROMPT, t)) for t in (texts, own))
        more[feature] = (not sweep.is_fluent(steered, plain), plain.rate - steered.rate)
    assert list(more.values()) == sorted(more.values())


def test_the_features_tried_are_those_that_raise_the_clearest_classes(lm, loaded, trials, monkeypatch):
    monkeypatch.setattr(search, "TRIED", 2)
    candidates = [3, 7, 11, 30, 40]
    (text,) = lm.sample(PROMPT, [0], search.LOOKED_AT_TOKENS, 0.7)
    maxima = {feature: 4 * float(loaded.maximum_F[feature]) for feature in candidates}
    clear = search.clearness(search.logit_changes(lm, loaded, maxima, torch.tensor([PROMPT + text]))).tolist()
    best = sorted(candidates, key=lambda feature: -clear[candidates.index(feature)])[:2]
    assert search._clearest(subject_of(lm, loaded), candidates, trials) == best


def test_a_text_that_repeats_itself_is_not_taken_for_an_effect(lm, loaded, trials):
    own = Trial([[]] * 2, [Measured(40, 1.0, 0.0, 0.1, 0.0, 0.0)] * 2)
    fluent, repeats = Measured(40, 1.5, 0.0, 0.2, 0.0, 0.5), Measured(40, 1.5, 0.0, 0.3, 0.0, 0.5)
    assert search._stays_fluent(Trial([[]] * 2, [fluent, fluent]), own)
    assert not search._stays_fluent(Trial([[]] * 2, [fluent._replace(repetition=0.0), repeats]), own)


@pytest.mark.parametrize(
    ("density", "explained", "expected"),
    [
        (0.001, [3], [("explained features", 1), ("features that fire now and then", F - 1)]),
        (0.001, [], [("features that fire now and then", F)]),
        (0.5, [3], [("features", F)]),
    ],
)
def test_explained_features_are_looked_among_first(lm, loaded, density, explained, expected):
    pools = search._pools(subject_of(lm, loaded, density, explained))
    assert [(kind, len(among)) for kind, among in pools] == expected


@pytest.mark.parametrize(("visible", "kinds"), [(-1.0, 1), (2.0, 2)])
def test_others_are_tried_where_no_explained_feature_shows(lm, loaded, trials, monkeypatch, capsys, visible, kinds):
    monkeypatch.setattr(search, "TRIED", 2)
    monkeypatch.setattr(search, "VISIBLE", visible)
    monkeypatch.setattr(search, "_stays_fluent", lambda trial, own: True)
    search.most_visible(subject_of(lm, loaded, explanations=[3, 7]), Edit({}), 0.5, trials)
    assert capsys.readouterr().out.count("choosing a feature") == kinds


def test_without_a_feature_that_ever_fired_there_is_none_to_show(lm, loaded, trials):
    subject = Subject(lm, loaded, Statistics(torch.zeros(F), torch.zeros(F), None), {})
    with pytest.raises(SteeringError, match="no feature that ever fired"):
        search.most_visible(subject, Edit({}), 1.0, trials)
