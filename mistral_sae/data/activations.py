"""Rows of tokens -> shuffled batches of residuals.

Shapes: R rows a forward, T positions, D model width, B tokens a batch, S streams, L layers.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mistral_sae.cli import room_for
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Row
from mistral_sae.distributed import ALONE, Group
from mistral_sae.model.language_model import LanguageModel, sent


class Stream(NamedTuple):
    """Which residuals, in which order: all that tells the batches of one autoencoder of a grid from another's."""

    layer: int
    seed: int


class Batch(NamedTuple):
    """Residuals, and where the stream goes on after them."""

    x: Tensor  # (B, D), or (S, B, D) of several streams, in the model's dtype
    place: Place


class Buffer(NamedTuple):
    """Residuals that are shuffled together."""

    residuals: dict[int, Tensor]  # (N, D) by layer
    place: Place  # of its first one; `place.buffer` is its number
    # (ranks + 1) on the CPU: between which numbers those of each rank lie; None where this one has all
    bounds: Tensor | None = None


def residuals_of(model: LanguageModel, tokens_RT: Tensor, layer: int) -> Tensor:
    """Residuals of `layer` at the positions of `model.kept`, (N, D), row by row; tokens on the CPU spare a wait."""
    return residuals_of_layers(model, tokens_RT, [layer])[layer]


