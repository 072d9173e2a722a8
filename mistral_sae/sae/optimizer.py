"""Adam for a sparse autoencoder: projection, clipping, moments and the renormalisation of decoder rows in two passes.

The first pass measures the norm of the gradient without its component along each decoder row. The second removes that
component, clips, updates and renormalises. Both go through the matrices in blocks of features small enough to stay in
cache; on a CPU the gradient of a block is made again in each, which is cheaper than writing it to memory and reading it
back. Neither pass waits for the device.

Shapes: D model width, F features.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim.adam import adam

from mistral_sae.sae.autoencoder import SparseAutoencoder, normalize_rows
from mistral_sae.sae.kernels import MatrixGradient, Step

BETAS = (0.9, 0.999)  # Gao et al. 2024, appendix A.3
EPSILON = 6.25e-10  # from the same place; activations are standardised, gradients small
BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**28}  # of a parameter in float32, a block: L2 cache; few enough launches


class SAEAdam:
    """Adam over the four parameters of a SparseAutoencoder, moments in float32 or bfloat16.

    bfloat16 halves the optimizer's memory. Its second moment would stop moving, since 0.999 is closer to 1 than
    bfloat16 can step, so both moments are rounded stochastically: right on average.
    """

    def __init__(self, sae: SparseAutoencoder, moments: torch.dtype = torch.float32):
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments must be float32 or bfloat16: found {moments}")
        # Feature by feature, as the matrices lie in memory
        self.parameters = {name: p.data.T if name == "W_enc" else p.data for name, p in sae.named_parameters()}
        self.first = {name: torch.zeros_like(p, dtype=moments) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p, dtype=moments) for name, p in self.parameters.items()}
        self.steps = torch.zeros((), device=sae.W_dec.device)

    @torch.no_grad()
    def step(self, gradients: Step, learning_rate: float, max_norm: float) -> Tensor:
        """Update the autoencoder in place. Returns the gradient's norm before clipping, a scalar."""
        W_dec = self.parameters["W_dec"]
        blocks_of = {name: _in_blocks(getattr(gradients, name)) for name in ("W_enc", "W_dec")}
        squares = [gradients.b_enc.square().sum(), gradients.b_dec.square().sum()]
        squares += [grad.square().sum() for _, grad in blocks_of["W_enc"]()]
        for rows, grad in blocks_of["W_dec"]():  # without the component along each row, which has length one
            squares += [grad.square().sum(), -torch.einsum("fd,fd->f", grad, W_dec[rows]).square().sum()]
        norm = torch.stack(squares).sum().clamp_min(0.0).sqrt()
        divisor = (norm / max_norm).clamp_min(1.0)  # Adam's kernel divides by it while it reads the gradient

        for name in ("b_enc", "b_dec"):
            self._adam(name, slice(None), getattr(gradients, name), learning_rate, divisor)
        for name, blocks in blocks_of.items():
            for rows, grad in blocks():
                if name == "W_dec":
                    along = torch.einsum("fd,fd->f", grad, W_dec[rows])
                    grad.addcmul_(along.unsqueeze(1), W_dec[rows], value=-1)
                self._adam(name, rows, grad, learning_rate, divisor)
                if name == "W_dec":
                    normalize_rows(W_dec[rows])
        self.steps += 1
        return norm

    def _adam(self, name: str, rows: slice, grad: Tensor, learning_rate: float, divisor: Tensor) -> None:
        p, m, v = (named[name][rows] for named in (self.parameters, self.first, self.second))
        m32, v32 = m.float(), v.float()  # the same tensors where the moments are float32
        adam(
            [p], [grad], [m32], [v32], [], [self.steps.clone()],
            fused=True, grad_scale=divisor, found_inf=torch.zeros_like(divisor), amsgrad=False, maximize=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=learning_rate, weight_decay=0.0, eps=EPSILON,
        )  # fmt: skip
        if m32 is not m:
            m.copy_(_round_stochastically(m32))
            v.copy_(_round_stochastically(v32))

    def state(self) -> dict[str, Tensor]:
        """Moments and step count, which continuing needs."""
        moments = {"first": self.first, "second": self.second}
        tensors = {f"adam.{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}
        return tensors | {"adam.steps": self.steps}


def _in_blocks(gradient: MatrixGradient) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """A function that iterates over blocks of features and their gradients."""
    n_features, device = len(gradient.offsets), gradient.vectors.device.type
    size = max(1, BLOCK_BYTES[device] // (4 * gradient.vectors.shape[1]))
    whole = None if device == "cpu" else gradient.whole()  # a GPU would wait for where the terms of a block begin

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, n_features, size):
            rows = slice(start, min(start + size, n_features))
            yield rows, gradient.rows(rows.start, rows.stop) if whole is None else whole[rows]

    return blocks


def _round_stochastically(x: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes it right on average."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)
