"""Operations on chosen rows in nothing but torch, for every device.

It also is what the kernels in `fused` are tested against.

Shapes: B tokens, D model width, F features, K active features.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from mistral_sae.sae.kernels.types import BETAS, EPSILON, MatrixGradient, Rates, RowState

GROUP = 8  # features a group in the top-k of several levels
FEWEST_GROUPS = 3  # times k, from which on one more level is faster (measured)
PAIRS = 2**14  # of gathered rows at a time
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # of a parameter in float32, a block: in cache, and few enough calls


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact k largest of the last dimension, (..., F) -> values and int64 indices (..., k), unordered.

    In levels where that is faster: the k largest values of a row lie in the k groups with the largest maxima, so that
    the selection runs over F / GROUP maxima, themselves in groups, and then k * GROUP candidates instead of F values.
    A group is every (F / GROUP)-th feature: on a CPU maxima across long runs are many times as fast as within short
    ones, in bfloat16 above all.
    """
    n_features = pre.shape[-1]
    if n_features % GROUP or n_features < FEWEST_GROUPS * max(1, k) * GROUP:
        return torch.topk(pre, k, dim=-1, sorted=False)
    n_groups = n_features // GROUP
    best = topk(pre.unflatten(-1, (GROUP, n_groups)).amax(dim=-2), k)[1]
    members = (best.unsqueeze(-2) + torch.arange(0, n_features, n_groups, device=pre.device).unsqueeze(-1)).flatten(-2)
    values, where = torch.topk(pre.gather(-1, members), k, dim=-1, sorted=False)
    return values, members.gather(-1, where)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Weighted sums of decoder rows, values and indices (B, K), W_dec (F, D) -> (B, D). No bias; differentiable."""
    return F.embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")


def inner_products(x_BD: Tensor, indices: Tensor, rows_FD: Tensor) -> Tensor:
    """Inner products of each token's vector (B, D) with its own choice of rows (F, D), indices (B, K) -> (B, K)."""
    n_tokens, k = indices.shape
    if x_BD.device.type == "cpu":
        order = indices.argsort(dim=1)
        starts = torch.arange(0, n_tokens * k + 1, k)
        products = _sampled(x_BD, rows_FD, starts, indices.gather(1, order).flatten()).view(n_tokens, k)
        return torch.empty_like(products).scatter_(1, order, products)
    tokens = torch.arange(n_tokens, device=x_BD.device).repeat_interleave(k)
    return _paired(x_BD, rows_FD, tokens, indices.flatten()).view(n_tokens, k)


def row_products(gradient: MatrixGradient, rows_FD: Tensor) -> tuple[Tensor, None]:
    """Inner products of each term's vector with its feature's row, (terms)."""
    if rows_FD.device.type == "cpu":
        return _sampled(rows_FD, gradient.vectors, gradient.offsets, gradient.owners), None
    terms = torch.arange(len(gradient.owners), device=rows_FD.device)
    features = torch.searchsorted(gradient.offsets, terms, right=True) - 1
    return _paired(rows_FD, gradient.vectors, features, gradient.owners), None


