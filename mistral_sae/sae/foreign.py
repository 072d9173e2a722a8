"""Autoencoders in the folders of other libraries than SAE Lens, in this project's terms.

sparsify has a folder for each hookpoint, with cfg.json and sae.safetensors, and a config.json of the run above them.
dictionary_learning has config.json and ae.pt, which is pickled; ae.safetensors is the same as safetensors. Features are
those of its release 0.1.0, which scales AutoEncoder's by the norms of the decoder rows and no others.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mistral_sae.cli import one_line
from mistral_sae.files import SAEError
from mistral_sae.sae.cfg import (
    CFG,
    NORMALIZATIONS,
    TENSORS,
    WEIGHTS,
    Description,
    Metadata,
    checked_k,
    hook_name,
    layer_in,
    read_cfg,
)
from mistral_sae.schema import Count, Index, Schema, Words, read

CONFIG = "config.json"
SPARSIFY, DICTIONARY, PICKLED, GEMMA_SCOPE = "sae.safetensors", "ae.safetensors", "ae.pt", "params.npz"
MARKS = (WEIGHTS, SPARSIFY, DICTIONARY, PICKLED, GEMMA_SCOPE)  # one of them is in the folder of each autoencoder
LISTED = 12  # of the autoencoders below a folder


def describe(folder: Path, known: dict[str, str], hook: str | None) -> Description:
    """The autoencoder in a folder, whoever wrote it; `known` and `hook` as `read_cfg` takes them. Raises SAEError."""
    if (folder / SPARSIFY).exists():
        return _sparsify(folder, hook)
    if not (folder / CFG).exists() and (folder / CONFIG).exists():
        return _dictionary(folder, hook)
    return read_cfg(folder, known, hook)


def check_readable(names: Iterable[str], where: str) -> None:
    """Raise SAEError where the only weights among files of these names are of a kind that is not read, and say why."""
    found = set(names)
    if found & {WEIGHTS, SPARSIFY, DICTIONARY}:
        return
    if GEMMA_SCOPE in found:
        raise SAEError(
            f"found {GEMMA_SCOPE} in {where}, as Gemma Scope has it, and Gemma is not run here: expected an SAE of a "
            "Mistral; if it is one, load it in SAE Lens, save it with its save_model and set SAE_PATH to that folder"
        )
    if PICKLED in found:
        raise SAEError(
            f"found {PICKLED} in {where}, a pickle, which could run anything: expected {DICTIONARY}; docs/sharing.md "
            "has the lines that make it, for files that you trust"
        )


def check_is_one(files: Iterable[str], source: str) -> None:
    """Raise SAEError, which lists them, where files (relative to a folder) are those of autoencoders below it."""
    found = {parent for parent, _, name in (file.rpartition("/") for file in files) if parent and name in MARKS}
    if found:
        path, at, revision = source.partition("@")
        first, *others = sorted(found, key=_by_number)
        shown = ", ".join(others[: LISTED - 1]) + (f" and {len(found) - LISTED} more" if len(found) > LISTED else "")
        number = f"{len(found)} autoencoders" if others else "an autoencoder"
        choose = f"SAE_PATH={path.rstrip('/')}/{first}{at}{revision}" + (f", or so with {shown}" if others else "")
        raise SAEError(f"found {number} below {source}, expected one in it: set {choose}")


def _by_number(name: str) -> list[tuple[str, int]]:
    return [(words, int(number or 0)) for words, number in re.findall(r"(\D*)(\d{0,18})", name)]


# ---- sparsify ----


class _SparseCoder(Schema):
    """A cfg.json of sparsify."""

    d_in: Count
    k: Count
    num_latents: Index | None = None  # 0 is none, too
    expansion_factor: Count = 32
    activation: str = "topk"
    signed: bool = False
    transcode: bool = False
    skip_connection: bool = False
    normalize_activations: str = "none"  # of what share.py wrote: sparsify itself does not normalize


class _Run(Schema):
    """The config.json above the hookpoints of a run."""

    model: Words | None = None
    dataset: Words | None = None
    ctx_len: Count | None = None


def _sparsify(folder: Path, hook: str | None) -> Description:
    path = folder / CFG
    cfg: _SparseCoder = read(_SparseCoder, path, "get sparsify's folder again", SAEError)
    if cfg.normalize_activations not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise SAEError(f"found normalize_activations {cfg.normalize_activations!r} in {path}, expected one of {known}")
    for name, expected in {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False}.items():
        if (found := getattr(cfg, name)) != expected:
            raise SAEError(f"found {name} = {found!r} in {path}, expected {expected!r}: use another checkpoint")
    above = folder.resolve().parent / CONFIG
    run = read(_Run, above, "get it again or remove it", SAEError) if above.exists() else _Run()
    name = hook or folder.name
    n_features = cfg.num_latents or cfg.d_in * cfg.expansion_factor
    return Description(
        cfg.d_in,
        n_features,
        checked_k(cfg.k, n_features, path),
        "topk",
        TENSORS | {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias"},
        Metadata(run.model, name, layer_in(name), True, run.ctx_len, run.dataset),
        weights=SPARSIFY,
        normalize=cfg.normalize_activations,
    )


# ---- dictionary_learning ----


class _Kind(NamedTuple):
    """A class of dictionary_learning."""

    activation: str
    tensors: Mapping[str, str]
    center: bool = True
    rescale: bool = False


LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}
GATED = LINEAR | {"b_enc": "mag_bias", "b_dec": "decoder_bias", "b_gate": "gate_bias", "r_mag": "r_mag"}
CLASSES = {
    "AutoEncoder": _Kind("relu", LINEAR | {"b_dec": "bias"}, rescale=True),
    "AutoEncoderNew": _Kind("relu", LINEAR | {"b_dec": "decoder.bias"}, center=False),
    "AutoEncoderTopK": _Kind("topk", LINEAR),
    "BatchTopKSAE": _Kind("jumprelu", LINEAR | {"cutoff": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Kind("jumprelu", TENSORS | {"cutoff": "threshold"}),
    "JumpReluAutoEncoder": _Kind("jumprelu", TENSORS | {"threshold": "threshold"}, center=False),
    "GatedAutoEncoder": _Kind("jumprelu", GATED),
}


class _Trainer(Schema):
    dict_class: str
    activation_dim: Count
    dict_size: Count
    k: Count | float | None = None
    layer: Index | None = None
    lm_name: Words | None = None
    submodule_name: Words | None = None


class _Buffer(Schema):
    ctx_len: Count | None = None
    io: str | None = None


class _Dictionary(Schema):
    """A config.json of dictionary_learning."""

    trainer: _Trainer
    buffer: _Buffer | None = None


def _dictionary(folder: Path, hook: str | None) -> Description:
    path = folder / CONFIG
    cfg: _Dictionary = read(_Dictionary, path, "is it dictionary_learning's? Get the folder again", SAEError)
    trainer, buffer = cfg.trainer, cfg.buffer or _Buffer()
    kind = CLASSES.get(trainer.dict_class)
    if kind is None:
        known = ", ".join(CLASSES)
        raise SAEError(f"found dict_class {one_line(trainer.dict_class)!r} in {path}, expected one of {known}")
    name = hook or _hook(trainer, buffer)
    return Description(
        trainer.activation_dim,
        trainer.dict_size,
        checked_k(trainer.k, trainer.dict_size, path) if kind.activation == "topk" else trainer.dict_size,
        kind.activation,
        kind.tensors,
        Metadata(trainer.lm_name, name, layer_in(name), True, buffer.ctx_len, None),
        weights=DICTIONARY,
        center=kind.center,
        rescale=kind.rescale,
    )


def _hook(trainer: _Trainer, buffer: _Buffer) -> str | None:
    """SAE Lens's name of the place that a trainer's layer, submodule and side mean."""
    submodule = trainer.submodule_name or "resid_post"
    if trainer.layer is None or "resid_post" not in submodule:
        return trainer.submodule_name
    after = hook_name(trainer.layer)
    return after.replace("resid_post", "resid_pre") if buffer.io == "in" else after
