"""Mistral weights between the layouts of mistral-inference and of Hugging Face transformers.

Names are those in the safetensors files of either layout, for dense models and for mixtures of experts
(Mixtral). A dense `MistralForCausalLM` has the same names in memory.
"""

import re

import torch

from mistral_sae.model.params import EXPERTS, NAMES, is_rotated, name_in_transformers, to_halves


def from_hf(state: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Weights of a Hugging Face Mistral or Mixtral -> those of mistral-inference."""
    ours = {hf: name for name, hf in NAMES.items()}
    out = {}
    for key, weight in state.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key)
        if match and match[2].startswith(EXPERTS[1]):
            name = f"layers.{match[1]}.{EXPERTS[0]}{match[2].removeprefix(EXPERTS[1])}"
        else:
            name = f"layers.{match[1]}.{ours[match[2]]}" if match else ours[key.removesuffix(".weight")]
        name += ".weight"
        out[name] = _to_interleaved(weight, head_dim) if is_rotated(name) else weight
    return out


def to_hf(state: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Weights of mistral-inference -> those of a Hugging Face Mistral or Mixtral."""
    return {
        str(name_in_transformers(name)): to_halves(weight, head_dim) if is_rotated(name) else weight
        for name, weight in state.items()
    }


def _to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_halves`."""
    rows, columns = weight.shape
    return weight.view(-1, 2, head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
