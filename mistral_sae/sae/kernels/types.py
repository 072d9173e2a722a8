"""What the kernels take and give.

Shapes: B tokens, D model width, F features, K active features, A dead features.
"""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from mistral_sae.distributed import ALONE, Mesh

BETAS = (0.9, 0.999)  # of Adam: Gao et al. 2024, appendix A.3
EPSILON = 6.25e-10  # from the same place; activations are standardised, gradients small


class MatrixGradient(NamedTuple):
    """The gradient of a matrix (F, D): for each feature a weighted sum of vectors over the tokens in which it fired.

    It is made some features at a time, so that all of it need never exist.
    """

    offsets: Tensor  # (F + 1) where each feature's run of terms begins, and where the last one ends
    vectors: Tensor  # (N, D)
    owners: Tensor  # (terms) which vector each term takes, feature by feature
    weights: Tensor  # (terms) and how much of it
    added: tuple[Tensor, Tensor] | None = None  # features (A), ascending, and rows (A, D) that come on top
    along: Tensor | None = None  # (F) inner product of each row with the matrix's own, where that part is to be removed
    squares: Tensor | None = None  # () its squared norm, that part included, where it is known

    def whole(self) -> Tensor:
        """All of it, (F, D), the part along the matrix's rows included."""
        rows = F.embedding_bag(
            self.owners, self.vectors, self.offsets,
            mode="sum", per_sample_weights=self.weights, include_last_offset=True,
        )  # fmt: skip
        return rows if self.added is None else rows.index_add_(0, *self.added)


class RowState(NamedTuple):
    """A matrix and what Adam keeps of it, updated in place."""

    parameter: Tensor  # (F, D) float32
    first: Tensor  # (F, D) moments, float32 or bfloat16
    second: Tensor  # (F, D)
    copy: Tensor | None = None  # (F, D) bfloat16, to be the parameter's


class Rates(NamedTuple):
    """Numbers of one step of Adam that all parameters share."""

    learning_rate: float
    divisor: Tensor | None  # () of the gradient, so that its norm is bounded; None for one that is short enough
    steps: Tensor  # () float32, those before this one


class Operations(Protocol):
    """What differs by device: `portable` is in torch, `fused` in Triton."""

    def inner_products(self, x_BD: Tensor, indices: Tensor, rows_FD: Tensor) -> Tensor:
        """Inner products of each token's vector (B, D) with its own choice of rows (F, D), indices (B, K) -> (B, K)."""

    def row_products(self, gradient: MatrixGradient, rows_FD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inner products of each term's vector with its feature's row, (terms).

        And the squared norm of the gradient, a scalar, where it is had on the way.
        """

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product a @ b in float32."""

    def squares(self, gradient: MatrixGradient) -> Tensor:
        """The squared norm of a gradient, without its part along the matrix's rows, which have unit norm; a scalar."""

    def adam_rows(self, state: RowState, gradient: MatrixGradient, rates: Rates) -> Tensor | None:
        """One step of Adam on a matrix. Returns `squares` where they are had on the way.

        Where the gradient says what lies along the matrix's rows, that part is removed and the rows, which have unit
        norm before, have it again afterwards.
        """


class Weights(NamedTuple):
    """The four parameters of an autoencoder, or of a shard's features, and a copy of one."""

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F)
    W_dec: Tensor  # (F, D)
    b_dec: Tensor  # (D)
    W_enc_bf16: Tensor | None = None  # W_enc in bfloat16, where a product with it nominates the active features
    mesh: Mesh = ALONE  # whose other shards hold the other features


class AuxK(NamedTuple):
    """The auxiliary loss that revives dead features."""

    dead: Tensor  # (A) int64, ascending: the features that count as dead
    k: int  # dead features that a token may use, at most as many as there are
    coefficient: float  # weight of the loss
    of_shards: tuple[int, ...] = ()  # how many dead features each shard has, where there are several

    @property
    def total(self) -> int:
        """How many dead features there are on all shards."""
        return sum(self.of_shards) if self.of_shards else len(self.dead)


class Step(NamedTuple):
    """Loss and gradients of one batch; scalars are tensors, so that nothing waits for the device."""

    loss: Tensor  # normalized_mse + auxk coefficient * auxk, or the architecture's own
    normalized_mse: Tensor
    auxk: Tensor
    l0: Tensor  # mean number of features with an activation above 0
    values: Tensor  # (B, K) of this shard's features, as all that follows; 0 where none is active
    indices: Tensor  # (B, K)
    W_enc: MatrixGradient  # (F, D): feature by feature
    b_enc: Tensor  # gradient (F)
    W_dec: MatrixGradient  # (F, D)
    b_dec: Tensor  # gradient (D)
    threshold: Tensor | None = None  # gradient (F), where each feature has a threshold that is trained


class Used(NamedTuple):
    """The features that one of the two losses used, and what its gradients are made of."""

    features: Tensor  # (B, k)
    values: Tensor  # (B, k), their activations
    slopes: Tensor  # (B, k), times the inner product of error and decoder row: the gradient of a pre-activation
    error: Tensor  # (B, D), what they leave; (P B, D) where a feature is in some of P losses, its own part of them
    scale: Tensor  # (), times the error: the gradient of what they decode to
    part: Tensor | None = None  # (B, k) which of the P parts each feature's error is


class Dense(NamedTuple):
    """Gradients of some features that were used so much that they were made by products with all of them."""

    features: Tensor  # (A)
    W_enc: Tensor  # (A, D)
    b_enc: Tensor  # (A)
    W_dec: Tensor  # (A, D)
    along: Tensor  # (A) inner products of W_dec's rows with their gradients
