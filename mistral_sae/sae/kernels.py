"""The sparse forward and backward of the TopK step.

Only the encoder product is dense. Everything behind it touches K of F features a token: the decoder gathers rows,
both weight gradients sum over the tokens in which a feature fired, the gradient of an activation is one inner product.

Shapes: B tokens, D model width, F features, K active features, A dead features.
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16  # features a group in the two-level top-k
FEWEST_GROUPS = 3  # times k, from which on two levels are faster than one (measured)
# Dead features to one that a token uses, up to which AuxK takes dense products. On a CPU both ways take about as long
# there (measured); on a GPU gathered rows should take longer, going by their traffic
DENSE_AUXK = 4
# Bytes of pre-activations at a time. On a CPU a product in float32 wants many tokens, one in bfloat16 a result that
# stays in cache (measured); on a GPU launches should be few
CHUNK_BYTES = {
    ("cpu", torch.float32): 2**26,
    ("cpu", torch.bfloat16): 2**23,
    ("cuda", torch.float32): 2**28,
    ("cuda", torch.bfloat16): 2**28,
}
SMALLEST_VARIANCE = 1e-12  # floor of the loss's denominator: a batch of one token has no variance about its mean


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


def bf16_pays(device: torch.device) -> bool:
    """Whether an encoder product in bfloat16, and the exact values after it, take less time than one in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks)


