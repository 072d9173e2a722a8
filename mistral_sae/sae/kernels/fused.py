"""Triton's kernels for a GPU of CUDA, from Ampere on: the signatures of `kernels.Operations`.

Each sums in an order that its arguments fix and uses no atomics, so that a step is the same every time. Decoding and
top-k stay with torch: its kernels move no more bytes (`python -m benchmarks.traffic`).

Shapes: B tokens, D model width, F features, K chosen features, N vectors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_sae.sae.kernels.types import BETAS, EPSILON, MatrixGradient, Rates, RowState

ROWS, WIDTH = 64, 128  # of the tile of chosen rows whose inner products are taken at a time
TERMS = 4  # of a feature's gradient, loaded at a time
COLUMNS = 1024  # of the gradient whose squares are summed, at a time: that much of 4,096 vectors fits an L2 cache
ROUNDS = tl.constexpr(7)  # of Philox4x32, the fewest whose numbers pass all of BigCrush (Salmon et al. 2011)
BETA1, BETA2, EPS = (tl.constexpr(value) for value in (*BETAS, EPSILON))
# Multiplications and additions contract, as in torch's own kernels; said so that Triton does not warn of its default
OPTIONS = {"enable_fp_fusion": True}


# ---- inner products with chosen rows ----


@triton.jit
def inner_products_kernel(x, indices, rows, out, K, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program has a token and ROWS of its chosen rows."""
    token = tl.program_id(0).to(tl.int64)
    chosen = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = chosen < K
    starts = tl.load(indices + token * K + chosen, mask=exists, other=0) * D
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, D, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = columns < D
        tile = tl.load(rows + starts[:, None] + columns[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        sums += tile * tl.load(x + token * D + columns, mask=inside, other=0.0)[None, :]
    tl.store(out + token * K + chosen, tl.sum(sums, axis=1), mask=exists)


@torch.library.custom_op("mistral_sae::inner_products", mutates_args=())
def inner_products(x_BD: Tensor, indices: Tensor, rows_FD: Tensor) -> Tensor:
    """Inner products of each token's vector (B, D) with its own choice of rows (F, D), indices (B, K) -> (B, K)."""
    n_tokens, k = indices.shape
    x_BD, indices, rows_FD = x_BD.contiguous(), indices.contiguous(), rows_FD.contiguous()  # as they are in training
    out = x_BD.new_empty(n_tokens, k)
    at_once = min(ROWS, triton.next_power_of_2(k))
    with torch.cuda.device_of(x_BD):
        inner_products_kernel[(n_tokens, triton.cdiv(k, at_once))](
            x_BD, indices, rows_FD, out, k, x_BD.shape[1], at_once, WIDTH, num_warps=4, **OPTIONS
        )
    return out


@inner_products.register_fake
def _(x_BD: Tensor, indices: Tensor, rows_FD: Tensor) -> Tensor:
    return x_BD.new_empty(indices.shape)


# ---- matrix products ----


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a @ b of float32 matrices, as three products of bfloat16 on the tensor cores.

    A number is the sum of two in bfloat16, up to 2^-17 of it; of the four products of such sums, that of the two small
    ones is left out. Three take as long as a fifth of one in float32 on an H100, by its data sheet.
    """
    return _multiply(_halves(a, 1, small=2), _halves(b, 0, small=1))


def _halves(x: Tensor, dim: int, small: int) -> Tensor:
    """x in bfloat16 three times over along a dimension, the `small`-th time what is left of it."""
    if not x.is_contiguous():
        return _halves(x.T, 1 - dim, small).T
    out = x.new_empty([3 * n if i == dim else n for i, n in enumerate(x.shape)], dtype=torch.bfloat16)
    parts = list(out.chunk(3, dim=dim))
    left = parts.pop(small)
    for part in parts:
        part.copy_(x)
    torch.sub(x, parts[0], out=left)
    return out


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 matrices, multiplied and summed in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


# ---- the optimizer's two passes over a matrix ----


@triton.jit
def gradient_of(gradient, feature, columns, rows, products, D, TERMS: tl.constexpr):
    """A feature's row of a gradient, at some columns.

    With `rows`, writes each term's inner product at these columns with the feature's row.
    """
    offsets, vectors, owners, weights, place, added = gradient
    inside = columns < D
    if rows is not None:
        own = tl.load(rows + feature * D + columns, mask=inside, other=0.0)
    row = tl.zeros(columns.shape, tl.float32)
    if place is not None:
        at = tl.load(place + feature).to(tl.int64)
        if at >= 0:
            row += tl.load(added + at * D + columns, mask=inside, other=0.0)
    stop = tl.load(offsets + feature + 1)
    for start in range(tl.load(offsets + feature), stop, TERMS):
        term = start + tl.arange(0, TERMS)
        exists = term < stop
        weight = tl.load(weights + term, mask=exists, other=0.0)
        begin = tl.load(owners + term, mask=exists, other=0) * D
        tile = tl.load(vectors + begin[:, None] + columns[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        row += tl.sum(weight[:, None] * tile, axis=0)
        if rows is not None:
            tl.store(products + term * tl.num_programs(1), tl.sum(own[None, :] * tile, axis=1), mask=exists)
    return row


@triton.jit
def squares_kernel(gradient, rows, products, out, D, COLUMNS: tl.constexpr, TERMS: tl.constexpr):
    """A program has some columns of a feature's row; those of all features come before the next columns."""
    feature, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if products is not None:
        products += part
    row = gradient_of(gradient, feature, part * COLUMNS + tl.arange(0, COLUMNS), rows, products, D, TERMS)
    tl.store(out + feature * tl.num_programs(1) + part, tl.sum(row * row))


@triton.jit
def adam_rows_kernel(state, gradient, along, rates, learning_rate, D, COLUMNS: tl.constexpr, TERMS: tl.constexpr):
    """A program has a feature's row: its gradient, projected and clipped, Adam, the row's norm, the rounded copies."""
    parameter, first, second, copy = state
    feature, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside, at = columns < D, feature * D + columns
    p = tl.load(parameter + at, mask=inside, other=0.0)
    g = gradient_of(gradient, feature, columns, None, None, D, TERMS)
    if along is not None:
        g -= tl.load(along + feature) * p
    g /= tl.load(rates)
    m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    p -= learning_rate / tl.load(rates + 1) * m / (tl.sqrt(v) / tl.load(rates + 2) + EPS)
    if along is not None:
        norm = tl.sqrt(tl.sum(p * p))
        p /= tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    tl.store(parameter + at, p, mask=inside)
    if copy is not None:
        tl.store(copy + at, p.to(tl.bfloat16), mask=inside)
    if first.dtype.element_ty == tl.bfloat16:
        # The generator gives 128 bits a call, for both moments of four parameters; its counter says which four, its key
        # which step and which matrix
        key = tl.load(rates + 3).to(tl.int32) * 2 + (along is not None)
        a, b, c, d = tl.randint4x(key, feature * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4), ROUNDS)
        noise = tl.join(tl.join(a, c), tl.join(b, d)).reshape(COLUMNS).to(tl.int32, bitcast=True)
        m = rounded(m, noise & 0xFFFF)
        v = rounded(v, (noise >> 16) & 0xFFFF)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)


