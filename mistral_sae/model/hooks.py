"""Context managers that read the residual stream of one layer or edit it.

`lm` is a `mistral_sae.lm.LanguageModel`: `lm.block(layer)` is the module whose output is
blocks.{layer}.hook_resid_post and `lm.span` holds (B, T, start) of the forward in progress. Both hold for a
model of either backend, although blocks of mistral-inference give (B * T, D) and those of transformers (B, T,
D).

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mistral_sae.model.language_model import LanguageModel


class HookError(RuntimeError):
    """A hook that never fired, or an edit that returned something else than a residual."""


class Residual:
    """Where `read_residual` leaves what it read."""

    value: torch.Tensor | None = None  # (B, T, D), in the model's dtype


class _Stop(Exception):
    """Ends a forward whose remaining layers nobody needs."""


@contextmanager
def read_residual(lm: LanguageModel, layer: int) -> Iterator[Residual]:
    """Read the residual after `layer`; the forward stops there, and what follows it in the block is not run.

        with read_residual(lm, 16) as residual:
            lm.forward(tokens_BT)
        residual.value  # (B, T, D)

    An `edit_residual` of the same layer that was entered earlier is part of what is read. Raises HookError if
    no forward ran through the layer.
    """
    residual = Residual()
    stop = _Stop()

    def read(module, args, output):
        B, T, _ = lm.span
        residual.value = output.view(B, T, -1)
        raise stop

    handle = lm.block(layer).register_forward_hook(read)
    try:
        yield residual
    except _Stop as caught:
        if caught is not stop:  # that of a reader further out
            raise
    finally:
        handle.remove()
        stop.__traceback__ = None  # a cycle through this frame, which would keep the callers' tensors alive
    if residual.value is None:
        raise HookError(f"the residual of layer {layer} was not read: no forward ran inside the with-block")


@contextmanager
def edit_residual(lm: LanguageModel, layer: int, edit: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[None]:
    """Replace the residual after `layer` by `edit(residual_BTD, start)` in every forward inside the block.

    `start` is the position in the row of the first of the T positions: with a KV cache the prompt comes
    first, with start 0, and then each new token alone, with T = 1 and start counting up. The result has the
    shape of the residual and is brought to its dtype. Contexts on one layer apply in the order they were
    entered. Raises HookError if the shape differs or if no forward ran through the layer, as when a generator
    made inside the with-block is consumed after it.
    """
    fired = False

    def replace(module, args, output):
        nonlocal fired
        fired = True
        B, T, start = lm.span
        before_BTD = output.view(B, T, -1)
        after_BTD = edit(before_BTD, start)
        if after_BTD.shape != before_BTD.shape:
            raise HookError(
                f"the edit of layer {layer} returned {tuple(after_BTD.shape)}, expected {tuple(before_BTD.shape)}"
            )
        return after_BTD.to(output.dtype).reshape(output.shape)

    handle = lm.block(layer).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise HookError(f"the residual of layer {layer} was not edited: no forward ran inside the with-block")
