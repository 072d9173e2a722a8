"""The layers of a model as PyTorch's compiler makes them, on a GPU and for many tokens at a time.

Between its products a block reads and writes the residuals a dozen times over: norms, rotary positions, the gate of the
feed-forward layer. Compiled, each of them is one kernel. One compilation serves all layers, since their weights are its
inputs. It takes part of a minute at first, and is kept on disk by PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mistral_sae.cli import one_line

MANY = 2048  # tokens from which on compiled blocks are used: a text, or one token, is not worth a compilation


def pays(device: torch.device) -> bool:
    """Whether layers are compiled there: on GPUs for which PyTorch's compiler has Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Let dense blocks run compiled where they have many tokens; those with experts choose tokens, and stay as is.

    Where the compiler fails, all blocks run as they were from then on.
    """
    works = True

    def forward(eager: Any, fused: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal works
        if works and hidden.numel() >= MANY * hidden.shape[-1]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the compiler's: advice
                    return fused(hidden, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:  # for want of a C compiler, say
                works = False
                print(f"the language model runs without PyTorch's compiler, which fails: {one_line(error)}")
        return eager(hidden, *args, **kwargs)

    for block in blocks:
        if not any(name.endswith("experts") for name, _ in block.named_modules()):
            block.forward = partial(forward, block.forward, torch.compile(block.forward))
