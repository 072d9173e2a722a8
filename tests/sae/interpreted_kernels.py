"""The Triton kernels under Triton's interpreter, on the CPU, against torch's.

test_fused.py runs this file in a process that has TRITON_INTERPRET=1 before anything imports Triton.
"""

import math

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks import accounting
from mistral_sae.sae import optimizer
from mistral_sae.sae.kernels import fused, portable
from mistral_sae.sae.kernels import step as topk_step
from mistral_sae.sae.kernels.types import MatrixGradient, Rates, RowState
from mistral_sae.sae.trainer import TrainConfig, Trainer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that small tensors do not fit into, and do not fill."""
    monkeypatch.setattr(fused, "ROWS", 4)
    monkeypatch.setattr(fused, "WIDTH", 8)
    monkeypatch.setattr(fused, "COLUMNS", 16)


def run_on(monkeypatch, operations):
    for module in (topk_step, optimizer):
        monkeypatch.setattr(module, "operations", lambda device: operations)


# ---- inner products ----


@pytest.mark.parametrize(("B", "D", "F", "K"), [(3, 21, 11, 5), (2, 16, 9, 1), (2, 7, 6, 6), (1, 1, 1, 1)])
def test_inner_products_equal_torchs(small_tiles, B, D, F, K):
    x, rows = randn(B, D), randn(F, D, seed=1)
    indices = torch.stack([torch.randperm(F, generator=torch.Generator().manual_seed(i))[:K] for i in range(B)])
    found = fused.inner_products(x, indices, rows)
    torch.testing.assert_close(found, torch.einsum("bd,bkd->bk", x, rows[indices]), rtol=1e-6, atol=1e-6)


def test_a_nan_stays_in_the_inner_products_that_it_is_in():
    x, rows = randn(3, 20), randn(5, 20, seed=1)
    rows[2, 7] = torch.nan
    found = fused.inner_products(x, torch.tensor([[0, 2], [1, 3], [2, 4]]), rows)
    assert found.isnan().tolist() == [[False, True], [False, False], [True, False]]


# ---- gradients ----

B, D, F = 9, 21, 7  # of the gradients


def gradient_of(case):
    """A gradient, and all of it in torch's own words: no term for feature 2, one from every token for feature 5."""
    fired = torch.rand(F, B, generator=torch.Generator().manual_seed(3)) < 0.3
    fired[2], fired[5] = False, True
    features, owners = fired.nonzero().T
    vectors, weights = randn(B, D, seed=4), randn(len(owners), seed=5)
    offsets = torch.searchsorted(features, torch.arange(F + 1))
    added = (torch.tensor([2, 4]), randn(2, D, seed=6)) if case == "with rows on top" else None
    if case == "with a NaN":
        vectors[owners[0], 3] = torch.nan
    dense = torch.zeros(F, D).index_add_(0, features, weights.unsqueeze(1) * vectors[owners])
    if added:
        dense[added[0]] += added[1]
    return MatrixGradient(offsets, vectors, owners, weights, added), dense


CASES = ["plain", "with rows on top", "with a NaN"]


