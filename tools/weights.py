"""Mistral weights between the layouts of mistral-inference and of Hugging Face transformers.

Names are those in the safetensors files of either layout, for dense models and for mixtures of experts
(Mixtral). A dense `MistralForCausalLM` has the same names in memory.
"""

import re
from pathlib import Path

import numpy as np
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


def write_gguf(path: Path) -> None:
    """Write a small random Llama in 16 bits, as llama.cpp stores it, with a byte-level tokenizer."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    noise = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "Ġa", "Ġb"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ġ a", "Ġ b"])  # of one alone transformers before 5.20 cannot read
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    layer |= {"attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    for i in range(3):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        values = noise.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", 1 + values / 10 if len(shape) == 1 else (values / 6).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_halves`."""
    rows, columns = weight.shape
    return weight.view(-1, 2, head_dim // 2, columns).transpose(1, 2).reshape(rows, columns)