def residuals_of_layers(model: LanguageModel, tokens_RT: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
    """The same of several layers, by layer, in one forward."""
    kept_N = model.kept(tokens_RT).flatten().nonzero().squeeze(1)
    found = model.residuals_by_layer(tokens_RT, layers)
    kept_N = sent(kept_N, model.device)
    return {layer: x_RTD.flatten(0, 1).index_select(0, kept_N) for layer, x_RTD in found.items()}


def shuffled_batches(
    rows: Iterator[Row],
    model: LanguageModel,
    layer: int,
    *,
    batch_size: int,
    buffer_tokens: int,
    rows_per_forward: int,
    seed: int,
    start: Place = BEGINNING,
) -> Iterator[Batch]:
    """Batches (B, D) of one stream: `shuffled_streams` says how."""
    sizes: dict = {"batch_size": batch_size, "buffer_tokens": buffer_tokens, "rows_per_forward": rows_per_forward}
    batches = shuffled_streams(rows, model, [Stream(layer, seed)], **sizes, start=start)
    yield from map(lambda batch: Batch(batch.x[0], batch.place), batches)  # keeps no batch alive, as a loop would


def shuffled_streams(
    rows: Iterator[Row],
    model: LanguageModel,
    streams: Sequence[Stream],
    *,
    batch_size: int,
    buffer_tokens: int,
    rows_per_forward: int,
    start: Place = BEGINNING,
    ranks: Group = ALONE.ranks,
) -> Iterator[Batch]:
    """Residuals at the positions of `model.kept`, in shuffled batches (S, B, D) of S streams, in the model's dtype.

    `rows` are all of the same length. They are cut into buffers of as many whole rows as give at most `buffer_tokens`
    residuals, of all layers in one forward; `permuted` makes batches of them. What a batch holds is therefore a
    function of the rows, the layer, the seed and its number alone, whatever the other streams. A run that had the place
    of a batch goes on after it, where `rows` and `start` are of that place: the rows of one buffer go through the model
    for it, and none before them.

    Of several ranks each has the same rows of tokens, and runs the model on its part of those of a buffer; a batch is
    made of what each of them has of it. So all have the whole batch, and it is that of one process.

    Memory: a buffer for each layer, a batch for each stream and the rows in the model. Raises ValueError if a buffer
    cannot hold a row.
    """
    layers = {stream.layer for stream in streams}
    buffers = _buffers(rows, model, layers, buffer_tokens, rows_per_forward, start.buffer, ranks)
    return permuted(buffers, streams, batch_size, start, ranks)


def permuted(
    buffers: Iterator[Buffer],
    streams: Sequence[Stream],
    batch_size: int,
    start: Place = BEGINNING,
    ranks: Group = ALONE.ranks,
) -> Iterator[Batch]:
    """Batches (S, B, D) of S streams: for each, each buffer permuted by (seed, number of the buffer), end to end.

    The buffers begin with that of `start`. They may have an end, and then the last whole batch is it.
    """
    batch, filled, used = None, 0, start.residuals  # the batch that is being filled goes on in the next buffer
    for residuals, place, bounds in buffers:
        some = next(iter(residuals.values()))
        n_residuals = len(some) if bounds is None else int(bounds[-1])
        orders = {
            seed: sent(_order(n_residuals, seed, place.buffer)[used:], some.device if bounds is None else bounds.device)
            for seed in {stream.seed for stream in streams}
        }
        while used < n_residuals:
            if batch is None:
                batch, filled = some.new_empty(len(streams), batch_size, some.shape[1]), 0
            end = min(batch_size, filled + n_residuals - used)
            taken = {seed: order[: end - filled] for seed, order in orders.items()}
            orders = {seed: order[end - filled :] for seed, order in orders.items()}
            for i, (layer, seed) in enumerate(streams):
                _pick(residuals[layer], taken[seed], bounds, ranks, batch[i, filled:end])
            used, filled = used + end - filled, end
            if filled == batch_size:
                yield Batch(batch, place._replace(residuals=used))
                batch = None
        used = 0
        del residuals, some  # before the next buffer is made


def sent_to(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a device.

    Between two GPUs they go by streams of their own: copies on the usual ones would wait for the training steps before
    them, and the language model, which comes after them, too.
    """
    streams: list[torch.cuda.Stream] = []
    for x, place in batches:
        if x.device == device or not x.is_cuda or device.type != "cuda":
            yield Batch(sent(x, device), place)
            continue
        leaving, arriving = streams = streams or [torch.cuda.Stream(x.device), torch.cuda.Stream(device)]
        leaving.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(leaving), torch.cuda.stream(arriving):
            there = x.to(device, non_blocking=True)
        x.record_stream(leaving)
        training = torch.cuda.current_stream(device)
        training.wait_stream(arriving)
        there.record_stream(training)
        yield Batch(there, place)


def _order(n_residuals: int, seed: int, number: int) -> Tensor:
    """The order in which the residuals of a buffer come, by the seed and the buffer's number."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.randperm(n_residuals, generator=generator)


def _shares(tokens_RT: Tensor, residuals_R: Tensor, ranks: Group) -> tuple[Tensor, Tensor]:
    """This rank's rows of a buffer, and between which numbers the residuals of each rank lie, (ranks + 1)."""
    of_ranks = [residuals.sum() for residuals in residuals_R.tensor_split(ranks.size)]
    bounds = torch.stack([residuals_R.new_zeros(()), *of_ranks]).cumsum(0)
    return tokens_RT.tensor_split(ranks.size)[ranks.rank], bounds


def _pick(x_ND: Tensor, chosen_N: Tensor, bounds: Tensor | None, ranks: Group, out_ND: Tensor) -> None:
    """Fill in the residuals of some numbers, of which each rank has a run."""
    if bounds is None:
        torch.index_select(x_ND, 0, chosen_N, out=out_ND)
        return
    owner_N = torch.searchsorted(bounds[1:], chosen_N, right=True)
    counts = owner_N.bincount(minlength=ranks.size)
    mine = sent(chosen_N[owner_N == ranks.rank] - bounds[ranks.rank], x_ND.device)
    ours = x_ND.new_zeros(int(counts.max()), x_ND.shape[1])  # as long on all ranks
    torch.index_select(x_ND, 0, mine, out=ours[: len(mine)])
    by_owner = owner_N.argsort(stable=True)
    gaps = len(ours) * torch.arange(ranks.size) - (counts.cumsum(0) - counts)  # before each rank's, where all are
    where_N = torch.empty_like(chosen_N)
    where_N[by_owner] = torch.arange(len(chosen_N)) + gaps[owner_N[by_owner]]
    torch.index_select(ranks.gather(ours), 0, sent(where_N, x_ND.device), out=out_ND)


def _buffers(
    rows: Iterator[Row],
    model: LanguageModel,
    layers: Collection[int],
    buffer_tokens: int,
    rows_per_forward: int,
    first_number: int,
    ranks: Group,
) -> Iterator[Buffer]:
    """Buffers of as many whole rows as give at most `buffer_tokens` residuals."""
    first = next(rows, None)
    if first is None:
        return
    per_row = len(first.tokens) - 1
    rows_per_buffer = buffer_tokens // per_row
    if rows_per_buffer < 1:
        raise ValueError(f"BUFFER_TOKENS must hold at least one row of {per_row} residuals: found {buffer_tokens}")
    rows = chain([first], rows)
    for number in itertools.count(first_number):
        if not (buffer := list(islice(rows, rows_per_buffer))):
            return
        tokens_RT = torch.from_numpy(np.stack([row.tokens for row in buffer], dtype=np.int64))
        bounds = None
        if ranks.size > 1:
            tokens_RT, bounds = _shares(tokens_RT, model.kept(tokens_RT).sum(dim=1), ranks)
        with room_for("a buffer of residuals", "lower BUFFER_TOKENS or ROWS_PER_FORWARD"):
            residuals = _residuals_of_rows(tokens_RT, model, layers, rows_per_forward)
        yield Buffer(residuals, buffer[0].place._replace(buffer=number, residuals=0), bounds)
        del residuals  # before the next buffer is made


def _residuals_of_rows(
    tokens_RT: Tensor, model: LanguageModel, layers: Collection[int], rows_per_forward: int
) -> dict[int, Tensor]:
    """Residuals (N, D) of all rows, by layer; allocated once, filled in place: concatenating would need twice that."""
    shape = (int(model.kept(tokens_RT).sum()), model.d_model)
    residuals = {layer: torch.empty(shape, dtype=model.dtype, device=model.device) for layer in layers}
    filled = 0
    for tokens in tokens_RT.split(rows_per_forward) if len(tokens_RT) else ():
        some = residuals_of_layers(model, tokens, layers)
        end = filled + len(next(iter(some.values())))
        for layer, x_ND in some.items():
            residuals[layer][filled:end] = x_ND
        filled = end
    return residuals
