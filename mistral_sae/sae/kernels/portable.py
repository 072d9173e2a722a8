"""Operations on chosen rows in nothing but torch, for every device.

Shapes: B tokens, D model width, F features, K active features.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16  # features a group in the two-level top-k
FEWEST_GROUPS = 3  # times k, from which on two levels are faster than one (measured)


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact k largest of the last dimension, (..., F) -> values and int64 indices (..., k), unordered.

    On a CPU in two levels: the k largest values of a row lie in the k groups with the largest maxima, so that the
    selection runs over F / GROUP maxima and then k * GROUP candidates instead of F values. A group is every
    (F / GROUP)-th feature: maxima across long runs are many times as fast as within short ones, in bfloat16 above all.
    """
    n_features = pre.shape[-1]
    if pre.device.type != "cpu" or n_features % GROUP or n_features < FEWEST_GROUPS * k * GROUP:
        return torch.topk(pre, k, dim=-1, sorted=False)
    n_groups = n_features // GROUP
    best = pre.unflatten(-1, (GROUP, n_groups)).amax(dim=-2).topk(k, dim=-1, sorted=False).indices
    members = (best.unsqueeze(-2) + torch.arange(0, n_features, n_groups).unsqueeze(-1)).flatten(-2)
    values, where = torch.topk(pre.gather(-1, members), k, dim=-1, sorted=False)
    return values, members.gather(-1, where)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Weighted sums of decoder rows, values and indices (B, K), W_dec (F, D) -> (B, D). No bias; differentiable."""
    return F.embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")


def inner_products(x_BD: Tensor, indices: Tensor, rows_FD: Tensor) -> Tensor:
    """Inner products of each token's vector (B, D) with its own choice of rows (F, D), indices (B, K) -> (B, K)."""
    n_tokens, k = indices.shape
    if x_BD.device.type == "cpu":
        starts = torch.arange(0, n_tokens * k + 1, k)
        order = indices.argsort(dim=1)  # a CSR row wants ascending columns
        columns, zeros = indices.gather(1, order).flatten(), x_BD.new_zeros(n_tokens * k)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(starts, columns, zeros, (n_tokens, len(rows_FD)), check_invariants=False)
        products = torch.sparse.sampled_addmm(pattern, x_BD, rows_FD.T, beta=0.0).values().view(n_tokens, k)
        return torch.empty_like(products).scatter_(1, order, products)
    out = x_BD.new_empty(n_tokens, k)
    step = max(1, 2**26 // (k * rows_FD.shape[1]))  # tokens at a time: the gathered rows are K times the batch
    for start in range(0, n_tokens, step):
        part = slice(start, start + step)
        torch.bmm(rows_FD[indices[part]], x_BD[part].unsqueeze(-1), out=out[part].unsqueeze(-1))
    return out
