"""Samples in batches, and what is measured of them."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_steering import LAYER, autoencoder, loaded_of

from mistral_sae.model.language_model import load_model
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import sweep
from mistral_sae.steer.steering import Edit, Subject, activations_of, steer
from mistral_sae.steer.sweep import Measured, Trial, Trials

PROMPT = [1, 50, 60]


@pytest.fixture(scope="module")
def lm(mistral_folder):
    return load_model(mistral_folder, device="cpu")


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(autoencoder())


def test_each_row_of_a_batch_can_have_its_own_strength(lm, loaded):
    with steer(lm, loaded, {3: torch.tensor([0.0, 8.0])}):
        batch = lm.sample(PROMPT, [0, 0], 10, 0.0)
    for c, text in zip((0.0, 8.0), batch, strict=True):
        with steer(lm, loaded, {3: c}):
            assert text == list(lm.generate(PROMPT, 10))
    assert batch[0] != batch[1]


def test_figures_are_those_of_each_text_alone(lm, loaded):
    feature = int(loaded.sae.encode(lm.residuals(torch.tensor([[*PROMPT, 90, 91]]), LAYER)).indices[0, 3, 0])
    texts = [[90, 91, 92, 93, 94, 95], [90, 91, 300], []]
    found = sweep.measure(lm, loaded, [feature], PROMPT, texts, steer(lm, loaded, {3: 6.0}))
    assert [each.tokens for each in found] == [6, 3, 0]
    for text, each in zip(texts[:2], found, strict=False):
        tokens, n = torch.tensor([PROMPT + text]), len(PROMPT)
        plain = lm.forward(tokens)[0, n - 1 : -1].log_softmax(-1)
        with steer(lm, loaded, {3: 6.0}):
            steered = lm.forward(tokens)[0, n - 1 : -1].log_softmax(-1)
        activations, _ = activations_of(loaded.sae, lm.residuals(tokens, LAYER)[0, n:], torch.tensor([feature]))
        assert each.cross_entropy == pytest.approx(F.nll_loss(plain, tokens[0, n:]).item(), rel=1e-4)
        assert each.kl == pytest.approx((steered.exp() * (steered - plain)).sum(-1).mean().item(), rel=1e-3)
        assert each.activation == pytest.approx(activations.mean().item(), rel=1e-4)
        assert each.rate == pytest.approx((activations > 0).float().mean().item())
    assert found[0].rate > 0
    assert found[0].kl > 0.01
    assert found[2] == Measured(0, 0, 0, 0, 0, 0)


def test_of_several_features_the_strongest_counts_on_each_token(lm, loaded):
    text = list(range(90, 110))
    encoded = loaded.sae.encode(lm.residuals(torch.tensor([PROMPT + text]), LAYER)[0, len(PROMPT) :])
    dense_TF = encoded.dense(loaded.sae.n_features)
    several = (dense_TF > 0).float().mean(0).sort().indices[-3:].tolist()
    (found,) = sweep.measure(lm, loaded, several, PROMPT, [text])
    assert found.activation == pytest.approx(dense_TF[:, several].amax(1).mean().item(), rel=1e-4)
    assert found.rate == pytest.approx((dense_TF[:, several] > 0).any(1).float().mean().item())
    (alone,) = sweep.measure(lm, loaded, several[-1:], PROMPT, [text])
    assert alone.rate < found.rate


def test_without_an_edit_the_divergence_is_zero(lm, loaded):
    (found,) = sweep.measure(lm, loaded, [3], PROMPT, [[90, 91]], nullcontext())
    assert found.kl == 0


def test_nothing_but_empty_texts_has_no_figures(lm, loaded):
    assert sweep.measure(lm, loaded, [3], PROMPT, [[], []]) == [Measured(0, 0, 0, 0, 0, 0)] * 2


@pytest.mark.parametrize(
    ("text", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 8, 4 / 5), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repetition_is_the_share_of_four_grams_that_came_before(text, share):
    assert sweep.repetition(text) == pytest.approx(share)


def test_pooled_figures_weigh_every_token_alike():
    found = sweep.pooled([Measured(1, 4.0, 0.0, 0.0, 1.0, 1.0), Measured(3, 2.0, 0.4, 0.2, 0.0, 0.0)])
    assert found == pytest.approx((4, 2.5, 0.3, 0.15, 0.25, 0.25))
    assert sweep.pooled([Measured(0, 0, 0, 0, 0, 0)]).cross_entropy == 0


def figures(cross_entropy, repetition):
    return Measured(10, cross_entropy, 0.0, repetition, 0.0, 0.0)


def test_fluent_text_costs_and_repeats_little_more_than_the_models_own():
    own = figures(1.5, 0.1)
    assert sweep.is_fluent(own, own)
    assert sweep.is_fluent(figures(1.5 + sweep.MOST_NATS, 0.1), own)
    assert not sweep.is_fluent(figures(1.5 + sweep.MOST_NATS + 0.01, 0.1), own)
    assert not sweep.is_fluent(figures(0.2, 0.1 + sweep.MOST_REPETITION + 0.01), own)
    assert not sweep.is_fluent(figures(1.5, 0.1)._replace(tokens=1), own)  # it ended at once


def test_the_strongest_fluent_setting_may_come_after_one_that_failed_by_chance():
    def strongest(*fluent):
        trials = [Trial([[]], [figures(1 if is_it else 9, 0)]) for is_it in fluent]
        return sweep.strongest_fluent(range(len(fluent)), trials, Trial([[]], [figures(1, 0)]))

    assert strongest(True, False, True, False) == 2
    assert strongest(True, True) == 1
    assert strongest(False, False) is None
    assert strongest(True, False, False, True) == 0  # which passed by chance


def test_the_first_text_which_is_shown_is_fluent_by_itself_too():
    own, first = Trial([[]] * 3, [figures(1, 0)] * 3), Trial([[]] * 3, [figures(3, 0), figures(1, 0), figures(1, 0)])
    last = first._replace(measured=first.measured[::-1])
    assert sweep.is_fluent(first.pooled, own.pooled)
    assert sweep.strongest_fluent([1.0, 2.0], [own, first], own) == 1.0
    assert sweep.strongest_fluent([1.0, 2.0], [own, last], own) == 2.0


@pytest.mark.parametrize("rows", [4, 100])
def test_each_setting_of_a_sweep_has_its_own_figures_however_many_share_a_batch(lm, loaded, monkeypatch, rows):
    monkeypatch.setattr(sweep, "ROWS", rows)
    settings, seeds = [(3, 0.5), (3, 2.0), (3, 8.0), (7, 8.0)], [0, 1, 2]
    trials = Trials(lm, loaded, PROMPT, seeds, max_tokens=6, temperature=0.5)

    def edit(settings_B):
        values = {f: [c if own == f else torch.nan for own, c in settings_B] for f, _ in settings_B}
        return steer(lm, loaded, {f: torch.tensor(c_B) for f, c_B in values.items()})

    found = list(trials.steered(settings, edit, lambda setting: setting[:1]))
    assert len(found) == len(settings)
    for (feature, c), each in zip(settings, found, strict=True):
        with steer(lm, loaded, {feature: c}):
            texts = [list(lm.generate(PROMPT, 6, 0.5, seed=seed)) for seed in seeds]
        alone = sweep.measure(lm, loaded, [feature], PROMPT, texts, steer(lm, loaded, {feature: c}))
        assert each.texts == texts
        for mine, its in zip(each.measured, alone, strict=True):
            assert mine == pytest.approx(its, rel=1e-3, abs=1e-5)
        assert each.pooled == sweep.pooled(each.measured)
    assert found[0].pooled.kl < found[1].pooled.kl < found[2].pooled.kl


def test_the_models_own_texts_have_no_divergence(lm, loaded):
    own = Trials(lm, loaded, PROMPT, [0, 1], max_tokens=6, temperature=0.5).unsteered([3])
    assert own.texts == [list(lm.generate(PROMPT, 6, 0.5, seed=seed)) for seed in (0, 1)]
    assert own.pooled.kl == 0


def test_features_are_read_back_after_the_prompt(lm, loaded):
    tokens_BT, features_S = torch.tensor([[*PROMPT, 90, 91, 92]]), torch.tensor([3, 7])
    dense_TF = loaded.sae.encode(lm.residuals(tokens_BT, LAYER)[0, len(PROMPT) :]).dense(loaded.sae.n_features)
    found = sweep.read_back(lm, loaded, features_S, tokens_BT, len(PROMPT))
    torch.testing.assert_close(found[0], dense_TF[:, features_S])


def test_random_directions_have_the_norms_of_the_rows():
    rows = torch.randn(5, 32) * torch.arange(1, 6)[:, None]
    found = sweep.random_directions(rows, seed=0)
    torch.testing.assert_close(found.norm(dim=1), rows.norm(dim=1))
    assert F.cosine_similarity(found, rows).abs().max() < 0.9
    assert torch.equal(found, sweep.random_directions(rows, seed=0))
    assert not torch.equal(found, sweep.random_directions(rows, seed=1))


@pytest.fixture
def controls_of(lm, loaded):
    """The controls of a sweep where three features are of middle density, one of which never fired."""
    maximum, density = torch.ones(64), torch.full((64,), 0.5)
    density[[5, 9, 20]] = 0.001
    maximum[20] = 0.0
    subject = Subject(lm, loaded, Statistics(maximum, density, None), {})

    def of(coefficients, seed=0):
        found = sweep.with_controls(subject, Edit(coefficients), seed)
        return [(title, edit.coefficients, along) for title, edit, along in found]

    return of


def test_a_sweep_stands_beside_a_random_direction_and_other_features(loaded, controls_of):
    (_, of, none), (_, same, directions), (title, others, none_too) = controls_of({3: 1.0, 4: -2.0})
    assert of == same == {3: 1.0, 4: -2.0}
    assert none is none_too is None
    torch.testing.assert_close(directions.norm(dim=1), loaded.sae.W_dec[[3, 4]].norm(dim=1))
    assert set(others) == {5, 9}
    assert list(others.values()) == [1.0, -2.0]
    assert ", ".join(map(str, others)) in title


def test_other_features_are_as_many_random_ones_that_fire_now_and_then(controls_of):
    def others(seed, *features):
        return tuple(tuple(of) for _, of, _ in controls_of(dict.fromkeys(features, 1.0), seed)[2:])

    assert {others(seed, 3) for seed in range(20)} == {((5,),), ((9,),)}
    assert {others(seed, 3, 4) for seed in range(20)} == {((5, 9),), ((9, 5),)}
    assert others(0, 5) == ((9,),)
    assert others(0, 5, 9) == others(0, 3, 4, 6) == ()  # too few
