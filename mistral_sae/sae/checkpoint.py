"""The SAE Lens directory format, both ways.

An SAE Lens directory holds cfg.json, sae_weights.safetensors with W_enc (D, F), b_enc (F), W_dec (F, D) and
b_dec (D), and sparsity.safetensors with the log10 firing frequency (F), beside which we keep each feature's largest
activation, `maximum` (F); SAE Lens passes over it. Nothing is ever unpickled.

Shapes: D model width, F features.
"""

import glob
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_sae.cli import one_line
from mistral_sae.files import SAEError, hash_of, opened, sync_folder, write_beside
from mistral_sae.sae.autoencoder import SparseAutoencoder

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SCALER = "activation_scaler.json"  # beside the weights of an unfinished training of SAE Lens
SAE_LENS_VERSION = "6.54.12"  # whose format is written; below 6, SAE Lens would drop the metadata
NEVER_FIRED = 1e-10  # added to a firing frequency before its log10, as SAE Lens does

# SAE Lens's (architecture, activation function) -> SparseAutoencoder's activation. Before version 6 a TopK
# autoencoder was called "standard" with the activation function "topk"; now the architecture says it all.
ACTIVATIONS = {
    ("standard", "relu"): "relu",
    ("standard", "topk"): "topk",
    ("topk", "relu"): "topk",
    ("topk", "topk"): "topk",
    ("jumprelu", "relu"): "jumprelu",
}
ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
SCALED_ONCE = "expected_average_only_in"  # one factor for all residuals, which folds into the weights


class Metadata(NamedTuple):
    """What an autoencoder was trained on."""

    model_name: str | None
    hook_name: str | None  # "blocks.16.hook_resid_post" is the output of block 16
    layer: int | None  # the number in hook_name
    prepend_bos: bool
    context_size: int | None  # tokens a row
    dataset_path: str | None

    @property
    def residual_layer(self) -> int:
        """The layer whose output is read and written: resid_post of its layer, or resid_pre of the next one.

        Raises SAEError for an autoencoder of another place in the block, or of none that its folder names.
        """
        name = self.hook_name or ""
        if self.layer is not None and name.endswith("hook_resid_post"):
            return self.layer
        if self.layer and name.endswith("hook_resid_pre"):
            return self.layer - 1
        raise SAEError(
            f"found an autoencoder of {self.hook_name or 'no named hook'}: expected a residual stream; where the label "
            "is wrong, load it with hook_name, as in blocks.16.hook_resid_post"
        )


def hook_name(layer: int) -> str:
    """SAE Lens's name of the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


class LoadedSAE(NamedTuple):
    """An autoencoder and what its folder says about it."""

    sae: SparseAutoencoder
    metadata: Metadata
    log_sparsity: Tensor | None  # (F) log10 firing frequency, on the CPU
    maximum: Tensor | None = None  # (F) largest activation late in training, on the CPU; None in what others saved


class Model(Protocol):
    """What `check_model` needs to know of a language model, loaded or not."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def d_model(self) -> int: ...  # noqa: D102
    @property
    def n_layers(self) -> int: ...  # noqa: D102


def check_model(loaded: LoadedSAE, model: Model) -> None:
    """Raise SAEError unless the autoencoder has the width of the model, and the model its layer."""
    width, layer = loaded.sae.d_model, loaded.metadata.residual_layer
    if width != model.d_model or layer >= model.n_layers:
        raise SAEError(
            f"found an autoencoder of width {width} and layer {layer}, and {model.name} of width {model.d_model} and "
            f"layers 0 to {model.n_layers - 1}: expected the model that it was trained on; set MISTRAL_MODEL_PATH or "
            "SAE_PATH"
        )


def hash_of_sae(sae: SparseAutoencoder) -> str:
    """SHA-256 of the autoencoder's sizes and weights."""
    config = (sae.d_model, sae.n_features, sae.k, sae.activation, sae.normalize, sae.center)
    return hash_of(config, sae.state_dict())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SAEError(
            f"found no {path.name} in {path.parent}, expected an SAE Lens directory ({CFG}, {WEIGHTS}): "
            "check the path; if a save was interrupted here, save again"
        ) from None
    except (ValueError, OSError) as error:
        raise SAEError(f"found a damaged {path} ({one_line(error)}), expected JSON: copy it again") from None
    if not isinstance(found, dict):
        raise SAEError(f"found a {type(found).__name__} in {path}, expected a JSON object: copy it again")
    return found


# ---- save ----


