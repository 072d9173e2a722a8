"""What training changes, and one step of it.

Shapes: B tokens, D model width, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mistral_sae.files import SAEError
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.kernels import bf16_pays, topk_step
from mistral_sae.sae.optimizer import SAEAdam

NEVER = torch.iinfo(torch.int64).max


class Figures(NamedTuple):
    """A step's numbers, still on the device so that nothing waits for it: `stack` some of them before reading."""

    loss: Tensor  # normalized_mse + auxk_coefficient * auxk
    normalized_mse: Tensor
    auxk: Tensor
    l0: Tensor
    gradient_norm: Tensor  # before clipping


class Trainer:
    """A TopK autoencoder in training, with Adam's moments and the record of what fired (Gao et al. 2024).

    Args:
        d_model, n_features, k: sizes D, F, K.
        k_aux: dead features a token may use in the auxiliary loss.
        auxk_features: dead features that the auxiliary loss looks at, at most; None is all. Bounds its memory.
        auxk_coefficient: weight of that loss.
        dead_after_tokens: a feature that has not fired for so many tokens is dead.
        max_gradient_norm: larger gradients are scaled down to it.
        moments: dtype of Adam's moments, float32 or bfloat16.
        bf16: nominate active features by a bfloat16 product (`kernels.encode`); None does so where it pays.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        k_aux: int,
        auxk_features: int | None = None,
        auxk_coefficient: float,
        dead_after_tokens: int,
        max_gradient_norm: float,
        moments: torch.dtype = torch.float32,
        bf16: bool | None = None,
        device: torch.device | str = "cpu",
    ):
        self.sae = SparseAutoencoder(d_model, n_features, k, device=device).requires_grad_(False)
        self.adam = SAEAdam(self.sae, moments)
        self.k_aux, self.auxk_features, self.auxk_coefficient = k_aux, auxk_features, auxk_coefficient
        self.dead_after_tokens, self.max_gradient_norm = dead_after_tokens, max_gradient_norm
        self.bf16 = bf16_pays(torch.device(device)) if bf16 is None else bf16
        self.since_fired = torch.zeros(n_features, dtype=torch.int64, device=device)  # tokens
        self.firings = torch.zeros(n_features, dtype=torch.int64, device=device)  # tokens on which each fired
        self.maximum = torch.zeros(n_features, device=device)  # largest activation of each since `forget_maximum`
        self.find_dead()

    def initialize(self, x: Tensor, seed: int) -> None:
        """Start from random features around the first residuals x (B, D)."""
        self.sae.initialize(self.sae.standardize(x)[0], seed)

    def find_dead(self) -> Tensor:
        """Bring `self.dead`, the indices of the dead features, up to date. Waits for the device."""
        self.dead = (self.since_fired >= self.dead_after_tokens).nonzero().squeeze(1)
        return self.dead

    def step(self, x: Tensor, learning_rate: float) -> Figures:
        """Train on residuals x (B, D)."""
        sae = self.sae
        z, _, _ = sae.standardize(x)
        # Forward and backward
        step = topk_step(
            z, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k,
            self.dead[: self.auxk_features], self.k_aux, self.auxk_coefficient, self.bf16,
        )  # fmt: skip
        # Project the decoder's gradient, clip, Adam, renormalise the decoder's rows
        gradient_norm = self.adam.step(step, learning_rate, self.max_gradient_norm)
        # Remember what fired
        indices, fired = step.indices.flatten(), step.values.flatten() > 0
        self.since_fired.add_(len(x)).scatter_reduce_(0, indices, torch.where(fired, 0, NEVER), "amin")
        self.firings.scatter_add_(0, indices, fired.long())
        self.maximum.scatter_reduce_(0, indices, step.values.flatten(), "amax")
        return Figures(step.loss, step.normalized_mse, step.auxk, step.l0, gradient_norm)

    def forget_maximum(self) -> None:
        """Measure the features' maxima from here on: earlier ones belong to other weights."""
        self.maximum.zero_()

    def state(self) -> dict[str, Tensor]:
        """All tensors that continuing needs, for `load`."""
        # W_enc feature by feature, as it lies in memory: no transposed copy on the device
        weights = {name: p.T if name == "W_enc" else p for name, p in self.sae.named_parameters()}
        return (
            weights
            | self.adam.state()
            | {
                "since_fired": self.since_fired,
                "firings": self.firings,
                "maximum": self.maximum,
            }
        )

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave. Raises SAEError where a tensor is missing."""
        if missing := self.state().keys() - tensors.keys():
            raise SAEError(
                f"found a training state without {', '.join(sorted(missing))}, expected one of this version: "
                "train anew with RESUME=False, or in another RUN_DIR"
            )
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.find_dead()
