"""Planted concepts: features that are the neurons, a rotation of them, more than there are dimensions, or nothing."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mistral_sae.analysis.answers import FEATURES, codes_of, monosemanticity, searched, superposition, with_enough
from mistral_sae.analysis.sample import Activity, Texts
from mistral_sae.sae.autoencoder import SparseAutoencoder

D, N, K, CONCEPTS = 24, 4000, 2, 12


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rows_FD: Tensor, *, knows: bool = True) -> tuple[Texts, Activity, SparseAutoencoder]:
    """Residuals that are sums of K rows, some of them concepts, and an autoencoder that knows the rows, or others."""
    generator = torch.Generator().manual_seed(0)
    n_features = len(rows_FD)
    indices = torch.rand(N, n_features, generator=generator).topk(K).indices
    values = 0.5 + torch.rand(N, K, generator=generator)
    z = torch.einsum("nk,nkd->nd", values, rows_FD[indices]) + 0.02 * randn(N, D, seed=1)
    labels = torch.zeros(N, n_features, dtype=torch.bool).scatter_(1, indices, True)[:, :CONCEPTS]
    document = torch.arange(N) // 40
    texts = Texts(
        torch.zeros(0), torch.zeros(0), labels, document, document % 2 == 0, [f"concept {i}" for i in range(CONCEPTS)],
        [str(i) for i in range(N // 40)],
    )  # fmt: skip
    sae = SparseAutoencoder(D, n_features, K).requires_grad_(False)
    sae.W_dec.copy_(rows_FD if knows else normalize(randn(n_features, D, seed=2), dim=1))
    if not knows:
        values, indices = (z @ sae.W_dec.T).topk(K)
    return texts, Activity(z, values.relu(), indices, None), sae


def answers(rows_FD: Tensor, **changed: bool) -> tuple[dict, dict]:
    texts, activity, sae = planted(rows_FD, **changed)
    texts, codes = with_enough(texts), codes_of(activity, sae, seed=0)
    found = searched(codes, texts)
    return monosemanticity(texts, activity, codes, found, sae, seed=0), superposition(texts, activity, sae, seed=0)


def rotation() -> Tensor:
    return torch.linalg.qr(randn(D, D, seed=3))[0]


def test_where_the_features_are_the_neurons_they_are_no_better_than_those():
    monosemantic, superposed = answers(torch.eye(D))
    assert monosemantic["answer"] == "no"
    assert monosemantic["sentence"].startswith("No more than basis directions")
    for code in (FEATURES, "basis directions"):  # which are counted alike
        assert monosemantic["codes"][code]["precise"] == CONCEPTS
    assert superposed["answer"] == "neurons"


def test_where_they_are_a_rotation_they_are_monosemantic_and_not_superposed():
    monosemantic, superposed = answers(rotation())
    assert monosemantic["answer"] == "yes"
    assert superposed["answer"] == "basis"
    assert monosemantic["codes"][FEATURES]["precise"] == CONCEPTS


def test_where_there_are_more_than_dimensions_they_are_both():
    monosemantic, superposed = answers(normalize(randn(4 * D, D, seed=4), dim=1))
    assert monosemantic["answer"] == "yes"
    assert superposed["answer"] == "superposition"
    for row in monosemantic["concepts"]:
        assert row["f1"][FEATURES] == pytest.approx(1, abs=0.1)
        assert row["features"] == 1
        assert row["feature"] == int(row["concept"].split()[1])


def test_where_they_are_random_nothing_is_shown():
    monosemantic, superposed = answers(rotation(), knows=False)
    assert monosemantic["answer"] == "no"
    assert superposed["answer"] == "unclear"