def save_sae(
    folder: Path,
    sae: SparseAutoencoder,
    metadata: Metadata,
    sparsity_F: Tensor | None = None,
    maximum_F: Tensor | None = None,
) -> None:
    """Write an SAE Lens directory that sae-lens 6 and `load_sae` read, in float32.

    `sparsity_F` (F) is each feature's firing frequency, the fraction of tokens from 0 to 1; log10 is taken
    here. `maximum_F` (F), which needs `sparsity_F` beside it, is each feature's largest activation. An older
    checkpoint in `folder` is replaced. Raises SAEError, before anything is written, where weights are not finite,
    where `sparsity_F` is anything but (F) numbers from 0 to 1 and `maximum_F` anything but (F) of at least 0.
    """
    folder = Path(folder)
    tensors = {name: getattr(sae, name) for name in _shapes(sae.d_model, sae.n_features, sae.activation)}
    for name, tensor in tensors.items():
        _check_finite(name, tensor, "the autoencoder to save")
    cfg = json.dumps(_cfg(sae, metadata), indent=2) + "\n"

    statistics = {}
    if sparsity_F is not None:
        _check_statistic("sparsity", sparsity_F, sae.n_features, 1, "firing frequencies, not their logarithms")
        statistics["sparsity"] = torch.log10(sparsity_F.detach().float() + NEVER_FIRED)
    if maximum_F is not None:
        _check_statistic("maxima", maximum_F, sae.n_features, torch.finfo().max, "finite activations")
        if sparsity_F is None:
            raise SAEError("found maxima without firing frequencies, expected both: pass sparsity_F")
        statistics["maximum"] = maximum_F

    # The slow part: everything is written next to whatever is there, which stays as it is.
    new = {CFG: write_beside(folder / CFG, lambda path: path.write_bytes(cfg.encode()))}
    if statistics:
        new[SPARSITY] = write_beside(folder / SPARSITY, lambda path: save_file(_exported(statistics), path))
    new[WEIGHTS] = write_beside(folder / WEIGHTS, lambda path: save_file(_exported(tensors), path))

    # Three files cannot be renamed as one, so the files that describe the weights leave first and cfg.json
    # comes back last. What a crash in between leaves: complete weights, old or new, never beside the other's
    # sparsity, and either the cfg.json that is right for both or none; without one no loader takes them.
    (folder / SPARSITY).unlink(missing_ok=True)
    if (folder / CFG).exists() and (folder / CFG).read_bytes() != new[CFG].read_bytes():
        (folder / CFG).unlink()
    sync_folder(folder)
    for name in (WEIGHTS, SPARSITY, CFG):
        if name in new:
            os.replace(new[name], folder / name)
            sync_folder(folder)


def _check_statistic(name: str, values_F: Tensor, n_features: int, highest: float, wanted: str) -> None:
    low, high = (bound.item() for bound in values_F.aminmax())
    if values_F.shape != (n_features,) or not 0 <= low <= high <= highest:
        raise SAEError(
            f"found {name} of shape {tuple(values_F.shape)} from {low:.3g} to {high:.3g}, expected ({n_features},) and "
            f"0 to {highest:g}: pass {wanted}"
        )


