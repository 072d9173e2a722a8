"""The sparse step against dense autograd."""

import pytest
import torch

from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels import step as kernels_step
from mistral_sae.sae.kernels.portable import topk
from mistral_sae.sae.kernels.step import bf16_pays, encode, topk_step
from mistral_sae.sae.kernels.types import AuxK, Weights

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]

CASES = [  # B, D, F, K, dead features, K_AUX
    (33, 24, 130, 7, 0, 0),
    (33, 24, 130, 7, 41, 12),
    (17, 8, 64, 1, 5, 12),
    (9, 8, 48, 48, 0, 0),
    (9, 8, 48, 3, 48, 4),
    (1, 8, 48, 3, 10, 4),
    (13, 32, 1024, 5, 100, 16),
    (13, 32, 2048, 2, 2048, 16),
]


def random_parameters(D, F, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=generator, dtype=dtype), dim=1)
    W_enc = (W_dec + 0.1 * torch.randn(F, D, generator=generator, dtype=dtype)).T
    b_enc = 0.1 * torch.randn(F, generator=generator, dtype=dtype)
    b_dec = 0.1 * torch.randn(D, generator=generator, dtype=dtype)
    return W_enc, b_enc, W_dec, b_dec


def dense_loss(z, W_enc, b_enc, W_dec, b_dec, k, dead, k_aux, coefficient):
    """The equations of the design, all features of all tokens written out, in nothing but elementary operations."""
    pre = (z - b_dec) @ W_enc + b_enc
    kept = pre.topk(k, dim=1)
    f = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    z_hat = f @ W_dec + b_dec
    normalized_mse = (z - z_hat).square().sum() / (z - z.mean(dim=0)).square().sum().clamp_min(1e-12)
    auxk = torch.zeros((), dtype=z.dtype)
    if len(dead) and k_aux:
        e = (z - z_hat).detach()
        alive = torch.ones(W_dec.shape[0], dtype=torch.bool)
        alive[dead] = False
        kept = pre.masked_fill(alive, -torch.inf).topk(min(k_aux, len(dead)), dim=1)
        e_hat = torch.zeros_like(pre).scatter(1, kept.indices, kept.values) @ W_dec
        auxk = (e - e_hat).square().sum() / (e - e.mean(dim=0)).square().sum()
        auxk = auxk if auxk.isfinite() else torch.zeros_like(auxk)
    return normalized_mse + coefficient * auxk, normalized_mse, auxk


def relative_error(found, expected):
    scale = torch.linalg.vector_norm(expected)
    return (torch.linalg.vector_norm(found - expected) / scale.clamp_min(1e-30)).item()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("B", "D", "F", "K", "A", "K_AUX"), CASES)
def test_loss_and_every_gradient_equal_dense_autograd(B, D, F, K, A, K_AUX, device, bf16):
    z = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    parameters = random_parameters(D, F)
    dead = torch.randperm(F, generator=torch.Generator().manual_seed(2))[:A].sort().values
    leaves = [p.clone().requires_grad_() for p in parameters]
    loss, normalized_mse, auxk = dense_loss(z, *leaves, K, dead, K_AUX, 1 / 32)
    loss.backward()

    on_device = [p.T.contiguous().to(device).T if i == 0 else p.to(device) for i, p in enumerate(parameters)]
    aux = AuxK(dead.to(device), K_AUX, 1 / 32)
    W_enc_bf16 = on_device[0].bfloat16() if bf16 else None
    step = topk_step(z.to(device), Weights(*on_device, W_enc_bf16), K, aux)

    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert step.normalized_mse.item() == pytest.approx(normalized_mse.item(), rel=1e-5)
    assert step.auxk.item() == pytest.approx(auxk.item(), rel=1e-5)
    assert relative_error(step.W_enc.whole().T.cpu(), leaves[0].grad) < 1e-5
    assert relative_error(step.b_enc.cpu(), leaves[1].grad) < 1e-5
    assert relative_error(step.W_dec.whole().cpu(), leaves[2].grad) < 1e-5
    assert relative_error(step.b_dec.cpu(), leaves[3].grad) < 1e-5


@pytest.mark.parametrize("k_aux", [5, 2])  # the second loss by dense products, and by gathered rows
def test_a_matrix_gradient_is_the_same_in_blocks(k_aux, monkeypatch):
    parameters = [p.T.contiguous().T if i == 0 else p for i, p in enumerate(random_parameters(16, 100))]
    z, dead = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)), torch.arange(40, 60)
    step = topk_step(z, Weights(*parameters), 3, AuxK(dead, k_aux, 1 / 32))
    assert (step.W_dec.added is None) == (len(dead) > kernels_step.DENSE_AUXK * k_aux)
    monkeypatch.setitem(portable.BLOCK_BYTES, "cpu", 7 * 16 * 4)
    for gradient in (step.W_enc, step.W_dec):
        blocks = [block for _, block in portable.blocks(gradient)]
        assert [len(block) for block in blocks] == [7] * 14 + [2]
        assert torch.equal(torch.cat(blocks), gradient.whole())
        assert gradient.whole()[dead].any()  # else the second loss is not in it