@triton.jit
def rounded(x, noise):
    """float32 -> bfloat16, up or down with the probability that makes it right on average; noise from 0 to 2^16 - 1."""
    bits = (x.to(tl.int32, bitcast=True) + noise) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


def row_products(gradient: MatrixGradient, rows_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of each term's vector with its feature's row, (terms), and the squared norm of the gradient."""
    products, row_squares = _row_squares(_tensors(gradient), rows_FD)
    return products.sum(dim=1), row_squares.sum()


def squares(gradient: MatrixGradient) -> Tensor:
    """The squared norm of a gradient, without its part along the matrix's rows (of unit norm), a scalar."""
    known = gradient.squares
    total = _row_squares(_tensors(gradient), None)[1].sum() if known is None else known
    return total if gradient.along is None else total - gradient.along.square().sum()


def adam_rows(state: RowState, gradient: MatrixGradient, rates: Rates) -> None:
    """One step of Adam on a matrix; rows that `along` belongs to have unit norm before and after."""
    step = (rates.steps + 1).double()
    corrections = [1 - BETAS[0] ** step, (1 - BETAS[1] ** step).sqrt()]
    divisor = torch.ones_like(step) if rates.divisor is None else rates.divisor
    on_device = torch.stack([divisor, *corrections, step]).float()
    state_tensors = [tensor for tensor in state if tensor is not None]
    _adam_rows(state_tensors, _tensors(gradient), gradient.along, on_device, rates.learning_rate)


def _tensors(gradient: MatrixGradient) -> list[Tensor]:
    """What `gradient_of` takes: where rows come on top, with the place among them of every feature, or -1."""
    tensors = [gradient.offsets, gradient.vectors, gradient.owners, gradient.weights]
    if gradient.added is None:
        return tensors
    features, rows = gradient.added
    place = torch.full((len(gradient.offsets) - 1,), -1, dtype=torch.int32, device=rows.device)
    place.scatter_(0, features, torch.arange(len(features), dtype=torch.int32, device=rows.device))
    return [*tensors, place, rows]


def _arguments(tensors: list[Tensor], count: int) -> tuple[Tensor | None, ...]:
    return (*tensors, *[None] * (count - len(tensors)))


@torch.library.custom_op("mistral_sae::row_squares", mutates_args=())
def _row_squares(gradient: list[Tensor], rows_FD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each term's inner products with its row, where rows are given, (terms, parts), and squares (F, parts)."""
    products, out = _empty_parts(gradient, rows_FD)
    d_model = gradient[1].shape[1]
    with torch.cuda.device_of(out):
        squares_kernel[out.shape](
            _arguments(gradient, 6), rows_FD, None if rows_FD is None else products, out, d_model,
            _columns(d_model), TERMS, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return products, out


@_row_squares.register_fake
def _empty_parts(gradient: list[Tensor], rows_FD: Tensor | None) -> tuple[Tensor, Tensor]:
    offsets, vectors, owners = gradient[:3]
    parts = triton.cdiv(vectors.shape[1], _columns(vectors.shape[1]))
    n_terms = 0 if rows_FD is None else len(owners)
    return vectors.new_empty(n_terms, parts), vectors.new_empty(len(offsets) - 1, parts)


def _columns(d_model: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(d_model))


@torch.library.custom_op("mistral_sae::adam_rows", mutates_args=("state",))
def _adam_rows(
    state: list[Tensor], gradient: list[Tensor], along: Tensor | None, rates: Tensor, learning_rate: float
) -> None:
    assert all(tensor.is_contiguous() for tensor in state)
    n_features, d_model = state[0].shape
    columns, terms, warps = row_shape(d_model)
    with torch.cuda.device_of(rates):
        adam_rows_kernel[(n_features,)](
            _arguments(state, 4), _arguments(gradient, 6), along, rates, learning_rate, d_model, columns, terms,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip


def row_shape(d_model: int) -> tuple[int, int, int]:
    """Columns, terms at a time and warps of a program that holds a row: registers suffice up to D = 8,192."""
    columns = max(4, triton.next_power_of_2(d_model))
    return columns, TERMS if columns <= 4096 else TERMS // 2, min(32, max(4, columns // 512))


@_adam_rows.register_fake
def _(state: list[Tensor], gradient: list[Tensor], along: Tensor | None, rates: Tensor, learning_rate: float) -> None:
    return None
