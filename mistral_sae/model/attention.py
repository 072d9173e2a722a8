"""Attention for mistral-inference, on any device.

mistral-inference calls xformers' `memory_efficient_attention`, which does not run on a CPU and whose compiled part
loads only with the PyTorch it was built for. The function of that name below takes its place, through PyTorch's scaled
dot product attention; of xformers only the descriptions of masks, which are plain Python, stay in use.

Shapes: B rows, Q queries a row, K keys a row, H heads, E width of a head, S and N queries and keys of all rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Let a library log nothing below an error: what it advises at load plays no part here."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_load() -> Iterator[None]:
    """Let transformers load something without a bar, and without its list of the layers that are left out."""
    from transformers.utils import logging as library

    has_bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        with quiet("transformers"):
            yield
    finally:
        if has_bars:
            library.enable_progress_bar()


def install_attention() -> None:
    """Let mistral-inference use this module's attention, in this process; a second call changes nothing."""
    with quiet("xformers"):  # it complains at import of compiled parts that are not used here
        from mistral_inference import transformer_layers

    transformer_layers.memory_efficient_attention = memory_efficient_attention


class CausalView:
    """What a block of mistral-inference needs of a cache when there is none: the causal mask.

    Without it the block calls attention with no mask at all, so that every token sees every other, of other
    rows too.
    """

    prefill = True

    def __init__(self, rows: int, length: int, window: int | None):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        mask = BlockDiagonalCausalMask.from_seqlens([length] * rows, device=torch.device("cpu"))
        self.mask = mask if window is None else mask.make_local_attention(window)

    def interleave_kv(self, key_NHE: Tensor, value_NHE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are: nothing lies before them."""
        return key_NHE, value_NHE

    def update(self, key_NHE: Tensor, value_NHE: Tensor) -> None:
        """Store nothing."""


def memory_efficient_attention(query_1SHE: Tensor, key_1NHE: Tensor, value_1NHE: Tensor, attn_bias: Any) -> Tensor:
    """Attention of flattened rows of equal length, each to its own keys only, (1, S, H, E) like the queries.

    `attn_bias` is one of xformers' causal block-diagonal masks: prefill with or without a sliding window, prefill
    after cached keys, and decoding over padded keys. Raises TypeError for any other mask, for none (that would be
    attention in both directions and across rows), and for rows of several lengths, which no model here is given.
    """
    from xformers.ops.fmha import attn_bias as masks

    to_bottom_right = masks.BlockDiagonalCausalFromBottomRightMask, masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
    if not isinstance(attn_bias, (masks.BlockDiagonalCausalMask, *to_bottom_right)):
        raise TypeError(f"found {type(attn_bias).__name__} as attention mask, expected a causal block-diagonal one")
    queries, keys = ([b - a for a, b in part.intervals()] for part in (attn_bias.q_seqinfo, attn_bias.k_seqinfo))
    B, Q, K = len(queries), queries[0], keys[0]
    if queries != [Q] * B or keys != [K] * B:
        raise TypeError(f"found rows of {queries} queries and {keys} keys, expected rows of equal length")
    query, key, value = (
        x.view(B, -1, *x.shape[2:])[:, :length].transpose(1, 2)  # keys may be padded
        for x, length in ((query_1SHE, Q), (key_1NHE, K), (value_1NHE, K))
    )
    offset = K - Q if isinstance(attn_bias, to_bottom_right) else 0
    window = getattr(attn_bias, "_window_size", None) or Q + offset
    needs_no_mask = Q + offset == K <= window and (Q == 1 or offset == 0)  # one query, or what PyTorch calls causal
    seen_QK = None
    if not needs_no_mask:
        last = torch.arange(Q, device=query.device)[:, None] + offset
        position = torch.arange(K, device=query.device)
        seen_QK = (position <= last) & (position > last - window)
    out_BHQE = F.scaled_dot_product_attention(query, key, value, seen_QK, is_causal=needs_no_mask and offset == 0)
    return out_BHQE.transpose(1, 2).reshape(query_1SHE.shape)
