"""Context managers that read the residual streams of layers or edit that of one.

The residual after a layer is what SAE Lens calls blocks.{layer}.hook_resid_post. Both work on a model of either
engine, although blocks of mistral-inference give (B * T, D) and those of transformers (B, T, D).

Shapes: B rows, T positions, D model width.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class HookError(RuntimeError):
    """A hook that never fired, or an edit that returned something else than a residual."""


class HookedModel(Protocol):
    """What the hooks need of a language model."""

    span: tuple[int, int, int]  # (B, T, start) of the forward in progress, start the position of its first token

    @property
    def special_BT(self) -> Tensor:
        """Which of its tokens are BOS, EOS or the like."""

    def block(self, layer: int) -> nn.Module:
        """The module whose output is the residual after `layer`."""


class _Stop(Exception):
    """Ends a forward whose remaining layers nobody needs."""


@contextmanager
def read_residuals(model: HookedModel, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Read the residuals (B, T, D) after some layers, in the model's dtype; the forward stops after the last of them.

        with read_residuals(model, [8, 16]) as residuals:
            model.forward(tokens_BT)  # what follows it in the block is not run
        residuals[16]

    An `edit_residual` of the same layer that was entered earlier is part of what is read. Raises HookError if no
    forward ran through the layers.
    """
    residuals: dict[int, Tensor] = {}
    stop, last = _Stop(), max(layers)

    def read(layer: int, module: nn.Module, args: Any, output: Tensor) -> None:
        B, T, _ = model.span
        residuals[layer] = output.view(B, T, -1)
        if layer == last:
            raise stop

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(model.block(layer).register_forward_hook(partial(read, layer)))
        try:
            yield residuals
        except _Stop as caught:
            if caught is not stop:  # that of a reader further out
                raise
        finally:
            stop.__traceback__ = None  # a cycle through this frame, which would keep the callers' tensors alive
    if last not in residuals:
        raise HookError(f"the residual of layer {last} was not read: no forward ran inside the with-block")


@contextmanager
def edit_residual(
    model: HookedModel,
    layer: int,
    edit: Callable[[Tensor], Tensor],
    *,
    first_position: int = 0,
    special: bool = True,
) -> Iterator[None]:
    """Replace the residual after `layer` by `edit(residual_BTD)` in every forward inside the block.

    `edit` does not see the positions of a row before `first_position`: 1 leaves out the attention sink, the length of
    the prompt edits what is generated only, with a KV cache or without one. Without `special` its result is not used
    at special tokens. It is brought to the model's dtype. Contexts on one layer apply in the order they were entered.

    Raises HookError if the shape changes or if no forward ran through the layer, as when a generator made inside the
    with-block is consumed after it.
    """
    fired = False

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal fired
        fired = True
        B, T, start = model.span
        kept = max(0, first_position - start)
        if kept >= T:
            return output
        kept_BTD, before_BTD = output.view(B, T, -1).tensor_split([kept], dim=1)
        after_BTD = edit(before_BTD)
        if after_BTD.shape != before_BTD.shape:
            found, expected = tuple(after_BTD.shape), tuple(before_BTD.shape)
            raise HookError(f"the edit of layer {layer} returned {found}, expected {expected}")
        after_BTD = after_BTD.to(output.dtype)
        if not special:
            after_BTD = torch.where(model.special_BT[:, kept:, None], before_BTD, after_BTD)
        if kept:
            after_BTD = torch.cat([kept_BTD, after_BTD], dim=1)
        return after_BTD.reshape(output.shape)

    with model.block(layer).register_forward_hook(replace):
        yield
    if not fired:
        raise HookError(f"the residual of layer {layer} was not edited: no forward ran inside the with-block")
