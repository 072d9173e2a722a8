"""The training of an autoencoder: its sizes, one step, and the state that a run continues from.

Shapes: B tokens, D model width, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_sae.cli import expect
from mistral_sae.distributed import ALONE, Mesh
from mistral_sae.files import SAEError
from mistral_sae.sae.architectures import (
    ARCHITECTURES,
    PENALIZED,
    START,
    activation_of,
    batchtopk_step,
    equal_thresholds,
    jumprelu_step,
    nested_sizes,
    relu_step,
    threshold_after,
)
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import Counts
from mistral_sae.sae.kernels.step import bf16_pays, topk_step
from mistral_sae.sae.kernels.types import AuxK, Step
from mistral_sae.sae.optimizer import SAEAdam

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class TrainConfig:
    """The sizes and rates of one training, under the names that config.py has in capitals and explains."""

    d_model: int
    d_hidden: int
    k: int
    architecture: str = "topk"
    matryoshka_levels: int = 5
    sparsity_coefficient: float | None = None  # where there is a penalty
    bandwidth: float = 0.0
    train_tokens: int = 1_000_000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    warm_up_steps: int = 0
    decay_fraction: float = 0.2
    max_gradient_norm: float = 1.0
    auxk_coefficient: float = 1 / 32
    k_aux: int = 128
    auxk_features: int = 8192
    dead_after_tokens: int = 200_000
    moments_dtype: str = "float32"
    seed: int = 0
    context_length: int = 256
    buffer_tokens: int = 131_072
    rows_per_forward: int = 16

    @classmethod
    def of(cls, constants: Any, d_model: int) -> TrainConfig:
        """Read from constants such as config.py's."""
        names = [field.name for field in fields(cls) if field.name != "d_model"]
        return cls(d_model, **{name: getattr(constants, name.upper()) for name in names})

    def check_mesh(self, replicas: int, shards: int) -> None:
        """Raise UserError unless a mesh can share out the batch and the features."""
        for name, value, parts, what in (
            ("BATCH_SIZE", self.batch_size, replicas, "replicas"),
            ("D_HIDDEN", self.d_hidden, shards, "shards"),
        ):
            expect(name, value, value % parts == 0, f"a multiple of the {parts} {what} of MESH")

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.train_tokens // self.batch_size

    @property
    def decay_step(self) -> int:
        """The step from which the learning rate falls."""
        return int((1 - self.decay_fraction) * self.steps)

    def active(self) -> str:
        """How many features are active, in words."""
        if self.architecture in PENALIZED:
            return f"as many active as the penalty leaves ({self.architecture})"
        if self.architecture == "topk":
            return f"of which {self.k} are active on a token"
        return f"of which {self.k} are active on a token, on average ({self.architecture})"

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, plateau, linear decay."""
        warm_up = (step + 1) / max(1, self.warm_up_steps)
        decay = (self.steps - step) / (self.decay_fraction * self.steps)
        return self.learning_rate * min(1.0, warm_up, decay)


class Figures(NamedTuple):
    """A step's numbers, still on the device so that nothing waits for it: `stack` some of them before reading."""

    loss: Tensor  # normalized_mse + auxk_coefficient * auxk
    normalized_mse: Tensor
    auxk: Tensor
    l0: Tensor
    gradient_norm: Tensor  # before clipping
    finite: Tensor  # 1 where all residuals were, else 0: a loss that is not finite may be the language model's