def _sampled(a: Tensor, b: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """Inner products of each row of a with some rows of b, ascending, laid out as in a CSR matrix; on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        shape, zeros = (len(a), len(b)), a.new_zeros(len(columns))
        pattern = torch.sparse_csr_tensor(offsets, columns, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()


def _paired(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products of rows of a with rows of b, in pairs (N); some at a time, since the rows of both are gathered."""
    pairs = zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    return torch.cat([torch.linalg.vecdot(a.index_select(0, r), b.index_select(0, c)) for r, c in pairs])


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a @ b in float32."""
    return a @ b


# ---- the optimizer's two passes over a matrix ----


def squares(gradient: MatrixGradient) -> Tensor:
    """The squared norm of a gradient, without its part along the matrix's rows (of unit norm), a scalar."""
    return _sum_of_squares([squared_norm(block) for _, block in blocks(gradient)], gradient)


def most_squares(gradient: MatrixGradient) -> Tensor:
    """What a gradient's squared norm cannot exceed, a scalar: that of a gradient whose terms all point the same way.

    It takes the terms' lengths alone, and no gradient of a row needs to be made.
    """
    lengths = torch.linalg.vector_norm(gradient.vectors, dim=1)
    longest = run_sums(gradient.weights.abs() * lengths[gradient.owners], gradient.offsets)
    if gradient.added is not None:
        longest.index_add_(0, gradient.added[0], torch.linalg.vector_norm(gradient.added[1], dim=1))
    return longest.square().sum()


@torch.no_grad()
def adam_rows(state: RowState, gradient: MatrixGradient, rates: Rates) -> Tensor:
    """One step of Adam on a matrix; rows that `along` belongs to have unit norm before and after. Returns `squares`."""
    found = []
    for rows, block in blocks(gradient):
        found.append(squared_norm(block))
        parameter = state.parameter[rows]
        if gradient.along is not None:
            block.addcmul_(gradient.along[rows].unsqueeze(1), parameter, value=-1)
        adam_(RowState(parameter, state.first[rows], state.second[rows]), block, rates)
        if gradient.along is not None:
            normalize_rows(parameter)
        if state.copy is not None:
            state.copy[rows] = parameter
    return _sum_of_squares(found, gradient)


def _sum_of_squares(of_blocks: list[Tensor], gradient: MatrixGradient) -> Tensor:
    removed = [] if gradient.along is None else [-gradient.along.square().sum()]
    return torch.stack(of_blocks + removed).sum()


def blocks(gradient: MatrixGradient) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of features and their gradients.

    On a CPU each is made by itself and stays in cache, which is cheaper than writing all of it to memory and reading it
    back; on a GPU that would wait for where the terms of a block begin.
    """
    n_features, on_cpu = len(gradient.offsets) - 1, gradient.vectors.device.type == "cpu"
    size = max(1, BLOCK_BYTES["cpu" if on_cpu else "cuda"] // (4 * gradient.vectors.shape[1]))
    whole = None if on_cpu else gradient.whole()
    for start in range(0, n_features, size):
        rows = slice(start, min(start + size, n_features))
        yield rows, _block(gradient, rows) if whole is None else whole[rows]


def _block(gradient: MatrixGradient, rows: slice) -> Tensor:
    """The gradient of some rows."""
    offsets = gradient.offsets[rows.start : rows.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    added = gradient.added
    if added is not None:
        low, high = torch.searchsorted(added[0], torch.tensor([rows.start, rows.stop])).tolist()
        added = added[0][low:high] - rows.start, added[1][low:high]
    owners, weights = gradient.owners[first:last], gradient.weights[first:last]
    return MatrixGradient(offsets - first, gradient.vectors, owners, weights, added).whole()


def run_sums(terms: Tensor, offsets: Tensor) -> Tensor:
    """Sums of runs of terms, (F)."""
    places = torch.arange(len(terms), device=terms.device)
    return F.embedding_bag(places, terms.unsqueeze(1), offsets, mode="sum", include_last_offset=True).squeeze(1)


def squared_norm(x: Tensor) -> Tensor:
    """The squared norm of all of x (B, D), a scalar."""
    return torch.linalg.vector_norm(x, dim=1).square().sum()  # row by row: one running sum would lose digits


def adam_(state: RowState, gradient: Tensor, rates: Rates) -> None:
    """One step of Adam on any parameter."""
    parameter, first, second, _ = state
    first32, second32 = first.float(), second.float()  # the same tensors where the moments are float32
    found_inf = None if rates.divisor is None else torch.zeros_like(rates.divisor)
    adam(
        [parameter], [gradient], [first32], [second32], [], [rates.steps.clone()],
        fused=True, grad_scale=rates.divisor, found_inf=found_inf, amsgrad=False, maximize=False,
        beta1=BETAS[0], beta2=BETAS[1], lr=rates.learning_rate, weight_decay=0.0, eps=EPSILON,
    )  # fmt: skip
    if first32 is not first:
        first.copy_(round_stochastically(first32))
        second.copy_(round_stochastically(second32))


def round_stochastically(x: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes it right on average."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def normalize_rows(W_dec: Tensor) -> None:
    """Scale each row of W_dec (F, D), or of a block of its rows, to unit norm, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12))
