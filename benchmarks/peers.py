"""The training step of a peer, for the benchmarks that measure it and the one that counts it."""

from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_


def sparsify_step(coder: Any, optimizer: Any, x: Tensor, **forward: Any) -> None:
    """A step of sparsify's trainer, whose gradients are clipped, as the others' are, and whose optimizer is Adam."""
    coder.set_decoder_norm_to_unit_norm()
    out = coder(x, **forward)
    (out.fvu + out.auxk_loss / 32).backward()
    clip_grad_norm_(coder.parameters(), 1.0)
    coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
