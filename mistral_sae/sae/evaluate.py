"""What a sparse autoencoder keeps of the residuals, and what of it the language model needs.

Shapes: R rows, T positions, D model width, F features, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.cli import Progress
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import RARE, Counts

LOGITS_BYTES = 2**28  # of logits at a time, which exist HELD_LOGITS times over
HELD_LOGITS = 5  # log-probabilities clean and spliced, and what their divergence is computed through


class _Model(Protocol):
    """A language model, as LanguageModel describes it."""

    name: str
    device: torch.device
    vocab_size: int
    last_layer: int | None  # None if all of it is loaded

    def check_finite(self, numbers: Tensor, what: str) -> None: ...
    def kept(self, tokens_BT: Tensor) -> Tensor: ...
    def residuals(self, tokens_BT: Tensor, layer: int) -> Tensor: ...
    def log_probabilities(
        self, tokens_BT: Tensor, layer: int | None = None, replace: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor: ...


class Reconstruction(NamedTuple):
    """How well the autoencoder reconstructs some residuals, and with how many features."""

    tokens: int
    l0: float  # mean number of active features a token
    normalized_mse: float  # |z - z^|^2 / |z - mean(z)|^2 of the standardised residuals, what training minimises
    explained_variance: float  # 1 - |x - x^|^2 / |x - mean(x)|^2 of the residuals themselves, about their mean
    silent_fraction: float  # of the features: fired on none of these tokens
    rare_fraction: float  # of the features: fired on fewer than one token in ten thousand
    density_F: Tensor  # share of the tokens on which each feature fired


@torch.no_grad()
def reconstruction(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> Reconstruction:
    """Measure over batches of residuals (B, D). Means and variances are over all of them, in float64.

    All shards of an autoencoder have to, at the same time and over the same batches.
    """
    counts = Counts(len(sae.W_dec), sae.W_dec.device, sae.mesh.shards)
    errors = {"z": 0.0, "x": 0.0}
    sums, squares = {s: torch.zeros(sae.d_model, dtype=torch.float64) for s in errors}, dict.fromkeys(errors, 0.0)
    for batch in batches:
        x = batch.to(sae.W_dec.device).float()
        encoded = sae.encode(x)
        x_hat = sae.decode(encoded)
        z, mean, std = sae.standardize(x)
        for space, true, found in (("x", x, x_hat), ("z", z, (x_hat - mean) / std)):
            errors[space] += _exact(true - found).square().sum().item()
            sums[space] += _exact(true).sum(dim=0).cpu()
            squares[space] += _exact(true).square().sum().item()
        counts.add(encoded.values, encoded.indices)
    density_F = counts.density_F()
    if not counts.tokens:
        raise ValueError("there are no held-out residuals to evaluate on: raise EVALUATION_ROWS or HELD_OUT_FRACTION")
    unexplained = {s: errors[s] / (squares[s] - sums[s].square().sum().item() / counts.tokens) for s in errors}
    return Reconstruction(
        tokens=counts.tokens,
        l0=counts.shards.total(counts.fired_F.sum()).item() / counts.tokens,
        normalized_mse=unexplained["z"],
        explained_variance=1 - unexplained["x"],
        silent_fraction=(density_F == 0).double().mean().item(),
        rare_fraction=(density_F < RARE).double().mean().item(),
        density_F=density_F.float(),
    )


class Evaluator:
    """Measures autoencoders of one layer on held-out rows (R, T); what the layer itself is worth is measured once."""

    def __init__(self, model: _Model, rows_RT: Tensor, layer: int, rows_per_forward: int):
        self.model, self.rows_RT, self.layer, self.rows_per_forward = model, rows_RT, layer, rows_per_forward
        self.n_tokens = len(rows_RT) * (rows_RT.shape[1] - 1)  # that are predicted

    def __call__(self, sae: SparseAutoencoder) -> dict[str, float]:
        """The figures of `Reconstruction`, and those of `cross_entropy` if all of the model is loaded, by name."""
        figures = reconstruction(sae, self._residuals())._asdict()
        del figures["density_F"]
        return figures if self.model.last_layer is not None else figures | self.cross_entropy(sae)

    @torch.no_grad()
    def cross_entropy(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Cross-entropy (nats a token) of the model as it is and with residuals of the layer replaced.

        Those at first positions and at BOS and EOS stay.
        """
        totals = torch.zeros(3, dtype=torch.float64)
        for tokens in Progress(self._parts(), desc="cross-entropy", leave=False):
            clean, spliced = (self.model.log_probabilities(tokens, self.layer, replace) for replace in (None, sae))
            divergence = F.kl_div(spliced, clean, log_target=True, reduction="sum").item()
            losses = (_negative_log_likelihood(logprobs, tokens) for logprobs in (clean, spliced))
            totals += torch.tensor([*losses, divergence])
        self.model.check_finite(totals, "logits")
        clean_loss, spliced_loss, kl = (totals / self.n_tokens).tolist()
        mean, zero = self._ablated
        return {
            "ce_loss_clean": clean_loss,
            "ce_loss_with_sae": spliced_loss,
            "ce_loss_ablated": mean,  # every residual replaced by their mean
            "ce_loss_zero_ablated": zero,
            "ce_loss_recovered": (mean - spliced_loss) / (mean - clean_loss),
            "ce_loss_recovered_zero": (zero - spliced_loss) / (zero - clean_loss),
            "kl": kl,  # KL(clean || with_sae), nats a token
        }

    @cached_property
    @torch.no_grad()
    def _ablated(self) -> tuple[float, float]:
        """Cross-entropy with the mean, and with zero, in place of every residual."""
        sums = [_exact(x).sum(dim=0) for x in self._residuals()]
        mean = torch.stack(sums).sum(dim=0) / int(self.model.kept(self.rows_RT).sum())
        mean = mean.float().to(self.model.device)
        totals = torch.zeros(2, dtype=torch.float64)
        for tokens in Progress(self._parts(), desc="cross-entropy without the layer", leave=False):
            for i, constant in enumerate((mean, torch.zeros_like(mean))):
                logprobs = self.model.log_probabilities(tokens, self.layer, constant.expand_as)
                totals[i] += _negative_log_likelihood(logprobs, tokens)
        with_mean, with_zero = (totals / self.n_tokens).tolist()
        return with_mean, with_zero

    def _residuals(self) -> Iterator[Tensor]:
        """Residuals (N, D) of some rows at a time, at the positions that are trained on."""
        for part in self.rows_RT.split(self.rows_per_forward):
            x_RTD = self.model.residuals(part, self.layer)
            yield x_RTD[self.model.kept(part).to(x_RTD.device)]

    def _parts(self) -> list[Tensor]:
        """The rows, so many at a time that their logits have room."""
        room = LOGITS_BYTES // (4 * self.rows_RT.shape[1] * self.model.vocab_size)
        parts = self.rows_RT.split(max(1, min(self.rows_per_forward, room)))
        return [part.to(self.model.device) for part in parts]


