"""Which kernels run on a device."""

from functools import cache
from importlib.util import find_spec

import torch

from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels.types import Operations


@cache
def operations(device: torch.device) -> Operations:
    """The kernels for a device: Triton's on a GPU of CUDA, from Ampere on, where Triton is installed; else torch's."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return portable
    from mistral_sae.sae.kernels import fused  # Triton takes a while to import

    return fused
