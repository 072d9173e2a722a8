"""Causal attention for mistral-inference on any device, through PyTorch's scaled dot-product attention.

mistral-inference calls xformers' `memory_efficient_attention`, which does not run on a CPU and whose compiled
part loads only with the PyTorch it was built for. `install` puts the function below in its place. Of xformers
only the descriptions of masks, which are plain Python, stay in use.

Shapes: B rows, Q queries a row, K keys a row, H heads, E width of a head; S and N count queries and keys over
all rows.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F


def install() -> None:
    """Let mistral-inference use this module's attention, in this process; a second call changes nothing."""
    with _without_xformers_complaints():
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

    def interleave_kv(self, key_NHE, value_NHE):
        """Return keys and values as they are: nothing lies before them."""
        return key_NHE, value_NHE

    def update(self, key_NHE, value_NHE) -> None:
        """Store nothing."""


def memory_efficient_attention(
    query_1SHE: torch.Tensor, key_1NHE: torch.Tensor, value_1NHE: torch.Tensor, attn_bias: object
) -> torch.Tensor:
    """Attention of flattened rows, each to its own keys only, (1, S, H, E) like the queries.

    `attn_bias` is one of xformers' causal block-diagonal masks: prefill with or without a sliding window,
    prefill after cached keys, and decoding over padded keys. Raises TypeError for any other mask, and for
    none: that would be attention in both directions and across rows.
    """
    from xformers.ops.fmha import attn_bias as masks

    if isinstance(attn_bias, masks.BlockDiagonalCausalMask):
        from_bottom_right = False
    elif isinstance(
        attn_bias,
        masks.BlockDiagonalCausalFromBottomRightMask | masks.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    ):
        from_bottom_right = True
    else:
        raise TypeError(f"found {type(attn_bias).__name__} as attention mask, expected a causal block-diagonal one")
    window = getattr(attn_bias, "_window_size", None)
    queries = list(attn_bias.q_seqinfo.intervals())
    keys = list(attn_bias.k_seqinfo.intervals())
    Q, K = queries[0][1] - queries[0][0], keys[0][1] - keys[0][0]
    stride = attn_bias.k_seqinfo.seqstart_py[1]  # more than K where the keys are padded

    if all(b - a == Q for a, b in queries) and all(b - a == K for a, b in keys):
        # Rows of equal length, the only kind this project makes: all rows in one call
        query_BQHE = query_1SHE.view(len(queries), Q, *query_1SHE.shape[2:])
        key_BKHE = key_1NHE.view(len(keys), stride, *key_1NHE.shape[2:])[:, :K]
        value_BKHE = value_1NHE.view(len(keys), stride, *value_1NHE.shape[2:])[:, :K]
        out_BQHE = _attend(query_BQHE, key_BKHE, value_BKHE, K - Q if from_bottom_right else 0, window)
        return out_BQHE.reshape(query_1SHE.shape)

    outs = []
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        offset = (k1 - k0) - (q1 - q0) if from_bottom_right else 0
        outs.append(_attend(query_1SHE[:, q0:q1], key_1NHE[:, k0:k1], value_1NHE[:, k0:k1], offset, window))
    return torch.cat(outs, dim=1)


def _attend(query_BQHE, key_BKHE, value_BKHE, offset: int, window: int | None) -> torch.Tensor:
    """Attention in which query i sees keys j with i + offset - window < j <= i + offset."""
    Q, K = query_BQHE.shape[1], key_BKHE.shape[1]
    query, key, value = (x.transpose(1, 2) for x in (query_BQHE, key_BKHE, value_BKHE))
    windowed = window is not None and window < Q + offset
    if not windowed and Q == K and offset == 0:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    elif not windowed and Q == 1 and offset == K - 1:
        out = F.scaled_dot_product_attention(query, key, value)
    else:
        last = torch.arange(Q, device=query.device)[:, None] + offset
        position = torch.arange(K, device=query.device)
        seen_QK = position <= last
        if windowed:
            seen_QK &= position > last - window
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_QK)
    return out.transpose(1, 2)


@contextmanager
def _without_xformers_complaints() -> Iterator[None]:
    """Drop what xformers logs at import about compiled parts that are not used here, and nothing else."""
    loggers = [logging.getLogger(name) for name in ("xformers", "xformers.ops.fmha.flash3")]
    parts = (
        "can't load C++/CUDA extensions",
        "Need to compile C++ extensions",
        "A matching Triton is not available",
        "Flash-Attention 3 package can't be used",
    )

    def keep(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in parts)

    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