@pytest.mark.parametrize("case", CASES)
def test_the_norm_and_the_inner_products_of_a_gradient_equal_torchs(small_tiles, case):
    gradient, dense = gradient_of(case)
    rows = torch.nn.functional.normalize(randn(F, D, seed=7), dim=1)
    along = (rows * dense).sum(dim=1)
    products, squares = fused.row_products(gradient, rows)
    expected, none = portable.row_products(gradient, rows)
    assert none is None
    torch.testing.assert_close(products, expected, equal_nan=True)
    torch.testing.assert_close(squares, dense.square().sum(), equal_nan=True)
    projected = (dense - along.unsqueeze(1) * rows).square().sum()
    for known in (None, squares):
        found = fused.squares(gradient._replace(along=along, squares=known))
        torch.testing.assert_close(found, projected, equal_nan=True)
    torch.testing.assert_close(fused.squares(gradient), portable.squares(gradient), equal_nan=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_step_of_adam_equals_torchs(case, is_decoder):
    gradient, dense = gradient_of(case)
    start = torch.nn.functional.normalize(randn(F, D, seed=7), dim=1)
    if is_decoder:
        gradient = gradient._replace(along=(start * dense).sum(dim=1))
    states = []
    for kernels in (fused, portable):
        copy = None if is_decoder else torch.zeros(F, D, dtype=torch.bfloat16)
        state = RowState(start.clone(), 0.1 * randn(F, D, seed=8), 0.01 * randn(F, D, seed=9).square(), copy)
        kernels.adam_rows(state, gradient, Rates(1e-2, torch.tensor(2.5), torch.tensor(3.0)))
        states.append(state)
    for found, expected in zip(states[0][:3], states[1][:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7, equal_nan=True)
    if not is_decoder:  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(states[0].copy.float(), states[0].parameter, rtol=2**-7, atol=0.0, equal_nan=True)
    if is_decoder and case != "with a NaN":
        torch.testing.assert_close(states[0].parameter.norm(dim=1), torch.ones(F))


def test_moments_in_bfloat16_are_rounded_up_or_down_and_right_on_average():
    n_features, d_model = 40, 60
    nothing = MatrixGradient(
        torch.zeros(n_features + 1, dtype=torch.int64), torch.zeros(1, d_model), torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
    )  # fmt: skip
    found = []
    for step in (0, 0, 1):
        ones = torch.ones(n_features, d_model, dtype=torch.bfloat16)
        state = RowState(torch.ones(n_features, d_model), ones.clone(), ones.clone())
        fused.adam_rows(state, nothing, Rates(0.0, torch.tensor(1.0), torch.tensor(float(step))))
        found.append(state)
    spacing = 2**-8  # of bfloat16 below 1
    for moments, decayed in ((found[0].first, 0.9), (found[0].second, 0.999)):
        low, values = math.floor(decayed / spacing) * spacing, moments.float()
        assert set(values.unique().tolist()) == {low, low + spacing}
        assert values.mean().item() == pytest.approx(decayed, abs=2 * spacing / (n_features * d_model) ** 0.5)
    assert torch.equal(found[0].second, found[1].second)  # the same step, the same noise
    assert not torch.equal(found[0].second, found[2].second)
    up = (found[0].first.float() > 0.9, found[0].second.float() > 0.999)
    assert torch.corrcoef(torch.stack(up).flatten(1).float())[0, 1].abs() < 0.1
    assert up[1].float().std(dim=0).min() > 0  # no column goes one way in all rows


@pytest.mark.parametrize("case", ["plain", "with rows on top"])
def test_the_kernels_do_the_same_every_time(case):
    gradient, _ = gradient_of(case)
    assert torch.equal(fused.squares(gradient), fused.squares(gradient))


def test_products_of_halves_are_as_exact_as_is_said():
    a, b = randn(30, 50), randn(50, 40, seed=1)
    exact = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    assert ((fused.product(a, b) - exact).abs() / scale).max() < 2**-16
    assert torch.equal(fused.product(a, b.T.contiguous().T), fused.product(a, b))
    assert torch.equal(fused.product(a.T.contiguous().T, b), fused.product(a, b))


# ---- a training ----


@pytest.mark.parametrize(("k", "k_aux", "dead", "bf16"), [
    (5, 0, 0, True), (1, 0, 0, False), (32, 0, 0, False), (4, 3, 9, False), (4, 1, 9, True),
])  # fmt: skip
def test_some_steps_of_training_equal_torchs(monkeypatch, k, k_aux, dead, bf16):
    """With dead features whose second loss takes dense products (three of nine a token), and gathered rows (one)."""
    trainers, figures = [], []
    for operations in (portable, fused):
        run_on(monkeypatch, operations)
        config = TrainConfig(12, 32, k, k_aux=k_aux, max_gradient_norm=0.05, dead_after_tokens=10**9)
        trainer = Trainer(config, bf16=bf16)
        trainer.initialize(randn(40, 12))
        for W_enc in (trainer.sae.W_enc, *([trainer.W_enc_bf16] if bf16 else [])):
            W_enc.mul_(0.8)  # else activations have no gradient with K = 1, but for rounding
        trainer.dead = torch.arange(3, 3 + 2 * dead, 2)
        figures.append([trainer.step(randn(10, 12, seed=10 + i), 1e-2) for i in range(3)])
        trainers.append(trainer)
    assert figures[0][0].gradient_norm > 0.05  # or clipping would go untested
    assert bool(figures[0][0].auxk > 0) == bool(dead)
    for found, expected in zip(figures[1], figures[0], strict=True):
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=2e-5, atol=1e-7)
    for name, expected in trainers[0].state().items():
        torch.testing.assert_close(trainers[1].state()[name], expected, rtol=1e-4, atol=2e-6, msg=name)


# ---- accounting ----


@pytest.fixture
def touched(monkeypatch):
    """Bytes that the interpreter loads and stores."""
    count = {"bytes": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting(function, mask_at):
        def counted(self, pointers, *rest):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            count["bytes"] += int(rest[mask_at].data.sum()) * size
            return function(self, pointers, *rest)

        return counted

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting(load, 0))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting(store, 1))
    return count


def test_the_bytes_that_the_accounting_states_are_those_that_the_kernels_touch(touched):
    x, rows, indices = randn(3, 20), randn(5, 20, seed=1), torch.tensor([[0, 2], [1, 3], [2, 4]])
    out = fused.inner_products(x, indices, rows)
    assert touched["bytes"] == accounting.inner_products((x, indices, rows), out)
    for case in CASES[:2]:
        gradient, _ = gradient_of(case)
        tensors = fused._tensors(gradient)
        for own in (None, randn(F, D)):
            touched["bytes"] = 0
            out = fused._row_squares(tensors, own)
            assert touched["bytes"] == accounting.row_squares((tensors, own), out)
        for dtype, along, copy in ((torch.float32, torch.zeros(F), []), (torch.bfloat16, None, [torch.bfloat16])):
            state = [torch.ones(F, D, dtype=kind) for kind in (torch.float32, dtype, dtype, *copy)]
            arguments = (state, tensors, along, torch.ones(4), 1e-3)
            touched["bytes"] = 0
            fused._adam_rows(*arguments)
            assert touched["bytes"] == accounting.adam_rows(arguments, None)