def _exported(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as float32 on the CPU, each contiguous: W_enc lies transposed in memory."""
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def _cfg(sae: SparseAutoencoder, metadata: Metadata) -> dict[str, Any]:
    try:
        own_version = version("mistral-sae")
    except PackageNotFoundError:  # run from a checkout without being installed
        own_version = None
    cfg = {
        "architecture": ARCHITECTURES[sae.activation],
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
            "mistral_sae_version": own_version,
            "model_name": metadata.model_name,
            "hook_name": metadata.hook_name,
            "hook_layer": metadata.layer,
            "prepend_bos": metadata.prepend_bos,
            "context_size": metadata.context_size,
            "dataset_path": metadata.dataset_path,
        },
    }
    if sae.activation == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return cfg


# ---- load ----


def load_sae(source: str | Path, *, hook_name: str | None = None, device: torch.device | str = "cpu") -> LoadedSAE:
    """Load an SAE Lens directory, in float32.

    `source` is a folder, a RUN_DIR that holds one as `sae`, or a repository of the Hugging Face hub:
    "owner/name" or "owner/name/folder/in/it". `hook_name` replaces what the checkpoint says about where it
    was trained, for one whose label is wrong. Reads what sae-lens 6 saves for topk, jumprelu and standard,
    and the form of 2024, which calls a TopK autoencoder "standard". Decoder rows keep their norm, unless the
    checkpoint scales features by it (rescale_acts_by_decoder_norm): the norms then move into the encoder.

    Raises SAEError, one line, where there is no checkpoint, or it is damaged or of a kind that is not known.
    """
    folder = _find(source)
    where, weights = folder / CFG, folder / WEIGHTS
    cfg = _read_json(where)
    metadata = _metadata(cfg, where, hook_name)
    d_model, n_features = _field(cfg, "d_in", int, where), _field(cfg, "d_sae", int, where)
    activation, k = _activation(cfg, where, n_features)
    normalize, is_scaled_once = _normalization(cfg, where)
    center = _field(cfg, "apply_b_dec_to_input", bool, where, True)
    shapes = _shapes(d_model, n_features, activation)
    with opened(weights) as file:
        _check_tensors(file, shapes, weights)
        sae = SparseAutoencoder(
            d_model, n_features, k, activation=activation, normalize=normalize, center=center, device=device
        )
        for name in shapes:
            # Copied in: W_enc stays the transposed view of an (F, D) block, and nothing maps the file.
            getattr(sae, name).data.copy_(file.get_tensor(name))
            _check_finite(name, getattr(sae, name), weights)
    if is_scaled_once:
        _fold_scaling_factor(sae, folder / SCALER)
    if activation == "topk" and _field(cfg, "rescale_acts_by_decoder_norm", bool, where, False):
        _fold_decoder_norms(sae)
    if activation == "jumprelu":
        sae.threshold.clamp_(min=0)  # in SAE Lens a feature is never negative, wherever its threshold lies
    return LoadedSAE(sae, metadata, *_statistics(folder / SPARSITY, n_features))


def _find(source: str | Path) -> Path:
    """The folder that holds cfg.json: here, in `sae` below, or downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "sae"
        return inner if inner.is_dir() and not (folder / CFG).exists() else folder
    if folder.exists():
        raise SAEError(f"found a file at {source}, expected the folder of {CFG} and {WEIGHTS}: pass the folder")
    parts = str(source).rstrip("/").split("/")
    is_local = isinstance(source, Path) or Path(parts[0]).exists()  # runs/typo is no repository where runs/ exists
    if is_local or len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        raise SAEError(
            f"found no folder {str(source)!r}, expected an SAE Lens directory, a RUN_DIR that holds one or a "
            "hub repository (owner/name): check the path, or train one with train.py"
        )
    return _download("/".join(parts[:2]), "/".join(parts[2:]))


def _download(repository: str, subfolder: str) -> Path:
    """Fetch the files of a checkpoint from the hub, all of one revision, and return their folder."""
    from httpx import HTTPError  # both are slow to import, and of use here only
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [glob.escape(prefix + name) for name in (CFG, WEIGHTS, SPARSITY, SCALER)]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns)) / subfolder
    except (HTTPError, OSError, ValueError) as error:
        raise SAEError(
            f"found neither such a folder nor {repository!r} on the Hugging Face hub ({one_line(error)}), "
            "expected an SAE Lens directory: check the name and the network; for a private one set HF_TOKEN"
        ) from None


REQUIRED: Any = object()
Field = TypeVar("Field")


def _field(cfg: dict[str, Any], key: str, kind: type[Field], where: Path, default: Any = REQUIRED) -> Field:
    """The entry `key` of a configuration, of type `kind`; `default` where it is missing or null."""
    found = cfg.get(key)
    if found is None and default is not REQUIRED:
        return default
    if key not in cfg:
        raise SAEError(f"found no {key} in {where}, expected one ({kind.__name__}): is it an SAE Lens checkpoint?")
    if type(found) is not kind:  # not isinstance: True is no int here
        raise SAEError(f"found {key} = {found!r} in {where}, expected {kind.__name__}: copy the file again")
    return found


def _metadata(cfg: dict[str, Any], where: Path, hook_name: str | None) -> Metadata:
    """Metadata of version 6, under `metadata`, or of before, at the top level, under two names in 2024."""
    fields = {**cfg, **_field(cfg, "metadata", dict, where, {})}
    name = hook_name or _field(fields, "hook_name", str, where, _field(fields, "hook_point", str, where, None))
    number = re.search(r"\.(\d+)(?:\.|$)", name or "")
    if hook_name and not number:
        raise SAEError(f"found hook_name {hook_name!r}, expected a layer in it: as in blocks.16.hook_resid_post")
    layer = _field(fields, "hook_layer", int, where, _field(fields, "hook_point_layer", int, where, None))
    return Metadata(
        model_name=_field(fields, "model_name", str, where, None),
        hook_name=name,
        layer=int(number[1]) if number else layer,
        prepend_bos=_field(fields, "prepend_bos", bool, where, True),  # SAE Lens's own default
        context_size=_field(fields, "context_size", int, where, None),
        dataset_path=_field(fields, "dataset_path", str, where, None),
    )


