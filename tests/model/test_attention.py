"""Attention, rotary positions and the norm against what they stand in for, and the import of mistral-inference."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mistral_sae.model import attention
from mistral_sae.model.attention import Past, RMSNorm, causal_attention, install_attention, rotary_table, rotate
from mistral_sae.model.language_model import load_model

B, H, G, E = 3, 4, 2, 8


def by_hand(query_BHTE, key_BGKE, value_BGKE, window):
    """Softmax attention, a query and its keys at a time."""
    out_BHTE = torch.empty_like(query_BHTE)
    before = key_BGKE.shape[2] - query_BHTE.shape[2]
    for head in range(H):
        for t in range(query_BHTE.shape[2]):
            end = before + t + 1
            seen = slice(max(0, end - window) if window else 0, end)
            key, value = (x[:, head // (H // G), seen] for x in (key_BGKE, value_BGKE))
            scores = torch.einsum("be,bke->bk", query_BHTE[:, head, t], key) * E**-0.5
            out_BHTE[:, head, t] = torch.einsum("bk,bke->be", scores.softmax(-1), value)
    return out_BHTE


def random_qkv(queries: int, keys: int):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, h, n, E, generator=generator) for h, n in ((H, queries), (G, keys), (G, keys)))


@pytest.mark.parametrize("repeats", [False, True], ids=["keys shared", "keys repeated"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (2, 7), (1, 7), (1, 1)])
def test_attention_equals_softmax_over_the_keys_that_a_query_may_see(queries, keys, window, repeats, monkeypatch):
    monkeypatch.setattr(attention, "shares_keys", lambda device, is_masked: not repeats)
    given = random_qkv(queries, keys)
    torch.testing.assert_close(causal_attention(*given, window), by_hand(*given, window), rtol=1e-5, atol=1e-6)


def test_a_cache_returns_what_it_was_given_and_never_what_lies_behind_it():
    room = torch.full((2, B, G, 9, E), float("nan"))
    _, key, value = random_qkv(1, 5)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        seen = Past(B, None, None, start, *room).and_now(key[:, :, start:end], value[:, :, start:end])
        assert all(torch.equal(found, x[:, :, :end]) for found, x in zip(seen, (key, value), strict=True))
    assert room[:, :, :, 5:].isnan().all()


def test_rotation_equals_that_of_mistral_inference_compiled_or_not(monkeypatch):
    from mistral_inference.rope import apply_rotary_emb, precompute_freqs_cis

    x_BTHE, theta = torch.randn(2, 6, H, E), 1e6
    table = rotary_table(6, E, theta, torch.device("cpu"))
    by_token = precompute_freqs_cis(E, 6, theta).repeat(2, 1)
    expected, _ = apply_rotary_emb(x_BTHE.flatten(0, 1), x_BTHE.flatten(0, 1), by_token)
    torch.testing.assert_close(rotate(x_BTHE, table).flatten(0, 1), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x_BTHE, table).flatten(0, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_keeps_its_inputs_dtype_and_equals_its_formula(dtype):
    norm = RMSNorm(16, eps=1e-5)
    norm.weight.data = torch.randn(16, dtype=torch.bfloat16)
    x = torch.randn(5, 16, dtype=dtype)
    expected = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.float()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_one_row_runs_on_each_of_pytorchs_kernels(backend):
    model, tokens = load_model(None), torch.arange(20, 28).view(1, 8)
    with sdpa_kernel(backend):  # the plain one is what bfloat16 gets on GPUs before Ampere
        logits = model.forward(tokens)
    torch.testing.assert_close(logits, model.forward(tokens), rtol=1e-4, atol=1e-4)


def test_install_replaces_attention_and_norms_and_may_run_twice():
    from mistral_inference import transformer, transformer_layers

    install_attention()
    install_attention()
    assert transformer_layers.Attention.forward is attention.attention
    assert transformer.RMSNorm is transformer_layers.RMSNorm is RMSNorm


def test_mistral_inference_is_imported_when_it_runs_and_xformers_may_be_missing():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(name, *_):\n"
        "        if name.startswith('xformers'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing)\n"
        "import torch\n"
        "from mistral_sae.model.language_model import load_model\n"
        "assert 'mistral_inference' not in sys.modules\n"
        "model = load_model(None, engine='mistral-inference', device='cpu')\n"
        "assert model.forward(torch.tensor([[1, 2]])).isfinite().all()\n"
        "assert not any(name.startswith('xformers') for name in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
