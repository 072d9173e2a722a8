"""Rows of tokens -> shuffled batches of residuals.

Shapes: R rows a forward, T positions, D model width, B tokens a batch.
"""

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from mistral_sae.model.language_model import LanguageModel


def residuals_of(model: LanguageModel, tokens_RT: Tensor, layer: int) -> Tensor:
    """Residuals of `layer` at all but the first position of each row, (R * (T - 1), D), row by row.

    The first position is the attention sink: its norm is up to a hundred times the others', and it says nothing.
    """
    return model.residuals(_sent(tokens_RT, model.device), layer)[:, 1:].flatten(0, 1)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, from pinned memory, which spares waiting for what a GPU has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shuffled_batches(
    rows: Iterator[np.ndarray],
    model: LanguageModel,
    layer: int,
    *,
    batch_size: int,
    buffer_tokens: int,
    rows_per_forward: int,
    seed: int,
    skip_batches: int = 0,
) -> Iterator[Tensor]:
    """Residuals (B, D) of `layer` in shuffled batches, on the model's device and in its dtype.

    `rows` are token rows (T), all of the same length, from the beginning of the stream. It is cut into buffers of as
    many whole rows as give at most `buffer_tokens` residuals; each buffer is permuted by (seed, number of the buffer),
    and the permuted buffers, end to end, are cut into batches. What a batch holds is therefore a function of the
    stream, the seed and its number alone, and a run that consumed `skip_batches` resumes by running the model over one
    buffer: rows of earlier ones are drawn and dropped.

    A finite stream ends with its last whole batch. Memory: one buffer, one batch and the rows in the model. Raises
    ValueError if a buffer cannot hold a row.
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
        order = _sent(torch.randperm(len(residuals_ND), generator=generator)[offset:], model.device)
        number, offset = number + 1, 0
        while len(order):
            if batch is None:
                batch, filled = residuals_ND.new_empty(batch_size, model.d_model), 0
            taken, order = order[: batch_size - filled], order[batch_size - filled :]
            torch.index_select(residuals_ND, 0, taken, out=batch[filled : filled + len(taken)])
            filled += len(taken)
            if filled == batch_size:
                yield batch
                batch = None
        del residuals_ND  # before the next buffer is made


def _residuals_of_buffer(tokens_RT: Tensor, model: LanguageModel, layer: int, rows_per_forward: int) -> Tensor:
    """Residuals of all rows; one allocation, filled in place: concatenating would need the memory twice."""
    R, T = tokens_RT.shape
    residuals_RTD = torch.empty(R, T - 1, model.d_model, dtype=model.dtype, device=model.device)
    for tokens, out in zip(tokens_RT.split(rows_per_forward), residuals_RTD.split(rows_per_forward), strict=True):
        out.copy_(residuals_of(model, tokens, layer).view_as(out))
    return residuals_RTD.flatten(0, 1)
