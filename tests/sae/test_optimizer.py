"""Adam with projection, clipping and unit rows, against torch's own pieces."""

import math

import pytest
import torch

from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels.step import topk_step
from mistral_sae.sae.kernels.types import BETAS, EPSILON, AuxK
from mistral_sae.sae.optimizer import SAEAdam

D, F, K = 24, 200, 6


@pytest.fixture(params=["one block", "blocks of 7 features"])
def blocks(request, monkeypatch):
    if request.param != "one block":
        monkeypatch.setitem(portable.BLOCK_BYTES, "cpu", 7 * D * 4)


def made(z):
    sae = SparseAutoencoder(D, F, K).requires_grad_(False)
    sae.initialize(z, seed=0)
    return sae


def gradients_of(sae, z):
    return topk_step(z, sae.weights, sae.k)


def batches():
    return torch.randn(5, 64, D, generator=torch.Generator().manual_seed(0))


def test_five_steps_equal_torch_adam_after_projection_and_clipping(blocks):
    ours = made(batches()[0])
    adam = SAEAdam(ours)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in (ours.W_enc.T, ours.b_enc, ours.W_dec, ours.b_dec)]
    reference = torch.optim.Adam(theirs, lr=1e-2, betas=BETAS, eps=EPSILON)
    for z in batches():
        step = gradients_of(ours, z)
        for p, gradient in zip(theirs, (step.W_enc.whole(), step.b_enc, step.W_dec.whole(), step.b_dec), strict=True):
            p.grad = gradient.clone()
        W_dec = theirs[2]
        W_dec.grad -= (W_dec.grad * W_dec.data).sum(dim=1, keepdim=True) * W_dec.data
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs, 0.05)
        reference.step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)

        norm = adam.step(step, 1e-2, 0.05)

        assert expected_norm > 0.05  # or clipping would go untested
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)
        for p, q in zip(theirs, (ours.W_enc.T, ours.b_enc, ours.W_dec, ours.b_dec), strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-5, atol=1e-6)


def test_a_small_gradient_is_not_clipped():
    z = batches()[0]
    clipped, free = made(z), made(z)
    SAEAdam(clipped).step(gradients_of(clipped, z), 1e-2, 1e3)
    SAEAdam(free).step(gradients_of(free, z), 1e-2, 1e6)
    assert torch.equal(clipped.W_dec, free.W_dec)


@pytest.mark.parametrize("of_dead", [False, True], ids=["sparse", "with gradients of dead features"])
def test_one_pass_of_a_small_gradient_equals_two(of_dead, blocks, monkeypatch):
    """Where a bound says that nothing is clipped the norm is had on the way; all else is the same, bit for bit."""
    z = batches()[0]
    one, two = made(z), made(z)
    aux = AuxK(torch.arange(0, F, 5), K, 1 / 32) if of_dead else None
    step = topk_step(z, one.weights, K, aux)
    bounds = [portable.most_squares(gradient) for gradient in (step.W_enc, step.W_dec)]
    assert all(portable.squares(g) < bound for g, bound in zip((step.W_enc, step.W_dec), bounds, strict=True))
    clipping = math.sqrt(sum(bounds) + step.b_enc.square().sum() + step.b_dec.square().sum()) * 1.01
    norm = SAEAdam(one).step(step, 1e-2, clipping)
    monkeypatch.setattr(portable, "most_squares", lambda gradient: torch.tensor(math.inf))
    assert norm == SAEAdam(two).step(topk_step(z, two.weights, K, aux), 1e-2, clipping)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_bfloat16_moments_take_half_the_memory_and_stay_close():
    exact, rounded = made(batches()[0]), made(batches()[0])
    adams = SAEAdam(exact), SAEAdam(rounded, torch.bfloat16)
    start = exact.W_dec.clone()
    for sae, adam in zip((exact, rounded), adams, strict=True):
        for i in range(50):
            adam.step(gradients_of(sae, batches()[i % 5]), 1e-3, 1.0)
    moved = (exact.W_dec - start).norm()
    assert (exact.W_dec - rounded.W_dec).norm() < 0.2 * moved
    assert all(t.dtype == torch.bfloat16 for t in (*adams[1].first.values(), *adams[1].second.values()))


def test_bfloat16_moments_follow_changes_too_small_for_bfloat16():
    """0.999 * v + 0.001 * g^2 rounds to v wherever the two are close, unless rounding is stochastic."""
    x = torch.full((20_000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    rounded = portable.round_stochastically(x)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.float().mean().item() == pytest.approx(x[0].item(), abs=2e-4)


def test_a_step_rounds_both_moments_stochastically():
    """A hundred steps without a gradient leave 0.999^100 of the second moment: each alone is too small for bfloat16."""
    sae = made(batches()[0])
    adam = SAEAdam(sae, torch.bfloat16)
    gradients = gradients_of(sae, batches()[0])
    nothing = {name: torch.zeros_like(getattr(gradients, name)) for name in ("b_enc", "b_dec")}
    nothing |= {
        "W_enc": gradients.W_enc._replace(weights=torch.zeros_like(gradients.W_enc.weights)),
        "W_dec": gradients.W_dec._replace(weights=torch.zeros_like(gradients.W_dec.weights), along=torch.zeros(F)),
    }
    for moments in (adam.first, adam.second):
        for tensor in moments.values():
            tensor.fill_(1.0)
    for _ in range(100):
        adam.step(gradients._replace(**nothing), 0.0, 1.0)
    assert adam.second["W_enc"].float().mean().item() == pytest.approx(0.999**100, abs=0.01)
    assert adam.first["W_enc"].float().abs().max() < 1e-3


def test_other_moments_are_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        SAEAdam(SparseAutoencoder(D, F, K), torch.float16)
