"""The SAE Lens directory format, both ways.

An SAE Lens directory holds cfg.json, sae_weights.safetensors with W_enc (D, F), b_enc (F), W_dec (F, D) and
b_dec (D), and sparsity.safetensors with the log10 of each feature's density (F), beside which we keep its largest
activation, `maximum` (F); SAE Lens passes over it. Folders of other libraries are read as well (foreign.py). Nothing is
ever unpickled.

Shapes: D model width, F features.
"""

import glob
import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_sae.cli import Progress, not_finite, one_line
from mistral_sae.files import SAEError, hash_of, opened, put_in_place, sync_folder, write_beside
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import CFG, PUBLISHED, SCALER, WEIGHTS, Description, Metadata, to_write
from mistral_sae.sae.features import Statistics
from mistral_sae.sae.foreign import CONFIG, DICTIONARY, MARKS, SPARSIFY, check_is_one, check_readable, describe

SPARSITY = "sparsity.safetensors"
AXES = {"W_enc": "DF", "b_enc": "F", "W_dec": "FD", "b_dec": "D", "threshold": "F", "b_gate": "F", "r_mag": "F"}
PASSED_OVER = {"k", "threshold", "group_sizes"}  # of dictionary_learning, where they do not make the features
GATHERED_BYTES = 2**28  # of a matrix, from all shards at a time
NEVER_FIRED = 1e-10  # added to a density before its log10, as SAE Lens does


class LoadedSAE(NamedTuple):
    """An autoencoder and what its folder says about it."""

    sae: SparseAutoencoder
    metadata: Metadata
    density_F: Tensor | None = None  # share of the tokens on which each feature fires, on the CPU
    maximum_F: Tensor | None = None  # largest activation late in training, on the CPU; None in what others saved

    @property
    def statistics(self) -> Statistics | None:
        """Densities and maxima; None unless both were saved."""
        if self.density_F is None or self.maximum_F is None:
            return None
        return Statistics(self.maximum_F, self.density_F, None)


def check_model(loaded: LoadedSAE, name: str, d_model: int, n_layers: int) -> None:
    """Raise SAEError unless the autoencoder has the width of a model, and the model its layer."""
    width, layer = loaded.sae.d_model, loaded.metadata.residual_layer
    if width != d_model or layer >= n_layers:
        raise SAEError(
            f"found an autoencoder of width {width} and layer {layer}, and {name} of width {d_model} and layers 0 to "
            f"{n_layers - 1}: expected the model that it was trained on; set MISTRAL_MODEL_PATH or SAE_PATH"
        )


def hash_of_sae(sae: SparseAutoencoder) -> str:
    """SHA-256 of the autoencoder's sizes and weights."""
    config = (sae.d_model, sae.n_features, sae.k, sae.activation, sae.normalize, sae.center)
    return hash_of(config, sae.state_dict())


