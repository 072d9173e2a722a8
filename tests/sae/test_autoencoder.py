"""The autoencoder's maths."""

import pytest
import torch

from mistral_sae.sae.autoencoder import EPSILON, SparseAutoencoder, geometric_median, normalize_rows

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
