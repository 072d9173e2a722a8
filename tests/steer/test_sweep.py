"""Samples in batches, and what is measured of them."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_steering import LAYER, autoencoder, loaded_of

from mistral_sae.model.language_model import load
from mistral_sae.steer import sweep
from mistral_sae.steer.steering import activations_of, steer
from mistral_sae.steer.sweep import Measured, Setting

PROMPT = [1, 50, 60]


@pytest.fixture(scope="module")
def lm(mistral_folder):
    return load(mistral_folder, device="cpu")


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(autoencoder())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_has_the_texts_that_are_generated_one_by_one(lm, loaded, temperature):
    with steer(lm, loaded, {3: 5.0}):
        batch = sweep.sample(lm, PROMPT, [0, 7, 7], 10, temperature)
        assert batch == [list(lm.generate(PROMPT, 10, temperature, seed=seed)) for seed in (0, 7, 7)]
    assert (batch[0] == batch[1]) == (temperature == 0)


def test_a_text_ends_where_the_model_ends_it_and_the_others_go_on(lm, monkeypatch):
    whole = sweep.sample(lm, PROMPT, [0, 1], 10, 1.0)
    monkeypatch.setattr(lm.tokenizer, "eos_id", whole[0][4])
    found = sweep.sample(lm, PROMPT, [0, 1], 10, 1.0)
    assert found[0] == whole[0][:4]
    assert found[1] == whole[1]


def test_each_row_of_a_batch_can_have_its_own_strength(lm, loaded):
    with steer(lm, loaded, {3: torch.tensor([0.0, 8.0])}):
        batch = sweep.sample(lm, PROMPT, [0, 0], 10, 0.0)
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
    (found,) = sweep.measure(lm, loaded, several, PROMPT, [text], nullcontext())
    assert found.activation == pytest.approx(dense_TF[:, several].amax(1).mean().item(), rel=1e-4)
    assert found.rate == pytest.approx((dense_TF[:, several] > 0).any(1).float().mean().item())
    (alone,) = sweep.measure(lm, loaded, several[-1:], PROMPT, [text], nullcontext())
    assert alone.rate < found.rate


def test_without_an_edit_the_divergence_is_zero(lm, loaded):
    (found,) = sweep.measure(lm, loaded, [3], PROMPT, [[90, 91]], nullcontext())
    assert found.kl == 0


def test_nothing_but_empty_texts_has_no_figures(lm, loaded):
    assert sweep.measure(lm, loaded, [3], PROMPT, [[], []], nullcontext()) == [Measured(0, 0, 0, 0, 0, 0)] * 2


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


def test_fluent_text_costs_little_more_than_the_models_own_and_repeats_itself_little_more():
    own = figures(1.5, 0.1)
    assert sweep.is_fluent(own, own)
    assert sweep.is_fluent(figures(1.5 + sweep.MOST_NATS, 0.1), own)
    assert not sweep.is_fluent(figures(1.5 + sweep.MOST_NATS + 0.01, 0.1), own)
    assert not sweep.is_fluent(figures(0.2, 0.1 + sweep.MOST_REPETITION + 0.01), own)


def test_the_strongest_fluent_setting_may_come_after_one_that_failed_by_chance():
    def settings(*fluent):
        return [Setting(float(i), [], figures(1, 0), is_it) for i, is_it in enumerate(fluent)]

    assert sweep.strongest_fluent(settings(True, False, True, False)).scale == 2
    assert sweep.strongest_fluent(settings(True, True)).scale == 1
    assert sweep.strongest_fluent(settings(False, False)) is None


@pytest.mark.parametrize("rows", [4, 100])
def test_a_sweep_gives_each_strength_its_own_figures_however_many_share_a_batch(lm, loaded, monkeypatch, rows):
    monkeypatch.setattr(sweep, "ROWS", rows)
    scales, seeds = [0.5, 2.0, 8.0], [0, 1, 2]
    options = {"prompt_ids": PROMPT, "seeds": seeds, "max_tokens": 6, "temperature": 0.5}
    found = list(
        sweep.sweep(lm, loaded, [3], lambda c: steer(lm, loaded, {3: c}), scales, figures(7.0, 0.0), **options)
    )
    assert [each.scale for each in found] == scales
    for scale, each in zip(scales, found, strict=True):
        with steer(lm, loaded, {3: scale}):
            texts = [list(lm.generate(PROMPT, 6, 0.5, seed=seed)) for seed in seeds]
        alone = sweep.pooled(sweep.measure(lm, loaded, [3], PROMPT, texts, steer(lm, loaded, {3: scale})))
        assert each.text == texts[0]
        assert each.measured == pytest.approx(alone, rel=1e-3, abs=1e-5)
        assert each.fluent == sweep.is_fluent(alone, figures(7.0, 0.0))
    assert found[0].measured.kl < found[1].measured.kl < found[2].measured.kl


def test_random_directions_have_the_norms_of_the_rows():
    rows = torch.randn(5, 32) * torch.arange(1, 6)[:, None]
    found = sweep.random_directions(rows, seed=0)
    torch.testing.assert_close(found.norm(dim=1), rows.norm(dim=1))
    assert F.cosine_similarity(found, rows).abs().max() < 0.9
    assert torch.equal(found, sweep.random_directions(rows, seed=0))
    assert not torch.equal(found, sweep.random_directions(rows, seed=1))
