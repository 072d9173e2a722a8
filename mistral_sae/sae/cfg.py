"""What the cfg.json of an SAE Lens directory says, of version 6 and of before, in this project's terms."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from mistral_sae.files import SAEError
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.schema import Count, Index, Schema, Words, read

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER = "activation_scaler.json"  # beside the weights of an unfinished training of SAE Lens
SAE_LENS_VERSION = "6.54.12"  # whose format is written; below 6, SAE Lens would drop the metadata
NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}  # ours: theirs
# What published folders leave out or say wrongly, by their name on the hub
PUBLISHED = {
    "JoshEngels/Mistral-7B-Residual-Stream-SAEs": {
        "model_name": "mistralai/Mistral-7B-v0.1",
        "normalize_activations": "constant_norm_rescale",
    },
    "tylercosgrove/mistral-7b-sparse-autoencoder-layer16": {
        "model_name": "mistralai/Mistral-7B-Instruct-v0.1",
        "hook_name": "blocks.16.hook_resid_post",
    },
}
SCALED_ONCE = "expected_average_only_in"  # normalization by one factor for all residuals, which folds into the weights
TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}  # ours: theirs
# What each architecture is here, and where its tensors are. Those of an unfinished training are saved as they are
ARCHITECTURES: dict[str | None, tuple[str, Mapping[str, str]]] = {
    "topk": ("topk", TENSORS),
    "relu": ("relu", TENSORS),
    "jumprelu": ("jumprelu", TENSORS | {"threshold": "threshold"}),
    "batchtopk": ("jumprelu", TENSORS | {"cutoff": "topk_threshold"}),
    "matryoshka_batchtopk": ("jumprelu", TENSORS | {"cutoff": "topk_threshold"}),
    "gated": ("jumprelu", TENSORS | {"b_enc": "b_mag", "b_gate": "b_gate", "r_mag": "r_mag"}),
}


class Metadata(NamedTuple):
    """What an autoencoder was trained on."""

    model_name: str | None
    hook_name: str | None  # "blocks.16.hook_resid_post" is the output of block 16
    hook_layer: int | None  # the number in hook_name
    prepend_bos: bool
    context_size: int | None  # tokens a row
    dataset_path: str | None
    model_fingerprint: str | None = None  # of the model's sizes and weights; None in what others saved

    @property
    def residual_layer(self) -> int:
        """The layer whose output is read and written. Raises SAEError unless it is a residual stream's."""
        name, layer = self.hook_name or "no named hook", self.hook_layer
        if layer is not None and (name.endswith("hook_resid_post") or OF_TRANSFORMERS.fullmatch(name)):
            return layer
        if layer and name.endswith("hook_resid_pre"):  # what goes into a block comes out of the one before
            return layer - 1
        raise SAEError(
            f"found an autoencoder of {name}: expected a residual stream; where the label is wrong, load it with "
            "hook_name, as in blocks.16.hook_resid_post"
        )


OF_TRANSFORMERS = re.compile(r"(model\.)?layers\.\d+")  # a layer's output, by the module's name in transformers


def layer_in(hook_name: str | None) -> int | None:
    """The number of the layer in a hook's name."""
    number = re.search(r"\.(\d+)(?:\.|$)", hook_name or "")
    return int(number[1][:18]) if number else None  # no model has so many


def hook_name(layer: int) -> str:
    """SAE Lens's name of the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


class _Training(Schema):
    """What version 6 says under `metadata` of what was trained on, and those before at the top level."""

    model_name: Words | None = None
    hook_name: Words | None = None
    hook_point: Words | None = None  # both names of 2024
    hook_layer: Index | None = None
    hook_point_layer: Index | None = None
    prepend_bos: bool | None = None
    context_size: Count | None = None
    dataset_path: Words | None = None
    model_fingerprint: Words | None = None


class _Arguments(Schema):
    """Of an activation function, before version 6."""

    k: Count | float | None = None


class _Cfg(_Training):
    """A cfg.json."""

    d_in: Count
    d_sae: Count
    k: Count | float | None = None
    architecture: str | None = None
    activation_fn: str | None = None
    activation_fn_str: str | None = None
    activation_fn_kwargs: _Arguments | None = None
    apply_b_dec_to_input: bool | None = None
    rescale_acts_by_decoder_norm: bool | None = None
    normalize_activations: str | bool | None = None
    reshape_activations: str | None = None
    metadata: _Training | None = None


class _Scaler(Schema):
    """An activation_scaler.json."""

    scaling_factor: Annotated[float, Field(gt=0)] | None = None  # null once SAE Lens has folded it


class Description(NamedTuple):
    """An autoencoder, in SparseAutoencoder's terms."""

    d_model: int
    n_features: int
    k: int  # n_features where every feature may be active
    activation: str
    tensors: Mapping[str, str]  # ours: the file's name for it, with .T behind it where it is transposed
    metadata: Metadata
    weights: str = WEIGHTS  # the file
    normalize: str = "none"
    center: bool = True
    factor: float = 1.0  # by which all residuals are multiplied before anything else
    rescale: bool = False  # features are scaled by the norm of their decoder rows


