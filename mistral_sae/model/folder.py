"""What a model's folder holds: layout, sizes, tensors. Of the weights only the headers are read."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mistral_sae.cli import UserError, one_line

MISTRAL_INFERENCE = "mistral-inference"
TRANSFORMERS = "transformers"

_SIZES = {
    MISTRAL_INFERENCE: ["dim", "n_layers", "vocab_size"],
    TRANSFORMERS: ["hidden_size", "num_hidden_layers", "vocab_size"],
}
# What a params.json holds. Of the optional ones the first four shape the model, the others say nothing about its layers
_REQUIRED = [*_SIZES[MISTRAL_INFERENCE], "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps"]
_OPTIONAL = ["rope_theta", "sliding_window", "_sliding_window", "moe", "model_type", "vision_encoder"]
_OPTIONAL += ["max_batch_size", "max_seq_len", "max_position_embeddings"]
_MODEL_TYPES = ("mistral", "mixtral")  # of a Hugging Face config.json


class ModelError(UserError):
    """A model that cannot be used as asked. One line: what was found, what was expected, what to do."""


class ModelSpec(NamedTuple):
    """A model's sizes, known before any weight is read."""

    name: str
    backend: str  # "mistral-inference" or "transformers"
    d_model: int
    n_layers: int
    vocab_size: int
    embedding_parameters: int
    layer_parameters: tuple[int, ...]  # of each layer
    head_parameters: int  # final norm and output matrix
    context_length: int | None = None  # positions that the model was made for, if its folder says so

    def parameters(self, last_layer: int | None = None) -> int:
        """Number of parameters of the embedding and layers 0..last_layer, or of the whole model."""
        if last_layer is None:
            return self.embedding_parameters + sum(self.layer_parameters) + self.head_parameters
        return self.embedding_parameters + sum(self.layer_parameters[: last_layer + 1])


class ModelFolder(NamedTuple):
    """A folder whose layout is known."""

    path: Path
    spec: ModelSpec
    config: dict[str, Any]  # params.json or config.json
    tensors: dict[str, tuple[Path, tuple[int, ...]]]  # name -> file, shape


def inspect(path: str | Path) -> ModelSpec:
    """Sizes of the model in a folder, from its configuration and the headers of its safetensors files.

    Raises ModelError if the folder holds no usable model.
    """
    folder = open_folder(path)
    if folder.spec.backend == MISTRAL_INFERENCE:
        check_tensors(folder, None)
    return folder.spec


def open_folder(path: str | Path) -> ModelFolder:
    """Find out what a folder holds; of both layouts, mistral-inference's wins. Raises ModelError."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder: expected a mistral-inference or a Hugging Face model folder")
    consolidated = sorted({*path.glob("consolidated.safetensors"), *path.glob("consolidated[-.]*.safetensors")})
    sharded = sorted(path.glob("model*.safetensors"))
    has_params, has_config = (path / "params.json").is_file(), (path / "config.json").is_file()
    if has_params and consolidated:
        backend, files, config = MISTRAL_INFERENCE, consolidated, _read_params(path / "params.json")
    elif has_config and sharded:
        backend, files, config = TRANSFORMERS, sharded, _read_config(path / "config.json")
    elif not has_params and not has_config:
        raise ModelError(
            f"{path} holds no model: expected params.json and consolidated.safetensors (mistral-inference) "
            "or config.json and model.safetensors (Hugging Face)"
        )
    else:
        pickled = sorted({*path.glob("*.pth"), *path.glob("*.bin"), *path.glob("*.pt")})
        found = f"only {pickled[0].name}, which is pickled and never read here" if pickled else "no weights"
        wanted = "consolidated.safetensors" if has_params else "model.safetensors"
        raise ModelError(f"{path} holds {found}: expected {wanted}; download or convert the weights as safetensors")
    tensors = {name: (file, shape) for file in files for name, shape in _shapes_in(file).items()}
    return ModelFolder(path, _spec_of(path, backend, config, tensors), config, tensors)


def shapes_of_params(params: dict[str, Any], last_layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mistral-inference's tensors: embedding and layers 0..last_layer, or all."""
    D, hidden = params["dim"], params["hidden_dim"]
    q, kv = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (D,),
        "attention.wq": (q, D),
        "attention.wk": (kv, D),
        "attention.wv": (kv, D),
        "attention.wo": (D, q),
        "ffn_norm": (D,),
    }
    feed_forward: dict[str, tuple[int, ...]] = {"w1": (hidden, D), "w2": (D, hidden), "w3": (hidden, D)}
    if moe := params.get("moe"):
        layer["feed_forward.gate"] = (moe["num_experts"], D)
        for expert in range(moe["num_experts"]):
            layer |= {f"feed_forward.experts.{expert}.{w}": shape for w, shape in feed_forward.items()}
    else:
        layer |= {f"feed_forward.{w}": shape for w, shape in feed_forward.items()}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (params["vocab_size"], D)}
    if last_layer is None:
        shapes |= {"norm.weight": (D,), "output.weight": (params["vocab_size"], D)}
    count = params["n_layers"] if last_layer is None else last_layer + 1
    return shapes | {f"layers.{i}.{name}.weight": shape for i in range(count) for name, shape in layer.items()}


