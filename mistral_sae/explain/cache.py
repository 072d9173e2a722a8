"""The sparse activations of one pass over a corpus, on disk: later questions about features run no model.

    folder/manifest.json       what the cache was made from; its number of tokens once the pass is complete
    folder/00000.safetensors   the first shard: whole rows, SHARD_TOKENS tokens at most; then 00001, ...

A shard holds the activations of its tokens sorted by feature, and where each feature begins: reading a feature is two
short reads a shard. Shards appear whole and in order, so a pass that is cut off goes on after the last one. Writing
takes memory for one shard; reading maps the files.

Activations are float16, within 0.05 % of what the encoder gave: reports show three digits, and bfloat16 would have two
and a half. Its range, 6e-8 to 65,504, is far wider than that of activations of standardised residuals.

Shapes: B rows, T positions, D model width, F features, S tokens of a shard, N activations, M passages.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from mistral_sae.cli import UserError
from mistral_sae.data.tokens import Row
from mistral_sae.distributed import ALONE, Group
from mistral_sae.files import SAEError, hash_of, opened, write_atomically, write_text
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import hash_of_sae
from mistral_sae.sae.features import Statistics
from mistral_sae.sae.kernels.step import bf16_pays
from mistral_sae.schema import Count, Schema, Total, parse, read

FORMAT = 1  # of the files: raise it with any change of what is in them
SHARD_TOKENS = 2**16  # so that 16 bits hold a position; at K=128 a shard is 34 MB and takes 0.3 GB while it is sorted
LARGEST = torch.finfo(torch.float16).max  # larger activations are stored as this
FOLDER = "activations"  # of a RUN_DIR
MANIFEST = "manifest.json"
OTHER = {
    "format": "another version",
    "autoencoder": "another autoencoder",
    "model": "another model",
    "corpus": "another corpus, or another part of it",
}


def is_for_scoring(document_id: str) -> bool:
    """True if explanations are scored on a document, False if they are made from it.

    A hash of the id decides, by another bit than those that decide whether it is held out of training.
    """
    return bool(hashlib.sha256(document_id.encode()).digest()[15] & 2)


# ---- what a cache is made from ----


def made_from(model: LanguageModel, sae: SparseAutoencoder, layer: int, corpus: dict[str, Any]) -> dict[str, Any]:
    """All that the activations depend on, as JSON: hashes of the autoencoder and of the model's layers, the corpus.

    `corpus` is whatever tells its rows from others: fingerprint, part, seed, length and number of rows.
    """
    tensors = {f"{i}.{name}": tensor for i in range(layer + 1) for name, tensor in model.block(i).state_dict().items()}
    found = {
        "format": FORMAT,
        "autoencoder": hash_of_sae(sae),
        "model": hash_of((model.name, layer, model.vocab_size, model.special_ids), tensors),
        "corpus": corpus,
    }
    return json.loads(json.dumps(found))  # as it will be read


def is_of(folder: Path, autoencoder: str) -> bool:
    """False if a cache, and so the explanations beside it, is of another autoencoder than the one with this hash."""
    found = _manifest(folder)
    return found is None or found.made_from.get("autoencoder") == autoencoder


def is_of_another_making(folder: Path, made_from: dict[str, Any]) -> bool:
    """True if there is a cache, and what it was made from is something else."""
    found = _manifest(folder)
    return found is not None and found.made_from != made_from


def note(folder: Path, explained_with: dict[str, Any]) -> None:
    """Write in the manifest with which settings the explanations beside the cache were made."""
    _write_manifest(folder, explained_with=explained_with)


def noted(folder: Path) -> dict[str, Any] | None:
    """What `note` has written since the cache was made, or None."""
    return found.explained_with if (found := _manifest(folder)) else None


class _Manifest(Schema):
    made_from: dict[str, Any]
    tokens: Total | None = None  # once the pass is complete
    row_tokens: Count | None = None
    explained_with: dict[str, Any] | None = None


def _manifest(folder: Path) -> _Manifest | None:
    """The manifest; None where it is missing or cannot be read, and the cache is made again."""
    with contextlib.suppress(SAEError):
        return read(_Manifest, Path(folder) / MANIFEST, "", SAEError)
    return None


def _write_manifest(folder: Path, **changed: Any) -> None:
    found = _manifest(folder)
    content = (found.model_dump(exclude_none=True) if found else {}) | changed
    write_text(Path(folder) / MANIFEST, json.dumps(content))


# ---- write ----


def write(
    folder: Path,
    made_from: dict[str, Any],
    rows: Iterable[Row],
    model: LanguageModel,
    sae: SparseAutoencoder,
    layer: int,
    rows_per_forward: int = 16,
    ranks: Group = ALONE.ranks,
) -> None:
    """Run rows of one length through the model up to `layer` and the encoder, and write the cache shard by shard.

    Goes on after the last whole shard of an earlier pass with the same `made_from`; `rows` always begins with the
    first row. A cache of another making is deleted. The first position of a row and special tokens get no activations.
    Several ranks, who all have all rows, write every so many-th shard each. Raises UserError where there is no row.
    """
    folder, rows = Path(folder), iter(rows)
    first = next(rows, None)  # before anything is deleted: the text may not be there
    if first is None:
        raise UserError("found not one row of text to look for activations in: use more text or a lower CONTEXT_LENGTH")
    with ranks.first_alone():
        if (found := _manifest(folder)) is None or found.made_from != made_from:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: shards without it are nobody's
            for path in folder.glob("*.safetensors"):
                path.unlink()
            _write_manifest(folder, made_from=made_from)
    row_tokens = len(first.tokens)
    per_shard, done = max(1, SHARD_TOKENS // row_tokens), len(_shards(folder))
    rows = itertools.islice(itertools.chain([first], rows), done * per_shard, None)
    for number in itertools.count(done):
        some = itertools.islice(rows, per_shard)
        if number % ranks.size != ranks.rank:
            if not sum(1 for _ in some):
                break
            continue
        arrays = _shard_of(some, model, sae, layer, rows_per_forward)
        if arrays is None:
            break
        write_atomically(folder / f"{number:05}.safetensors", partial(save_file, arrays))
    ranks.wait()
    with ranks.first_alone():
        if not ranks.rank:
            tokens = sum(len(shard.tokens) for shard in _shards(folder))
            _write_manifest(folder, tokens=tokens, row_tokens=row_tokens)


def _shard_of(
    rows: Iterator[Row], model: LanguageModel, sae: SparseAutoencoder, layer: int, rows_per_forward: int
) -> dict[str, np.ndarray] | None:
    """The arrays of a Shard of some rows; None of none."""
    names: dict[str, int] = {}
    batches, parts, n_tokens = [], [], 0
    while batch := list(itertools.islice(rows, rows_per_forward)):
        tokens_BT = np.stack([row.tokens for row in batch], dtype=np.int64)
        numbers = [[*(names.setdefault(name, len(names)) for name in row.documents), -1] for row in batch]
        documents_BT = np.stack([np.array(of)[row.document_of] for of, row in zip(numbers, batch, strict=True)])
        documents_BT[~model.kept(torch.from_numpy(tokens_BT)).numpy()] = -1
        counts_BT = torch.from_numpy(documents_BT >= 0)
        token, feature, value = active(model, sae, layer, torch.from_numpy(tokens_BT), counts_BT)
        batches.append((tokens_BT, documents_BT))
        parts.append((token + n_tokens, feature, value))
        n_tokens += tokens_BT.size
    if not batches:
        return None
    tokens_BT, documents_BT = map(np.concatenate, zip(*batches, strict=True))
    first, last = _runs(documents_BT)
    token_N, feature_N, value_N = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    feature_N = feature_N.to(torch.int16 if sae.n_features <= 2**15 else torch.int32)  # fewer bits sort faster
    feature_N, order_N = feature_N.sort(stable=True)
    feature_N, value_N = feature_N.long(), value_N[order_N]
    ends_F = torch.bincount(feature_N, minlength=sae.n_features).cumsum(0)
    maxima_F = value_N.new_zeros(sae.n_features).scatter_reduce_(0, feature_N, value_N, "amax")
    position = np.min_scalar_type(tokens_BT.size - 1)
    return {
        "tokens": tokens_BT.ravel().astype(np.int32),
        "documents": documents_BT.ravel().astype(np.int32),
        "first": first.astype(position),
        "last": last.astype(position),
        "positions": token_N[order_N].cpu().numpy().astype(position),
        "values": value_N.cpu().numpy(),
        "offsets": np.concatenate(([0], ends_F.cpu().numpy())),
        "maxima": maxima_F.cpu().numpy(),
        "names": np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8),
    }


@torch.no_grad()
def active(
    model: LanguageModel, sae: SparseAutoencoder, layer: int, tokens_BT: Tensor, counts_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Token (its place in the batch, row by row), feature and float16 value (N each) of the activations, by token.

    Only positions where `counts_BT` are encoded: an autoencoder without a fixed K may have thousands of features
    active on a BOS. Raises NotFinite where a residual is.
    """
    x_BTD = model.residuals(tokens_BT, layer).to(sae.W_dec.device)
    places = counts_BT.flatten().nonzero().squeeze(1).to(x_BTD.device)
    # Without a fixed K all F pre-activations exist at once: those of a row's tokens at a time
    step = max(1, len(places)) if sae.activation == "topk" else tokens_BT.shape[1]
    parts = []
    for some in places.split(step):
        x_ND = x_BTD.flatten(0, 1)[some]
        model.check_finite(x_ND, f"residuals of layer {layer}")
        encoded = sae.encode(x_ND, bf16=bf16_pays(x_BTD.device))
        values = encoded.values.clamp(max=LARGEST).half()
        which, column = (values > 0).nonzero(as_tuple=True)
        parts.append((some[which], encoded.indices[which, column], values[which, column]))
    token, feature, value = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return token, feature, value


