"""Rows of tokens -> shuffled batches of residuals.

Shapes: R rows a forward, T positions, D model width, B tokens a batch.
"""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ResidualModel(Protocol):
    """What batches of residuals need of a language model."""

    device: torch.device

    def residuals(self, tokens_BT: Tensor, layer: int) -> Tensor:
        """The residual stream after `layer`, (B, T, D)."""


def residuals_of(model: ResidualModel, tokens_RT: Tensor, layer: int) -> Tensor:
    """Residuals of `layer` at all but the first position of each row, (R * (T - 1), D), row by row.

    The first position is the attention sink: its norm is up to a hundred times the others', and it says nothing.
    """
    return model.residuals(_sent(tokens_RT, model.device), layer)[:, 1:].flatten(0, 1)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for what a GPU has still to do: that takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shuffled_batches(
    rows: Iterator[np.ndarray],
    model: ResidualModel,
    layer: int,
    *,
    batch_size: int,
    buffer_tokens: int,
    rows_per_forward: int,
    seed: int,
    skip_batches: int = 0,
) -> Iterator[Tensor]:
    """Residuals (B, D) of `layer` in shuffled batches, on the model's device and in its dtype.

    The stream is cut into buffers of as many whole rows as give at most `buffer_tokens` residuals; each buffer is
    permuted by (seed, number of the buffer), and the permuted buffers, end to end, are cut into batches. What a batch
    holds is therefore a function of the stream, the seed and its number alone, and a run resumes at batch
    `skip_batches` by running the model over one buffer: rows of earlier ones are drawn and dropped.

    A finite stream ends with its last whole batch. Memory: one buffer, one batch and the rows in the model.

    Args:
        rows: token rows (T), all of the same length, from the beginning of the stream.
        batch_size: residuals a batch.
        buffer_tokens: residuals a buffer, at least one row's.
        rows_per_forward: rows the model runs at a time.
        skip_batches: how many batches were consumed before.
    """
    first = next(rows, None)
    if first is None:
        return
    per_row = len(first) - 1
    rows_per_buffer = buffer_tokens // per_row
    if rows_per_buffer < 1:
        raise ValueError(f"BUFFER_TOKENS must hold at least one row of {per_row} residuals: found {buffer_tokens}")
    number, offset = divmod(skip_batches * batch_size, rows_per_buffer * per_row)
    rows = islice(chain([first], rows), number * rows_per_buffer, None)
    batch, filled = None, 0  # the batch that is being filled goes on in the next buffer
    while buffer := list(islice(rows, rows_per_buffer)):
        residuals_ND = _residuals_of_buffer(torch.from_numpy(np.stack(buffer)), model, layer, rows_per_forward)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        order = torch.randperm(len(residuals_ND), generator=generator)[offset:]
        order = _sent(order, residuals_ND.device)
        number, offset = number + 1, 0
        while len(order):
            if batch is None:
                batch, filled = residuals_ND.new_empty(batch_size, residuals_ND.shape[1]), 0
            taken, order = order[: batch_size - filled], order[batch_size - filled :]
            torch.index_select(residuals_ND, 0, taken, out=batch[filled : filled + len(taken)])
            filled += len(taken)
            if filled == batch_size:
                yield batch
                batch = None
        del residuals_ND  # before the next buffer is made


def _residuals_of_buffer(tokens_RT: Tensor, model: ResidualModel, layer: int, rows_per_forward: int) -> Tensor:
    """Residuals of all rows; one allocation, filled in place: concatenating would need the memory twice."""
    first, *parts = tokens_RT.split(rows_per_forward)
    residuals = residuals_of(model, first, layer)
    filled = len(residuals)
    whole_ND = residuals.new_empty(len(tokens_RT) * (tokens_RT.shape[1] - 1), residuals.shape[1])
    whole_ND[:filled] = residuals
    for part in parts:
        residuals = residuals_of(model, part, layer)
        whole_ND[filled : filled + len(residuals)] = residuals
        filled += len(residuals)
    return whole_ND