def as_held_out(figures: dict[str, float]) -> dict[str, float]:
    """Held-out figures under names that a training record does not have."""
    return {key if key.startswith(("ce_", "kl")) else f"held_out_{key}": value for key, value in figures.items()}


def summary(figures: dict[str, float]) -> str:
    """The figures of a whole evaluation, in words, a line each."""
    return f"""\
on {figures["tokens"]:,} held-out tokens
  normalized MSE           {figures["normalized_mse"]:.3f} (0 is perfect, 1 is predicting the mean)
  explained variance       {figures["explained_variance"]:.3f}
  active features a token  {figures["l0"]:.1f}
  cross-entropy            {figures["ce_loss_clean"]:.3f} nats a token
    through the features   {figures["ce_loss_with_sae"]:.3f}
    without the layer      {figures["ce_loss_ablated"]:.3f} (its mean instead)
  cross-entropy recovered  {figures["ce_loss_recovered"]:.1%}
  dead features            {figures["dead_fraction"]:.1%}
  rarely firing features   {figures["rare_fraction"]:.1%} (on fewer than one of these tokens in 10,000)"""


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures of whole evaluations by the names of their autoencoders, in words, a line each."""
    width = max(map(len, figures))
    lines = [f"{'':{width}}  active a token  normalized MSE  cross-entropy recovered  dead"]
    for name, found in figures.items():
        recovered, dead = f"{found['ce_loss_recovered']:.1%}", f"{found['dead_fraction']:.1%}"
        lines.append(
            f"{name:{width}}  {found['l0']:14.1f}  {found['normalized_mse']:14.3f}  {recovered:>23}  {dead:>5}"
        )
    return "\n".join(lines)


def _exact(x: Tensor) -> Tensor:
    """The same in float64; on the CPU where the device, an Apple GPU, has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _negative_log_likelihood(logprobs_RTV: Tensor, tokens_RT: Tensor) -> float:
    return F.nll_loss(logprobs_RTV.flatten(0, 1), tokens_RT[:, 1:].flatten(), reduction="sum").item()
