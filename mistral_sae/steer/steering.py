"""Steer: edit the residual of one layer along the decoder rows of a few features, while a model runs.

    with steer(lm, loaded, {12: 2 * loaded.maximum[12]}, method="clamp"):
        ids = list(lm.generate(prompt_ids, 40))

Four methods, each with its unit. x is the residual at a position, s its standard deviation (what the autoencoder
divides by), f(x) the feature's activation there and w its decoder row:

    clamp   x + s * (c - f(x)) * w   c is the activation that the feature is set to, in the autoencoder's own unit, that
                                     of the standardised residual (`times_maximum` makes it from multiples of a maximum)
    ablate  x + s * (0 - f(x)) * w   whatever c is
    add     x + c * |x| * w / |w|    c is in norms of the residual at that position
    raw     x + c * w                c is in units of the decoder row, whatever the residual's size

All are closed forms on the residual: nothing is decoded, so what the autoencoder does not explain of x, its error term,
stays as it is. They touch the rows of W_enc and W_dec of the steered features alone.

Two limits. A TopK autoencoder's feature counts as 0 where K others are stronger, which only an encoding of all
features tells. f(x) is taken to be relu of the feature's own pre-activation instead, which is larger there, so that
clamping adds less by the same amount; `exact=True` encodes all. And a clamped feature, read back from the edited
residual, is c before interference: the edit also changes the residual's mean and standard deviation, an encoder column
need not have the product 1 with its decoder row, and features clamped together, each along its own row, add to each
other where those rows are not orthogonal.

Shapes: B rows, T positions, D model width, F features, S steered features.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.cli import UserError
from mistral_sae.model.hooks import edit_residual
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, check_model

METHODS = ("clamp", "add", "ablate", "raw")
# A number; None, for a feature as it is; or one for each row of a batch (B), where NaN leaves it as it is in that row
Coefficient = float | Tensor | None


class SteeringError(UserError):
    """An edit that cannot be made. One line: what was found, what was expected, what to do."""


@contextmanager
def steer(
    lm: LanguageModel,
    loaded: LoadedSAE,
    coefficients: Mapping[int, Coefficient],
    method: str = "clamp",
    *,
    first_position: int = 1,
    exact: bool = False,
    directions_SD: Tensor | None = None,
) -> Iterator[None]:
    """Steer every forward of `lm` inside the block. Contexts nest: each edits what those entered before it left.

    With a KV cache and without one the same positions are edited, so the text is the same. Where no coefficient is
    left after the `None`s the model runs as if there were no block, bit for bit.

    Args:
        lm: the model, with at least the autoencoder's layer loaded.
        loaded: what `load_sae` gave; its hook says which layer is edited.
        coefficients: {feature: c}, in the unit of the method (see the module's docstring).
        method: "clamp", "add", "ablate" or "raw".
        first_position: the first position of a row that is edited. 1 is all but the attention sink, which is never
            edited; the length of the prompt (its BOS included) is the generated tokens only.
        exact: take f(x) from an encoding of all features, with TopK's competition; the autoencoder must be on the
            model's device. For clamp and ablate.
        directions_SD: directions to write along in place of the decoder rows, as a control.

    Raises SteeringError for what cannot be steered, SAEError for an autoencoder of another place or another model,
    ModelError for a layer that is not loaded, and HookError if no forward ran inside the block.
    """
    layer = loaded.metadata.residual_layer
    wanted = {feature: c for feature, c in coefficients.items() if c is not None}
    check_coefficients(loaded.sae, wanted, method)
    check_model(loaded, lm)
    if first_position < 1:
        raise SteeringError(f"found first_position {first_position}: expected 1 or more, position 0 is never edited")
    if not wanted:
        yield
        return
    edit = make_edit(loaded.sae, wanted, method, lm.device, exact=exact, directions_SD=directions_SD)
    with edit_residual(lm, layer, lambda x_BTD: edit(x_BTD.float()), first_position=first_position):
        yield


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
    as_it_is_S = target_S.isnan() if target_S.isnan().any() else None
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
    activations = _exact_activations(sae, features_S, device) if exact else _own_activations(sae, features_S, device)

    def clamp(x_BTD: Tensor) -> Tensor:
        f_BTS, std_BT1 = activations(x_BTD)
        change_BTS = target_S - f_BTS if as_it_is_S is None else (target_S - f_BTS).masked_fill(as_it_is_S, 0.0)
        return x_BTD + (change_BTS * std_BT1) @ rows_SD

    return clamp


def _own_activations(
    sae: SparseAutoencoder, features_S: Tensor, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Residuals (B, T, D) -> the features' activations (B, T, S) from their own rows alone, and std (B, T, 1)."""
    W_SD, b_S = sae.W_enc.T[features_S], sae.b_enc[features_S]
    if sae.center:
        b_S = b_S - W_SD @ sae.b_dec
    W_SD, b_S = W_SD.to(device), b_S.to(device)
    threshold_S = sae.threshold[features_S].to(device) if sae.activation == "jumprelu" else None

    def activations(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        z_BTD, _, std_BT1 = sae.standardize(x_BTD)
        pre_BTS = F.linear(z_BTD, W_SD, b_S)
        return pre_BTS.relu() if threshold_S is None else pre_BTS * (pre_BTS > threshold_S), std_BT1

    return activations


def _exact_activations(
    sae: SparseAutoencoder, features_S: Tensor, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The same from an encoding of all features."""
    if sae.W_dec.device != device:
        raise SteeringError(
            f"found the autoencoder on {sae.W_dec.device} and the model on {device}: exact=True encodes all features, "
            "load the autoencoder with device=lm.device"
        )
    return lambda x_BTD: activations_of(sae, x_BTD, features_S)


@torch.no_grad()
def activations_of(sae: SparseAutoencoder, x: Tensor, features_S: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (..., D) -> activations (..., S) of some features, as `sae.encode` finds them, and std (..., 1)."""
    encoded = sae.encode(x)
    is_it = encoded.indices.unsqueeze(-1) == features_S
    return (encoded.values.unsqueeze(-1) * is_it).sum(dim=-2), encoded.std


# ---- what can be steered ----


def check_coefficients(sae: SparseAutoencoder, coefficients: Mapping[int, Coefficient], method: str) -> None:
    """Raise SteeringError for an unknown method, a feature that the autoencoder has not, a coefficient that is none."""
    if method not in METHODS:
        raise SteeringError(f"found METHOD {method!r}: expected {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    for feature, c in coefficients.items():
        if type(feature) is not int or not 0 <= feature < sae.n_features:
            raise SteeringError(
                f"found feature {feature!r}: expected a whole number from 0 to {sae.n_features - 1}, as the "
                f"autoencoder has {sae.n_features:,} features"
            )
        if isinstance(c, Tensor):
            is_finite = not bool(c.isinf().any())
        else:
            is_finite = c is None or (isinstance(c, int | float) and math.isfinite(c))
        if not is_finite:
            raise SteeringError(f"found coefficient {c!r} of feature {feature}: expected a finite number")


def times_maximum(coefficients: Mapping[int, Coefficient], maximum_F: Tensor) -> dict[int, Coefficient]:
    """Multiples of each feature's maximum (F) as the activations that "clamp" takes; None stays None.

    Raises SteeringError for a feature that never fired where the maximum was measured.
    """
    activations = {}
    for feature, c in coefficients.items():
        if (largest := float(maximum_F[feature])) <= 0 and c is not None:
            raise SteeringError(
                f"feature {feature} never fired where its maximum was measured: expected one that did, or METHOD=add"
            )
        activations[feature] = None if c is None else c * largest
    return activations
