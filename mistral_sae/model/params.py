"""What a params.json of mistral-inference says, and the same model in the terms of transformers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mistral_sae.schema import Count, Schema

if TYPE_CHECKING:
    from torch import Tensor

Layers = Annotated[int, Field(ge=1, le=1000)]
Window = Annotated[int, Field(ge=0)]


class Experts(Schema):
    """A mixture of experts in place of each layer's feed-forward part."""

    num_experts: Annotated[int, Field(ge=1, le=1024)]
    num_experts_per_tok: Annotated[int, Field(ge=1, le=1024)]


class Params(Schema):
    """A params.json. What is not named here and set would change the residuals without a word, so it is refused."""

    model_config = ConfigDict(extra="allow")
    model_type: Literal["transformer"] = "transformer"
    dim: Count
    n_layers: Layers
    vocab_size: Count
    head_dim: Annotated[Count, Field(multiple_of=2)]
    hidden_dim: Count
    n_heads: Count
    n_kv_heads: Count
    norm_eps: Annotated[float, Field(ge=0, lt=1)]
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    sliding_window: Window | list[Window | None] | None = None
    # Some files have this name for it
    window: Window | list[Window | None] | None = Field(None, alias="_sliding_window")
    moe: Experts | None = None
    tied_embeddings: bool | None = None
    max_position_embeddings: int | None = None
    # These say nothing about the layers
    vision_encoder: Any = None
    max_batch_size: Any = None
    max_seq_len: Any = None

    @model_validator(mode="after")
    def _can_be_run(self) -> Params:
        if unknown := sorted(name for name, value in (self.model_extra or {}).items() if value):
            raise ValueError(
                f"a model that sets {', '.join(unknown)}", "one that can be run, as a Hugging Face copy may"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads}", f"a multiple of n_kv_heads, {self.n_kv_heads}")
        if self.moe and self.moe.num_experts_per_tok > self.moe.num_experts:
            raise ValueError(f"num_experts_per_tok = {self.moe.num_experts_per_tok}", "no more than num_experts")
        return self


# mistral-inference -> transformers, in the safetensors files of both
NAMES = {
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
EXPERTS = "feed_forward.experts.", "block_sparse_moe.experts."  # then {number}.w1, w2 or w3 in both


def shapes_of_params(params: dict[str, Any], last_layer: int | None, head: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mistral-inference's tensors: embedding, layers 0..last_layer and the head, or all."""
    D, hidden = params["dim"], params["hidden_dim"]
    q, kv = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    layer: dict[str, tuple[int, ...]] = {"attention_norm": (D,), "attention.wq": (q, D), "attention.wk": (kv, D)}
    layer |= {"attention.wv": (kv, D), "attention.wo": (D, q), "ffn_norm": (D,)}
    experts = ["feed_forward"]
    if moe := params.get("moe"):
        layer["feed_forward.gate"] = (moe["num_experts"], D)
        experts = [f"feed_forward.experts.{expert}" for expert in range(moe["num_experts"])]
    for expert in experts:
        layer |= {f"{expert}.w1": (hidden, D), f"{expert}.w2": (D, hidden), f"{expert}.w3": (hidden, D)}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (params["vocab_size"], D)}
    if head or last_layer is None:
        shapes["norm.weight"] = (D,)
        if not params.get("tied_embeddings"):
            shapes["output.weight"] = (params["vocab_size"], D)
    count = params["n_layers"] if last_layer is None else last_layer + 1
    return shapes | {f"layers.{i}.{name}.weight": shape for i in range(count) for name, shape in layer.items()}


def windows_of(params: dict[str, Any]) -> list[int | None]:
    """The sliding window of each layer, None for full attention; a list in the file is a pattern that repeats."""
    window = params.get("sliding_window") or params.get("_sliding_window")
    pattern = window if isinstance(window, list) else [window]
    return [pattern[layer % len(pattern)] for layer in range(params["n_layers"])]


def theta_of(params: dict[str, Any]) -> float:
    """The base of the rotary positions."""
    # Mistral 7B v0.1, the one with a sliding window, has 10,000, which its params.json does not say
    return params.get("rope_theta") or (1e6 if windows_of(params)[0] is None else 1e4)


def config_for_transformers(params: dict[str, Any]) -> Any:
    """The configuration of the same model in transformers. Raises ValueError for what that cannot say."""
    from transformers import MinistralConfig, MistralConfig, MixtralConfig

    windows = windows_of(params)
    if len(lengths := sorted({window for window in windows if window})) > 1:
        raise ValueError(f"it has windows of {' and '.join(map(str, lengths))} tokens")
    sizes = {
        "vocab_size": params["vocab_size"],
        "hidden_size": params["dim"],
        "intermediate_size": params["hidden_dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "head_dim": params["head_dim"],
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": theta_of(params)},
        "tie_word_embeddings": bool(params.get("tied_embeddings")),
        "sliding_window": next(filter(None, windows), None),
    }
    if moe := params.get("moe"):
        experts = {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
        return MixtralConfig(**sizes, **experts)
    if len(set(windows)) > 1:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return MinistralConfig(**sizes, layer_types=kinds)
    return MistralConfig(**sizes)


def name_in_transformers(name: str) -> str | None:
    """The name that a weight of mistral-inference has in transformers; None for other tensors."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
    if match is None:
        return None
    layer, name = match[1], match[2]
    if layer is None:
        return f"{NAMES[name]}.weight" if name in NAMES else None
    if name.startswith(EXPERTS[0]):
        return f"model.layers.{layer}.{EXPERTS[1]}{name.removeprefix(EXPERTS[0])}.weight"
    return f"model.layers.{layer}.{NAMES[name]}.weight" if name in NAMES else None


def is_rotated(name: str) -> bool:
    """Whether a tensor of mistral-inference gives queries or keys, whose rows transformers wants in another order."""
    return name.endswith((".wq.weight", ".wk.weight"))


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys: rotary pairs (2i, 2i + 1) of mistral-inference -> (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.view(-1, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
