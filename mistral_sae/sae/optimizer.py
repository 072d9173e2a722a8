"""Adam for a sparse autoencoder: projection, clipping, moments and the renormalisation of decoder rows in two passes.

The first pass measures the norm of the gradient without its component along each decoder row. The second removes that
component, clips, updates and renormalises. Both make the gradient of a feature when they come to it, so that it need
never all exist, and neither waits for the device (`kernels.Operations`). A CPU goes without the first where a bound
says that there is nothing to clip, which is the rule.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.kernels.types import Rates, RowState, Step


class SAEAdam:
    """Adam over the parameters of a SparseAutoencoder, moments in float32 or bfloat16.

    bfloat16 halves the optimizer's memory. Its second moment would stop moving, since 0.999 is closer to 1 than
    bfloat16 can step, so both moments are rounded stochastically: right on average.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        moments: torch.dtype = torch.float32,
        W_enc_bf16: Tensor | None = None,
        trains_threshold: bool = False,
    ):
        """`W_enc_bf16` (D, F), if given, is kept a copy of W_enc."""
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments must be float32 or bfloat16: found {moments}")
        # Feature by feature, as the matrices lie in memory
        self.parameters = {name: p.data.T if name == "W_enc" else p.data for name, p in sae.named_parameters()}
        if trains_threshold:
            self.parameters["threshold"] = sae.threshold
        self.first = {name: torch.zeros_like(p, dtype=moments) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p, dtype=moments) for name, p in self.parameters.items()}
        self.copies = {} if W_enc_bf16 is None else {"W_enc": W_enc_bf16.T}
        self.steps = torch.zeros((), device=sae.W_dec.device)
        self.shards = sae.mesh.shards

    @torch.no_grad()
    def step(self, gradients: Step, learning_rate: float, max_norm: float) -> Tensor:
        """Update the autoencoder in place. Returns the gradient's norm before clipping, a scalar."""
        kernels = operations(self.steps.device)
        matrices = {"W_enc": gradients.W_enc, "W_dec": gradients.W_dec}
        biases = {"b_enc": gradients.b_enc, "b_dec": gradients.b_dec}
        if gradients.threshold is not None:
            biases["threshold"] = gradients.threshold
        here = {name: bias for name, bias in biases.items() if name != "b_dec" or self.shards.rank == 0}  # all have it
        of_biases = [gradient.square().sum() for gradient in here.values()]

        def norm_of(squares: Iterable[Tensor]) -> Tensor:
            return self.shards.total(torch.stack([*of_biases, *squares]).sum()).clamp_min(0.0).sqrt()

        divisor = norm = None  # Adam's kernels divide by it while they read the gradient
        if self.steps.device.type != "cpu" or not norm_of(map(portable.most_squares, matrices.values())) <= max_norm:
            norm = norm_of(map(kernels.squares, matrices.values()))
            divisor = (norm / max_norm).clamp_min(1.0)

        rates = Rates(learning_rate, divisor, self.steps)
        for name, bias in biases.items():
            # A threshold is of the order of 1, an entry of a matrix that of a unit vector: it is to move as freely
            rate = learning_rate * self.parameters["b_dec"].numel() ** 0.5 if name == "threshold" else learning_rate
            portable.adam_(self._state(name), bias, rates._replace(learning_rate=rate))
        if "threshold" in biases:
            self.parameters["threshold"].clamp_(min=0.0)
        squares = [kernels.adam_rows(self._state(name), matrix, rates) for name, matrix in matrices.items()]
        self.steps += 1
        return norm_of(each for each in squares if each is not None) if norm is None else norm

    def _state(self, name: str) -> RowState:
        return RowState(self.parameters[name], self.first[name], self.second[name], self.copies.get(name))

    def state(self) -> dict[str, Tensor]:
        """Moments and step count, which continuing needs."""
        moments = {"first": self.first, "second": self.second}
        tensors = {f"adam.{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}
        return tensors | {"adam.steps": self.steps}
