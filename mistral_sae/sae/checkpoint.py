"""The SAE Lens directory format, both ways.

An SAE Lens directory holds cfg.json, sae_weights.safetensors with W_enc (D, F), b_enc (F), W_dec (F, D) and
b_dec (D), and sparsity.safetensors with the log10 of each feature's density (F), beside which we keep its largest
activation, `maximum` (F); SAE Lens passes over it. Nothing is ever unpickled.

Shapes: D model width, F features.
"""

import glob
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_sae.cli import not_finite, one_line
from mistral_sae.files import SAEError, hash_of, opened, put_in_place, sync_folder, write_beside
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import CFG, PUBLISHED, SCALER, Metadata, read_cfg, to_write
from mistral_sae.sae.features import Statistics

WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
WRITTEN_BYTES = 2**28  # of a matrix, gathered and written at a time
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


def _shapes(d_model: int, n_features: int, activation: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an SAE Lens directory."""
    F, D = n_features, d_model
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return shapes | ({"threshold": (F,)} if activation == "jumprelu" else {})


def _check_finite(name: str, tensor: Tensor, where: Path | str) -> None:
    low, high = torch.aminmax(tensor.detach())  # both pass NaN on, and no mask as large as the weights is made
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise SAEError(not_finite(f"{name} of {where}", "use an earlier one"))


# ---- save ----


def save_sae(folder: Path, sae: SparseAutoencoder, metadata: Metadata, statistics: Statistics | None = None) -> None:
    """Write an SAE Lens directory that sae-lens 6 and `load_sae` read, in float32, in place of an older one.

    Raises SAEError, before anything is written, where weights are not finite, or statistics of other sizes or numbers
    than densities and maxima have.
    """
    folder = Path(folder)
    shapes = _shapes(sae.d_model, sae.n_features, sae.activation)
    for name in shapes:
        _check_finite(name, getattr(sae, name), "the autoencoder to save")
    if statistics is not None:
        _check_statistic("density_F", statistics.density_F, sae.n_features, 1)
        _check_statistic("maximum_F", statistics.maximum_F, sae.n_features, torch.finfo().max)
    if sae.mesh.ranks.rank:
        for _ in _rows(sae, shapes):  # which the first rank writes
            pass
        return

    # The slow part: everything is written next to whatever is there, which stays as it is.
    cfg = json.dumps(to_write(sae, metadata), indent=2) + "\n"
    new = {CFG: write_beside(folder / CFG, lambda path: path.write_text(cfg, encoding="utf-8"))}
    if statistics is not None:
        log_density_F = torch.log10(statistics.density_F.float() + NEVER_FIRED)
        described = {"sparsity": log_density_F, "maximum": statistics.maximum_F}
        new[SPARSITY] = write_beside(folder / SPARSITY, partial(save_file, described))
    new[WEIGHTS] = write_beside(folder / WEIGHTS, partial(_write_weights, sae, shapes))

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


def _rows(sae: SparseAutoencoder, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, Tensor]]:
    """The weights of all shards, some rows at a time: their name, the first row's number, and the rows.

    So no rank ever holds all of them.
    """
    shards = sae.mesh.shards
    for name in shapes:
        tensor = getattr(sae, name).detach().float()
        at_once = max(1, WRITTEN_BYTES // (4 * tensor[0].numel() * shards.size))
        for start in range(0, len(tensor), at_once):
            rows = tensor[start : start + at_once]
            if name == "W_enc":  # (D, F)
                yield name, start, shards.gather(rows, dim=1)
            elif name == "b_dec":  # which every shard has
                yield name, start, rows
            else:
                for shard, part in enumerate(shards.gather(rows).split(len(rows))):
                    yield name, shard * len(tensor) + start, part


def _write_weights(sae: SparseAutoencoder, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Write a safetensors file of float32 tensors, some rows at a time: the library would want all of them at once."""
    header, ends = {}, [0, *itertools.accumulate(4 * math.prod(shape) for shape in shapes.values())]
    for (name, shape), *offsets in zip(shapes.items(), ends, ends[1:], strict=False):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begins = dict(zip(shapes, (8 + len(text) + end for end in ends), strict=False))
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, start, rows in _rows(sae, shapes):
            file.seek(begins[name] + 4 * start * math.prod(shapes[name][1:]))
            file.write(rows.cpu().contiguous().numpy().astype("<f4", copy=False).data)


def _check_statistic(name: str, values_F: Tensor, n_features: int, highest: float) -> None:
    low, high = (bound.item() for bound in values_F.aminmax())
    if values_F.shape != (n_features,) or not 0 <= low <= high <= highest:
        found = f"{name} of shape {tuple(values_F.shape)} from {low:.3g} to {high:.3g}"
        raise SAEError(f"found {found}, expected ({n_features},) and 0 to {highest:g}: pass no logarithms")


# ---- load ----


@torch.no_grad()
def load_sae(source: str | Path, *, hook_name: str | None = None, device: torch.device | str = "cpu") -> LoadedSAE:
    """Load an SAE Lens directory, in float32: what sae-lens 6 saves for topk, jumprelu and standard, or that of 2024.

    `source` is a folder, a RUN_DIR that holds one as `sae`, or a repository of the Hugging Face hub: "owner/name" or
    "owner/name/folder/in/it"; what those in PUBLISHED leave out is known here. `hook_name` replaces what the checkpoint
    says about where it was trained, for one whose label is wrong. Decoder rows keep their norm, unless the checkpoint
    scales features by it: it then moves into the encoder. Raises SAEError, one line, where there is no checkpoint, or
    it is damaged or of a kind that is not known.
    """
    folder = _find(source)
    path, known = folder / WEIGHTS, PUBLISHED.get("/".join(str(source).split("/")[:2]), {})
    cfg = read_cfg(folder, known, hook_name)
    d_model, n_features, activation = cfg.d_model, cfg.n_features, cfg.activation
    shapes = _shapes(d_model, n_features, activation)
    with opened(path) as file:
        _check_shapes(file, shapes, path)  # before any memory is taken
        options: dict[str, Any] = {"activation": activation, "normalize": cfg.normalize, "center": cfg.center}
        sae = SparseAutoencoder(d_model, n_features, cfg.k, device=device, **options)
        for name in shapes:
            stored, tensor = file.get_tensor(name), getattr(sae, name)
            if not stored.is_floating_point():
                raise SAEError(f"found {name} as {stored.dtype} in {path}, expected floating point: use another copy")
            tensor.copy_(stored)  # W_enc stays the transposed view of an (F, D) block, and nothing maps the file
            _check_finite(name, tensor, path)
    if cfg.factor != 1:
        sae.W_enc.mul_(cfg.factor)
        sae.W_dec.div_(cfg.factor)
        sae.b_dec.div_(cfg.factor)
    if cfg.rescale:
        norm_F = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(1e-8)
        sae.W_enc.mul_(norm_F)
        sae.b_enc.mul_(norm_F)
        sae.W_dec.div_(norm_F.unsqueeze(1))
    if activation == "jumprelu":
        sae.threshold.clamp_(min=0)  # in SAE Lens a feature is never negative, wherever its threshold lies
    return LoadedSAE(sae, cfg.metadata, *_densities_and_maxima(folder / SPARSITY, n_features))


def _find(source: str | Path) -> Path:
    """The folder that holds cfg.json: here, in `sae` below, or downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "sae"
        return inner if inner.is_dir() and not (folder / CFG).exists() else folder
    parts = str(source).rstrip("/").split("/")
    is_local = isinstance(source, Path) or Path(parts[0]).exists()  # runs/typo is no repository where runs/ exists
    if is_local or len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        known = "an SAE Lens directory, a RUN_DIR that holds one or a hub repository (owner/name)"
        raise SAEError(f"found no folder {str(source)!r}, expected {known}: check the path, or run train.py")
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
        found = f"neither such a folder nor {repository!r} on the Hugging Face hub ({one_line(error)})"
        do = "check the name and the network; for a private one set HF_TOKEN"
        raise SAEError(f"found {found}, expected an SAE Lens directory: {do}") from None


def _check_shapes(file: Any, expected: dict[str, tuple[int, ...]], path: Path) -> None:
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    # Early in 2024 SAE Lens wrote a scaling factor for each feature, all ones unless it had been tuned.
    if "scaling_factor" in found and bool((file.get_tensor("scaling_factor") == 1).all()):
        del found["scaling_factor"]
    for name in (*expected, *found):
        if found.get(name) != expected.get(name):
            shapes = f"{name} of shape {found.get(name)} in {path}, expected {expected.get(name)} from {CFG}"
            raise SAEError(f"found {shapes}: copy both files from one checkpoint, or use another")


def _densities_and_maxima(path: Path, n_features: int) -> tuple[Tensor | None, Tensor | None]:
    if not path.exists():
        return None, None
    with opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes.get("sparsity") != (n_features,) or shapes.get("maximum", (n_features,)) != (n_features,):
            raise SAEError(f"found {shapes} in {path}, expected sparsity ({n_features},): delete or replace the file")
        found = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in shapes}
    return 10 ** found["sparsity"], found.get("maximum")