class Trainer:
    """An autoencoder in training, with Adam's moments and counts of what fired (Gao et al. 2024).

    `bf16` nominates active features by a bfloat16 product (`step.encode`); None does so where it pays. The copy of
    W_enc that this takes is kept up to date by `initialize`, `load` and each `step`.
    """

    auxk_of_shards: tuple[int, ...] = ()  # dead features that AuxK looks at on each shard, where there are several

    def __init__(
        self, config: TrainConfig, device: torch.device | str = "cpu", bf16: bool | None = None, mesh: Mesh = ALONE
    ):
        config.check_mesh(mesh.replicas.size, mesh.shards.size)
        self.config, self.mesh = config, mesh
        activation = activation_of(config.architecture)
        self.sae = SparseAutoencoder(
            config.d_model, config.d_hidden, config.k, activation=activation, device=device, mesh=mesh
        )
        self.sae.requires_grad_(False)
        self.bf16 = bf16_pays(torch.device(device)) if bf16 is None else bf16
        self.bf16 &= config.architecture not in PENALIZED  # which have no features to nominate
        self.W_enc_bf16 = torch.empty_like(self.sae.W_enc, dtype=torch.bfloat16) if self.bf16 else None
        trains_threshold = config.architecture == "jumprelu"
        self.adam = SAEAdam(self.sae, getattr(torch, config.moments_dtype), self.W_enc_bf16, trains_threshold)
        self.ends = None  # of the nested autoencoders
        if config.architecture == "matryoshka":
            self.ends = nested_sizes(config.d_hidden, config.matryoshka_levels, mesh.shards).to(device)
        self.since_fired = torch.zeros_like(self.sae.b_enc, dtype=torch.int64)  # tokens
        self.counts = Counts(len(self.since_fired), device, mesh.shards)  # since `forget_counts`
        self.find_dead()

    def initialize(self, x: Tensor) -> None:
        """Start from random features around the first residuals x (B, D)."""
        z, config = self.sae.standardize(x)[0], self.config
        self.sae.initialize(z, config.seed)
        if config.architecture in PENALIZED:
            keeps = config.architecture == "jumprelu"
            threshold_F, scale = equal_thresholds(self.sae.weights, z, START * config.k, keeps=keeps)
            self.sae.W_enc.mul_(scale)
            (self.sae.threshold if keeps else self.sae.b_enc).copy_(threshold_F if keeps else -threshold_F)
        self._copy_W_enc()

    def _copy_W_enc(self) -> None:
        """Bring W_enc's copy in bfloat16 up to date."""
        if self.W_enc_bf16 is not None:
            self.W_enc_bf16.copy_(self.sae.W_enc)

    def find_dead(self) -> Tensor:
        """Bring `self.dead`, the indices of this shard's dead features, and `self.n_dead`, of all shards, up to date.

        Waits for the device.
        """
        self._set_dead(self.since_fired >= self.config.dead_after_tokens)
        return self.dead

    def _set_dead(self, is_dead_F: Tensor) -> None:
        self.dead = is_dead_F.nonzero().squeeze(1)
        of_shards, shards = torch.tensor([len(self.dead)]), self.mesh.shards
        if shards.size > 1:  # another wait
            of_shards = shards.gather(of_shards.to(self.dead.device)).cpu()
        self.n_dead = int(of_shards.sum())
        first = of_shards.cumsum(0).clamp(max=self.config.auxk_features).diff(prepend=of_shards.new_zeros(1))
        self.auxk_of_shards = tuple(first.tolist()) if len(first) > 1 else ()

    def step(self, x: Tensor, learning_rate: float) -> Figures:
        """Train on residuals x (B, D), which are the same on all ranks."""
        config = self.config
        step = self._forward_and_backward(self.sae.standardize(x)[0])
        # Project the decoder's gradient, clip, Adam, renormalise the decoder's rows
        gradient_norm = self.adam.step(step, learning_rate, config.max_gradient_norm)
        # Remember what fired
        silent = torch.where(step.values > 0, 0, NEVER).flatten()
        self.since_fired.add_(len(x)).scatter_reduce_(0, step.indices.flatten(), silent, "amin")
        self.counts.add(step.values, step.indices)
        finite = x.isfinite().all().float()
        return Figures(step.loss, step.normalized_mse, step.auxk, step.l0, gradient_norm, finite)

    def _forward_and_backward(self, z: Tensor) -> Step:
        """Loss and gradients on standardised residuals z (B, D)."""
        config, weights = self.config, self.sae.weights._replace(W_enc_bf16=self.W_enc_bf16)
        limit = self.auxk_of_shards[self.mesh.shards.rank] if self.auxk_of_shards else config.auxk_features
        aux = AuxK(self.dead[:limit], config.k_aux, config.auxk_coefficient, self.auxk_of_shards)
        # The penalty grows over the first twentieth, or most features would die at once (Templeton et al. 2024)
        penalty = (config.sparsity_coefficient or 0.0) * (20 * (self.adam.steps + 1) / config.steps).clamp_max(1.0)
        match config.architecture:
            case "topk":
                return topk_step(z, weights, config.k, aux)
            case "batchtopk" | "matryoshka":
                step, least = batchtopk_step(z, weights, config.k, aux, self.ends)
                self.sae.threshold.copy_(threshold_after(self.sae.threshold, least, self.adam.steps))
                return step
            case "relu":
                return relu_step(z, weights, penalty)
            case "jumprelu":
                return jumprelu_step(z, weights, self.sae.threshold, penalty, config.bandwidth)
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}: found {config.architecture!r}")

    def forget_counts(self) -> None:
        """Measure the features' densities and maxima from here on: earlier ones belong to other weights."""
        self.counts = Counts(len(self.sae.W_dec), self.sae.W_dec.device, self.mesh.shards)

    def record(self, step: int, figures: list[Tensor], seconds: float) -> dict[str, Any]:
        """A line of the log: the means of the steps since the last one, each stacked, which took so many seconds."""
        return {
            "step": step,
            "tokens": step * self.config.batch_size,
            **dict(zip(Figures._fields, torch.stack(figures).mean(dim=0).tolist(), strict=True)),
            "dead": self.n_dead,
            "learning_rate": self.config.learning_rate_at(step - 1),
            "tokens_per_second": len(figures) * self.config.batch_size / seconds,
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors that continuing needs, for `load`."""
        # W_enc feature by feature, as it lies in memory: no transposed copy on the device
        weights = {name: p.T if name == "W_enc" else p for name, p in self.sae.named_parameters()}
        counts = {"since_fired": self.since_fired, "fired": self.counts.fired_F, "maximum": self.counts.maximum_F}
        counts["counted_tokens"] = torch.tensor(self.counts.tokens)
        counts["dead"] = torch.zeros_like(self.since_fired, dtype=torch.bool).index_fill_(0, self.dead, True)
        return weights | dict(self.sae.named_buffers()) | self.adam.state() | counts

    def check(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Raise SAEError, which names their file, unless tensors have the names, shapes and types of `state`."""
        found = {name: f"{name} {tuple(x.shape)} of {x.dtype}" for name, x in tensors.items()}
        expected = {name: f"{name} {tuple(x.shape)} of {x.dtype}" for name, x in self.state().items()}
        for name in expected:
            if found.get(name) != expected[name]:
                what = f"{found.get(name, f'no {name}')} in {path}, expected {expected[name]}"
                raise SAEError(f"found {what}: it is of another version or damaged, remove the file")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self._copy_W_enc()
        self.counts.tokens = int(tensors["counted_tokens"])
        self._set_dead(tensors["dead"].to(self.since_fired.device))
