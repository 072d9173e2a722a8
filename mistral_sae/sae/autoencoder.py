"""The sparse autoencoder: maths, unit-norm decoder. It knows no language model and no files.

Shapes: B tokens, D model width, F features, K active features. `...` is any number of leading dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral_sae.distributed import ALONE, Mesh
from mistral_sae.sae.kernels import portable, step
from mistral_sae.sae.kernels.portable import normalize_rows
from mistral_sae.sae.kernels.types import Weights

EPSILON = 1e-5  # added to the standard deviation a token is divided by, on the way in only, as SAE Lens does


class Encoded(NamedTuple):
    """The active features of some tokens, and what undoes their standardisation."""

    values: Tensor  # (..., K) activations, >= 0, in units of the standardised residual; 0 where fewer than K are active
    indices: Tensor  # (..., K) int64, which feature each value belongs to
    mean: Tensor  # (..., 1) of the residual
    std: Tensor  # (..., 1) of the residual, without EPSILON

    def dense(self, n_features: int) -> Tensor:
        """Activations of all features, (..., F)."""
        shape = (*self.values.shape[:-1], n_features)
        return self.values.new_zeros(shape).scatter_(-1, self.indices, self.values)


class SparseAutoencoder(nn.Module):
    """A TopK sparse autoencoder on standardised residuals (Gao et al. 2024, sections 2.3 and 3.1).

    ::

        mu = mean(x);  s = std(x);  z = (x - mu) / (s + EPSILON)
        pre = (z - b_dec) @ W_enc + b_enc             W_enc (D, F), b_enc (F)
        f   = relu(topk(pre, K))
        z^  = f @ W_dec + b_dec                       W_dec (F, D), b_dec (D)
        x^  = z^ * s + mu

    SAEs that others trained may differ in three places, for inference: `activation` is "topk", "relu" or
    "jumprelu" (f = pre where pre > threshold (F)); `normalize` is "layer_norm" (above), "constant_norm"
    (mu = 0 and s = |x| / sqrt(D)) or "none" (mu = 0 and s = 1); with `center=False`, b_dec is not subtracted
    before the encoder. Rows of W_dec have unit norm in what we train, but for relu's, and any norm in what is loaded.

    Both matrices lie in memory feature by feature (W_enc is the transposed view of an (F, D) block), since all but
    the encoder product touches a few features' rows.

    Of `n_features` a shard of a mesh holds an equal part. It encodes to its own among the active features, and all
    shards together decode, which both they have to do at the same time.
    """

    threshold: Tensor  # (F) of a JumpReLU autoencoder

    def __init__(
        self,
        d_model: int,
        n_features: int,
        k: int,
        *,
        activation: str = "topk",
        normalize: str = "layer_norm",
        center: bool = True,
        device: torch.device | str | None = None,
        mesh: Mesh = ALONE,
    ):
        super().__init__()
        if not 1 <= k <= n_features:
            raise ValueError(f"K must lie between 1 and the number of features: found K={k} and {n_features} features")
        if activation not in ("topk", "relu", "jumprelu"):
            raise ValueError(f"activation must be topk, relu or jumprelu: found {activation!r}")
        if normalize not in ("layer_norm", "constant_norm", "none"):
            raise ValueError(f"normalize must be layer_norm, constant_norm or none: found {normalize!r}")
        self.d_model, self.n_features, self.k = d_model, n_features, k
        self.activation, self.normalize, self.center = activation, normalize, center
        self.mesh, held = mesh, n_features // mesh.shards.size
        self.W_enc = nn.Parameter(torch.empty(held, d_model, device=device).T)
        self.b_enc = nn.Parameter(torch.zeros(held, device=device))
        self.W_dec = nn.Parameter(torch.empty(held, d_model, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_model, device=device))
        if activation == "jumprelu":
            self.register_buffer("threshold", torch.zeros(held, device=device))

    @property
    def weights(self) -> Weights:
        """The four parameters."""
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, mesh=self.mesh)

    @torch.no_grad()
    def initialize(self, sample_z: Tensor, seed: int) -> None:
        """Random unit decoder rows, the encoder their transpose, b_dec the geometric median of `sample_z` (B, D)."""
        generator = torch.Generator().manual_seed(seed)
        first = self.mesh.shards.rank * len(self.W_dec)
        for start in range(-first, len(self.W_dec), 1024):  # of all shards, so that a seed means the same on every mesh
            drawn = torch.randn(min(1024, self.n_features - first - start), self.d_model, generator=generator)
            rows = self.W_dec[max(0, start) : max(0, start + len(drawn))]
            rows.copy_(drawn[max(0, -start) : max(0, -start) + len(rows)])
        normalize_rows(self.W_dec)
        self.W_enc.T.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(sample_z))

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals (..., D) -> z (..., D), mean (..., 1) and std (..., 1), in float32."""
        x = x.float()
        if self.normalize == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            centered = x - mean
            std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / (self.d_model - 1) ** 0.5
            return centered / (std + EPSILON), mean, std
        mean, std = x.new_zeros(*x.shape[:-1], 1), x.new_ones(*x.shape[:-1], 1)
        if self.normalize == "constant_norm":
            std = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12) / self.d_model**0.5
        return x / std, mean, std

    def encode(self, x: Tensor, *, bf16: bool = False) -> Encoded:
        """Residuals (..., D) -> their active features, the strongest K of each token for a TopK autoencoder.

        Residuals of another device come to the autoencoder's. With `bf16` bfloat16 nominates the K features: as exact,
        not differentiable, and faster where `step.bf16_pays`.
        """
        z, mean, std = self.standardize(x.to(self.W_enc.device))
        centered = z - self.b_dec if self.center else z
        if self.activation == "topk":
            weights = self.weights._replace(W_enc_bf16=self.W_enc.to(torch.bfloat16) if bf16 else None)
            values, indices = step.encode_shard(centered.flatten(0, -2), weights, self.k)
            shape = (*x.shape[:-1], values.shape[-1])
            return Encoded(values.view(shape), indices.view(shape), mean, std)
        size = step.tokens_at_once(centered.device, torch.float32, len(self.b_enc))
        parts = [self._above_threshold(part) for part in centered.flatten(0, -2).split(size)]
        widest = max(values.shape[1] for values, _ in parts)
        padded = [[nn.functional.pad(each, (0, widest - each.shape[1])) for each in part] for part in parts]
        values, indices = (torch.cat(each).view(*x.shape[:-1], widest) for each in zip(*padded, strict=True))
        return Encoded(values, indices, mean, std)

    def _above_threshold(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """The activations and features of some tokens, as many as the one with the most has."""
        pre = torch.addmm(self.b_enc, centered, self.W_enc)
        threshold = self.threshold if self.activation == "jumprelu" else 0.0
        active = torch.where(pre > threshold, pre, 0.0)
        return portable.topk(active, max(1, int((active > 0).sum(dim=-1).max())))

    def decode(self, encoded: Encoded) -> Tensor:
        """Active features -> reconstructed residuals (..., D), in float32."""
        values, indices, mean, std = encoded
        z_hat = portable.decode(values.flatten(0, -2), indices.flatten(0, -2), self.W_dec)
        z_hat = self.mesh.shards.sum_(z_hat)
        return (z_hat.view(*values.shape[:-1], self.d_model) + self.b_dec) * std + mean

    def forward(self, x: Tensor) -> Tensor:
        """Residuals (..., D) -> their reconstruction (..., D), on the residuals' device."""
        return self.decode(self.encode(x)).to(x.device)


def geometric_median(x: Tensor) -> Tensor:
    """The point (D) with the least summed distance to the rows of x (B, D), by Weiszfeld's iteration."""
    guess = x.mean(dim=0)
    for _ in range(100):
        weights = 1 / torch.linalg.vector_norm(x - guess, dim=1).clamp_min(1e-8)
        previous, guess = guess, weights @ x / weights.sum()
        if torch.linalg.vector_norm(guess - previous) <= 1e-6 * torch.linalg.vector_norm(guess):
            break
    return guess
