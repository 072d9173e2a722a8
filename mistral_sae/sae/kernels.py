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


def encode(
    centered: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    dead: Tensor | None = None,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k largest pre-activations of each token, and those of the dead features: (B, K), (B, K), (B, A) or None.

    The only dense product. It runs over some tokens at a time, so that only dead features' pre-activations ever exist
    for all of a batch. With `bf16` it only nominates: somewhat more than k candidates a token, of which float32
    computes the values and chooses k. Rounding can swap features whose values lie close to the k-th; so few do that
    the k true ones are among the candidates, as a test checks, and the values are as exact as without it.
    """
    if bf16:
        candidates = min(len(b_enc), k + max(8, k // 4))
        nominate = centered.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16()
    else:
        candidates, nominate = k, (centered, W_enc, b_enc)
    inputs, weight, bias = nominate
    step = max(1, CHUNK_BYTES[inputs.device.type, inputs.dtype] // (inputs.element_size() * len(b_enc)))
    parts = []
    for chunk in inputs.split(step):
        pre = F.linear(chunk, weight.T, bias)
        parts.append((*topk(pre, candidates), pre[:, dead] if dead is not None and not bf16 else None))
    values, indices, of_dead = (None if xs[0] is None else _joined(xs) for xs in zip(*parts, strict=True))
    if bf16:
        exact = inner_products(centered, indices, W_enc.T) + b_enc[indices]
        values, chosen = torch.topk(exact, k, dim=-1, sorted=False)
        indices = indices.gather(1, chosen)
        if dead is not None:
            of_dead = F.linear(centered, W_enc.T[dead], b_enc[dead])
    return values, indices, of_dead


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
        return self.rows(0, len(self.offsets))

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows of features start to stop, (stop - start, D). Waits for a GPU unless they are all."""
        offsets, owners, weights = self.offsets[start:stop], self.owners, self.weights
        if (start, stop) != (0, len(self.offsets)):
            first = int(offsets[0])
            last = int(self.offsets[stop]) if stop < len(self.offsets) else len(owners)
            offsets, owners, weights = offsets - first, owners[first:last], weights[first:last]
        rows = F.embedding_bag(owners, self.vectors, offsets, mode="sum", per_sample_weights=weights)
        if self.added is None:
            return rows
        features, more = self.added
        if (start, stop) != (0, len(self.offsets)):
            first, last = torch.searchsorted(features, torch.tensor([start, stop], device=features.device)).tolist()
            features, more = features[first:last] - start, more[first:last]
        return rows.index_add_(0, features, more)


class Step(NamedTuple):
    """Loss and gradients of one batch; scalars are tensors, so that nothing waits for the device."""

    loss: Tensor  # normalized_mse + auxk_coefficient * auxk
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
def topk_step(
    z: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    dead: Tensor | None = None,
    k_aux: int = 0,
    auxk_coefficient: float = 0.0,
    bf16: bool = False,
) -> Step:
    """Loss of the TopK autoencoder with AuxK and its gradients in closed form (Gao et al. 2024, sections 2.3, A.2).

    ::

        loss = |z - z^|^2 / |z - mean(z)|^2  +  auxk_coefficient * |e - e^|^2 / |e - mean(e)|^2
        e = z - z^ as a constant;  e^ = topk(pre of the dead features, k_aux) @ W_dec

    Sums run over the batch, means over its tokens. The second term is 0 where it is not finite.

    Args:
        z: standardised residuals (B, D).
        W_enc, b_enc, W_dec, b_dec: the autoencoder, (D, F), (F), (F, D), (D).
        k: active features a token.
        dead: int64 indices (A), ascending, of the features that count as dead; None or empty for none.
        k_aux: how many dead features a token may use, at most A are.
        auxk_coefficient: weight of the second term.
        bf16: let a product in bfloat16 nominate the active features (see `encode`).
    """
    n_features = W_dec.shape[0]
    centered = z - b_dec
    if dead is not None and (len(dead) == 0 or k_aux == 0 or not auxk_coefficient):
        dead = None
    values, indices, pre_of_dead = encode(centered, W_enc, b_enc, k, dead, bf16)
    values = values.relu_()
    z_hat = decode(values, indices, W_dec) + b_dec
    error = z - z_hat

    variance = (z - z.mean(dim=0)).square().sum().clamp_min(SMALLEST_VARIANCE)
    normalized_mse = error.square().sum() / variance
    grad_z_hat = error * (-2 / variance)
    terms = [_Terms(indices, values, inner_products(grad_z_hat, indices, W_dec) * (values > 0), grad_z_hat)]
    auxk, of_auxk, is_dense = z.new_zeros(()), None, False
    if dead is not None:
        k_aux = min(k_aux, len(dead))
        is_dense = len(dead) <= DENSE_AUXK * k_aux
        auxk, of_auxk = _auxk(error, pre_of_dead, W_dec[dead], k_aux, auxk_coefficient, is_dense)
        if not is_dense:
            terms.append(of_auxk._replace(features=dead[of_auxk.features]))
    grad_W_enc, grad_b_enc, grad_W_dec = _parameter_gradients(terms, centered, n_features)
    if is_dense:
        of_W_enc, of_b_enc, of_W_dec = _dense_gradients(of_auxk, centered, len(dead))
        grad_b_enc.index_add_(0, dead, of_b_enc)
        grad_W_enc, grad_W_dec = (
            gradient._replace(added=(dead, rows)) for gradient, rows in ((grad_W_enc, of_W_enc), (grad_W_dec, of_W_dec))
        )
    # b_dec also enters every pre-activation, through the centering
    grad_b_dec = grad_z_hat.sum(dim=0) - W_enc @ grad_b_enc
    return Step(
        loss=normalized_mse + auxk_coefficient * auxk,
        normalized_mse=normalized_mse,
        auxk=auxk,
        l0=(values > 0).sum() / len(z),
        values=values,
        indices=indices,
        W_enc=grad_W_enc,
        b_enc=grad_b_enc,
        W_dec=grad_W_dec,
        b_dec=grad_b_dec,
    )


class _Terms(NamedTuple):
    """What one of the two losses says about the features it used."""

    features: Tensor  # (B, k)
    values: Tensor  # (B, k), their activations
    grad_values: Tensor  # (B, k), the gradient of their pre-activations
    grad_z_hat: Tensor  # (B, D), that of what they decode to


def _auxk(
    error: Tensor, pre: Tensor, rows: Tensor, k_aux: int, coefficient: float, is_dense: bool
) -> tuple[Tensor, _Terms]:
    """The auxiliary loss; `pre` (B, A) and `rows` (A, D) are the dead features' pre-activations and decoder rows.

    A token uses many of them: where that is a good part of all, products with all are faster than gathered rows.
    """
    values, indices = topk(pre, k_aux)
    e_hat = _scattered(values, indices, pre.shape[1]) @ rows if is_dense else decode(values, indices, rows)
    residual = error - e_hat
    variance = (error - error.mean(dim=0)).square().sum()
    loss = residual.square().sum() / variance
    finite = loss.isfinite()
    grad_e_hat = torch.where(finite, residual * (-2 * coefficient / variance), 0.0)
    grad_values = (grad_e_hat @ rows.T).gather(1, indices) if is_dense else inner_products(grad_e_hat, indices, rows)
    return torch.where(finite, loss, 0.0), _Terms(indices, values, grad_values, grad_e_hat)


def _scattered(values: Tensor, indices: Tensor, n_features: int) -> Tensor:
    """Values (B, k) in their places among all features, (B, A)."""
    return values.new_zeros(len(values), n_features).scatter_(1, indices, values)


def _dense_gradients(terms: _Terms, centered: Tensor, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows of W_enc, of b_enc and of the rows of W_dec of some features: (A, D), (A) and (A, D)."""
    grad_pre = _scattered(terms.grad_values, terms.features, n_features)
    of_W_enc, of_b_enc = grad_pre.T @ centered, grad_pre.sum(dim=0)
    del grad_pre
    return of_W_enc, of_b_enc, _scattered(terms.values, terms.features, n_features).T @ terms.grad_z_hat


def _parameter_gradients(
    terms: list[_Terms], centered: Tensor, n_features: int
) -> tuple[MatrixGradient, Tensor, MatrixGradient]:
    """Gradients of W_enc, b_enc and W_dec, which sum over the same terms: one sort by feature serves all three."""
    n_tokens, device = len(centered), centered.device
    features, order = _joined([t.features.flatten().to(torch.int32) for t in terms]).sort(stable=True)
    offsets = torch.searchsorted(features, torch.arange(n_features, dtype=torch.int32, device=device))
    token = torch.arange(n_tokens, device=device)
    tokens = _joined([token.repeat_interleave(t.features.shape[1]) for t in terms])[order]
    owners = _joined([(token + n_tokens * i).repeat_interleave(t.features.shape[1]) for i, t in enumerate(terms)])
    values = _joined([t.values.flatten() for t in terms])[order]
    grad_values = _joined([t.grad_values.flatten() for t in terms])[order]
    grad_z_hat = _joined([t.grad_z_hat for t in terms])
    of_bias = MatrixGradient(offsets, centered.new_ones(n_tokens, 1), tokens, grad_values)
    return (
        MatrixGradient(offsets, centered, tokens, grad_values),
        of_bias.whole().squeeze(1),
        MatrixGradient(offsets, grad_z_hat, owners[order], values),
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
