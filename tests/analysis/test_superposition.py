"""Planted residuals whose features are the neurons, a rotation of them, more than there are dimensions, or none."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mistral_sae.analysis.superposition import fits, interference, rivals, unexplained, verdict
from mistral_sae.sae.features import decoder_geometry

D, N, K = 32, 3000, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_sums(rows_FD: Tensor, noise: float = 0.02) -> Tensor:
    """Residuals (N, D) that are sums of K rows each with positive weights."""
    generator = torch.Generator().manual_seed(1)
    which = torch.rand(N, len(rows_FD), generator=generator).topk(K).indices
    weights = 0.5 + torch.rand(N, K, generator=generator)
    return torch.einsum("nk,nkd->nd", weights, rows_FD[which]) + noise * randn(N, D, seed=2)


def rotation() -> Tensor:
    return torch.linalg.qr(randn(D, D, seed=3))[0]


def answer(rows_FD: Tensor, z_ND: Tensor) -> tuple[str, str]:
    dictionaries = {"features": rows_FD} | rivals(z_ND, len(rows_FD), seed=0)
    found = fits(z_ND, dictionaries, K, torch.arange(N) // 10, seed=0)
    return verdict(decoder_geometry(rows_FD), D, found, "features")


def test_principal_components_are_of_what_differs_between_tokens_and_not_of_their_mean():
    z_ND = randn(N, D) * torch.linspace(1, 3, D)
    for mean in (0.0, 100.0):
        first = rivals(z_ND + mean, n_directions=1, seed=0)["principal components"][0]
        assert first.abs().argmax() >= D - 3
        assert first[: D // 2].abs().max() < 0.2


def test_features_that_are_the_neurons_are_no_superposition():
    word, sentence = answer(torch.eye(D), sparse_sums(torch.eye(D)))
    assert word == "neurons"
    assert sentence.startswith("No: 32 features lie along the neurons")


def test_a_rotation_is_no_superposition_either_but_no_neuron_is_a_feature():
    word, sentence = answer(rotation(), sparse_sums(rotation()))
    assert word == "basis"
    assert "need no superposition, though each spreads over" in sentence


def test_more_features_than_dimensions_are_superposition():
    planted = normalize(randn(4 * D, D, seed=4), dim=1)
    word, sentence = answer(planted, sparse_sums(planted))
    assert word == "superposition"
    assert sentence.startswith("Yes, as far as a sparse code can tell: 128 features in 32 dimensions")


@pytest.mark.parametrize("residuals", ["of no features", "of a rotation"])
def test_as_many_random_directions_show_nothing(residuals):
    z_ND = randn(N, D, seed=5) if residuals == "of no features" else sparse_sums(rotation())
    word, sentence = answer(normalize(randn(4 * D, D, seed=6), dim=1), z_ND)
    assert word == "unclear"
    assert sentence.startswith("Not shown")


def test_a_basis_is_fitted_by_its_largest_coefficients_exactly():
    z_ND = randn(50, D)
    expected = z_ND.square().sort(dim=1).values[:, : D - K].sum(dim=1)
    torch.testing.assert_close(unexplained(z_ND, 3 * torch.eye(D), K), expected, rtol=1e-4, atol=1e-4)


def test_directions_that_hold_the_residual_leave_nothing_even_where_two_are_the_same():
    rows = randn(2 * D, D, seed=7)
    rows[1] = 2 * rows[0]
    z_ND = rows[:20] * 3
    assert float(unexplained(z_ND, rows, K).max()) < 1e-3
    assert float(unexplained(z_ND, rows, 10 * D).max()) < 1e-3  # more than there are dimensions


def test_features_that_never_meet_interfere_only_where_they_are_moved_together():
    W = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])  # 0 and 1 alike, 2 and 3 alike
    indices = torch.tensor([[0, 2], [1, 3]]).repeat(200, 1)
    found = interference(W, torch.ones(400, 2), indices, seed=0)
    assert found.together == found.noise == 0
    assert found.apart > 0.2
    assert found.random == 0.25


def test_a_feature_that_shares_its_direction_reads_as_much_of_the_other_as_of_itself():
    W = torch.tensor([[1.0, 0], [1, 0]])
    found = interference(W, torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0, 1], [0, 1]]), seed=0)
    assert found.noise == pytest.approx((2 / 6) ** 0.5)