def _shapes(d_model: int, n_features: int, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of an autoencoder's tensors; of one that has no axes it is ()."""
    sizes = {"D": d_model, "F": n_features}
    return {name: tuple(sizes[axis] for axis in AXES.get(name, "")) for name in names}


def _check_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    low, high = torch.aminmax(tensor.detach())  # both pass NaN on, and no mask as large as the weights is made
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise SAEError(not_finite(f"{name} of {where}", "use an earlier one"))


# ---- save ----


def save_sae(folder: Path, sae: SparseAutoencoder, metadata: Metadata, statistics: Statistics | None = None) -> None:
    """Write an SAE Lens directory that sae-lens 6 and `load_sae` read, in float32, in place of an older one.

    All ranks have to, and the first one writes. Raises SAEError, before anything is written, where weights are not
    finite.
    """
    folder = Path(folder)
    for name in sae.state_dict():
        _check_finite(name, getattr(sae, name), "the autoencoder to save")
    weights = {name: _whole(sae, name) for name in sae.state_dict()}
    if sae.mesh.ranks.rank:
        return

    # The slow part: everything is written next to whatever is there, which stays as it is.
    cfg = json.dumps(to_write(sae, metadata), indent=2) + "\n"
    new = {CFG: write_beside(folder / CFG, lambda path: path.write_text(cfg, encoding="utf-8"))}
    if statistics is not None:
        log_density_F = torch.log10(statistics.density_F.float() + NEVER_FIRED)
        described = {"sparsity": log_density_F, "maximum": statistics.maximum_F}
        new[SPARSITY] = write_beside(folder / SPARSITY, partial(save_file, described))
    new[WEIGHTS] = write_beside(folder / WEIGHTS, partial(save_file, weights))

    # Three files cannot be renamed as one, so the files that describe the weights leave first and cfg.json
    # comes back last. What a crash in between leaves: complete weights, old or new, never beside the other's
    # sparsity, and either the cfg.json that is right for both or none; without one no loader takes them.
    (folder / SPARSITY).unlink(missing_ok=True)
    if (folder / CFG).exists() and (folder / CFG).read_bytes() != new[CFG].read_bytes():
        (folder / CFG).unlink()
    sync_folder(folder)
    for name in reversed(new):
        put_in_place(new[name], folder / name)
        sync_folder(folder)


def _whole(sae: SparseAutoencoder, name: str) -> Tensor:
    """A tensor of all shards in float32, on the CPU of the first rank; all ranks have to ask for it.

    It comes some features at a time, so that no device has to hold what the others do.
    """
    tensor, mesh = getattr(sae, name).detach().float(), sae.mesh
    if mesh.shards.size == 1 or name == "b_dec":  # which every shard has
        return tensor.cpu().contiguous()
    rows = tensor.T if name == "W_enc" else tensor
    at_once = max(1, GATHERED_BYTES // (4 * rows[0].numel() * mesh.shards.size))
    whole = torch.empty(0 if mesh.ranks.rank else mesh.shards.size, *rows.shape)
    for start in range(0, len(rows), at_once):
        some = mesh.shards.gather(rows[start : start + at_once].unsqueeze(0))
        whole[:, start : start + at_once] = some[: len(whole)]
    whole = whole.flatten(0, 1)
    return whole.T.contiguous() if name == "W_enc" else whole


# ---- load ----


@torch.no_grad()
def load_sae(source: str | Path, *, hook_name: str | None = None, device: torch.device | str = "cpu") -> LoadedSAE:
    """Load an autoencoder, in float32: what sae-lens 6 saves, or that of 2024, sparsify or dictionary_learning.

    `source` is a folder, a RUN_DIR that holds one as `sae`, or a repository of the Hugging Face hub: "owner/name" or
    "owner/name/folder/in/it", with "@revision" behind it for another than main; what those in PUBLISHED leave out is
    known here. `hook_name` replaces what the checkpoint says about where it was trained, for one whose label is wrong.
    Decoder rows keep their norm, unless the checkpoint scales features by it: it then moves into the encoder. Raises
    SAEError, one line, where there is no checkpoint, there are several, or it is damaged or of a kind not known.
    """
    folder = _find(source)
    known = PUBLISHED.get("/".join(str(source).partition("@")[0].split("/")[:2]), {})
    cfg = describe(folder, known, hook_name)
    path, shapes = folder / cfg.weights, _shapes(cfg.d_model, cfg.n_features, cfg.tensors)
    with opened(path) as file:
        _check_shapes(file, cfg, shapes, path)  # before any memory is taken
        options: dict[str, Any] = {"activation": cfg.activation, "normalize": cfg.normalize, "center": cfg.center}
        sae = SparseAutoencoder(cfg.d_model, cfg.n_features, cfg.k, device=device, **options)
        others = {name: torch.empty(shape, device=device) for name, shape in shapes.items() if not hasattr(sae, name)}
        for name, theirs in cfg.tensors.items():
            stored = file.get_tensor(theirs.removesuffix(".T"))
            if not stored.is_floating_point():
                raise SAEError(f"found {name} as {stored.dtype} in {path}, expected floating point: use another copy")
            # W_enc stays the transposed view of an (F, D) block, and nothing maps the file
            tensor = others[name] if name in others else getattr(sae, name)
            tensor.copy_(stored.T if theirs.endswith(".T") else stored)
            _check_finite(name, tensor, path)
    _fold(sae, cfg, others)
    return LoadedSAE(sae, cfg.metadata, *_densities_and_maxima(folder / SPARSITY, cfg.n_features))


def _fold(sae: SparseAutoencoder, cfg: Description, others: dict[str, Tensor]) -> None:
    """Bring weights that a file has in other terms into SparseAutoencoder's, in place; `others` it has no place for."""
    if "b_gate" in others:
        # Gated with shared weights is JumpReLU: x + b_gate > 0 where x e^r + b_mag > b_mag - b_gate e^r
        scale_F = others["r_mag"].exp()
        sae.threshold.copy_(sae.b_enc - scale_F * others["b_gate"])
        sae.W_enc.mul_(scale_F)
    if cfg.factor != 1:
        sae.W_enc.mul_(cfg.factor)
        sae.W_dec.div_(cfg.factor)
        sae.b_dec.div_(cfg.factor)
    if cfg.rescale:
        norm_F = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(1e-8)
        sae.W_enc.mul_(norm_F)
        sae.b_enc.mul_(norm_F)
        sae.W_dec.div_(norm_F.unsqueeze(1))
    if "cutoff" in others:  # one threshold for all features, as scaled
        sae.threshold.copy_(others["cutoff"] / (cfg.factor if cfg.rescale else 1))
    if cfg.activation == "jumprelu":
        sae.threshold.clamp_(min=0)  # a feature is never negative, wherever its threshold lies


def _find(source: str | Path) -> Path:
    """The folder that holds an autoencoder: here, in `sae` below, or downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "sae"
        folder = inner if inner.is_dir() and not (folder / CFG).exists() else folder
        names = [file.name for file in folder.iterdir()]
        check_readable(names, str(folder))
        if not {CFG, *MARKS} & set(names):
            below = [
                file for depth in ("*", "*/*", "*/*/*") for mark in MARKS for file in folder.glob(f"{depth}/{mark}")
            ]
            check_is_one([file.relative_to(folder).as_posix() for file in below], str(source))
        return folder
    path, _, revision = str(source).rstrip("/").partition("@")
    parts = path.split("/")
    is_local = isinstance(source, Path) or Path(parts[0]).exists()  # runs/typo is no repository where runs/ exists
    are_names = all(re.fullmatch(r"\w[\w.-]*", part) for part in (*parts, *(revision or "main").split("/")))
    if is_local or len(parts) < 2 or not are_names:
        known = "an SAE Lens directory, a RUN_DIR that holds one or a hub repository (owner/name)"
        raise SAEError(f"found no folder {str(source)!r}, expected {known}: check the path, or run train.py")
    return _download(str(source), "/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def _download(source: str, repository: str, subfolder: str, revision: str | None) -> Path:
    """Fetch the files of a checkpoint from the hub, all of one revision, and return their folder."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HTTPError  # slow to import, too, and of use here only

    prefix, above = (f"{subfolder}/", subfolder.rpartition("/")[0]) if subfolder else ("", "")
    wanted = (CFG, WEIGHTS, SPARSITY, SCALER, SPARSIFY, DICTIONARY, CONFIG)
    patterns = [glob.escape(name) for name in (*(prefix + each for each in wanted), f"{above}/{CONFIG}".lstrip("/"))]
    try:
        options: Any = {"revision": revision, "allow_patterns": patterns, "tqdm_class": Progress}
        folder = Path(snapshot_download(repository, **options)) / subfolder
        if any((folder / name).exists() for name in (CFG, *MARKS)):
            return folder
        files = list_repo_files(repository, revision=revision)
    except (HTTPError, OSError, ValueError) as error:
        found = f"neither such a folder nor {repository!r} on the Hugging Face hub ({one_line(error)})"
        do = "check the name and the network; for a private one set HF_TOKEN"
        raise SAEError(f"found {found}, expected an SAE Lens directory: {do}") from None
    within = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    check_readable(within, source)
    check_is_one(within, source)
    return folder


def _check_shapes(file: Any, cfg: Description, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise SAEError unless a file has all tensors, in their shapes, and no others."""
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {}
    for name, theirs in cfg.tensors.items():
        expected[theirs.removesuffix(".T")] = shapes[name][::-1] if theirs.endswith(".T") else shapes[name]
    # Early in 2024 SAE Lens wrote a scaling factor for each feature, all ones unless it had been tuned.
    if "scaling_factor" in found and bool((file.get_tensor("scaling_factor") == 1).all()):
        del found["scaling_factor"]
    passed_over = PASSED_OVER if cfg.weights == DICTIONARY else set()
    for name in (*expected, *(name for name in found if name not in passed_over)):
        if found.get(name) != expected.get(name):
            seen = f"{name} of shape {found.get(name)} in {path}, expected {expected.get(name)} by the file beside it"
            raise SAEError(f"found {seen}: copy both files from one checkpoint, or use another")


def _densities_and_maxima(path: Path, n_features: int) -> tuple[Tensor | None, Tensor | None]:
    if not path.exists():
        return None, None
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes.get("sparsity") != (n_features,) or shapes.get("maximum", (n_features,)) != (n_features,):
            raise SAEError(f"found {shapes} in {path}, expected sparsity ({n_features},): delete or replace the file")
        found = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in shapes}
    return 10 ** found["sparsity"], found.get("maximum")