def read_cfg(folder: Path, known: dict[str, str], hook_name: str | None) -> Description:
    """What a folder's cfg.json says, `known` and `hook_name` in place of some of it. Raises SAEError."""
    path = folder / CFG
    cfg: _Cfg = _read(_Cfg, path).model_copy(update=known)
    activation, tensors = _architecture(cfg, path)
    normalize, factor = _normalization(cfg, path)
    k = (cfg.activation_fn_kwargs and cfg.activation_fn_kwargs.k) or cfg.k
    return Description(
        cfg.d_in,
        cfg.d_sae,
        checked_k(k, cfg.d_sae, path) if activation == "topk" else cfg.d_sae,
        activation,
        tensors,
        _metadata(cfg, hook_name),
        normalize=normalize,
        factor=factor,
        center=cfg.apply_b_dec_to_input is not False,
        rescale=(activation == "topk" or "cutoff" in tensors) and cfg.rescale_acts_by_decoder_norm is True,
    )


def _read(kind: type[Schema], path: Path) -> Any:
    return read(kind, path, "is it an SAE Lens checkpoint? Copy it again, or save it again", SAEError)


def _metadata(cfg: _Cfg, hook_name: str | None) -> Metadata:
    """Metadata of version 6, under `metadata`, or of before, at the top level, under two names in 2024."""
    found = cfg.model_copy(update=cfg.metadata.model_dump(exclude_none=True) if cfg.metadata else {})
    name = hook_name or found.hook_name or found.hook_point
    number = layer_in(name)
    layer = found.hook_point_layer if found.hook_layer is None else found.hook_layer
    return Metadata(
        model_name=found.model_name,
        hook_name=name,
        hook_layer=layer if number is None else number,
        prepend_bos=found.prepend_bos is not False,  # SAE Lens's own default
        context_size=found.context_size,
        dataset_path=found.dataset_path,
        model_fingerprint=found.model_fingerprint,
    )


def _architecture(cfg: _Cfg, path: Path) -> tuple[str, Mapping[str, str]]:
    """The activation in SparseAutoencoder's terms, and where its tensors are."""
    # Before version 6, which brought `metadata`, TopK was called "standard" with the activation function "topk", and
    # the architecture could be left out
    architecture = cfg.architecture or (None if cfg.metadata else "standard")
    function = cfg.activation_fn_str or cfg.activation_fn or "relu"
    found = ARCHITECTURES.get(function if architecture == "standard" else architecture)
    if found is None:
        shown = f"architecture {architecture!r} with activation {function!r}" if architecture else "no architecture"
        known = ", ".join(("standard", *filter(None, ARCHITECTURES)))
        raise SAEError(f"found {shown} in {path}, expected {known}: use another checkpoint")
    return found


def checked_k(k: float | None, n_features: int, path: Path) -> int:
    """K, unless it is none or not one of so many features. Raises SAEError."""
    if not isinstance(k, int) or not 1 <= k <= n_features:
        shown = "no k" if k is None else f"k = {k}"
        raise SAEError(f"found {shown} in {path}, expected 1 to {n_features}, the features: copy the file again")
    return k


def _normalization(cfg: _Cfg, path: Path) -> tuple[str, float]:
    """The normalization in SparseAutoencoder's terms, and a factor that all residuals are multiplied by before it."""
    if (reshape := cfg.reshape_activations or "none") != "none":
        raise SAEError(f"found reshape_activations {reshape!r} in {path}, expected none: use another checkpoint")
    found = cfg.normalize_activations or "none"  # in 2024 also null, false and true
    if found in (SCALED_ONCE, True):
        return "none", _read(_Scaler, path.with_name(SCALER)).scaling_factor or 1.0
    for ours, theirs in NORMALIZATIONS.items():
        if found == theirs:
            return ours, 1.0
    known = ", ".join((*NORMALIZATIONS.values(), SCALED_ONCE))
    raise SAEError(f"found normalize_activations {found!r} in {path}, expected {known}: use another checkpoint")


def to_write(sae: SparseAutoencoder, metadata: Metadata) -> dict[str, Any]:
    """The content of the cfg.json of an autoencoder."""
    cfg = {
        "architecture": "standard" if sae.activation == "relu" else sae.activation,
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.center,
        "normalize_activations": NORMALIZATIONS[sae.normalize],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "sae_lens_training_version": None,  # without this entry SAE Lens would claim to have trained it
            **metadata._asdict(),
        },
    }
    return cfg | ({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.activation == "topk" else {})
