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
_MODEL_TYPES = {MISTRAL_INFERENCE: ["transformer"], TRANSFORMERS: ["mistral", "mixtral"]}
# What a params.json holds. Of the optional ones the first four shape the model, the others say nothing about its layers
_REQUIRED = [*_SIZES[MISTRAL_INFERENCE], "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps"]
_OPTIONAL = ["rope_theta", "sliding_window", "_sliding_window", "moe", "model_type", "vision_encoder"]
_OPTIONAL += ["max_batch_size", "max_seq_len", "max_position_embeddings"]


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
    """Sizes of the model in a folder, before any weight is read. Raises ModelError if it holds no usable model."""
    folder = open_folder(path)
    if folder.spec.backend == MISTRAL_INFERENCE:
        check_tensors(folder, None)
    return folder.spec


def open_folder(path: str | Path) -> ModelFolder:
    """Find out what a folder holds; of both layouts, mistral-inference's wins. Raises ModelError."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder: expected a mistral-inference or a Hugging Face model folder")
    params, config = path / "params.json", path / "config.json"
    consolidated = sorted({*path.glob("consolidated.safetensors"), *path.glob("consolidated[-.]*.safetensors")})
    sharded = sorted(path.glob("model*.safetensors"))
    if params.is_file() and consolidated:
        return _opened(path, MISTRAL_INFERENCE, params, consolidated)
    if config.is_file() and sharded:
        return _opened(path, TRANSFORMERS, config, sharded)
    if not params.is_file() and not config.is_file():
        raise ModelError(
            f"{path} holds no model: expected params.json and consolidated.safetensors (mistral-inference) "
            "or config.json and model.safetensors (Hugging Face)"
        )
    pickled = sorted({*path.glob("*.pth"), *path.glob("*.bin"), *path.glob("*.pt")})
    found = f"only {pickled[0].name}, which is pickled and never read here" if pickled else "no weights"
    wanted = "consolidated.safetensors" if params.is_file() else "model.safetensors"
    raise ModelError(f"{path} holds {found}: expected {wanted}; download or convert the weights as safetensors")


def shapes_of_params(params: dict[str, Any], last_layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mistral-inference's tensors: embedding and layers 0..last_layer, or all."""
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
        if folder.tensors[name][1] != shape:
            raise misshapen(folder, name, folder.tensors[name][1], shape)
    return list(shapes)


def misshapen(folder: ModelFolder, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    """The error of a tensor whose shape is not what the folder's configuration says."""
    file = "params.json" if folder.spec.backend == MISTRAL_INFERENCE else "config.json"
    return ModelError(f"{name} in {folder.path} has shape {found}: expected {expected}; get the {file} of this model")


def _read_config(path: Path, backend: str) -> dict[str, Any]:
    """A params.json or config.json of a model that the backend runs."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): expected the model's configuration") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object: expected the model's configuration")
    params = backend == MISTRAL_INFERENCE
    model_type = config.get("model_type", "transformer" if params else None)
    if model_type not in _MODEL_TYPES[backend]:
        raise ModelError(f"{path} is of model type {model_type!r}: expected {' or '.join(_MODEL_TYPES[backend])}")
    if missing := [name for name in (_REQUIRED if params else _SIZES[backend]) if name not in config]:
        raise ModelError(f"{path} has no {', '.join(missing)}: expected the configuration of a Mistral or Mixtral")
    # A setting that is not understood here would change the residuals without a word
    unknown = sorted(name for name, value in config.items() if value and name not in _REQUIRED + _OPTIONAL)
    if params and unknown:
        raise ModelError(f"{path} sets {', '.join(unknown)}, which cannot be run: use a Hugging Face copy of the model")
    return config


def _opened(path: Path, backend: str, config_path: Path, files: list[Path]) -> ModelFolder:
    config = _read_config(config_path, backend)
    tensors = {name: (file, shape) for file in files for name, shape in _shapes_in(file).items()}
    counts: Counter[str | int | None] = Counter()
    for name, (_, shape) in tensors.items():
        counts[_part(name)] += math.prod(shape)
    if not counts["embedding"]:
        raise ModelError(f"{path} has no token embedding in its weights: expected a whole {backend} model")
    d_model, n_layers, vocab_size = (config[name] for name in _SIZES[backend])
    spec = ModelSpec(
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
    return ModelFolder(path, spec, config, tensors)


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
        raise ModelError(f"{path} is cut short or no safetensors file ({one_line(error)}): get it again") from None