def encode(centered: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token and their features, (B, K) and (B, K), unordered.

    The only dense product; it runs over some tokens at a time, so that the pre-activations of a batch never all exist.
    With `bf16` it only nominates: somewhat more than k candidates a token, of which float32 computes the values and
    chooses k. Rounding can swap features whose values lie close to the k-th; so few do that the k true ones are among
    the candidates, as a test checks, and the values are as exact as without it.
    """
    candidates, dtype = k, torch.float32
    if bf16:
        candidates, dtype = min(len(b_enc), k + max(8, k // 4)), torch.bfloat16
    inputs, weight, bias = centered.to(dtype), W_enc.to(dtype), b_enc.to(dtype)
    kind = "cpu" if inputs.device.type == "cpu" else "cuda"
    step = max(1, CHUNK_BYTES[kind, dtype] // (inputs.element_size() * len(b_enc)))
    pairs = [topk(F.linear(chunk, weight.T, bias), candidates) for chunk in inputs.split(step)]
    values, indices = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if bf16:
        exact = inner_products(centered, indices, W_enc.T) + b_enc[indices]
        values, chosen = torch.topk(exact, k, dim=-1, sorted=False)
        indices = indices.gather(1, chosen)
    return values, indices


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


@torch.no_grad()
def topk_step(z: Tensor, weights: Weights, k: int, aux: AuxK | None = None, bf16: bool = False) -> Step:
    """Loss of the TopK autoencoder with AuxK and its gradients in closed form (Gao et al. 2024, sections 2.3, A.2).

    ::

        loss = |z - z^|^2 / |z - mean(z)|^2  +  aux.coefficient * |e - e^|^2 / |e - mean(e)|^2
        e = z - z^ as a constant;  e^ = topk(pre of the dead features, aux.k) @ W_dec

    Sums run over the batch, means over its tokens. The second term is 0 where it is not finite.

    Args:
        z: standardised residuals (B, D).
        k: active features a token.
        aux: None for the first term alone.
        bf16: let a product in bfloat16 nominate the active features (see `encode`).
    """
    W_enc, b_enc, W_dec, b_dec = weights
    centered = z - b_dec
    values, indices = encode(centered, W_enc, b_enc, k, bf16)
    values = values.relu_()
    error = z - (decode(values, indices, W_dec) + b_dec)
    variance = (z - z.mean(dim=0)).square().sum().clamp_min(SMALLEST_VARIANCE)
    normalized_mse = error.square().sum() / variance
    grad_z_hat = error * (-2 / variance)
    used = [Used(indices, values, inner_products(grad_z_hat, indices, W_dec) * (values > 0), grad_z_hat)]
    loss, auxk = normalized_mse, z.new_zeros(())
    if aux is not None and len(aux.dead) and aux.k and aux.coefficient:
        auxk, of_dead = auxk_loss(error, centered, weights, aux)
        loss = normalized_mse + aux.coefficient * auxk
        used.append(of_dead)
    grad_W_enc, grad_b_enc, grad_W_dec = gradients(used, centered, len(W_dec))
    return Step(
        loss=loss,
        normalized_mse=normalized_mse,
        auxk=auxk,
        l0=(values > 0).sum() / len(z),
        values=values,
        indices=indices,
        W_enc=grad_W_enc,
        b_enc=grad_b_enc,
        W_dec=grad_W_dec,
        b_dec=grad_z_hat.sum(dim=0) - W_enc @ grad_b_enc,  # it also enters every pre-activation, by the centering
    )


class Used(NamedTuple):
    """The features that one of the two losses used, and its gradients."""

    features: Tensor  # (B, k)
    values: Tensor  # (B, k), their activations
    grad_values: Tensor  # (B, k), the gradient of their pre-activations
    grad_z_hat: Tensor  # (B, D), that of what they decode to
    among: Tensor | None = None  # (A) what `features` are indices into, where dense products with all A are faster


def auxk_loss(error: Tensor, centered: Tensor, weights: Weights, aux: AuxK) -> tuple[Tensor, Used]:
    """How much of the error (B, D) the dead features leave, and which of them each token used.

    A token uses many of them: where that is a good part of all, products with all are faster than gathered rows.
    """
    W_enc, b_enc, W_dec, _ = weights
    k, rows = min(aux.k, len(aux.dead)), W_dec[aux.dead]
    pre = F.linear(centered, W_enc.T[aux.dead], b_enc[aux.dead])
    is_dense = len(aux.dead) <= DENSE_AUXK * k
    values, indices = topk(pre, k)
    e_hat = _scattered(values, indices, len(rows)) @ rows if is_dense else decode(values, indices, rows)
    residual = error - e_hat
    variance = (error - error.mean(dim=0)).square().sum()
    loss = residual.square().sum() / variance
    finite = loss.isfinite()
    grad_e_hat = torch.where(finite, residual * (-2 * aux.coefficient / variance), 0.0)
    loss = torch.where(finite, loss, 0.0)
    if is_dense:
        return loss, Used(indices, values, (grad_e_hat @ rows.T).gather(1, indices), grad_e_hat, aux.dead)
    return loss, Used(aux.dead[indices], values, inner_products(grad_e_hat, indices, rows), grad_e_hat)


def gradients(used: list[Used], centered: Tensor, n_features: int) -> tuple[MatrixGradient, Tensor, MatrixGradient]:
    """Gradients of W_enc, b_enc (F) and W_dec, which sum over the same terms: one sort by feature serves all three."""
    n_tokens, device = len(centered), centered.device
    gathered = [u for u in used if u.among is None]
    features, order = torch.cat([u.features.flatten().to(torch.int32) for u in gathered]).sort(stable=True)
    offsets = torch.searchsorted(features, torch.arange(n_features, dtype=torch.int32, device=device))
    rows = torch.arange(n_tokens * len(gathered), device=device).split(n_tokens)  # of the tokens, loss by loss
    owners = torch.cat([r.repeat_interleave(u.features.shape[1]) for r, u in zip(rows, gathered, strict=True)])[order]
    tokens = owners % n_tokens
    values = torch.cat([u.values.flatten() for u in gathered])[order]
    grad_values = torch.cat([u.grad_values.flatten() for u in gathered])[order]
    grad_W_enc = MatrixGradient(offsets, centered, tokens, grad_values)
    grad_b_enc = MatrixGradient(offsets, centered.new_ones(n_tokens, 1), tokens, grad_values).whole().squeeze(1)
    grad_W_dec = MatrixGradient(offsets, torch.cat([u.grad_z_hat for u in gathered]), owners, values)
    for u in used:
        if u.among is not None:
            of_W_enc, of_b_enc, of_W_dec = _dense_gradients(u, centered, len(u.among))
            grad_W_enc = grad_W_enc._replace(added=(u.among, of_W_enc))
            grad_W_dec = grad_W_dec._replace(added=(u.among, of_W_dec))
            grad_b_enc.index_add_(0, u.among, of_b_enc)
    return grad_W_enc, grad_b_enc, grad_W_dec


def _dense_gradients(used: Used, centered: Tensor, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows of W_enc, of b_enc and of the rows of W_dec of some features: (A, D), (A) and (A, D)."""
    grad_pre = _scattered(used.grad_values, used.features, n_features)
    of_W_enc, of_b_enc = grad_pre.T @ centered, grad_pre.sum(dim=0)
    del grad_pre
    return of_W_enc, of_b_enc, _scattered(used.values, used.features, n_features).T @ used.grad_z_hat


def _scattered(values: Tensor, indices: Tensor, n_features: int) -> Tensor:
    """Values (B, k) in their places among all features, (B, A)."""
    return values.new_zeros(len(values), n_features).scatter_(1, indices, values)
