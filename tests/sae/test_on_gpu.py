"""What only a GPU can show: its kernels equal the CPU's, a step waits for nothing and is the same every time."""

from importlib.util import find_spec

import pytest
import torch

from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.kernels.types import MatrixGradient, Rates, RowState
from mistral_sae.sae.trainer import TrainConfig, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
GPU = torch.device("cuda")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_gpu(tensors):
    """A tuple of the same kind, its tensors on the GPU."""
    return tensors._replace(**{
        name: value.to(GPU) for name, value in tensors._asdict().items() if isinstance(value, torch.Tensor)
    })  # fmt: skip


@pytest.fixture
def gradient():
    """Of 600 features, some of which never fired and one of which fired everywhere, at the width of Mistral 7B."""
    fired = torch.rand(600, 100, generator=torch.Generator().manual_seed(1)) < 0.02
    fired[7] = True
    features, owners = fired.nonzero().T.contiguous()
    offsets = torch.searchsorted(features, torch.arange(601))
    along = 0.1 * randn(600, seed=4)
    return MatrixGradient(offsets, randn(100, 4096, seed=2), owners, randn(len(owners), seed=3), along=along)


def trained(device, steps=4, **changes):
    config = TrainConfig(96, 1024, 8, **{"k_aux": 48, "max_gradient_norm": 0.1, "dead_after_tokens": 10**9} | changes)
    trainer = Trainer(config, device, bf16=device != "cpu")
    trainer.initialize(randn(300, 96).to(device))
    trainer.dead = torch.arange(0, 200, 2, device=device)
    torch.manual_seed(0)  # moments of the biases are rounded at random
    figures = [torch.stack(trainer.step(randn(200, 96, seed=i).to(device), 1e-3)) for i in range(steps)]
    return trainer, torch.stack(figures).cpu() if figures else None


def test_a_gpu_from_ampere_on_runs_tritons_kernels():
    newer = torch.cuda.get_device_capability() >= (8, 0) and find_spec("triton") is not None
    assert (operations(GPU) is not portable) == newer


def test_inner_products_equal_the_cpus():
    x, rows = randn(30, 4096), randn(500, 4096, seed=1)
    indices = torch.stack([torch.randperm(500)[:160] for _ in range(30)])
    found = operations(GPU).inner_products(x.to(GPU), indices.to(GPU), rows.to(GPU))
    torch.testing.assert_close(found.cpu(), portable.inner_products(x, indices, rows), rtol=1e-4, atol=1e-3)


def test_products_in_float32_equal_the_cpus():
    a, b = randn(300, 700), randn(700, 500, seed=1)
    found = operations(GPU).product(a.to(GPU), b.to(GPU)).cpu()
    assert ((found - a @ b).abs() / (a.abs() @ b.abs())).max() < 2**-16


def test_the_norm_of_a_gradient_and_its_products_equal_the_cpus(gradient):
    rows = torch.nn.functional.normalize(randn(600, 4096, seed=5), dim=1)
    kernels = operations(GPU)
    products, _ = kernels.row_products(on_gpu(gradient), rows.to(GPU))
    torch.testing.assert_close(products.cpu(), portable.row_products(gradient, rows)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.squares(on_gpu(gradient)).cpu(), portable.squares(gradient), rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adam_equals_the_cpus(gradient, is_decoder, moments):
    if not is_decoder:
        gradient = gradient._replace(along=None)
    start = torch.nn.functional.normalize(randn(600, 4096, seed=5), dim=1)
    copy = None if is_decoder else torch.zeros(600, 4096, dtype=torch.bfloat16)
    first, second = 0.1 * randn(600, 4096, seed=6), 0.01 * randn(600, 4096, seed=7).square()
    here, there = (
        RowState(start.clone(), first.to(moments, copy=True), second.to(moments, copy=True), copy) for _ in range(2)
    )
    there, rates = on_gpu(there), Rates(1e-3, torch.tensor(2.0), torch.tensor(3.0))
    portable.adam_rows(here, gradient, rates)
    operations(GPU).adam_rows(there, on_gpu(gradient), on_gpu(rates))
    torch.testing.assert_close(there.parameter.cpu(), here.parameter, rtol=1e-4, atol=1e-6)
    near = 1e-4 if moments == torch.float32 else 2**-6  # rounded up there and down here
    torch.testing.assert_close(there.first.cpu(), here.first, rtol=near, atol=1e-6)
    torch.testing.assert_close(there.second.cpu(), here.second, rtol=near, atol=1e-9)
    if there.copy is not None:
        assert torch.equal(there.copy, there.parameter.bfloat16())


@pytest.mark.parametrize("k_aux", [48, 4])  # the second loss by dense products, and by gathered rows
def test_some_steps_of_training_equal_the_cpus(k_aux):
    (here, expected), (there, found) = (trained(device, k_aux=k_aux) for device in ("cpu", "cuda"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    start = trained("cpu", steps=0)[0].sae.W_dec
    apart, moved = (there.sae.W_dec.cpu() - here.sae.W_dec).norm(), (here.sae.W_dec - start).norm()
    assert apart < 0.01 * moved  # Adam's first steps make a rounding error in a gradient near 0 as large as a gradient


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_same_training_twice_is_the_same_bit_for_bit(moments):
    (first, _), (second, _) = (trained("cuda", moments_dtype=moments) for _ in range(2))
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_a_step_waits_for_nothing():
    trainer, _ = trained("cuda", steps=2)
    x = randn(200, 96).to(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(x, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
