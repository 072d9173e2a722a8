"""Adam for a sparse autoencoder: projection, clipping, moments and the renormalisation of decoder rows in two passes.

The first pass removes the gradient's component along each decoder row and measures the norm of what is left. The second
clips, updates and renormalises. Both go through the matrices in blocks of features small enough to stay in cache, and
neither waits for the device.

Shapes: D model width, F features.
"""

import torch
from torch import Tensor
from torch.optim.adam import adam

from mistral_sae.kernels import Step
from mistral_sae.sae import SparseAutoencoder, normalize_rows

BETAS = (0.9, 0.999)  # Gao et al. 2024, appendix A.3
EPSILON = 6.25e-10  # likewise; activations are standardised, gradients small
BLOCK_BYTES = {
    "cpu": 2**20,
    "cuda": 2**28,
}  # of a parameter in float32, a block: L2 cache; few enough launches


class SAEAdam:
    """Adam over the four parameters of a SparseAutoencoder, moments in float32 or bfloat16.

    bfloat16 halves the optimizer's memory. Its second moment would stop moving, since 0.999 is closer to 1 than
    bfloat16 can step, so both moments are rounded stochastically: right on average.
    """

    def __init__(self, sae: SparseAutoencoder, moments: torch.dtype = torch.float32):
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments must be float32 or bfloat16: found {moments}")
        self.sae = sae
        # Feature by feature, as the matrices lie in memory
        self.parameters = {
            "W_enc": sae.W_enc.data.T,
            "b_enc": sae.b_enc.data,
            "W_dec": sae.W_dec.data,
            "b_dec": sae.b_dec.data,
        }
        self.first = {name: torch.zeros_like(p, dtype=moments) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p, dtype=moments) for name, p in self.parameters.items()}
        self.steps = torch.zeros((), device=sae.W_dec.device)

    @torch.no_grad()
    def step(self, gradients: Step, learning_rate: float, max_norm: float) -> Tensor:
        """Update the autoencoder in place; the gradients are used up. Returns their norm before clipping, a scalar."""
        grads = {name: getattr(gradients, name) for name in self.parameters}
        for rows, grad in zip(self._blocks(self.parameters["W_dec"]), self._blocks(grads["W_dec"]), strict=True):
            grad.addcmul_(torch.einsum("fd,fd->f", grad, rows).unsqueeze(1), rows, value=-1)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
        divisor = (norm / max_norm).clamp_min(1.0)  # Adam's kernel divides by it while it reads the gradient

        for name, parameter in self.parameters.items():
            tensors = (parameter, grads[name], self.first[name], self.second[name])
            for p, g, m, v in zip(*map(self._blocks, tensors), strict=True):
                self._adam(p, g, m, v, learning_rate, divisor)
                if name == "W_dec":
                    normalize_rows(p)
        self.steps += 1
        return norm

    def _adam(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, learning_rate: float, divisor: Tensor) -> None:
        m32, v32 = m.float(), v.float()  # the same tensors where the moments are float32
        adam(
            [p], [g], [m32], [v32], [], [self.steps.clone()],
            fused=True, grad_scale=divisor, found_inf=torch.zeros_like(divisor), amsgrad=False, maximize=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=learning_rate, weight_decay=0.0, eps=EPSILON,
        )  # fmt: skip
        if m32 is not m:
            m.copy_(_round_stochastically(m32))
            v.copy_(_round_stochastically(v32))

    def _blocks(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 1:
            return (x,)
        return x.split(max(1, BLOCK_BYTES[x.device.type] // (4 * x.shape[1])))

    def state(self) -> dict[str, Tensor]:
        """Moments and step count, for `load`."""
        moments = {"first": self.first, "second": self.second}
        tensors = {f"adam.{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}
        return tensors | {"adam.steps": self.steps}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])


def _round_stochastically(x: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes it right on average."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)
