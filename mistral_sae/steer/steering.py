"""Steer: edit the residual of one layer along the decoder rows of a few features while a model runs.

    with steer(model, loaded, {12: 2 * loaded.maximum_F[12]}, method="clamp"):
        ids = list(model.generate(prompt_ids, 40))

Nothing is decoded, so what the autoencoder does not explain of the residual stays as it is. docs/steering.md has the
methods, their units and their limits.

Shapes: B rows, T positions, D model width, F features, S steered features.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.cli import Progress, UserError, not_finite
from mistral_sae.data.activations import residuals_of
from mistral_sae.data.tokens import Corpus, batches
from mistral_sae.model.hooks import edit_residual
from mistral_sae.model.language_model import LanguageModel, NotFinite
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, check_model, hash_of_sae
from mistral_sae.sae.features import Statistics, cached_statistics, measure_statistics

MAXIMUM_TOKENS = 200_000  # that are read to measure features' maxima, for an autoencoder that comes without
METHODS = ("clamp", "add", "ablate", "raw")
# A number; None, for a feature as it is; or one for each row of a batch (B), where NaN leaves it as it is in that row
Coefficient = float | Tensor | None


class SteeringError(UserError):
    """An edit that cannot be made. One line: what was found, what was expected, what to do."""


@contextmanager
def steer(
    model: LanguageModel,
    loaded: LoadedSAE,
    coefficients: Mapping[int, Coefficient],
    method: str = "clamp",
    *,
    first_position: int = 1,
    exact: bool = False,
    directions_SD: Tensor | None = None,
) -> Iterator[None]:
    """Steer every forward of `model` inside the block. Contexts nest: each edits what those entered before it left.

    Where no coefficient is left after the `None`s the model runs as if there were no block, bit for bit.

    Args:
        model: with at least the autoencoder's layer loaded.
        loaded: what `load_sae` gave; its hook says which layer is edited.
        coefficients: {feature: c}, in the unit of the method.
        method: with x the residual, s its standard deviation, f the feature's activation and w its decoder row:
            "clamp" is x + s (c - f) w, "ablate" x + s (0 - f) w, "add" x + c |x| w / |w|, "raw" x + c w.
        first_position: the first position of a row that is edited. 1 is all but the attention sink, which is never
            edited; the length of the prompt (its BOS included) is the generated tokens only.
        exact: take f(x) from an encoding of all features, with TopK's competition. For clamp and ablate.
        directions_SD: directions to write along in place of the decoder rows, as a control.

    Raises SteeringError for what cannot be steered, SAEError for an autoencoder of another place or another model,
    ModelError for a layer that is not loaded, and HookError if no forward ran inside the block.
    """
    layer = loaded.metadata.residual_layer
    wanted = {feature: c for feature, c in coefficients.items() if c is not None}
    check_coefficients(loaded.sae, wanted, method, model.dtype)
    check_model(loaded, model.name, model.d_model, model.n_layers)
    if first_position < 1:
        raise SteeringError(f"found first_position {first_position}: expected 1 or more, position 0 is never edited")
    if not wanted:
        yield
        return
    edit = make_edit(loaded.sae, wanted, method, model.device, exact=exact, directions_SD=directions_SD)

    def edited(x_BTD: Tensor) -> Tensor:
        y_BTD = edit(x_BTD.float())
        # A norm whose squares overflow makes 0 of a residual, and text of that; logits are looked at anyway
        overflows_BT1 = ~y_BTD.square().sum(dim=-1, keepdim=True).isfinite()
        return y_BTD.masked_fill(overflows_BT1, torch.nan)

    try:
        with edit_residual(model, layer, edited, first_position=first_position, special=False):
            yield
    except NotFinite:
        model.check_finite(model.forward(model.tokens_BT), "logits")  # raises it again if it is the model's own
        features = ", ".join(map(str, wanted))
        do = f"the edit is too large for {model.dtype}, lower COEFFICIENT"
        raise SteeringError(not_finite(f"the logits with feature {features} steered, and none without", do)) from None


@torch.no_grad()
def make_edit(
    sae: SparseAutoencoder,
    coefficients: Mapping[int, float | Tensor],
    method: str,
    device: torch.device,
    *,
    exact: bool = False,
    directions_SD: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """The method as a function of residuals (B, T, D) in float32, with the rows that it needs gathered on `device`."""
    features_S = torch.tensor(list(coefficients), device=sae.W_dec.device)
    values = [torch.as_tensor(c, dtype=torch.float32, device=device) for c in coefficients.values()]
    target_S = torch.stack(torch.broadcast_tensors(*values), dim=-1)
    if target_S.ndim == 2:  # (B, S): the same at all positions of a row
        target_S = target_S.unsqueeze(1)
    as_it_is_S = target_S.isnan()
    rows_SD = sae.W_dec[features_S] if directions_SD is None else directions_SD
    rows_SD = rows_SD.detach().to(device, torch.float32)

    if method == "add":
        shift_D = target_S.nan_to_num() @ F.normalize(rows_SD, dim=1)
        return lambda x_BTD: x_BTD + torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True) * shift_D
    if method == "raw":
        shift_D = target_S.nan_to_num() @ rows_SD
        return lambda x_BTD: x_BTD + shift_D
    if method == "ablate":
        target_S = 0 * target_S
    own = _own_activations(sae, features_S, device)

    def clamp(x_BTD: Tensor) -> Tensor:
        f_BTS, std_BT1 = activations_of(sae, x_BTD, features_S) if exact else own(x_BTD)
        return x_BTD + ((target_S - f_BTS).masked_fill(as_it_is_S, 0.0) * std_BT1) @ rows_SD

    return clamp


def _own_activations(
    sae: SparseAutoencoder, features_S: Tensor, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Residuals (B, T, D) -> the features' activations (B, T, S) from their own rows alone, and std (B, T, 1)."""
    W_SD, b_S = sae.W_enc.T[features_S], sae.b_enc[features_S]
    if sae.center:
        b_S = b_S - W_SD @ sae.b_dec
    W_SD, b_S = W_SD.to(device), b_S.to(device)
    threshold_S = sae.get_buffer("threshold")[features_S].to(device) if sae.activation == "jumprelu" else 0.0

    def activations(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        z_BTD, _, std_BT1 = sae.standardize(x_BTD)
        pre_BTS = F.linear(z_BTD, W_SD, b_S)
        return pre_BTS * (pre_BTS > threshold_S), std_BT1

    return activations


@torch.no_grad()
def activations_of(sae: SparseAutoencoder, x: Tensor, features_S: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (..., D) -> activations (..., S) of some features, as `sae.encode` finds them, and std (..., 1)."""
    encoded = sae.encode(x)
    is_it = encoded.indices.unsqueeze(-1) == features_S.to(encoded.indices.device)
    return (encoded.values.unsqueeze(-1) * is_it).sum(dim=-2).to(x.device), encoded.std.to(x.device)


# ---- what can be steered ----


def check_coefficients(
    sae: SparseAutoencoder, coefficients: Mapping[int, Coefficient], method: str, dtype: torch.dtype = torch.float32
) -> None:
    """Raise SteeringError for an unknown method, an unknown feature or a coefficient that the edit has no room for.

    It is added to residuals of `dtype`, and norms square them in float32.
    """
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max ** 0.5)
    if method not in METHODS:
        raise SteeringError(f"found METHOD {method!r}: expected {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    for feature, c in coefficients.items():
        if type(feature) is not int or not 0 <= feature < sae.n_features:
            raise SteeringError(f"found feature {feature!r}: expected a whole number from 0 to {sae.n_features - 1}")
        if c is None:
            continue
        if isinstance(c, Tensor):  # where it is NaN the feature stays as it is
            size = float(c.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).abs().max())
        else:
            size = abs(c) if isinstance(c, int | float) else math.nan
        if not size <= most:
            raise SteeringError(
                f"found coefficient {c!r} of feature {feature}, expected a finite number of at most {most:.2g}, "
                f"for which {str(dtype).removeprefix('torch.')} has room: lower COEFFICIENT"
            )


# ---- edits in the user's units ----


class Explanation(NamedTuple):
    """What a feature is said to mean."""

    text: str
    source: str  # who says so, and how well it was tested


class Subject(NamedTuple):
    """A model, an autoencoder of one of its layers, and what is known of its features."""

    model: LanguageModel
    loaded: LoadedSAE
    statistics: Statistics
    explanations: Mapping[int, Explanation]  # of the features that have one


@dataclass(frozen=True)
class Edit:
    """Coefficients by feature, and how they are applied: as `steer`, but clamp's unit is the feature's maximum."""

    coefficients: Mapping[int, Coefficient]
    method: str = "clamp"
    generated_only: bool = False  # leave the prompt as it is
    exact: bool = False

    def alone_in(self, row: int, rows: int) -> "Edit":
        """The same edit of one row of a batch, which leaves the other rows as they are."""
        is_it_B = torch.arange(rows) == row
        given = {f: c for f, c in self.coefficients.items() if c is not None}
        return replace(self, coefficients={f: torch.where(is_it_B, c, math.nan) for f, c in given.items()})

    def times(self, factor: float | Tensor) -> "Edit":
        """The same edit so many times as strong; a tensor has the factor of each row of a batch (B)."""
        return replace(self, coefficients={f: None if c is None else factor * c for f, c in self.coefficients.items()})

    def unit(self) -> "Edit":
        """What a sweep multiplies: one feature by its sign, several in proportion; those at 0 or None are left out."""
        given = {f: float(c) for f, c in self.coefficients.items() if c}
        return replace(self, coefficients={f: c if len(given) > 1 else math.copysign(1.0, c) for f, c in given.items()})

    def in_units_of_steer(self, subject: Subject) -> Mapping[int, Coefficient]:
        """The coefficients that `steer` takes. Raises SteeringError for what cannot be steered."""
        check_coefficients(subject.loaded.sae, self.coefficients, self.method, subject.model.dtype)
        if self.method != "clamp":
            return self.coefficients
        found: dict[int, Coefficient] = {}
        for feature, c in self.coefficients.items():
            maximum = float(subject.statistics.maximum_F[feature])
            if maximum <= 0 and c is not None:
                raise SteeringError(
                    f"found feature {feature}, which never fired where its maximum was measured: "
                    "expected one that did, or METHOD=add"
                )
            found[feature] = None if c is None else c * maximum
        check_coefficients(subject.loaded.sae, found, self.method, subject.model.dtype)
        return found

    def context(
        self, subject: Subject, prompt_length: int, directions_SD: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """The context in which the model is steered; see `steer`."""
        return steer(
            subject.model,
            subject.loaded,
            self.in_units_of_steer(subject),
            self.method,
            first_position=prompt_length if self.generated_only else 1,
            exact=self.exact,
            directions_SD=directions_SD,
        )

    def describe(self, subject: Subject) -> str:
        """The edit in words, with its units. Raises SteeringError for what cannot be steered."""
        words = {
            "clamp": "{} set to {:g} times its maximum ({:.1f})",
            "ablate": "{} set to 0",
            "add": "{} added at {:g} times the residual's norm",
            "raw": "{} added at {:g} times its decoder row",
        }
        in_units = self.in_units_of_steer(subject)
        parts = [
            f"{feature} as it is" if c is None else words[self.method].format(feature, c, in_units[feature])
            for feature, c in self.coefficients.items()
        ]
        return f"{self.method}: {', '.join(parts)}" + ("; on generated tokens only" if self.generated_only else "")


def statistics_of(model: LanguageModel, loaded: LoadedSAE, constants: Any) -> Statistics:
    """How often and strongly features fire: from training, or measured once on the text that constants describe.

    What is measured is kept in RUN_DIR.
    """
    if loaded.statistics is not None:
        return loaded.statistics
    corpus, at_once = Corpus.of(constants), constants.ROWS_PER_FORWARD
    path = Path(constants.RUN_DIR, "feature_statistics.safetensors")
    layer, n_rows = loaded.metadata.residual_layer, max(1, MAXIMUM_TOKENS // corpus.context_length)
    made_from = {
        "autoencoder": hash_of_sae(loaded.sae),
        "model": model.fingerprint(layer),
        "layer": layer,
        "text": f"{n_rows} rows of {corpus}",
    }

    def residuals(tokens_RT: Tensor) -> Tensor:
        x_ND = residuals_of(model, tokens_RT, layer)
        model.check_finite(x_ND, f"residuals of layer {layer}")
        return x_ND

    def measure() -> Statistics:
        print(f"the autoencoder comes without its features' maxima: from {MAXIMUM_TOKENS:,} tokens, kept in {path}")
        parts = batches(islice(corpus.rows(model.tokenizer, held_out=False), n_rows), at_once)
        bar = Progress(parts, "maxima", -(-n_rows // at_once), unit=" batches", leave=False)
        return measure_statistics(loaded.sae, map(residuals, bar))

    return cached_statistics(path, made_from, measure)