@pytest.mark.parametrize(("F", "k"), [(256, 2), (2048, 16), (1000, 5), (64, 64), (4096, 1)])
def test_topk_finds_exactly_what_torch_finds(F, k):
    pre = torch.randn(50, F, generator=torch.Generator().manual_seed(0))
    values, indices = topk(pre, k)
    assert torch.equal(values.sort(dim=1).values, pre.topk(k).values.sort(dim=1).values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_a_bfloat16_product_chooses_the_features_that_float32_chooses():
    W_enc, b_enc, _, b_dec = random_parameters(64, 4096)
    centered = torch.randn(500, 64, generator=torch.Generator().manual_seed(3)) - b_dec
    values, indices = encode(centered, W_enc, b_enc, 16)
    values_bf16, indices_bf16 = encode(centered, W_enc, b_enc, 16, W_enc.bfloat16())
    assert torch.equal(indices.sort(dim=1).values, indices_bf16.sort(dim=1).values)
    torch.testing.assert_close(values_bf16.sort(dim=1).values, values.sort(dim=1).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_encoding_in_chunks_changes_nothing(monkeypatch, with_gradients):
    W_enc, b_enc, _, b_dec = random_parameters(64, 256)
    centered = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)) - b_dec
    whole = encode(centered, W_enc, b_enc, 16)
    monkeypatch.setitem(kernels_step.CHUNK_BYTES, ("cpu", torch.float32), 4 * 256 * 7)  # seven tokens at a time
    monkeypatch.setitem(kernels_step.FEWEST_TOKENS, torch.float32, 1)
    with torch.set_grad_enabled(with_gradients):
        found = encode(centered, W_enc, b_enc, 16)
    for part, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_dense_and_sparse_gradients_of_the_second_loss_agree(monkeypatch):
    parameters = [p.T.contiguous().T if i == 0 else p for i, p in enumerate(random_parameters(16, 100))]
    z, dead = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), torch.arange(3, 99, 4)
    found = []
    for ratio in (0, 1000):
        monkeypatch.setattr(kernels_step, "DENSE_AUXK", ratio)
        found.append(topk_step(z, Weights(*parameters), 3, AuxK(dead, 7, 1 / 32)))
    sparse, dense = found
    assert sparse.W_enc.added is None is not dense.W_enc.added
    torch.testing.assert_close(dense.auxk, sparse.auxk)
    torch.testing.assert_close(dense.b_enc, sparse.b_enc)
    torch.testing.assert_close(dense.b_dec, sparse.b_dec)
    for name in ("W_enc", "W_dec"):
        torch.testing.assert_close(getattr(dense, name).whole(), getattr(sparse, name).whole(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_product_is_in_bfloat16_where_that_is_asked(monkeypatch, bf16):
    W_enc, b_enc, _, _ = random_parameters(16, 256)
    dtypes, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **out: (dtypes.append(args[1].dtype), addmm(*args, **out))[1])
    encode(torch.randn(5, 16), W_enc, b_enc, 4, W_enc.bfloat16() if bf16 else None)
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32]


def test_inner_products_on_a_gpu_without_triton_are_those_on_a_cpu(monkeypatch):
    """They take other operators, which run on a CPU, too."""
    monkeypatch.setattr(portable, "PAIRS", 7)
    x, rows = (torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (10, 40))
    indices = torch.stack([torch.randperm(40)[:5] for _ in range(10)])
    tokens = torch.arange(10).repeat_interleave(5)
    found = portable._paired(x, rows, tokens, indices.flatten()).view(10, 5)
    torch.testing.assert_close(found, portable.inner_products(x, indices, rows))


def test_squared_norms_of_large_batches_are_exact():
    x = 3 + torch.randn(8192, 512, generator=torch.Generator().manual_seed(0))
    exact = x.double()
    assert kernels_step.squared_norm(x).item() == pytest.approx(exact.square().sum().item(), rel=1e-6)
    about_mean = (exact - exact.mean(dim=0)).square().sum().item()
    assert kernels_step.variation(x).item() == pytest.approx(about_mean, rel=1e-6)


def test_bfloat16_nominates_only_where_pytorch_uses_the_processors_instructions_for_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for capability, pays in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert bf16_pays(cpu) == pays