def _runs(documents_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place (B * T) the first and the last of the unbroken run of one document in one row that it is in."""
    begins, places = np.ones(documents_BT.shape, dtype=bool), np.arange(documents_BT.size)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    ends = np.append(begins.ravel()[1:], True)
    first = np.maximum.accumulate(np.where(begins.ravel(), places, 0))
    last = np.minimum.accumulate(np.where(ends, places, places.size)[::-1])[::-1]
    return first, last


# ---- read ----


class Shard(NamedTuple):
    """The arrays of a shard, mapped from its file. Positions are places in the shard, row by row, of 16 bits."""

    tokens: np.ndarray  # (S) int32, ids
    documents: np.ndarray  # (S) int32, place in the shard's names; -1 where there are no activations
    first: np.ndarray  # (S) position of the first token of the same document in the same row
    last: np.ndarray  # (S) and of the last
    positions: np.ndarray  # (N) of each activation, sorted by feature and position
    values: np.ndarray  # (N) float16, above 0
    offsets: np.ndarray  # (F + 1) int64: feature f has the activations offsets[f] to offsets[f + 1]
    maxima: np.ndarray  # (F) float16, largest value
    names: np.ndarray  # the documents' ids as JSON, bytes: there can be more of them than a header may hold


class Passages(NamedTuple):
    """Some tokens, and around each a stretch of one document in one row. A token is its place in the whole cache."""

    tokens: np.ndarray  # (M) int64
    first: np.ndarray  # (M) int64, first token of the stretch
    last: np.ndarray  # (M) int64, and last
    documents: np.ndarray  # (M) int64, place in the cache's `names`
    values: np.ndarray  # (M) float32, a feature's activation on the token; 0 where it does not fire

    def at(self, which: np.ndarray) -> Passages:
        """Some of these, by index or mask."""
        return Passages(*(array[which] for array in self))


class Cache:
    """A complete cache, open for reading.

    Attributes:
        shards: its shards, all but the last of `shard_tokens` tokens, in rows of `row_tokens`.
        rows: how many.
        names: the ids of its documents; `for_scoring` (bool) says which half each is in.
        documents: for each shard, the place in `names` of each of its documents, and -1 at -1.
        tokens: how many can have activations: all but first positions and special tokens.
        counts_F: (F) int64, tokens on which each feature fires.
        maxima_F: (F) float32, its largest activation, 0 if it never fires.
    """

    def __init__(self, shards: list[Shard], row_tokens: int):
        self.shards, self.shard_tokens, self.row_tokens = shards, len(shards[0].tokens), row_tokens
        self.rows = sum(len(shard.tokens) for shard in shards) // row_tokens
        names: dict[str, int] = {}
        of_shards = (json.loads(shard.names.tobytes()) for shard in shards)
        self.documents = [np.array([*(names.setdefault(n, len(names)) for n in each), -1]) for each in of_shards]
        self.names = list(names)
        self.for_scoring = np.array([*map(is_for_scoring, self.names), False])
        self.tokens = sum(int((shard.documents >= 0).sum()) for shard in shards)
        self.counts_F = torch.from_numpy(np.sum([np.diff(shard.offsets) for shard in shards], axis=0))
        self.maxima_F = torch.from_numpy(np.max([shard.maxima for shard in shards], axis=0)).float()

    def spread(self, count: int) -> list[int]:
        """The numbers of so many shards, or of all, evenly from the first to the last."""
        n = len(self.shards)
        return np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int)).tolist()

    def activations(self, feature: int, shards: Iterable[int] | None = None) -> Passages:
        """The tokens on which a feature fires, in all of the shards or those of these numbers, in their order.

        The stretches are all that a row has of a token's document.
        """
        parts = []
        for number in range(len(self.shards)) if shards is None else shards:
            shard, start = self.shards[number], number * self.shard_tokens
            part = slice(*shard.offsets[feature : feature + 2].tolist())
            at = shard.positions[part]
            tokens = (start + each.astype(np.int64) for each in (at, shard.first[at], shard.last[at]))
            documents = self.documents[number][shard.documents[at]]
            parts.append((*tokens, documents, shard.values[part].astype(np.float32)))
        return Passages(*map(np.concatenate, zip(*parts, strict=True)))

    def statistics(self) -> Statistics:
        """How strongly and how often each feature fires in it."""
        return Statistics(self.maxima_F, self.counts_F / max(1, self.tokens), self.tokens)

    def stretches(self) -> dict[str, list[tuple[int, int]]]:
        """By document the first and last token of each of its unbroken stretches in a row, in their order."""
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in self.names}
        for number, shard in enumerate(self.shards):
            begins = np.flatnonzero((shard.first == np.arange(len(shard.first))) & (shard.documents >= 0))
            documents, start = self.documents[number][shard.documents[begins]], number * self.shard_tokens
            for document, first, last in zip(documents, begins, shard.last[begins], strict=True):
                found[self.names[document]].append((start + int(first), start + int(last)))
        return found

    def ids(self, first: int, last: int) -> list[int]:
        """The token ids from one token to another in the same row."""
        number, position = divmod(first, self.shard_tokens)
        return self.shards[number].tokens[position : position + last - first + 1].tolist()


def open_cache(folder: Path, made_from: dict[str, Any]) -> tuple[Cache | None, str]:
    """The cache in a folder; or None and one line that says why what is there cannot be used, "" if nothing is."""
    manifest, shards = _manifest(folder), _shards(folder)
    if manifest is None:
        return None, f"the cache in {folder} is damaged: made again" if shards else ""
    other = [words for name, words in OTHER.items() if manifest.made_from.get(name) != made_from.get(name)]
    if other:
        return None, f"the cache in {folder} is of {' and '.join(other)}: made again"
    if manifest.tokens is None or manifest.row_tokens is None:
        return None, f"the pass that wrote {folder} was cut off: going on after {len(shards):,} shards"
    if not shards or manifest.tokens != sum(len(shard.tokens) for shard in shards):
        return None, f"the cache in {folder} is damaged: made again from shard {len(shards):,} on"
    return Cache(shards, manifest.row_tokens), ""


def open_of(folder: Path, autoencoder: str) -> Cache | None:
    """The cache in a folder, of whatever corpus, if it is complete and of the autoencoder with this hash."""
    if not (found := _manifest(folder)) or not is_of(folder, autoencoder):
        return None
    return open_cache(folder, found.made_from | {"format": FORMAT})[0]


def _shards(folder: Path) -> list[Shard]:
    """The whole shards, up to the first that is not there or damaged."""
    shards: list[Shard] = []
    while True:
        path = Path(folder) / f"{len(shards):05}.safetensors"
        try:
            with opened(path) as file:
                shard = Shard(*(file.get_tensor(name).numpy() for name in Shard._fields))
            documents = parse(list[str], shard.names.tobytes(), str(path), "", SAEError)
            _check(shard, len(documents), len(shards[0].maxima) if shards else len(shard.maxima))
        except (SAEError, TypeError, ValueError):  # of another type than numpy has, or another shape
            return shards
        shards.append(shard)


def _check(shard: Shard, n_documents: int, n_features: int) -> None:
    """Raise ValueError where a shard's arrays do not fit each other: what reads them trusts them."""
    S, N = len(shard.tokens), len(shard.positions)
    position = np.min_scalar_type(max(0, S - 1))
    shapes = [(S,), (S,), (S,), (S,), (N,), (N,), (n_features + 1,), (n_features,), (shard.names.size,)]
    types = [np.int32, np.int32, position, position, position, np.float16, np.int64, np.float16, np.uint8]
    is_whole = S > 0 and all(a.shape == s and a.dtype == t for a, s, t in zip(shard, shapes, types, strict=True))
    bounds = is_whole and [
        (shard.tokens, 0, 2**31), (shard.documents, -1, n_documents), (shard.first, 0, S), (shard.last, 0, S),
        (shard.maxima, 0, np.inf), (shard.offsets, 0, N + 1),
    ]  # fmt: skip
    if bounds and S <= np.iinfo(position).max:  # else any number is one; the activations are not read for nothing
        bounds.append((shard.positions, 0, S))
    if not bounds or not all(a.size == 0 or (a.min() >= low and a.max() < high) for a, low, high in bounds):
        raise ValueError("arrays out of their bounds")
    if shard.offsets[0] != 0 or shard.offsets[-1] != N or (np.diff(shard.offsets) < 0).any():
        raise ValueError("offsets that do not rise from 0 to the end")
