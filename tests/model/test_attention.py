"""Attention against the masks as xformers spells them out, and the import of xformers in a fresh process."""

import subprocess
import sys

import pytest
import torch

from mistral_sae.model.attention import install_attention, memory_efficient_attention

H, E = 2, 8


@pytest.fixture(scope="module")
def masks():
    install_attention()
    from xformers.ops.fmha import attn_bias

    return attn_bias


def by_hand(query, key, value, mask):
    """Softmax attention with the dense mask that xformers itself makes of its description."""
    bias = mask.materialize((query.shape[1], key.shape[1]))
    scores = torch.einsum("bqhe,bkhe->bhqk", query, key) * E**-0.5 + bias
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), value)


def random_qkv(queries: int, keys: int):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, n, H, E, generator=generator) for n in (queries, keys, keys))


def masks_to_try(masks):
    cpu = torch.device("cpu")
    causal, plain = masks.BlockDiagonalCausalMask, masks.BlockDiagonalMask
    padded = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
    return {
        "rows of equal length": causal.from_seqlens([5, 5, 5], device=cpu),
        "a sliding window": causal.from_seqlens([7, 7], device=cpu).make_local_attention(3),
        "a window as long as the rows": causal.from_seqlens([7, 7], device=cpu).make_local_attention(7),
        "prefill after cached keys": plain.from_seqlens(
            [2, 2], [6, 6], device=cpu
        ).make_local_attention_from_bottomright(100),
        "prefill after cached keys in a window": plain.from_seqlens(
            [4, 4], [7, 7], device=cpu
        ).make_local_attention_from_bottomright(3),
        "decoding": padded.from_seqlens([1, 1, 1], 8, [5, 5, 5], device=cpu),
        "decoding with full caches": padded.from_seqlens([1, 1], 4, [4, 4], device=cpu),
    }


@pytest.mark.parametrize("case", list(range(7)))
def test_attention_equals_softmax_over_the_spelled_out_mask(masks, case):
    name, mask = list(masks_to_try(masks).items())[case]
    query, key, value = random_qkv(mask.q_seqinfo.seqstart_py[-1], mask.k_seqinfo.seqstart_py[-1])
    out = memory_efficient_attention(query, key, value, mask)
    torch.testing.assert_close(
        out, by_hand(query, key, value, mask), rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}"
    )


def test_padding_behind_the_keys_is_never_read(masks):
    mask = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1], 8, [5, 5], device=torch.device("cpu"))
    query, key, value = random_qkv(2, 16)
    before = memory_efficient_attention(query, key, value, mask)
    for start in (5, 13):
        key[:, start : start + 3] = value[:, start : start + 3] = float("nan")
    assert torch.equal(memory_efficient_attention(query, key, value, mask), before)


def test_attention_in_both_directions_is_refused(masks):
    query, key, value = random_qkv(4, 4)
    both_ways = masks.BlockDiagonalMask.from_seqlens([4], device=torch.device("cpu"))
    for mask in (None, both_ways):
        with pytest.raises(TypeError, match="expected a causal block-diagonal one"):
            memory_efficient_attention(query, key, value, mask)


def test_rows_of_several_lengths_are_refused(masks):
    query, key, value = random_qkv(10, 10)
    mask = masks.BlockDiagonalCausalMask.from_seqlens([3, 6, 1], device=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"found rows of \[3, 6, 1\] queries.*expected rows of equal length"):
        memory_efficient_attention(query, key, value, mask)


def test_install_replaces_the_operator_and_may_run_twice(masks):
    from mistral_inference import transformer_layers

    install_attention()
    install_attention()
    assert transformer_layers.memory_efficient_attention is memory_efficient_attention


def test_only_install_attention_imports_mistral_inference_and_xformers_stays_silent():
    code = (
        "import sys, mistral_sae.model.attention as attention, mistral_sae.model.language_model\n"
        "assert 'mistral_inference' not in sys.modules and 'xformers' not in sys.modules\n"
        "attention.install_attention()\n"
        "import logging; logging.getLogger('xformers').warning('another warning')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr == "another warning\n"
