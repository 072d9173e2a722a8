"""Rows of tokens -> shuffled batches of residuals.

Shapes: R rows a forward, T positions, D model width, B tokens a batch.
"""

import itertools
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mistral_sae.cli import room_for
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Row
from mistral_sae.model.language_model import LanguageModel, sent


class Batch(NamedTuple):
    """Residuals, and where the stream goes on after them."""

    x: Tensor  # (B, D), in the model's dtype
    place: Place


def residuals_of(model: LanguageModel, tokens_RT: Tensor, layer: int) -> Tensor:
    """Residuals of `layer` at the positions of `model.kept`, (N, D), row by row; tokens on the CPU spare a wait."""
    kept_N = model.kept(tokens_RT).flatten().nonzero().squeeze(1)
    x_RTD = model.residuals(tokens_RT, layer)
    return x_RTD.flatten(0, 1).index_select(0, sent(kept_N, model.device))


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
    """Residuals of `layer` at the positions of `model.kept`, in shuffled batches, in the model's dtype.

    `rows` are all of the same length. They are cut into buffers of as many whole rows as give at most `buffer_tokens`
    residuals; each buffer is permuted by (seed, number of the buffer), and the permuted buffers, end to end, are cut
    into batches. What a batch holds is therefore a function of the stream, the seed and its number alone. A run that
    had the place of a batch goes on after it, where `rows` and `start` are of that place: the rows of one buffer go
    through the model for it, and none before them.

    A finite stream ends with its last whole batch. Memory: one buffer, one batch and the rows in the model. Raises
    ValueError if a buffer cannot hold a row.
    """
    first = next(rows, None)
    if first is None:
        return
    per_row = len(first.tokens) - 1
    rows_per_buffer = buffer_tokens // per_row
    if rows_per_buffer < 1:
        raise ValueError(f"BUFFER_TOKENS must hold at least one row of {per_row} residuals: found {buffer_tokens}")
    rows, used = chain([first], rows), start.residuals
    batch, filled = None, 0  # the batch that is being filled goes on in the next buffer
    for number in itertools.count(start.buffer):
        if not (buffer := list(islice(rows, rows_per_buffer))):
            return
        tokens_RT = torch.from_numpy(np.stack([row.tokens for row in buffer], dtype=np.int64))
        n_residuals = int(model.kept(tokens_RT).sum())
        with room_for("a buffer of residuals", "lower BUFFER_TOKENS or ROWS_PER_FORWARD"):
            residuals_ND = _residuals_of_buffer(tokens_RT, n_residuals, model, layer, rows_per_forward)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        order = sent(torch.randperm(n_residuals, generator=generator)[used:], model.device)
        while len(order):
            if batch is None:
                batch, filled = residuals_ND.new_empty(batch_size, model.d_model), 0
            taken, order = order[: batch_size - filled], order[batch_size - filled :]
            torch.index_select(residuals_ND, 0, taken, out=batch[filled : filled + len(taken)])
            filled += len(taken)
            used += len(taken)
            if filled == batch_size:
                yield Batch(batch, buffer[0].place._replace(buffer=number, residuals=used))
                batch = None
        used = 0
        del residuals_ND  # before the next buffer is made


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


def _residuals_of_buffer(
    tokens_RT: Tensor, n_residuals: int, model: LanguageModel, layer: int, rows_per_forward: int
) -> Tensor:
    """Residuals (N, D) of all rows; one allocation, filled in place: concatenating would need the memory twice."""
    residuals_ND = torch.empty(n_residuals, model.d_model, dtype=model.dtype, device=model.device)
    filled = 0
    for tokens in tokens_RT.split(rows_per_forward):
        some = residuals_of(model, tokens, layer)
        residuals_ND[filled : filled + len(some)] = some
        filled += len(some)
    return residuals_ND
