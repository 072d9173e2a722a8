"""How strong is fluent, and what counts as an effect."""

import pytest
import torch
from test_steering import LAYER, F, autoencoder, loaded_of

from mistral_sae.model.language_model import load_model
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import effect, sweep
from mistral_sae.steer.effect import Effect
from mistral_sae.steer.steering import Edit, SteeringError, Subject
from mistral_sae.steer.sweep import Measured, Trials

PROMPT = [1, 50, 60, 70]


@pytest.fixture(scope="module")
def lm(mistral_folder):
    return load_model(mistral_folder, device="cpu")


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(autoencoder())


@pytest.fixture
def subject(lm, loaded):
    return Subject(lm, loaded, Statistics(loaded.maximum_F, torch.full((F,), 0.001), None), {})


@pytest.fixture
def trials(lm, loaded):
    return Trials(lm, loaded, PROMPT, range(3), max_tokens=10, temperature=0.7)


@pytest.mark.parametrize("method", ["clamp", "add", "raw"])
@pytest.mark.parametrize("signs", [{3: 1.0}, {3: -1.0}, {3: 1.0, 40: -2.0}])
def test_strengths_of_every_method_move_the_residual_by_the_same_shares_of_its_norm(lm, subject, method, signs):
    tokens_BT = torch.tensor([[*PROMPT, 80, 90]])
    x_TD = lm.residuals(tokens_BT, LAYER)[0, 1:]
    found = effect.strengths_of(subject, Edit(signs, method), x_TD)
    assert found == sorted(found)

    def edited(scale):
        with Edit({f: scale * c for f, c in signs.items()}, method).context(subject, len(PROMPT)):
            return lm.residuals(tokens_BT, LAYER)[0, 1:]

    base_TD = edited(0.0)  # where the features are silent
    sizes = [float(((edited(c) - base_TD).norm(dim=1) / x_TD.norm(dim=1)).median()) for c in found]
    assert sizes == pytest.approx(effect.SIZES, rel=0.06)  # two digits


def test_ablating_has_one_strength_and_a_feature_that_never_fired_none(lm, subject):
    x_TD = lm.residuals(torch.tensor([PROMPT]), LAYER)[0, 1:]
    assert effect.strengths_of(subject, Edit({3: 1.0}, "ablate"), x_TD) == [1.0]
    silent = subject._replace(statistics=Statistics(torch.zeros(F), torch.zeros(F), None))
    with pytest.raises(SteeringError, match="never fired"):
        effect.strengths_of(silent, Edit({3: 1.0}), x_TD)
    still = loaded_of(autoencoder())
    still.sae.W_dec[3] = 0.0
    with pytest.raises(SteeringError, match="no effect of feature 3"):
        effect.strengths_of(subject._replace(loaded=still), Edit({3: 1.0}), x_TD)


def test_effects_of_many_features_are_those_of_each_alone(lm, loaded, subject, trials, monkeypatch):
    monkeypatch.setattr(sweep, "MOST_NATS", 99.0)
    monkeypatch.setattr(sweep, "MOST_REPETITION", 1.0)
    classes = {3: {90, 91}, 7: set(range(2000))}
    together = effect.effects_of(subject, Edit({}), {3: [0.5, 2.0], 7: [1.0]}, classes, trials)
    own = [list(lm.generate(PROMPT, 10, 0.7, seed=seed)) for seed in range(3)]
    for found, (feature, strongest) in zip(together, {3: 2.0, 7: 1.0}.items(), strict=True):
        assert (found.feature, found.strength, found.is_fluent) == (feature, strongest, True)
        with Edit({feature: strongest}).context(subject, len(PROMPT)):
            texts = [list(lm.generate(PROMPT, 10, 0.7, seed=seed)) for seed in range(3)]
        for mine, measured, shown in ((texts, found.steered, found.shown), (own, found.own, found.own_shown)):
            expected = sweep.pooled(sweep.measure(lm, loaded, [feature], PROMPT, mine))
            assert measured.rate == pytest.approx(expected.rate)
            assert measured.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-3)
            assert shown == effect.share_of(mine, classes[feature])


def test_where_no_strength_is_fluent_the_weakest_is_taken_and_that_is_said(subject, trials, monkeypatch):
    monkeypatch.setattr(sweep, "MOST_NATS", -99.0)
    (found,) = effect.effects_of(subject, Edit({}), {3: [0.5, 2.0]}, {}, trials)
    assert (found.strength, found.is_fluent) == (0.5, False)
    assert not found.is_visible
    assert found.why().startswith("0.5 of 0.5, 2: the weakest")


def test_a_control_writes_along_another_direction(lm, subject, trials):
    noise = sweep.random_directions(subject.loaded.sae.W_dec[[3]], seed=0)
    (found,) = effect.effects_of(subject, Edit({}), {3: [4.0]}, {}, trials, {3: noise[0]})
    with Edit({3: 4.0}).context(subject, len(PROMPT), noise):
        texts = [list(lm.generate(PROMPT, 10, 0.7, seed=seed)) for seed in range(3)]
    expected = sweep.pooled(sweep.measure(lm, subject.loaded, [3], PROMPT, texts))
    assert found.steered.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-3)


OWN = Measured(40, 1.0, 0.0, 0.1, 0.0, 0.02)
SEEN = Effect(3, 1.0, True, OWN._replace(rate=0.12), OWN, 0.1, 0.0, [1.0])


def test_an_effect_is_what_shows_and_fires_more_and_is_not_repeated():
    assert SEEN.is_visible
    assert SEEN.score == pytest.approx(0.1)
    assert not SEEN._replace(is_fluent=False).is_visible
    loops = SEEN._replace(steered=SEEN.steered._replace(repetition=0.1 + effect.CHANCE + 0.09))
    assert loops.gain == SEEN.gain
    assert not loops.is_visible
    less_repeated = SEEN._replace(steered=SEEN.steered._replace(repetition=0.0))
    assert less_repeated.score == SEEN.score
    assert SEEN._replace(shown=0.0).score == SEEN._replace(steered=OWN).score == 0.0  # one alone is no effect
    flooded = SEEN._replace(shown=0.9, steered=SEEN.steered._replace(rate=1.0))
    assert flooded.score == effect.ENOUGH
    ranked = [flooded, SEEN, loops, SEEN._replace(is_fluent=False)]
    assert sorted(reversed(ranked), key=Effect.rank) == ranked


def test_the_share_of_a_class_counts_each_token():
    assert effect.share_of([[1, 2, 3], [2]], {2, 9}) == 0.5
    assert effect.share_of([[], []], {2}) == 0
