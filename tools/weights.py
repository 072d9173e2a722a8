"""Mistral weights between the layouts of mistral-inference and of Hugging Face transformers.

Names are those in the safetensors files of either layout, for dense models and for mixtures of experts
(Mixtral). A dense `MistralForCausalLM` has the same names in memory.
"""

import re

import torch

_NAMES = {  # mistral-inference -> transformers
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.gate": "block_sparse_moe.gate",
}
_EXPERTS = "feed_forward.experts.", "block_sparse_moe.experts."  # then {number}.w1, w2 or w3 in both


def _to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotary pairs (i, i + head_dim/2) of transformers -> (2i, 2i + 1) of mistral-inference."""
    rows, columns = weight.shape
    return weight.view(-1, 2, head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)


def _to_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `_to_interleaved`."""
    rows, columns = weight.shape
    return weight.view(-1, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def from_hf(state: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Weights of a Hugging Face Mistral or Mixtral -> those of mistral-inference."""
    ours = {hf: name for name, hf in _NAMES.items()}
    out = {}
    for key, weight in state.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key)
        if match and match[2].startswith(_EXPERTS[1]):
            name = f"layers.{match[1]}.{_EXPERTS[0]}{match[2].removeprefix(_EXPERTS[1])}"
        else:
            name = f"layers.{match[1]}.{ours[match[2]]}" if match else ours[key.removesuffix(".weight")]
        if name.endswith((".wq", ".wk")):
            weight = _to_interleaved(weight, head_dim)
        out[name + ".weight"] = weight
    return out


def to_hf(state: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Weights of mistral-inference -> those of a Hugging Face Mistral or Mixtral."""
    out = {}
    for key, weight in state.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", key)
        if match and match[2].startswith(_EXPERTS[0]):
            name = f"model.layers.{match[1]}.{_EXPERTS[1]}{match[2].removeprefix(_EXPERTS[0])}"
        else:
            name = f"model.layers.{match[1]}.{_NAMES[match[2]]}" if match else _NAMES[key.removesuffix(".weight")]
        if key.endswith((".wq.weight", ".wk.weight")):
            weight = _to_halves(weight, head_dim)
        out[name + ".weight"] = weight
    return out
