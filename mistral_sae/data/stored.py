"""Residuals kept on disk: written once, then the source of any number of trainings.

    folder/manifest.json   what they were made from: the model, the tokenizer, the text, the layers
    folder/00000.arrow     the first SHARD_TOKENS of them, in a random order; then 00001.arrow, ...

A shard is an Arrow stream with one column a layer, `layer_16`: D numbers a token. Arrow is what Hugging Face's
`datasets` opens without a copy, and what maps into memory as it lies on disk. It has no bfloat16, so the numbers are
its 16 bits as int16, the type of 16 bits that torch has all operations for:

    dataset = datasets.Dataset.from_file("00000.arrow").with_format("torch", dtype=torch.int16)
    x_ND = dataset[:1000]["layer_16"].view(torch.bfloat16)

Shards appear whole, so that filling goes on where it was cut off, and makes only what is missing. They are read in
blocks of BLOCK_TOKENS, each with a checksum. Every buffer is made of blocks from all over the shards and permuted
again: with the order inside a shard this is a shuffle of the whole in two passes.

Shapes: N tokens, D model width.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import xxhash
from torch import Tensor

from mistral_sae.cli import Progress, UserError, one_line, room_for, size_of
from mistral_sae.data.activations import Batch, Buffer, Stream, permuted, shuffled_streams
from mistral_sae.data.documents import Skipped
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Corpus, prefetch, shuffle
from mistral_sae.files import locked, write_atomically, write_text
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.schema import Count, Schema, parse, read

FORMAT = 1  # of the files: raise it with any change of what is in them
SHARD_TOKENS = 2**14  # 134 MB a layer at 7B
BLOCK_TOKENS = 64  # read at once: 0.5 MB at 7B
KEY = b"mistral_sae"  # of a shard's metadata
MANIFEST = "manifest.json"


class StoreError(UserError):
    """Residuals on disk that cannot be used. One line: what was found, what was expected, what to do."""


class Manifest(Schema):
    """What a folder's residuals were made from."""

    format: int
    layers: list[int]
    shuffle_rows: Count  # rows of text that were shuffled together before the model read them
    made_from: dict[str, Any]


class _Header(Schema):
    """The metadata of a shard."""

    place: dict[str, Any]  # of the text after it
    checksums: dict[str, str]  # by column: 16 digits a block, XXH3


