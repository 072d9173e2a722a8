"""What mistral-inference takes from xformers and its own buffer cache, for any device and without a wait for it.

xformers' attention does not run on a CPU, its compiled part loads only with the PyTorch that it was built for, and its
import takes longer than PyTorch's own. The buffer cache makes the masks of every layer again for each token, on the
host. `attention` below takes the place of both: PyTorch's scaled dot product attention, and a cache that is a slice of
one block of memory.

Shapes: B rows, T positions of this forward, K positions seen, N positions that a cache has room for, H heads of
queries, G heads of keys and values, E width of a head.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

XFORMERS = ["xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"]


def install_attention() -> None:
    """Let mistral-inference use this module's attention and norm, in this process; a second call changes nothing.

    It is imported without xformers, which need not be installed.
    """
    missing = [name for name in XFORMERS if name not in sys.modules]
    sys.modules.update({name: _Unused(name) for name in missing})
    try:
        from mistral_inference import transformer, transformer_layers
    finally:
        for name in missing:
            del sys.modules[name]

    transformer_layers.Attention.forward = attention
    transformer_layers.RMSNorm = transformer.RMSNorm = RMSNorm


class _Unused(ModuleType):
    """A module that has every name, of which mistral-inference imports some and runs none."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):  # what Python asks of a module
            raise AttributeError(name)
        return type(name, (), {})


class RMSNorm(nn.RMSNorm):
    """PyTorch's, which is one kernel on a GPU, for inputs of another dtype than the weight's too."""

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, in x's dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Past(NamedTuple):
    """What a block is given in place of mistral-inference's view of a cache."""

    rows: int
    window: int | None  # positions that a query sees, its own included; None for all before it
    padding_B: Tensor | None = None  # positions that each row begins with and that no later one sees
    start: int = 0  # of this forward: positions that the cache holds
    keys_BGNE: Tensor | None = None  # None where nothing is kept
    values_BGNE: Tensor | None = None

    def and_now(self, key_BGTE: Tensor, value_BGTE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions seen, (B, G, K, E); those of this forward are kept."""
        if self.keys_BGNE is None or self.values_BGNE is None:
            return key_BGTE, value_BGTE
        end = self.start + key_BGTE.shape[2]
        self.keys_BGNE[:, :, self.start : end] = key_BGTE
        self.values_BGNE[:, :, self.start : end] = value_BGTE
        return self.keys_BGNE[:, :, :end], self.values_BGNE[:, :, :end]


def attention(self: Any, x_ND: Tensor, rotary_TE: Tensor, past: Past) -> Tensor:
    """`Attention.forward` of mistral-inference, of N = B * T tokens: B rows, each of which sees itself only."""

    def heads(projected: Tensor, count: int) -> Tensor:
        return projected.view(past.rows, -1, count, self.head_dim)

    query_BTHE = rotate(heads(self.wq(x_ND), self.n_heads), rotary_TE)
    key_BTGE = rotate(heads(self.wk(x_ND), self.n_kv_heads), rotary_TE)
    value_BTGE = heads(self.wv(x_ND), self.n_kv_heads)
    key, value = past.and_now(key_BTGE.transpose(1, 2), value_BTGE.transpose(1, 2))
    out_BHTE = causal_attention(query_BTHE.transpose(1, 2), key, value, past.window, past.padding_B)
    return self.wo(out_BHTE.transpose(1, 2).reshape(len(x_ND), -1))


def rotary_table(positions: int, width: int, theta: float, device: torch.device) -> Tensor:
    """Cosine and sine of the angles by which pairs of E / 2 are turned at each position, (positions, E / 2, 2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=device).float() / width)
    angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x_BTHE: Tensor, rotary_TE: Tensor) -> Tensor:
    """Queries or keys turned by their positions: neighbours (2i, 2i + 1) as complex numbers, times exp(i * angle).

    `rotary_TE` (T, E / 2, 2) is in float32, and so is the product. (Su et al. 2021, "RoFormer", section 3.2)
    """
    pairs = x_BTHE.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which knows no complex numbers, and makes one kernel of this
        (even, odd), (cos, sin) = pairs.unbind(-1), rotary_TE.unsqueeze(1).unbind(-1)
        both = (part.type_as(x_BTHE) for part in (even * cos - odd * sin, even * sin + odd * cos))
        return torch.stack(tuple(both), dim=-1).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotary_TE).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).type_as(x_BTHE)


def causal_attention(
    query_BHTE: Tensor, key_BGKE: Tensor, value_BGKE: Tensor, window: int | None, padding_B: Tensor | None = None
) -> Tensor:
    """Attention (B, H, T, E) of the last T of K positions to those up to their own, at most `window` of them."""
    T = query_BHTE.shape[2]
    if window is not None and T == 1 and padding_B is None:  # the keys outside of it are left out
        key_BGKE, value_BGKE = key_BGKE[:, :, -window:], value_BGKE[:, :, -window:]
    K = key_BGKE.shape[2]
    seen = None  # (T, K) or (B, 1, T, K)
    if padding_B is not None or (T > 1 and (T < K or (window is not None and window < K))):
        last = torch.arange(K - T, K, device=query_BHTE.device).unsqueeze(1)
        position = torch.arange(K, device=query_BHTE.device)
        seen = position <= last
        if window is not None:
            seen &= position > last - window
        if padding_B is not None:  # which sees itself: the mean of no values is NaN
            seen = seen & (position >= padding_B[:, None, None, None]) | (position == last)
    groups = query_BHTE.shape[1] // key_BGKE.shape[1]
    if repeats := groups > 1 and not shares_keys(query_BHTE.device, seen is not None):
        key_BGKE, value_BGKE = (x.repeat_interleave(groups, dim=1) for x in (key_BGKE, value_BGKE))
    is_causal = seen is None and T > 1
    return F.scaled_dot_product_attention(
        query_BHTE, key_BGKE, value_BGKE, seen, is_causal=is_causal, enable_gqa=groups > 1 and not repeats
    )


def shares_keys(device: torch.device, is_masked: bool) -> bool:
    """Whether PyTorch has a kernel there in which heads of queries share keys; else it would write all scores."""
    if device.type != "cuda":
        return True
    return not is_masked and torch.cuda.get_device_capability(device) >= (8, 0)  # flash attention's