def check_tensors(folder: ModelFolder, last_layer: int | None) -> list[str]:
    """Names of the tensors of `shapes_of_params`. Raises ModelError if one is missing or misshapen."""
    shapes = shapes_of_params(folder.config, last_layer)
    for name, shape in shapes.items():
        if name not in folder.tensors:
            raise ModelError(f"{folder.path} has no tensor {name}: expected one of shape {shape}; get the whole model")
        found = folder.tensors[name][1]
        if found != shape:
            raise ModelError(
                f"{name} in {folder.path} has shape {found}: expected {shape} by params.json, which "
                "belongs to another model or was edited"
            )
    return list(shapes)


def _read_params(path: Path) -> dict[str, Any]:
    params = _read_json(path)
    model_type = params.get("model_type", "transformer")
    if model_type != "transformer":
        raise ModelError(f"{path} is of a {model_type} model: expected a Mistral or Mixtral transformer")
    _require(path, params, _REQUIRED)
    # A setting that is not understood here would change the residuals without a word
    unknown = sorted(name for name, value in params.items() if value and name not in _REQUIRED + _OPTIONAL)
    if unknown:
        raise ModelError(
            f"{path} sets {', '.join(unknown)}: expected a model that mistral-inference 1.6 can "
            "run; use a Hugging Face copy of the model or another model"
        )
    return params


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if config.get("model_type") not in _MODEL_TYPES:
        kinds = " or ".join(_MODEL_TYPES)
        raise ModelError(f"{path} is of model type {config.get('model_type')!r}: expected {kinds}")
    _require(path, config, _SIZES[TRANSFORMERS])
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): expected the model's configuration") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object: expected the model's configuration")
    return content


def _require(path: Path, config: dict[str, Any], names: list[str]) -> None:
    if missing := [name for name in names if name not in config]:
        raise ModelError(f"{path} has no {', '.join(missing)}: expected the configuration of a Mistral or Mixtral")


def _spec_of(
    path: Path, backend: str, config: dict[str, Any], tensors: dict[str, tuple[Path, tuple[int, ...]]]
) -> ModelSpec:
    counts: Counter[str | int | None] = Counter()
    for name, (_, shape) in tensors.items():
        counts[_part(name)] += math.prod(shape)
    if not counts["embedding"]:
        raise ModelError(f"{path} has no token embedding in its weights: expected a whole {backend} model")
    d_model, n_layers, vocab_size = (config[name] for name in _SIZES[backend])
    return ModelSpec(
        _name(path),
        backend,
        d_model,
        n_layers,
        vocab_size,
        counts["embedding"],
        tuple(counts[layer] for layer in range(n_layers)),
        counts["head"],
        config.get("max_position_embeddings"),
    )


def _part(name: str) -> str | int | None:
    """The part of the text model to which a tensor of either layout belongs, None for other tensors."""
    words = name.removeprefix("model.").split(".")
    if words[0] == "layers":
        return int(words[1])
    return {
        "tok_embeddings": "embedding", "embed_tokens": "embedding", "norm": "head", "output": "head", "lm_head": "head"
    }.get(words[0])  # fmt: skip


def _name(path: Path) -> str:
    """The folder's name, or owner/model for a snapshot in the cache of the Hugging Face Hub."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, which must be whole."""
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is cut short or no safetensors file ({one_line(error)}): expected the model's weights; "
            "download it again"
        ) from None
