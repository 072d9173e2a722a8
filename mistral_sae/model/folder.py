"""What a model's folder holds: layout, sizes, tensors. Of the weights only the headers are read."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from mistral_sae.cli import one_line, printable
from mistral_sae.model.params import Layers, Params, config_for_transformers, is_rotated, name_in_transformers
from mistral_sae.model.source import MODEL_TYPES, ModelError, Source, quiet_transformers
from mistral_sae.schema import Count, Schema, read

MISTRAL_INFERENCE = "mistral-inference"
TRANSFORMERS = "transformers"
PARAMS, CONFIG = "params.json", "config.json"  # each describes the model of its layout
_WEIGHTS = {PARAMS: "consolidated", CONFIG: "model"}

_WITH_TEXT_INSIDE = ["mistral3"]  # beside a vision model, which is left out
# Hugging Face's names of the text model's tensors, however deep it lies
_TEXT = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?((?:embed_tokens|layers|norm|lm_head)\..+)")
_LAYER = re.compile(r"(?:model\.)?layers\.([0-9]{1,4})\.")
_FLOATS = ["F64", "F32", "F16", "BF16"]


class ModelSpec(NamedTuple):
    """A model's sizes, known before any weight is read."""

    name: str
    engine: str  # the library that runs it, "mistral-inference" or "transformers"
    d_model: int
    n_layers: int
    vocab_size: int
    embedding_parameters: int
    layer_parameters: tuple[int, ...]  # of each layer
    head_parameters: int  # final norm and output matrix
    context_length: int | None = None  # positions that the model was made for, if its folder says so
    cache_width: int = 0  # numbers that a KV cache has of a position: keys and values of all layers
    note: str = ""  # why it is this engine, where another could have been expected

    def parameters(self, last_layer: int | None = None) -> int:
        """Number of parameters of the embedding and layers 0..last_layer, or of the whole model."""
        if last_layer is None:
            return self.embedding_parameters + sum(self.layer_parameters) + self.head_parameters
        return self.embedding_parameters + sum(self.layer_parameters[: last_layer + 1])

    def run_by(self) -> str:
        """The engine and why it is this one, in words."""
        return f"{self.engine} ({self.note})" if self.note else self.engine


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    is_rotated: bool = False  # transformers wants its rows in halves, and has them in pairs here


class ModelFolder(NamedTuple):
    """A model's folder, in the terms of the engine that is to run it."""

    source: Source
    spec: ModelSpec
    described_by: str  # PARAMS or CONFIG
    config: Any  # the content of params.json, or a configuration of transformers
    tensors: dict[str, Stored]  # of the language model, by the engine's names

    @property
    def path(self) -> Path:
        """The folder."""
        return self.source.path

    def fetch(self) -> None:
        """Bring the weights here, where the model is one of the hub's. Raises ModelError."""
        self.source.fetch({stored.file.name for stored in self.tensors.values()})


def layouts(source: Source) -> list[str]:
    """PARAMS and CONFIG, as far as the folder has that file and weights beside it. Raises ModelError for neither."""
    path, names = source.path, source.names()
    described = [name for name in _WEIGHTS if name in names]
    if not described:
        raise ModelError(
            f"{path} holds no model: expected params.json and consolidated.safetensors (mistral-inference) "
            "or config.json and model.safetensors (Hugging Face)"
        )
    if found := [name for name in described if any(re.match(rf"{_WEIGHTS[name]}.*\.safetensors", n) for n in names)]:
        return found
    pickled = sorted(name for name in names if name.endswith((".pth", ".bin", ".pt")))
    weights = f"only {pickled[0]}, which is pickled and never read here" if pickled else "no weights"
    wanted = f"{_WEIGHTS[described[0]]}.safetensors"
    raise ModelError(f"{path} holds {weights}: expected {wanted}; download or convert the weights as safetensors")


def read_folder(source: Source, described_by: str, engine: str, note: str = "") -> ModelFolder:
    """What one layout of a folder holds, in the engine's terms. Raises ModelError."""
    path = source.path
    if described_by == CONFIG:
        found = _read(_Config, path / CONFIG)
        config = _text_config(path, found)
        tied, context_length = config.tie_word_embeddings, (found.text_config or found).max_position_embeddings
    else:
        params = _read(Params, path / PARAMS).model_dump(by_alias=True, exclude_unset=True)
        try:
            config = params if engine == MISTRAL_INFERENCE else config_for_transformers(params)
        except ValueError as error:
            raise ModelError(f"{path} cannot run in transformers, as {error}: use ENGINE=mistral-inference") from None
        tied, context_length = params.get("tied_embeddings"), params.get("max_position_embeddings")
    tensors = {}
    for file, headers in source.headers(_weight_files(source, _WEIGHTS[described_by])).items():
        for stored_name, dtype, shape in headers:
            name = stored_name
            if described_by == CONFIG and (match := _TEXT.fullmatch(name)):
                name = match[1] if match[1].startswith("lm_head") else f"model.{match[1]}"
            if part_of(name) is None or (tied and name in ("lm_head.weight", "output.weight")):
                continue
            if dtype not in _FLOATS:
                expected = "expected 16 or 32 bits a weight; get such a copy"
                raise ModelError(f"{path / file} is quantized ({dtype}): {expected}")
            halves = described_by == PARAMS and engine == TRANSFORMERS
            stored = Stored(path / file, stored_name, shape, halves and is_rotated(name))
            tensors[(name_in_transformers(name) or name) if halves else name] = stored
    spec = _spec(path, engine, config, tensors)._replace(context_length=context_length, note=note)
    return ModelFolder(source, spec, described_by, config, tensors)


