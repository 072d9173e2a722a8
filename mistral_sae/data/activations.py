"""Rows of tokens -> shuffled batches of residuals.

Shapes: R rows a forward, T positions, D model width, B tokens a batch.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mistral_sae.model.language_model import LanguageModel


def residuals_of(lm: LanguageModel, tokens_RT: Tensor, layer: int) -> Tensor:
    """Residuals of `layer` at all but the first position of each row, (R * (T - 1), D), row by row.

    The first position is the attention sink: its norm is up to a hundred times the others', and it says nothing.
    """
    return lm.residuals(_sent(tokens_RT, lm.device), layer)[:, 1:].flatten(0, 1)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for what a GPU has still to do: that takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shuffled_batches(
    rows: Iterator[np.ndarray],
    lm: LanguageModel,
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
    rows = _resume(first, rows, number * rows_per_buffer)
    batch, filled = None, 0  # the batch that is being filled goes on in the next buffer
    while buffer := list(islice(rows, rows_per_buffer)):
        tokens = torch.from_numpy(np.stack(buffer))
        residuals = None
        for start in range(0, len(tokens), rows_per_forward):
            part = residuals_of(lm, tokens[start : start + rows_per_forward], layer)
            if residuals is None:  # one allocation, filled in place: concatenating would need the memory twice
                residuals = part.new_empty(len(tokens) * per_row, part.shape[1])
            residuals[start * per_row : start * per_row + len(part)] = part
        del part
        generator = torch.Generator().manual_seed(_mix(seed, number))
        order = torch.randperm(len(residuals), generator=generator)[offset:]
        order = _sent(order, residuals.device)
        number, offset = number + 1, 0
        while len(order):
            if batch is None:
                batch, filled = residuals.new_empty(batch_size, residuals.shape[1]), 0
            taken, order = order[: batch_size - filled], order[batch_size - filled :]
            torch.index_select(residuals, 0, taken, out=batch[filled : filled + len(taken)])
            filled += len(taken)
            if filled == batch_size:
                yield batch
                batch = None


def _resume(first: np.ndarray, rows: Iterator[np.ndarray], skip: int) -> Iterator[np.ndarray]:
    """The stream `first`, *rows without its first `skip` rows."""
    if skip == 0:
        yield first
    else:
        next(islice(rows, skip - 1, skip - 1), None)
    yield from rows


def _mix(seed: int, number: int) -> int:
    """A seed of its own for each buffer."""
    return (seed * 1_000_003 + number) % 2**63
