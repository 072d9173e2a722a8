"""The autoencoder's maths, and that training recovers known features."""

import math

import pytest
import torch

from mistral_sae.sae import trainer as trainer_module
from mistral_sae.sae.autoencoder import EPSILON, SparseAutoencoder, geometric_median, normalize_rows
from mistral_sae.sae.trainer import Trainer

D, F, K = 16, 80, 5


@pytest.fixture
def sae():
    made = SparseAutoencoder(D, F, K)
    made.initialize(torch.randn(200, D, generator=torch.Generator().manual_seed(0)), seed=1)
    with torch.no_grad():
        made.b_enc.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return made


@pytest.fixture
def x():
    return 3 + 7 * torch.randn(50, D, generator=torch.Generator().manual_seed(3))


def test_the_module_computes_the_equations_of_its_docstring(sae, x):
    mu, s = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    z = (x - mu) / (s + EPSILON)
    pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = pre.topk(K, dim=1)
    f = torch.zeros(50, F).scatter(1, kept.indices, kept.values.relu())
    x_hat = (f @ sae.W_dec + sae.b_dec) * s + mu

    torch.testing.assert_close(sae.encode(x).dense(F), f)
    torch.testing.assert_close(sae(x), x_hat)


def test_encoding_does_not_depend_on_the_residuals_scale_and_offset(sae, x):
    torch.testing.assert_close(sae.encode(5 * x + 2).dense(F), sae.encode(x).dense(F), rtol=1e-3, atol=1e-4)


def test_at_most_k_features_are_active_and_none_is_negative(sae, x):
    encoded = sae.encode(x)
    assert encoded.values.shape == encoded.indices.shape == (50, K)
    assert (encoded.values >= 0).all()
    assert ((encoded.dense(F) > 0).sum(dim=1) <= K).all()


def test_leading_dimensions_are_kept(sae, x):
    rows = x.view(5, 10, D)
    assert sae(rows).shape == rows.shape
    torch.testing.assert_close(sae(rows).flatten(0, 1), sae(x))
    assert sae.encode(rows).dense(F).shape == (5, 10, F)


def test_gradients_flow_through_the_module(sae, x):
    loss = (sae(x) - x).square().sum()
    loss.backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        gradient = getattr(sae, name).grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


def test_initialization_is_unit_rows_transposed_encoder_and_geometric_median(x):
    made = SparseAutoencoder(D, F, K)
    made.initialize(x, seed=4)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(made.W_enc, made.W_dec.T)
    assert torch.equal(made.b_enc, torch.zeros(F))
    torch.testing.assert_close(made.b_dec.detach(), geometric_median(x))
    again = SparseAutoencoder(D, F, K)
    again.initialize(x, seed=4)
    assert torch.equal(again.W_dec, made.W_dec)


def test_the_geometric_median_resists_an_outlier_that_moves_the_mean():
    x = torch.cat([torch.randn(101, D, generator=torch.Generator().manual_seed(5)), torch.full((1, D), 1e4)])
    assert geometric_median(x).norm() < 1.5 < x.mean(dim=0).norm()