def check_layer(spec: ModelSpec, layer: int) -> None:
    """Raise ModelError if the model has no such layer."""
    if not 0 <= layer < spec.n_layers:
        expected = f"0 to {spec.n_layers - 1}, as {spec.name} has {spec.n_layers} layers"
        raise ModelError(f"found layer {layer}: expected {expected}")


def part_of(name: str) -> str | int | None:
    """The part of the text model to which a tensor of either engine belongs, None for other tensors."""
    if match := _LAYER.match(name):
        return int(match[1])
    return {
        "tok_embeddings": "embedding", "embed_tokens": "embedding", "norm": "head", "output": "head", "lm_head": "head"
    }.get(name.removeprefix("model.").split(".")[0])  # fmt: skip


def misshapen(folder: ModelFolder, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    """The error of a tensor whose shape is not what the folder's configuration says."""
    told = f"has shape {found}: expected {expected}; get the {folder.described_by} of this model"
    return ModelError(f"{name} in {folder.path} {told}")


# ---- what describes a model ----


class _Text(Schema):
    """What is read of a config.json beside what transformers makes of it: which model, and sizes that are bounded."""

    model_type: str | None = None
    quantization_config: dict[str, Any] | None = None
    num_hidden_layers: Layers | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count | None = None
    max_position_embeddings: Count | None = None


class _Config(_Text):
    text_config: _Text | None = None


class _Index(Schema):
    """An index of shards."""

    weight_map: dict[str, str]


def _read(kind: Any, path: Path) -> Any:
    return read(kind, path, "get the file of this model again", ModelError)


def _text_config(path: Path, found: _Config) -> Any:
    """The configuration of the text model that a config.json describes, in transformers."""
    text = found.text_config or found if found.model_type in _WITH_TEXT_INSIDE else found
    if text.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES + _WITH_TEXT_INSIDE)
        raise ModelError(f"{path / CONFIG} is of model type {text.model_type!r}: expected one of {known}")
    if quantized := found.quantization_config or text.quantization_config:
        how = quantized.get("quant_method", "no method named")
        raise ModelError(f"{path} is quantized ({how}): expected 16 or 32 bits a weight; get such a copy of the model")
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and huggingface_hub each raise their own
        raise ModelError(f"{path / CONFIG} cannot be read ({one_line(error)}): get it again") from None
    if config.model_type in _WITH_TEXT_INSIDE:
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        config = config.text_config
    if config.model_type == "ministral" and config.sliding_window is None:  # transformers masks by it in any case
        config.sliding_window = config.max_position_embeddings
    return config


# ---- the weights ----


def _weight_files(source: Source, stem: str) -> list[str]:
    """The files of a layout's weights: those that its index or the files' own names tell of. Raises ModelError."""
    names, index = source.names(), f"{stem}.safetensors.index.json"
    if f"{stem}.safetensors" in names:
        return [f"{stem}.safetensors"]
    there = {name for name in names if name.startswith(stem) and name.endswith(".safetensors")}
    wanted = set(_read(_Index, source.path / index).weight_map.values()) if index in names else set(there)
    for name in there:
        if match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", name):
            numbers = range(1, int(match[3]) + 1)
            wanted |= {f"{match[1]}-{i:0{len(match[2])}}-of-{match[3]}.safetensors" for i in numbers}
    if missing := sorted(wanted - there):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        expected = f"expected {len(wanted)} files of weights; get the others"
        raise ModelError(f"{source.path} has no {missing[0]}{more}: {expected}")
    return sorted(wanted)


def _spec(path: Path, engine: str, config: Any, tensors: dict[str, Stored]) -> ModelSpec:
    counts: Counter[str | int | None] = Counter()
    for name, stored in tensors.items():
        counts[part_of(name)] += math.prod(stored.shape)
    if not counts["embedding"]:
        raise ModelError(f"{path} has no token embedding in its weights: expected a whole model")
    if engine == MISTRAL_INFERENCE:
        d_model, n_layers, vocab_size = config["dim"], config["n_layers"], config["vocab_size"]
        key_width = config["n_kv_heads"] * config["head_dim"]
    else:
        d_model, n_layers, vocab_size = config.hidden_size, config.num_hidden_layers, config.vocab_size
        head_dim = getattr(config, "head_dim", None) or d_model // config.num_attention_heads
        key_width = config.num_key_value_heads * head_dim
    layers = tuple(counts[layer] for layer in range(n_layers))
    return ModelSpec(
        _name(path), engine, d_model, n_layers, vocab_size, counts["embedding"], layers, counts["head"],
        cache_width=2 * n_layers * key_width,
    )  # fmt: skip


def _name(path: Path) -> str:
    """The folder's name, or owner/model for a snapshot in the cache of the Hugging Face Hub."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return printable(path.parent.parent.name.removeprefix("models--").replace("--", "/"))
    return printable(path.name)
