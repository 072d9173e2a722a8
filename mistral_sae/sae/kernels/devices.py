"""Which kernels run on a device."""

from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch

from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels.types import Operations


@cache
def operations(device: torch.device) -> Operations:
    """The kernels for a device: Triton's on a GPU of CUDA, from Ampere on, where Triton is installed; else torch's.

    Triton needs a C compiler to start its kernels. Where that fails a line says so, once, and torch's are used.
    """
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return portable
    from mistral_sae.sae.kernels import fused  # Triton takes a while to import

    try:
        one = torch.ones(1, 1, device=device)
        fused.inner_products(one, one.long() - 1, one)
    except (RuntimeError, OSError, CalledProcessError) as error:
        reason = str(error).splitlines()[0]
        print(f"Triton's kernels do not start on {device} ({reason}): training uses torch's, which move more memory")
        return portable
    return fused