@dataclass(frozen=True)
class StoredResiduals:
    """The first `tokens` residuals of a folder, which may hold more of them, and of more layers.

    Raises StoreError, when it is made, if the folder holds others.
    """

    folder: Path
    d_model: int
    layers: Sequence[int]
    tokens: int
    shuffle_rows: int  # of a folder that is to be made
    made_from: dict[str, Any]  # what they depend on beside the model, by the names of the constants

    @classmethod
    def of(
        cls, constants: Any, corpus: Corpus, layers: Iterable[int], d_model: int, dtype: torch.dtype
    ) -> StoredResiduals | None:
        """What constants such as ACTIVATIONS_PATH describe, or None if they name no folder."""
        if constants.ACTIVATIONS_PATH is None:
            return None
        made_from = {name.upper(): value for name, value in asdict(corpus).items() if name not in ("seed", "data_path")}
        made_from |= {"text of DATA_PATH": corpus.fingerprint(), "EXCLUDE_TOKENS": constants.EXCLUDE_TOKENS}
        made_from |= {"DTYPE": str(dtype).removeprefix("torch.")}
        folder = Path(constants.ACTIVATIONS_PATH)
        return cls(folder, d_model, sorted(layers), constants.ACTIVATIONS_TOKENS, constants.SHUFFLE_ROWS, made_from)

    def __post_init__(self) -> None:
        self._check(self.made_from)

    # ---- what is there ----

    def missing(self) -> list[int]:
        """The numbers of the shards that are still to be written."""
        return [number for number in range(-(-self.tokens // SHARD_TOKENS)) if not self._path(number).exists()]

    def plan(self) -> str:
        """What there is and what is to be written. Raises UserError if it has no room."""
        missing = len(self.missing()) * SHARD_TOKENS
        held = f"{self.tokens:,} residuals of layer {', '.join(map(str, self.layers))} in {self.folder}"
        if not missing:
            return f"{held}, all there"
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        size, free = missing * self.d_model * 2 * len(self.layers), shutil.disk_usage(there).free
        if size > free:
            raise UserError(
                f"found {size_of(free)} free in {there}, expected {size_of(size)} for the residuals that are to be "
                "written: make room, lower ACTIVATIONS_TOKENS or choose another ACTIVATIONS_PATH"
            )
        return f"{held}: {size_of(size)} to write, of {size_of(free)} free"

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.arrow"

    def _manifest(self) -> Manifest | None:
        path, advice = self.folder / MANIFEST, "choose another ACTIVATIONS_PATH, or remove the folder"
        if path.exists():
            return read(Manifest, path, advice, StoreError)
        if any(self.folder.glob("*.arrow")):
            raise StoreError(f"found Arrow files without a {MANIFEST} in {self.folder}, expected both: {advice}")
        return None

    def _check(self, here: dict[str, Any]) -> None:
        """Raise StoreError if what the manifest says is another."""
        if (found := self._manifest()) is None:
            return
        there = {"format": found.format} | found.made_from
        here = {"format": FORMAT} | here
        wrong = [
            f"{name} ({there.get(name)} there, {value} here)" if name.isupper() else name
            for name, value in here.items()
            if there.get(name) != value
        ]
        if missing := [layer for layer in self.layers if layer not in found.layers]:
            wrong.append(f"TARGET_LAYER ({found.layers} there, {missing} here)")
        elif sorted(found.layers) != sorted(self.layers) and self.missing():
            wrong.append(f"TARGET_LAYER ({found.layers} there and not yet complete, {list(self.layers)} here)")
        if wrong:
            raise StoreError(
                f"{self.folder} holds residuals of another {', '.join(wrong)}, expected those of this run: choose "
                "another ACTIVATIONS_PATH"
            )

    # ---- write ----

    def fill(self, corpus: Corpus, model: LanguageModel, rows_per_forward: int) -> None:
        """Write the shards that are missing; after a stop it goes on after the last whole one.

        The text comes in one order whatever the seed of the training. Raises StoreError if the folder's residuals are
        of another model or tokenizer, UserError if another process is filling it, Failed if the disk is full.
        """
        here = self.made_from | {"tokenizer": model.tokenizer.fingerprint()}
        here |= {f"model to layer {layer}": model.fingerprint(layer) for layer in self.layers}
        self._check(here)
        if not self.missing():
            return
        with locked(self.folder, constant="ACTIVATIONS_PATH") as note:
            if note:
                print(note)
            self._check(here)  # again, as another process may have begun
            if (found := self._manifest()) is None:
                found = Manifest(
                    format=FORMAT, layers=list(self.layers), shuffle_rows=self.shuffle_rows, made_from=here
                )
                write_text(self.folder / MANIFEST, found.model_dump_json(indent=1) + "\n")
            print(f"writing the residuals to {self.folder}")
            self._write_missing(replace(corpus, seed=0), model, rows_per_forward, found.shuffle_rows)

    def _write_missing(self, corpus: Corpus, model: LanguageModel, rows_per_forward: int, window: int) -> None:
        missing, skipped, total = self.missing(), Skipped(), -(-self.tokens // SHARD_TOKENS) * SHARD_TOKENS
        done = total - len(missing) * SHARD_TOKENS
        with Progress(desc="residuals", total=total, initial=done, unit=" tokens", unit_scale=True) as progress:
            for _, run in itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
                numbers = [number for _, number in run]  # without a gap
                start = self.place_after(numbers[0] - 1) if numbers[0] else BEGINNING
                rows = corpus.rows(model.tokenizer, held_out=False, start=start, skipped=skipped)
                with closing(prefetch(rows, depth=window)) as ahead:
                    batches = shuffled_streams(
                        shuffle(ahead, window, corpus.seed, start),
                        model,
                        [Stream(layer, corpus.seed) for layer in self.layers],
                        batch_size=SHARD_TOKENS,
                        buffer_tokens=max(SHARD_TOKENS, corpus.context_length),
                        rows_per_forward=rows_per_forward,
                        start=start,
                    )
                    for number, (x, place) in zip(numbers, batches, strict=False):
                        x_by_layer = dict(zip(self.layers, x, strict=True))
                        for layer, x_ND in x_by_layer.items():
                            model.check_finite(x_ND, f"residuals of layer {layer}")
                        write_shard(self._path(number), x_by_layer, place)
                        progress.update(SHARD_TOKENS)
        if skipped.count:
            print(skipped.summary())

    def place_after(self, number: int) -> Place:
        """Where the text goes on after a shard."""
        return Place.of(self._open(number)[1].place)

    # ---- read ----

    def batches(
        self, streams: Sequence[Stream], *, batch_size: int, buffer_tokens: int, start: Place = BEGINNING
    ) -> Iterator[Batch]:
        """Shuffled batches (S, B, D) of S streams in bfloat16, on the CPU, without end.

        They have all tokens once, then all again in another order. What a batch holds is a function of the first
        `tokens`, `buffer_tokens`, the stream and its number. A run that had the place of a batch goes on after it.
        Memory: two buffers for each layer, of which one is being read, and a batch for each stream. Raises StoreError
        for a shard that is missing or damaged.
        """
        layers = sorted({stream.layer for stream in streams})
        with closing(prefetch(self._buffers(layers, buffer_tokens, start.buffer), depth=1)) as buffers:
            yield from permuted(buffers, streams, batch_size, start)

    def _buffers(self, layers: Sequence[int], buffer_tokens: int, first_number: int) -> Iterator[Buffer]:
        """Buffers of blocks from all over the shards, those of an epoch of nearly one size."""
        n_blocks, per_buffer = -(-self.tokens // BLOCK_TOKENS), max(1, buffer_tokens // BLOCK_TOKENS)
        n_buffers, order = -(-n_blocks // per_buffer), None
        for number in itertools.count(first_number):
            epoch, i = divmod(number, n_buffers)
            if order is None or i == 0:
                generator = torch.Generator().manual_seed(epoch)
                order = np.array_split(torch.randperm(n_blocks, generator=generator).numpy(), n_buffers)
            with room_for("a buffer of residuals", "lower BUFFER_TOKENS"):
                residuals = self._blocks(layers, np.sort(order[i]))
            yield Buffer(residuals, Place(epoch=epoch, buffer=number))
            del residuals

    def _blocks(self, layers: Sequence[int], numbers: np.ndarray) -> dict[int, Tensor]:
        """Residuals (N, D) of the blocks of these numbers, by layer, read shard by shard."""
        shape = len(numbers), BLOCK_TOKENS * self.d_model
        found = {layer: np.empty(shape, np.int16) for layer in layers}
        shards, within = np.divmod(numbers, SHARD_TOKENS // BLOCK_TOKENS)
        for shard in np.unique(shards):
            stored, header = self._open(shard, layers)
            for layer, blocks in found.items():
                checksums = header.checksums[_column(layer)]
                for i in np.flatnonzero(shards == shard):
                    blocks[i] = stored[layer][within[i]]
                    if _checksum(blocks[i]) != checksums[16 * within[i] :][:16]:
                        raise _damaged(self._path(shard), "another checksum")
        return {
            layer: torch.from_numpy(blocks).view(torch.bfloat16).view(-1, self.d_model)
            for layer, blocks in found.items()
        }

    def _open(self, number: int, layers: Sequence[int] = ()) -> tuple[dict[int, np.ndarray], _Header]:
        """The blocks (blocks, BLOCK_TOKENS x D) of some layers of a shard, as they lie on disk, and its header."""
        path = self._path(number)
        try:
            with pyarrow.memory_map(str(path)) as file:
                table = pyarrow.ipc.open_stream(file).read_all()
        except FileNotFoundError:
            raise StoreError(f"found no {path}, expected a shard of residuals: start again to write it") from None
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(path, one_line(error)) from None
        header = parse(_Header, (table.schema.metadata or {}).get(KEY, b""), str(path), "remove it", StoreError)
        found, kind = {}, pyarrow.list_(pyarrow.int16(), self.d_model)
        for layer in layers:
            name = _column(layer)
            is_there = name in table.column_names and name in header.checksums and table.schema.field(name).type == kind
            if not is_there or len(table) != SHARD_TOKENS or table.column(name).num_chunks != 1:
                raise _damaged(path, f"not {SHARD_TOKENS:,} residuals of layer {layer} and width {self.d_model}")
            found[layer] = table.column(name).chunk(0).values.to_numpy().reshape(-1, BLOCK_TOKENS * self.d_model)
        return found, header


def write_shard(path: Path, x_by_layer: dict[int, Tensor], place: Place) -> None:
    """Write a shard whole: residuals (N, D) of each layer, and where the text goes on. Raises Failed."""
    columns, checksums = {}, {}
    for layer, x_ND in x_by_layer.items():
        bits_ND = x_ND.to("cpu", torch.bfloat16).view(torch.int16).numpy()
        columns[_column(layer)] = pyarrow.FixedSizeListArray.from_arrays(bits_ND.ravel(), bits_ND.shape[1])
        blocks = bits_ND.reshape(-1, BLOCK_TOKENS * bits_ND.shape[1])
        checksums[_column(layer)] = "".join(map(_checksum, blocks))
    header = _Header(place=place._asdict(), checksums=checksums).model_dump_json()
    table = pyarrow.record_batch(columns, metadata={KEY: header.encode()})

    def write(partial: Path) -> None:
        with open(partial, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_batch(table)

    write_atomically(path, write)


def _column(layer: int) -> str:
    return f"layer_{layer}"


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"found a damaged {path} ({why}), expected what was written: remove it, and it is written again")


def _checksum(block: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(block.data)