def test_rows_are_normalized_over_the_width_not_over_the_features():
    W_dec = torch.randn(F, D)
    normalize_rows(W_dec)
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize(("k", "options", "message"), [
    (0, {}, "K must lie"), (F + 1, {}, "K must lie"),
    (K, {"activation": "gelu"}, "activation"), (K, {"normalize": "batch_norm"}, "normalize"),
])  # fmt: skip
def test_impossible_sizes_and_variants_are_refused(k, options, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(D, F, k, **options)


def make_trainer(d_model, n_features, k, **changes):
    options = {"k_aux": d_model // 2, "auxk_coefficient": 1 / 32, "dead_after_tokens": 50_000, "max_gradient_norm": 1.0}
    return Trainer(d_model, n_features, k, **options | changes)


def test_training_recovers_a_known_dictionary_in_superposition():
    """256 directions in 64 dimensions, 4 of them active at a time: every one is found by some feature."""
    true_features, width, active = 256, 64, 4
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(true_features, width, generator=generator), dim=1)

    def sample(tokens):
        chosen = torch.rand(tokens, true_features, generator=generator).topk(active, dim=1).indices
        strength = 1 + torch.rand(tokens, active, generator=generator)
        return torch.einsum("bk,bkd->bd", strength, directions[chosen])

    trainer = make_trainer(width, true_features, active)
    trainer.initialize(sample(4096), seed=0)
    steps = 3000
    for step in range(steps):
        trainer.step(sample(512), 3e-3 * min(1, (steps - step) / (0.3 * steps)))
        if step % 50 == 0:
            trainer.find_dead()

    # The autoencoder sees the directions without their mean over the width, which standardising removes
    centered = torch.nn.functional.normalize(directions - directions.mean(dim=1, keepdim=True), dim=1)
    best = (centered @ trainer.sae.W_dec.T).max(dim=1).values
    print(f"mean best cosine {best.mean():.4f}, worst {best.min():.4f}")
    assert best.mean() >= 0.99


def test_decoder_rows_keep_unit_norm_and_dead_features_are_counted_in_tokens():
    trainer = make_trainer(D, F, K, dead_after_tokens=250)
    x = torch.randn(100, D, generator=torch.Generator().manual_seed(6))
    trainer.initialize(x, seed=0)
    trainer.sae.b_enc[:10] = -1e6  # these never fire
    for _ in range(2):
        trainer.step(x, 1e-3)
        assert not set(trainer.find_dead().tolist()) & set(range(10))
    trainer.step(x[:40], 1e-3)  # 240 tokens, and then 280
    assert len(trainer.find_dead()) == 0
    trainer.step(x[:40], 1e-3)
    assert set(range(10)) <= set(trainer.find_dead().tolist())
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(F))
    assert math.isclose(trainer.firings.sum().item(), 280 * K, rel_tol=0.05)
    assert (trainer.firings[:10] == 0).all()


def test_the_auxiliary_loss_revives_dead_features():
    def dead_at_the_end(coefficient):
        generator = torch.Generator().manual_seed(7)
        trainer = make_trainer(D, F, K, dead_after_tokens=1000, auxk_coefficient=coefficient)
        trainer.initialize(torch.randn(1000, D, generator=generator), seed=0)
        trainer.sae.b_enc[:40] = -3.0
        for _ in range(300):
            trainer.step(torch.randn(200, D, generator=generator), 3e-3)
            trainer.find_dead()
        return len(trainer.dead)

    assert dead_at_the_end(0.0) >= 25
    assert dead_at_the_end(1 / 32) <= 10


def test_a_trainer_continues_bit_for_bit_from_its_state():
    batches = torch.randn(6, 100, D, generator=torch.Generator().manual_seed(8))
    through = make_trainer(D, F, K, dead_after_tokens=200)
    through.initialize(batches[0], seed=0)
    for i, x in enumerate(batches):
        if i == 3:
            state = {name: tensor.clone() for name, tensor in through.state().items()}
        through.step(x, 1e-2)
        through.find_dead()
    continued = make_trainer(D, F, K, dead_after_tokens=200)
    continued.load(state)
    for x in batches[3:]:
        continued.step(x, 1e-2)
        continued.find_dead()
    for name, tensor in through.state().items():
        assert torch.equal(continued.state()[name], tensor), name


def test_the_second_loss_looks_at_a_bounded_number_of_dead_features(monkeypatch):
    seen, topk_step = [], trainer_module.topk_step
    monkeypatch.setattr(trainer_module, "topk_step", lambda *args: (seen.append(args[6]), topk_step(*args))[1])
    trainer = Trainer(
        8, 64, 4, k_aux=8, auxk_coefficient=1 / 32, dead_after_tokens=1, max_gradient_norm=1.0, auxk_features=5
    )
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    trainer.initialize(x, 0)
    trainer.since_fired.fill_(100)
    assert len(trainer.find_dead()) == 64
    trainer.step(x, 1e-3)
    assert seen[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pays", [False, True])
def test_the_product_is_in_bfloat16_where_that_pays(monkeypatch, pays):
    monkeypatch.setattr(trainer_module, "bf16_pays", lambda device: pays)
    options = {"k_aux": 8, "auxk_coefficient": 1 / 32, "dead_after_tokens": 9, "max_gradient_norm": 1.0}
    assert Trainer(8, 64, 4, **options).bf16 is pays
    assert Trainer(8, 64, 4, **options, bf16=not pays).bf16 is not pays
