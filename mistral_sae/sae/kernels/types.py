"""What the kernels take and give.

Shapes: B tokens, D model width, F features, K active features, A dead features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MatrixGradient(NamedTuple):
    """The gradient of a matrix (F, D): for each feature a weighted sum of vectors over the tokens in which it fired.

    It is made some features at a time, so that all of it need never exist.
    """

    offsets: Tensor  # (F) where each feature's run of terms begins
    vectors: Tensor  # (N, D)
    owners: Tensor  # (terms) which vector each term takes, feature by feature
    weights: Tensor  # (terms) and how much of it
    added: tuple[Tensor, Tensor] | None = None  # features (A), ascending, and rows (A, D) that come on top

    def whole(self) -> Tensor:
        """All of it, (F, D)."""
        rows = F.embedding_bag(self.owners, self.vectors, self.offsets, mode="sum", per_sample_weights=self.weights)
        return rows if self.added is None else rows.index_add_(0, *self.added)

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows of features start to stop, (stop - start, D). Waits for a GPU."""
        first = int(self.offsets[start])
        last = int(self.offsets[stop]) if stop < len(self.offsets) else len(self.owners)
        added = self.added
        if added is not None:
            features, rows = added
            low, high = torch.searchsorted(features, torch.tensor([start, stop], device=features.device)).tolist()
            added = features[low:high] - start, rows[low:high]
        offsets = self.offsets[start:stop] - first
        return MatrixGradient(offsets, self.vectors, self.owners[first:last], self.weights[first:last], added).whole()


class Weights(NamedTuple):
    """The four parameters of an autoencoder."""

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F)
    W_dec: Tensor  # (F, D)
    b_dec: Tensor  # (D)


class AuxK(NamedTuple):
    """The auxiliary loss that revives dead features."""

    dead: Tensor  # (A) int64, ascending: the features that count as dead
    k: int  # dead features that a token may use, at most A are
    coefficient: float  # weight of the loss


class Step(NamedTuple):
    """Loss and gradients of one batch; scalars are tensors, so that nothing waits for the device."""

    loss: Tensor  # normalized_mse + auxk coefficient * auxk
    normalized_mse: Tensor
    auxk: Tensor
    l0: Tensor  # mean number of features with an activation above 0
    values: Tensor  # (B, K)
    indices: Tensor  # (B, K)
    W_enc: MatrixGradient  # (F, D): feature by feature
    b_enc: Tensor  # gradient (F)
    W_dec: MatrixGradient  # (F, D)
    b_dec: Tensor  # gradient (D)


class Used(NamedTuple):
    """The features that one of the two losses used, and its gradients."""

    features: Tensor  # (B, k)
    values: Tensor  # (B, k), their activations
    grad_values: Tensor  # (B, k), the gradient of their pre-activations
    grad_z_hat: Tensor  # (B, D), that of what they decode to
    among: Tensor | None = None  # (A) what `features` are indices into, where dense products with all A are faster