def _activation(cfg: dict[str, Any], where: Path, n_features: int) -> tuple[str, int]:
    """The activation in SparseAutoencoder's terms, and K: F where every feature may be active."""
    lens_version = (cfg.get("metadata") or {}).get("sae_lens_version") or cfg.get("sae_lens_version")
    is_of_2024 = int(str(lens_version).partition(".")[0] or 0) < 6 if lens_version else True
    architecture = _field(cfg, "architecture", str, where, "standard" if is_of_2024 else REQUIRED)
    function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    activation = ACTIVATIONS.get((architecture, str(function)))
    if activation is None:
        raise SAEError(
            f"found architecture {architecture!r} with activation {function!r} in {where}, expected topk, "
            "jumprelu or standard (with relu or topk): use another checkpoint"
        )
    if activation != "topk":
        return activation, n_features
    k = _field({**cfg, **_field(cfg, "activation_fn_kwargs", dict, where, {})}, "k", int, where)
    if not 1 <= k <= n_features:
        raise SAEError(f"found k = {k} in {where}, expected 1 to {n_features} (d_sae): copy the file again")
    return activation, k


def _normalization(cfg: dict[str, Any], where: Path) -> tuple[str, bool]:
    """The normalization in SparseAutoencoder's terms, and whether a factor is yet to be folded in."""
    reshape = cfg.get("reshape_activations") or "none"
    if reshape != "none" or "hook_z" in str(cfg.get("hook_name") or cfg.get("hook_point")):
        raise SAEError(
            f"found an autoencoder of attention heads in {where} (reshape_activations {reshape!r}), expected "
            "one of a residual stream: use another checkpoint"
        )
    found = cfg.get("normalize_activations") or "none"  # in 2024 also null, false and true
    if found in (SCALED_ONCE, True):
        return "none", True
    for ours, theirs in NORMALIZATIONS.items():
        if found == theirs:
            return ours, False
    known = ", ".join((*NORMALIZATIONS.values(), SCALED_ONCE))
    raise SAEError(
        f"found normalize_activations {found!r} in {where}, expected one of {known}: "
        "fold it into the weights with sae-lens and save again"
    )


def _shapes(d_model: int, n_features: int, activation: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an SAE Lens directory."""
    F, D = n_features, d_model
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return shapes | ({"threshold": (F,)} if activation == "jumprelu" else {})


def _check_tensors(file: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Compare names, shapes and types with what the configuration promises, before any memory is taken."""
    names = set(file.keys())
    for name, expected in shapes.items():
        if name not in names:
            raise SAEError(f"found no tensor {name} in {path}, expected {', '.join(shapes)}: copy it again")
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if shape != expected:
            raise SAEError(
                f"found {name} of shape {shape} in {path}, expected {expected} from {CFG}: "
                "copy both files from one checkpoint"
            )
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise SAEError(f"found {name} as {dtype} in {path}, expected floating point: use another copy")
    # Early in 2024 SAE Lens wrote a scaling factor for each feature, all ones unless it had been tuned.
    unknown = names - shapes.keys()
    if "scaling_factor" in unknown and bool((file.get_tensor("scaling_factor") == 1).all()):
        unknown.remove("scaling_factor")
    if unknown:
        raise SAEError(
            f"found tensors {', '.join(sorted(unknown))} in {path}, expected only {', '.join(shapes)}: "
            "use another checkpoint"
        )


def _check_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    low, high = torch.aminmax(tensor.detach())  # both pass NaN on, and no mask as large as the weights is made
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise SAEError(f"found NaN or infinity in {name} of {where}, expected finite numbers: use an earlier one")


@torch.no_grad()
def _fold_decoder_norms(sae: SparseAutoencoder) -> None:
    """Move the factor |row| of each feature into the encoder: the same features, from unit decoder rows."""
    norms_F = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(1e-8)
    sae.W_enc.mul_(norms_F)
    sae.b_enc.mul_(norms_F)
    sae.W_dec.div_(norms_F.unsqueeze(1))


@torch.no_grad()
def _fold_scaling_factor(sae: SparseAutoencoder, path: Path) -> None:
    """Make weights for residuals times one factor into weights for residuals as they are."""
    if not path.exists():
        raise SAEError(
            f"found normalize_activations {SCALED_ONCE!r} without its factor, expected {path}: "
            "fold it into the weights with sae-lens and save again"
        )
    factor = _field(_read_json(path), "scaling_factor", float, path, 1.0)  # null once SAE Lens has folded it
    if not 0 < factor < float("inf"):
        raise SAEError(f"found scaling_factor = {factor} in {path}, expected a positive number: copy it again")
    sae.W_enc.mul_(factor)
    sae.W_dec.div_(factor)
    sae.b_dec.div_(factor)


def _statistics(path: Path, n_features: int) -> tuple[Tensor | None, Tensor | None]:
    """The log10 firing frequencies and the largest activations, as far as they are there."""
    if not path.exists():
        return None, None
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes.get("sparsity") != (n_features,) or shapes.get("maximum", (n_features,)) != (n_features,):
            raise SAEError(f"found {shapes} in {path}, expected sparsity ({n_features},): delete or replace the file")
        found = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in shapes}
        return found["sparsity"], found.get("maximum")
