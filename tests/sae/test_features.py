"""What is known of features: density, maximum, nearest, logit lens, and the decoder as a whole."""

import pytest
import torch
from torch.nn.functional import normalize

from mistral_sae.files import save_state
from mistral_sae.sae import features
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import Counts, Statistics, decoder_geometry

D, F, V = 16, 50, 30


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sae():
    found = SparseAutoencoder(D, F, 4).requires_grad_(False)
    found.initialize(randn(100, D), seed=0)
    return found


# ---- density and maximum ----


def test_density_and_maximum_are_those_of_the_dense_activations(sae):
    x = randn(90, D, seed=1)
    found = features.measure_statistics(sae, x.split(40))
    dense = sae.encode(x).dense(F)
    torch.testing.assert_close(found.maximum_F, dense.amax(dim=0))
    torch.testing.assert_close(found.density_F, (dense > 0).float().mean(dim=0))
    assert found.tokens == 90


def test_an_active_feature_of_value_zero_did_not_fire():
    counts = Counts(3)
    counts.add(torch.tensor([[2.0, 0.0], [1.0, 0.5]]), torch.tensor([[0, 1], [0, 1]]))
    assert counts.fired_F.tolist() == [2, 1, 0]
    assert counts.statistics().density_F.tolist() == [1.0, 0.5, 0.0]
    assert counts.statistics().maximum_F.tolist() == [2.0, 0.5, 0.0]


def test_statistics_are_measured_once_for_the_same_sources(tmp_path):
    path, calls = tmp_path / "run" / "statistics.safetensors", []

    def measure():
        calls.append(1)
        return Statistics(torch.rand(F), torch.rand(F), 100)

    first = features.cached_statistics(path, {"text": "a", "layer": 1}, measure)
    again = features.cached_statistics(path, {"text": "a", "layer": 1}, measure)
    assert len(calls) == 1
    assert torch.equal(first.maximum_F, again.maximum_F)
    assert torch.equal(first.density_F, again.density_F)
    assert again.tokens == 100
    features.cached_statistics(path, {"text": "b", "layer": 1}, measure)
    assert len(calls) == 2
    path.write_bytes(b"damaged")
    features.cached_statistics(path, {"text": "b", "layer": 1}, measure)
    assert len(calls) == 3
    save_state(path, {"other": torch.zeros(1)}, {})
    features.cached_statistics(path, {"text": "b", "layer": 1}, measure)
    assert len(calls) == 4


def test_a_feature_of_mid_density_fires_more_than_rarely_and_less_than_commonly():
    density = torch.tensor([0.5, 0.001, features.RARE, 0.001, 0.0])
    maximum = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert Statistics(maximum, density, None).mid_density() == [1]


# ---- nearest, and the logit lens ----


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 100])
def test_the_nearest_features_are_those_of_the_largest_cosine_whatever_the_norms(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(features, "CHUNK_BYTES", 4 * F * rows_at_a_time)
    rows = randn(F, D, seed=1)
    unit = normalize(rows, dim=1)
    cosines = unit @ unit.T - 2 * torch.eye(F)
    chosen = [40, 3, 9, 11, 0, 2, 49, 8]
    found = features.nearest(rows * torch.arange(1, F + 1).unsqueeze(1), chosen, 5)
    expected = cosines[chosen].topk(5, dim=1)
    assert [[f for f, _ in pairs] for pairs in found] == expected.indices.tolist()
    torch.testing.assert_close(torch.tensor([[c for _, c in pairs] for pairs in found]), expected.values)


def test_only_features_that_may_be_neighbours_are():
    among = torch.zeros(F, dtype=torch.bool)
    among[[3, 9]] = True
    assert [{f for f, _ in pairs} for pairs in features.nearest(randn(F, D), [3, 20], 5, among)] == [{9}, {3, 9}]
    assert features.nearest(randn(F, D), [], 5) == []


@pytest.mark.parametrize("rows_at_a_time", [1, 100])
def test_the_logit_lens_has_the_tokens_furthest_above_and_below_the_mean(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(features, "CHUNK_BYTES", 4 * V * rows_at_a_time)
    rows, W_DV = randn(6, D), randn(D, V + 2, seed=1)
    W_DV[:, V:] *= 100  # padding beyond the tokenizer's vocabulary
    found = features.logit_lens(lambda x: x @ W_DV, rows, 4, V)
    logits = rows @ W_DV[:, :V]
    logits -= logits.mean(dim=1, keepdim=True)
    for pairs, best in ((found.promoted, logits.topk(4)), (found.suppressed, (-logits).topk(4))):
        assert [[id for id, _ in each] for each in pairs] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([[abs(v) for _, v in each] for each in pairs]), best.values)


# ---- the geometry of the decoder ----


def test_directions_at_right_angles_along_the_axes_are_no_superposition():
    geometry = decoder_geometry(torch.eye(8) * 3)
    assert geometry.features == 8
    assert geometry.nearest_N == (0.0,) * 8
    assert geometry.participation == pytest.approx(1)
    assert geometry.writers_D == (1,) * 8
    assert geometry.effective_dimensions == pytest.approx(8)
    assert geometry.dimensionality_F == pytest.approx((1,) * 8)
    assert geometry.welch == 0


def test_two_opposite_pairs_share_a_dimension_each_and_meet_no_bound_but_their_own():
    geometry = decoder_geometry(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -3.0]]))
    assert geometry.dimensionality_F == pytest.approx((0.5,) * 4)
    assert geometry.welch == pytest.approx((1 / 3) ** 0.5)


def test_three_directions_in_a_plane_reach_the_bound_of_welch():
    angles = torch.arange(3) * 2 * torch.pi / 3
    geometry = decoder_geometry(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert geometry.dimensionality_F == pytest.approx((2 / 3,) * 3)  # Elhage et al.: a triangle
    assert geometry.welch == pytest.approx(0.5)  # and its largest |cosine| is a half


def test_random_directions_measure_as_random_directions_are_said_to():
    geometry = decoder_geometry(torch.randn(3000, 128, generator=torch.Generator().manual_seed(0)))
    assert geometry.median_nearest == pytest.approx(geometry.nearest_random, rel=0.03)
    assert geometry.participation == pytest.approx(geometry.participation_random, rel=0.03)
    assert geometry.effective_dimensions == pytest.approx(128, rel=0.05)


def test_the_nearest_neighbour_is_the_same_in_parts_and_of_any_norm(monkeypatch):
    monkeypatch.setattr(features, "CHUNK_BYTES", 4 * 50 * 7)
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(rows, dim=1)
    expected = (unit @ unit.T - 2 * torch.eye(50)).amax(dim=1)
    found = decoder_geometry(rows * torch.arange(1, 51).unsqueeze(1))
    torch.testing.assert_close(torch.tensor(found.nearest_N), expected)
    assert found.writers_D == tuple((unit.abs() > 0.25).sum(dim=0).tolist())


def test_features_that_never_fired_do_not_count_in_the_geometry():
    rows = torch.eye(4)[[0, 1, 1, 2]]
    fired = torch.tensor([True, True, False, True])
    assert max(decoder_geometry(rows).nearest_N) == pytest.approx(1)
    assert max(decoder_geometry(rows, fired).nearest_N) == pytest.approx(0)
    assert decoder_geometry(rows, torch.tensor([True, False, False, False])) is None
