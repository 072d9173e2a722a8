"""Each architecture's loss and gradients against dense autograd, and what it recovers of a planted dictionary."""

import pytest
import torch
from test_kernels import random_parameters, relative_error
from torch import Tensor

from mistral_sae.sae import architectures
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import Metadata
from mistral_sae.sae.checkpoint import load_sae, save_sae
from mistral_sae.sae.kernels.types import AuxK, Step, Weights
from mistral_sae.sae.trainer import TrainConfig, Trainer

B, D, F, K = 33, 24, 130, 3
CASES = [(B, D, F, K), (1, 8, 48, 3), (9, 8, 16, 16)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def leaves_of(D: int, F: int) -> list[Tensor]:
    return [p.clone().requires_grad_() for p in random_parameters(D, F)]


def variance_of(z: Tensor) -> Tensor:
    return (z - z.mean(dim=0)).square().sum().clamp_min(1e-12)


def same_gradients(step: Step, leaves: list[Tensor]) -> None:
    W_enc, b_enc, W_dec, b_dec = (leaf.grad for leaf in leaves)
    assert relative_error(step.W_enc.whole().T, W_enc) < 1e-5
    assert relative_error(step.b_enc, b_enc) < 1e-5
    assert relative_error(step.W_dec.whole(), W_dec) < 1e-5
    assert relative_error(step.b_dec, b_dec) < 1e-5
    if step.W_dec.along is not None:
        torch.testing.assert_close(step.W_dec.along, (W_dec * leaves[2]).sum(dim=1), atol=1e-5, rtol=1e-4)


def stored(leaves: list[Tensor]) -> Weights:
    W_enc, *others = (leaf.detach() for leaf in leaves)
    return Weights(W_enc.T.contiguous().T, *others)


def batch_topk(pre: Tensor, k: int) -> Tensor:
    active = pre.relu().flatten()
    kept = active.topk(k * len(pre)).indices
    return torch.zeros_like(active).scatter(0, kept, active[kept]).view_as(pre)


@pytest.mark.parametrize("ends", [None, (5, 8, 16)])
@pytest.mark.parametrize(("B", "D", "F", "K"), CASES)
def test_batchtopk_and_matryoshka_equal_dense_autograd(B, D, F, K, ends, monkeypatch):
    monkeypatch.setattr(architectures, "SLOTS", F)  # no token is cut
    z, leaves = randn(B, D), leaves_of(D, F)
    W_enc, b_enc, W_dec, b_dec = leaves
    f = batch_topk((z - b_dec) @ W_enc + b_enc, K)
    prefixes = [F] if ends is None else [*(end for end in ends if end < F), F]
    losses = [(z - f[:, :n] @ W_dec[:n] - b_dec).square().sum() / variance_of(z) for n in prefixes]
    loss = torch.stack(losses).mean()
    loss.backward()

    given = None if ends is None else torch.tensor(prefixes)
    step, least = architectures.batchtopk_step(z, stored(leaves), K, ends=given)
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert step.normalized_mse.item() == pytest.approx(losses[-1].item(), rel=1e-5)
    assert step.l0.item() == pytest.approx(((f > 0).sum() / B).item())
    if K < F:
        assert least.item() == pytest.approx(f[f > 0].min().item())
    same_gradients(step, leaves)


def test_matryoshka_with_dead_features_is_the_sum_of_both_losses():
    z, leaves = randn(B, D), leaves_of(D, F)
    weights, ends = stored(leaves), torch.tensor([20, F])
    dead = torch.arange(0, F, 3)
    aux = AuxK(dead, 7, 1 / 32)
    both, _ = architectures.batchtopk_step(z, weights, K, aux, ends)
    alone, _ = architectures.batchtopk_step(z, weights, K, None, ends)
    plain, _ = architectures.batchtopk_step(z, weights, K, aux)  # AuxK sees the whole error in both
    without, _ = architectures.batchtopk_step(z, weights, K)
    assert both.loss.item() == pytest.approx((alone.loss + both.auxk / 32).item(), rel=1e-5)
    torch.testing.assert_close(both.auxk, plain.auxk)
    for name in ("W_enc", "W_dec"):
        found = getattr(both, name).whole() - getattr(alone, name).whole()
        torch.testing.assert_close(
            found, getattr(plain, name).whole() - getattr(without, name).whole(), atol=1e-6, rtol=1e-4
        )


def test_a_token_may_have_many_features_and_another_none():
    z = torch.cat([randn(4, D), torch.zeros(4, D)])
    weights = stored(leaves_of(D, F))._replace(b_dec=torch.zeros(D), b_enc=torch.zeros(F))
    step, _ = architectures.batchtopk_step(z, weights, K)
    active = (step.values > 0).sum(dim=1)
    assert active[4:].sum() == 0
    assert active[:4].float().mean() == pytest.approx(2 * K, abs=0.5)


@pytest.mark.parametrize(("B", "D", "F", "K"), CASES)
def test_relu_equals_dense_autograd_and_leaves_the_norms_free(B, D, F, K):
    z, leaves = randn(B, D), leaves_of(D, F)
    leaves[2].data.mul_(torch.linspace(0.5, 2, F).unsqueeze(1))
    W_enc, b_enc, W_dec, b_dec = leaves
    f = ((z - b_dec) @ W_enc + b_enc).relu()
    squared = (z - f @ W_dec - b_dec).square().sum()
    loss = (squared + 0.7 * (f * W_dec.norm(dim=1)).sum()) / variance_of(z)
    loss.backward()
    step = architectures.relu_step(z, stored(leaves), torch.tensor(0.7))
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert step.normalized_mse.item() == pytest.approx((squared / variance_of(z)).item(), rel=1e-5)
    assert step.W_dec.along is None
    same_gradients(step, leaves)


class StraightThrough(torch.autograd.Function):
    """JumpReLU and its number of active features with the pseudo-derivatives of the paper, equations 11 and 12."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold), (pre > threshold).float()

    @staticmethod
    def backward(ctx, of_f, of_count):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).float()
        of_threshold = -(threshold / ctx.bandwidth) * near * of_f - near * of_count / ctx.bandwidth
        return of_f * (pre > threshold), of_threshold, None


@pytest.mark.parametrize(("B", "D", "F", "K"), CASES)
def test_jumprelu_equals_dense_autograd_with_the_papers_pseudo_derivatives(B, D, F, K):
    z, leaves = randn(B, D), leaves_of(D, F)
    W_enc, b_enc, W_dec, b_dec = leaves
    threshold = torch.linspace(0.1, 0.6, F).requires_grad_()
    f, active = StraightThrough.apply((z - b_dec) @ W_enc + b_enc, threshold, 0.4)
    loss = ((z - f @ W_dec - b_dec).square().sum() + 0.3 * active.sum()) / variance_of(z)
    loss.backward()
    step = architectures.jumprelu_step(z, stored(leaves), threshold.detach(), torch.tensor(0.3), 0.4)
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(step.threshold, threshold.grad) < 1e-5
    same_gradients(step, leaves)


def test_nested_sizes_halve_and_end_with_all_features():
    assert architectures.nested_sizes(1000, 4).tolist() == [125, 250, 500, 1000]
    assert architectures.nested_sizes(3, 5).tolist() == [1, 3]


@pytest.mark.parametrize("keeps", [True, False])
def test_at_first_each_feature_fires_as_often_and_the_reconstruction_is_of_the_best_scale(keeps):
    z = randn(200, D)
    sae = SparseAutoencoder(D, F, K, activation="jumprelu" if keeps else "relu").requires_grad_(False)
    sae.initialize(z, seed=0)
    threshold, scale = architectures.equal_thresholds(sae.weights, z, 13, keeps=keeps)
    sae.W_enc.mul_(scale)
    (sae.threshold if keeps else sae.b_enc).copy_(threshold if keeps else -threshold)
    pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = torch.where(pre > (sae.threshold if keeps else 0), pre, 0)
    often = (f > 0).sum(dim=0)
    assert (often - 20).abs().max() <= 1, "13 of 130 features are a tenth, and 200 tokens there are"
    z_hat = f @ sae.W_dec
    # But for what lies on a threshold and fires by rounding
    torch.testing.assert_close((z_hat * (z - sae.b_dec)).sum(), z_hat.square().sum(), rtol=0.02, atol=0.0)


def trained(architecture: str) -> Trainer:
    """After some steps on standardised noise."""
    sizes = {"sparsity_coefficient": 0.3, "bandwidth": 0.3, "matryoshka_levels": 3, "train_tokens": 2000}
    trainer = Trainer(TrainConfig(D, F, K, architecture, dead_after_tokens=100, k_aux=4, batch_size=100, **sizes))
    x = randn(100, D)
    trainer.initialize(x)
    for _ in range(20):
        trainer.step(x, 1e-2)
        trainer.find_dead()
    return trainer


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_sae_lens_gets_what_each_architecture_trained(architecture, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = trained(architecture).sae, 3 * randn(50, D) + 1
    save_sae(tmp_path, sae, Metadata("m", "blocks.3.hook_resid_post", 3, True, 16, None))
    theirs, again = sae_lens.SAE.load_from_disk(tmp_path, device="cpu"), load_sae(tmp_path).sae
    encoded = sae.encode(x)
    dense = encoded.dense(F)
    assert (dense > 0).any()
    torch.testing.assert_close(theirs.encode(x).to_dense(), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.encode(x).dense(F), dense, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(theirs(x), sae.decode(encoded), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", architectures.PENALIZED)
def test_a_higher_penalty_leaves_fewer_features(architecture):
    def active(coefficient: float) -> float:
        sizes = {"bandwidth": 0.3, "train_tokens": 6000, "batch_size": 100}
        trainer = Trainer(TrainConfig(D, F, K, architecture, sparsity_coefficient=coefficient, **sizes))
        x = randn(100, D)
        trainer.initialize(x)
        return float(torch.stack([trainer.step(x, 3e-3).l0 for _ in range(60)])[-1])

    assert active(3.0) < 0.7 * active(0.3)
