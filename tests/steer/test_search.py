"""What is known of features, and which of them match words."""

import re
from dataclasses import replace

import pytest
import torch
from test_steering import D, F, autoencoder, loaded_of

from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import effect, search, sweep
from mistral_sae.steer.search import Search
from mistral_sae.steer.steering import Edit, Explanation, SteeringError, Subject, steer
from mistral_sae.steer.sweep import Measured, Trials

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
    found = search.changes_of(lm, loaded, activations, rows_RT)
    assert found.logits_NV.shape == found.probabilities_NV.shape == (3, lm.vocab_size)
    plain = lm.forward(rows_RT)[:, 1:]
    for logits_V, likelier_V, (feature, c) in zip(*found, activations.items(), strict=True):
        with steer(lm, loaded, {feature: c}):
            steered = lm.forward(rows_RT)[:, 1:]
        change = (steered - plain).mean((0, 1))
        torch.testing.assert_close(logits_V, (change - change.mean()) / change.std(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(
            likelier_V, (steered.softmax(-1) - plain.softmax(-1)).mean((0, 1)), atol=1e-5, rtol=0
        )


def test_the_extremes_are_the_tokens_with_the_highest_and_the_lowest_scores(lm):
    scores = torch.zeros(lm.vocab_size)
    scores[500], scores[600], scores[700], scores[800] = 2.0, 3.0, -5.0, -1.0
    names = {id: lm.tokenizer.strings([id])[0] for id in (500, 600, 700, 800)}
    assert search.extremes(lm, scores, 2) == ([names[600], names[500]], [names[700], names[800]])


def test_only_tokens_that_there_are_can_be_raised(hugging_face_folder, loaded):
    lm = load_model(hugging_face_folder, device="cpu")
    change_NV = search.changes_of(lm, loaded, {3: 4.0}, torch.tensor([PROMPT])).logits_NV
    assert change_NV.shape == (1, lm.tokenizer.vocab_size)
    assert lm.tokenizer.vocab_size < lm.vocab_size  # the matrix's rows


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


def test_between_equal_matches_the_one_that_raises_the_words_tokens_most_comes_first(lm, search_of, loaded, rows_RT):
    explanations = {feature: "an exception" for feature in (3, 7, 30, 31)} | {9: "brackets", 11: "an exception test"}
    searched = search_of(loaded, explanations, rows=lambda n: rows_RT)
    found, others, *_ = search.find("exception", searched)
    assert set(found) == {3, 7, 30, 31, 11}
    assert not {3, 7, 30, 31, 11} & set(others)
    ids = search.tokens_like(lm.tokenizer, "exception")
    maxima = {feature: float(loaded.maximum_F[feature]) for feature in found}
    changes_NV = search.changes_of(lm, loaded, maxima, searched.text_1T).logits_NV
    raised = changes_NV[:, ids].topk(search.CLASS, dim=1).values.mean(1).tolist()
    assert raised == sorted(raised, reverse=True)
    assert next(iter(search.find("exception test", searched).by_label)) == 11


def test_without_a_matching_explanation_features_are_found_by_tokens(lm, search_of, rows_RT):
    rows_RT = rows_RT.clone()
    (id, *_) = search.tokens_like(lm.tokenizer, "exception")
    rows_RT[1, 4] = id
    loaded = knows_tokens(lm, rows_RT, [id])
    for explanations in ({}, {5: "brackets"}):
        by_label, by_token, *_ = search.find("exception", search_of(loaded, explanations, rows=lambda n: rows_RT))
        assert (list(by_label), list(by_token)) == ([], [0])
    assert search.find("xylophone", search_of(loaded, rows=lambda n: rows_RT)) == ({}, {}, 0, [])


def test_no_text_is_read_where_explanations_are_enough(search_of, loaded):
    every = dict.fromkeys(range(F), "brackets") | {5: "an exception"}  # then they know best
    by_label, by_token, *_ = search.find("exception", search_of(loaded, every))
    assert (list(by_label), by_token) == ([5], {})


def test_features_that_never_fired_are_not_found(search_of, loaded, rows_RT):
    searched = search_of(loaded, {3: "an exception"}, maximum_F=torch.zeros(F), rows=lambda n: rows_RT)
    assert search.find("exception", searched)[:3] == ({}, {}, 1)


def test_words_take_the_feature_whose_texts_show_them_most_whatever_its_label(
    lm, search_of, loaded, rows_RT, monkeypatch, capsys
):
    ids = set(search.tokens_like(lm.tokenizer, "raised exception"))
    rows_RT = rows_RT.clone()
    rows_RT[1, 4] = min(ids)

    def effects_of(subject, edit, strengths, classes, trials):
        """Feature 30 shows most, and is seen by the words' tokens."""
        assert all(set(of) == ids for of in classes.values())
        found = effect.effects_of(subject, edit, strengths, classes, trials)
        own = Measured(30, 1.0, 0.0, 0.0, 0.0, 0.0)
        same = {"is_fluent": True, "own": own, "steered": own._replace(rate=0.1), "own_shown": 0.0}
        return [each._replace(**same, shown=0.1 if each.feature == 30 else 0.0) for each in found]

    monkeypatch.setattr(search, "effects_of", effects_of)
    explanations = {3: "raised exception", 7: "raised exception", 30: "an exception", 11: "brackets"}
    searched = search_of(loaded, explanations, rows=lambda n: rows_RT)
    edit = search.choose(searched, Edit({}), "raised exception", None)
    printed = capsys.readouterr().out
    assert "3 of 4 explanations match" in printed
    listed = [int(feature) for feature in re.findall(r"^  [→ ] +(\d+) ", printed, re.M)]
    assert listed[0] == 30
    assert list(edit.coefficients) == [30]
    assert {3, 7} < set(listed)
    assert set(listed) - set(explanations)  # found by tokens
    assert len(listed) == len(set(listed)) == search.TRIED_BY_WORDS
    assert re.search(r"^coefficient: [\d.e-]+ of ", printed, re.M)


def test_a_feature_found_by_its_label_that_does_nothing_visible_is_said_to_be_so(
    search_of, loaded, rows_RT, monkeypatch, capsys
):
    everything_is_fluent(monkeypatch)
    monkeypatch.setattr(effect, "VISIBLE", 2.0)
    monkeypatch.setattr(search, "VISIBLE", 2.0)
    searched = search_of(loaded, {3: "an exception"}, rows=lambda n: rows_RT)
    search.choose(searched, Edit({}), "exception", None)
    assert re.search(r"^  [→ ] +3 .* no visible effect: an exception$", capsys.readouterr().out, re.M)


# ---- what was asked for ----


def test_numbers_and_several_features_are_taken_as_they_are(search_of, loaded):
    searched = search_of(loaded)
    for wanted in (3, "3"):
        assert search.choose(searched, Edit({}), wanted, 2.0) == Edit({3: 2.0})
    assert search.choose(searched, Edit({}), "{3: 1, 7: None}", 2.0) == Edit({3: 1, 7: None})
    for wrong in ("{}", "[3]", "4.5"):
        with pytest.raises(SteeringError):
            search.choose(searched, Edit({}), wrong, 2.0)


@pytest.mark.parametrize("method", ["clamp", "add", "raw"])
def test_a_coefficient_that_is_not_given_is_the_strongest_that_stays_fluent(
    search_of, loaded, trials, monkeypatch, capsys, method
):
    monkeypatch.setattr(sweep, "MOST_REPETITION", 1.0)
    monkeypatch.setattr(sweep, "MOST_NATS", 0.3)
    searched = search_of(loaded)
    edit = search.choose(searched, Edit({}, method), 3, None)
    printed = capsys.readouterr().out
    (strengths,) = searched.strengths([Edit({3: 1.0}, method)])
    found = list(
        trials.steered(
            strengths,
            lambda of: Edit({3: torch.tensor(of)}, method).context(searched.subject, len(PROMPT)),
            lambda _: [3],
        )
    )
    strongest = sweep.strongest_fluent(strengths, found, trials.unsteered([3]))
    assert edit == Edit({3: strengths[0] if strongest is None else strongest}, method)
    assert f"{edit.coefficients[3]:g} of {', '.join(f'{strength:g}' for strength in strengths)}: " in printed


def test_the_text_that_is_shown_stays_fluent_to_its_end(search_of, loaded, monkeypatch, capsys):
    grid, length = (0.5, 2.0, 8.0), 24
    searched = replace(search_of(loaded), grid=grid)
    whole = searched.trials._replace(seeds=searched.trials.seeds[:1], max_tokens=length)
    by_strength = [
        next(whole.steered([c], lambda of: Edit({3: of[0]}).context(searched.subject, len(PROMPT)), lambda _: [3]))
        for c in grid
    ]
    of_strongest = by_strength[-1].pooled.cross_entropy
    # Shorter ones are fluent, and of those of full length all but the one at the greatest strength
    monkeypatch.setattr(
        sweep, "is_fluent", lambda found, _: found.tokens != length or found.cross_entropy != of_strongest
    )
    assert search.choose(searched, Edit({}), 3, None) == Edit({3: 8.0})
    printed = capsys.readouterr().out
    edit, begun = search.choose_and_begin(replace(searched, shown_tokens=length), Edit({}), 3, None)
    assert edit == Edit({3: 2.0})
    assert begun[1] == by_strength[1].texts[0]
    assert capsys.readouterr().out.removeprefix(printed).strip().startswith("then 2: at more the text below")


def test_the_strengths_tried_can_be_given_and_ablating_has_none(search_of, loaded, capsys):
    searched = replace(search_of(loaded), grid=(0.25, 4.0))
    edit = search.choose(searched, Edit({}), 3, None)
    assert edit.coefficients[3] in (0.25, 4.0)
    assert "of 0.25, 4: " in capsys.readouterr().out
    assert search.choose(searched, Edit({}, "ablate"), 3, None) == Edit({3: 1.0}, "ablate")
    assert capsys.readouterr().out == ""


# ---- what shows in text ----


def everything_is_fluent(monkeypatch):
    """That random weights repeat themselves, or cost much, says nothing."""
    monkeypatch.setattr(sweep, "MOST_NATS", 99.0)
    monkeypatch.setattr(sweep, "MOST_REPETITION", 1.0)


@pytest.fixture
def trials(lm, loaded):
    return Trials(lm, loaded, PROMPT, range(3), max_tokens=10, temperature=0.7)


@pytest.fixture
def search_of(lm, trials):
    """What features of an autoencoder are looked for with."""

    def of(loaded, explanations=(), *, maximum_F=None, density=0.001, rows=no_rows):
        statistics = Statistics(loaded.maximum_F if maximum_F is None else maximum_F, torch.full((F,), density), None)
        subject = Subject(lm, loaded, statistics, explained(dict(explanations)))
        return Search(subject, trials._replace(loaded=loaded), rows)

    return of


def no_rows(n):
    raise AssertionError("no text is wanted")


def labelled(*features):
    return dict.fromkeys(features, "an explanation")


def test_the_most_visible_feature_is_taken_at_the_strength_at_which_it_was_tried(
    lm, loaded, search_of, monkeypatch, capsys
):
    monkeypatch.setattr(search, "TRIED", 4)
    monkeypatch.setattr(search, "FINALISTS", 2)
    everything_is_fluent(monkeypatch)
    searched = search_of(loaded, labelled(3, 7, 11, 30, 40))
    edit = search.choose(searched, Edit({}), None, None)
    printed = capsys.readouterr().out
    assert "of 5 explained features, by the words that they raise, numbers 1 to 4 are tried" in printed
    listed = [int(feature) for feature in re.findall(r"^  [→ ] +(\d+) ", printed, re.M)]
    ((feature, strength),) = edit.coefficients.items()
    assert feature == listed[0]
    strengths = searched.strengths([Edit({f: 1.0}) for f in listed[:2]])
    assert strength in strengths[0]
    trials = searched.trials._replace(seeds=range(search.FINAL_TEXTS))
    classes = search.most_promising(searched, [3, 7, 11, 30, 40])
    best = {f: some[5] for f, some in zip(listed[:2], strengths, strict=True)}  # two above the middle one
    scores = [
        effect.effects_of(searched.subject, Edit({}), {f: [best[f]]}, classes, trials)[0].score for f in listed[:2]
    ]
    assert strength == best[feature]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("pushes_away", [("clamp", -2.0), ("ablate", None)])
def test_a_feature_that_is_to_be_pushed_away_is_one_that_shows_when_clamped(loaded, search_of, pushes_away, capsys):
    method, coefficient = pushes_away
    searched = search_of(loaded, labelled(3, 7))
    clamped = search.choose(searched, Edit({}), None, None)
    assert "coefficient: " in capsys.readouterr().out
    away = search.choose(searched, Edit({}, method), None, coefficient)
    assert away == Edit(dict.fromkeys(clamped.coefficients, coefficient or 1.0), method)
    assert "coefficient: " not in capsys.readouterr().out


def test_features_that_make_the_words_of_a_clear_class_likeliest_are_tried_first(lm, loaded, search_of):
    candidates = [3, 7, 11, 30, 40]
    searched = replace(search_of(loaded), grid=[1.0])
    maxima = {feature: float(loaded.maximum_F[feature]) for feature in candidates}
    changes = search.changes_of(lm, loaded, maxima, searched.text_1T)
    names = lm.tokenizer.strings(range(lm.vocab_size))
    is_word_V = torch.tensor([name[:1].isspace() and len(name) > 3 and name[1:].isalpha() for name in names])
    raised_NV = changes.logits_NV.masked_fill(~is_word_V, -torch.inf)
    classes = dict(zip(candidates, raised_NV.topk(search.RAISED, dim=1).indices.tolist(), strict=True))
    found = search.most_promising(searched, candidates)
    assert found == classes
    clear = dict(zip(candidates, search.clearness(raised_NV).tolist(), strict=True))
    likelier = {
        feature: float(changes.probabilities_NV[i, classes[feature]].sum()) for i, feature in enumerate(candidates)
    }
    best, rest = list(found)[:3], list(found)[3:]
    assert min(clear[feature] for feature in best) >= max(clear[feature] for feature in rest)
    for half in (best, rest):
        assert half == sorted(half, key=lambda feature: -likelier[feature])


@pytest.mark.parametrize(
    ("density", "features", "expected"),
    [
        (0.001, [3], [("explained features", 1), ("features that fire now and then", F - 1)]),
        (0.001, [], [("features that fire now and then", F)]),
        (0.5, [3], [("features", F)]),
    ],
)
def test_explained_features_are_looked_among_first(loaded, search_of, density, features, expected):
    pools = search.pools_of(search_of(loaded, labelled(*features), density=density).subject)
    assert [(kind, len(among)) for kind, among in pools] == expected


@pytest.mark.parametrize(
    ("visible", "rounds"),
    [(-1.0, ["2 that stand"]), (2.0, ["2 that stand", "2 explained features", "62 features that"])],
)
def test_features_that_stand_for_a_concept_are_tried_first_and_its_share_of_the_texts_is_said(
    loaded, search_of, monkeypatch, capsys, visible, rounds
):
    monkeypatch.setattr(effect, "VISIBLE", visible)
    monkeypatch.setattr(search, "ROUNDS", 1)
    everything_is_fluent(monkeypatch)
    monkeypatch.setattr(effect.Effect, "score", 0.0)
    shares = {30: lambda texts: 0.42, 40: lambda texts: 0.07}
    search.choose(replace(search_of(loaded, labelled(3, 30)), concepts=shares), Edit({}), None, None)
    printed = capsys.readouterr().out
    assert re.findall(r"^choosing a feature: of (\d+ \w+ \w+)", printed, re.M) == rounds
    if len(rounds) == 1:
        assert re.search(r" 30  42% →  42%.*\n", printed)
        assert re.search(r" 40   7% →   7%.*\n", printed)


@pytest.mark.parametrize(("visible", "kinds"), [(-1.0, 1), (2.0, 1 + 3)])
def test_others_are_tried_where_no_explained_feature_shows(loaded, search_of, monkeypatch, capsys, visible, kinds):
    monkeypatch.setattr(search, "TRIED", 2)
    monkeypatch.setattr(effect, "VISIBLE", visible)
    everything_is_fluent(monkeypatch)
    monkeypatch.setattr(effect.Effect, "score", 0.0)
    search.choose(search_of(loaded, labelled(3, 7)), Edit({}), None, None)
    assert capsys.readouterr().out.count("choosing a feature") == kinds


def test_without_a_feature_that_ever_fired_there_is_none_to_show(loaded, search_of):
    with pytest.raises(SteeringError, match="no feature that ever fired"):
        search.choose(search_of(loaded, maximum_F=torch.zeros(F)), Edit({}), None, None)
