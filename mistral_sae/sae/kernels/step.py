"""The sparse forward and backward of a TopK step, and of those like it.

Only the encoder product is dense. Everything behind it touches K of F features a token: the decoder gathers rows,
both weight gradients sum over the tokens in which a feature fired, the gradient of an activation is one inner product.

Each of several shards has all tokens of the batch and a part of the features. What travels between them: for each token
the K largest values of each shard, of which all then know the K largest; the sum of what each decodes to; sums of a few
numbers. Replicas share the encoder product and these sums; all else, of which the gradients of a shard's features are
the most, each of them computes from the whole batch, so that no gradient of a matrix ever travels.

Shapes: B tokens, D model width, F features (of a shard, where there are several), K active features, A dead features.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.distributed import Group
from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.kernels.portable import decode, run_sums, squared_norm, topk
from mistral_sae.sae.kernels.types import AuxK, Dense, MatrixGradient, Step, Used, Weights

# Dead features to one that a token uses, up to which AuxK takes dense products. On a CPU both ways take as long at
# about 10 (measured); on a GPU gathered rows should take longer, going by their traffic
DENSE_AUXK = 8
# Bytes of pre-activations at a time: on a CPU as many as make a product fast (measured), on a GPU few launches
CHUNK_BYTES = {
    ("cpu", torch.float32): 3 * 2**23,
    ("cpu", torch.bfloat16): 2**23,
    ("cuda", torch.float32): 2**28,
    ("cuda", torch.bfloat16): 2**30,
}
FEWEST_TOKENS = {torch.float32: 256, torch.bfloat16: 384}  # at a time: a product with fewer takes longer (measured)
SMALLEST_VARIANCE = 1e-12  # floor of the loss's denominator: a batch of one token has no variance about its mean


def bf16_pays(device: torch.device) -> bool:
    """Whether an encoder product in bfloat16, and the exact values after it, take less time than one in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # PyTorch may have been told to use less than there is
        return False
    checks = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks)


def chunk_bytes(kind: str, dtype: torch.dtype, n_features: int) -> int:
    """Bytes of pre-activations at a time, on a device of kind "cpu" or "cuda"."""
    return max(CHUNK_BYTES[kind, dtype], FEWEST_TOKENS[dtype] * dtype.itemsize * n_features)


def tokens_at_once(device: torch.device, dtype: torch.dtype, n_features: int) -> int:
    """Tokens whose pre-activations are made at a time on a device."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return max(1, chunk_bytes(kind, dtype, n_features) // (dtype.itemsize * n_features))


def encode(
    centered: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, W_enc_bf16: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token and their features, (B, K) and (B, K), unordered.

    The only dense product; it runs over some tokens at a time, so that the pre-activations of a batch need not all
    exist. With W_enc in bfloat16 it only nominates: somewhat more than k candidates a token, of which float32 computes
    the values and chooses k. Rounding can swap features whose values lie close to the k-th; so few do that the k true
    ones are among the candidates, as a test checks, and the values are as exact as without it.
    """
    if W_enc_bf16 is None:
        return nominate(centered, W_enc, b_enc, k)
    _, indices = nominate(centered, W_enc_bf16, b_enc, min(len(b_enc), k + margin(k)))
    values, chosen = torch.topk(exact(centered, W_enc, b_enc, indices), k, dim=-1, sorted=False)
    return values, indices.gather(1, chosen)


def margin(k: int) -> int:
    """How many more features than k a product in bfloat16 nominates."""
    return max(8, k // 4)


def nominate(centered: Tensor, weight: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token by a product in the weight's dtype, and their features."""
    inputs, bias = centered.to(weight.dtype), b_enc.to(weight.dtype)
    chunks = inputs.split(tokens_at_once(inputs.device, weight.dtype, len(b_enc)))
    if inputs.device.type == "cpu" and not torch.is_grad_enabled():
        # Into the same memory each time: fresh pages of it take up to a quarter of the product's time (measured)
        pre = inputs.new_empty(len(chunks[0]), len(b_enc))
        pairs = [topk(torch.addmm(bias, chunk, weight, out=pre[: len(chunk)]), k) for chunk in chunks]
    else:
        pairs = [topk(torch.addmm(bias, chunk, weight), k) for chunk in chunks]
    values, indices = (torch.cat(parts) for parts in zip(*pairs, strict=True)) if len(pairs) > 1 else pairs[0]
    return values, indices


def exact(centered: Tensor, W_enc: Tensor, b_enc: Tensor, indices: Tensor) -> Tensor:
    """Pre-activations of some features of each token in float32, (B, n)."""
    return operations(centered.device).inner_products(centered, indices, W_enc.T) + b_enc.take(indices)


@torch.no_grad()
def topk_step(z: Tensor, weights: Weights, k: int, aux: AuxK | None = None) -> Step:
    """Loss of the TopK autoencoder with AuxK and its gradients in closed form (Gao et al. 2024, sections 2.3, A.2).

    ::

        loss = |z - z^|^2 / |z - mean(z)|^2  +  aux.coefficient * |e - e^|^2 / |e - mean(e)|^2
        e = z - z^ as a constant;  e^ = topk(pre of the dead features, aux.k) @ W_dec

    Sums run over the batch, means over its tokens. The second term is 0 where it is not finite.

    Args:
        z: standardised residuals (B, D).
        weights: with W_enc in bfloat16, that nominates the active features (see `encode`).
        k: active features a token.
        aux: None for the first term alone.
    """
    centered = z - weights.b_dec
    values, indices = encode_batch(centered, weights, k)
    if weights.mesh.shards.size > 1:
        values, indices = only_used(values, indices)
    return sparse_step(z, centered, weights, values, indices, aux)


def encode_batch(centered: Tensor, weights: Weights, k: int) -> tuple[Tensor, Tensor]:
    """`encode_shard` of a batch that all replicas have, of which each encodes some tokens."""
    replicas = weights.mesh.replicas
    values, indices = encode_shard(replicas.part(centered), weights, k)
    return replicas.gather(values), replicas.gather(indices)


def encode_shard(centered: Tensor, weights: Weights, k: int) -> tuple[Tensor, Tensor]:
    """Which of the k active features of each token are this shard's, activations and features, (B, k) and (B, k).

    An activation of 0 is none. (B, k) or as many as the shard has.
    """
    shards, W_enc, b_enc, W_enc_bf16 = weights.mesh.shards, weights.W_enc, weights.b_enc, weights.W_enc_bf16
    most = min(k, len(b_enc))
    if shards.size == 1 or W_enc_bf16 is None:
        values, indices = encode(centered, W_enc, b_enc, most, W_enc_bf16)
    else:  # of the nominees of all shards, too, only as many get exact values as those of one process do
        most = min(k + margin(k), len(b_enc))
        values, indices = nominate(centered, W_enc_bf16, b_enc, most)
        values = values.masked_fill(lost(values, k + margin(k), shards, most), -torch.inf)
        values, best = values.topk(max(1, int((values > -torch.inf).sum(dim=1).max())), dim=1, sorted=False)
        indices = indices.gather(1, best)
        values = exact(centered, W_enc, b_enc, indices).masked_fill(values == -torch.inf, -torch.inf)
        missing = 0, most - values.shape[1]  # replicas differ in how many there are
        values, indices = F.pad(values, missing, value=-torch.inf), F.pad(indices, missing)
    return values.masked_fill(lost(values, k, shards, most), 0.0).relu(), indices


def lost(values: Tensor, k: int, shards: Group, width: int) -> Tensor:
    """Which of a shard's values (B, n) are not among the k largest of each token on all shards, (B, n).

    `width` is the largest n of all shards.
    """
    if shards.size == 1:
        return torch.zeros_like(values, dtype=torch.bool)
    everyone = shards.gather(F.pad(values, (0, width - values.shape[1]), value=-torch.inf), dim=1)
    best = everyone.topk(min(k, everyone.shape[1]), dim=1, sorted=False).indices  # the same on all of them, ties too
    is_lost = torch.ones_like(everyone, dtype=torch.bool).scatter_(1, best, False)
    return shards.part(is_lost, dim=1)[:, : values.shape[1]]


def only_used(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same active features with as many to a token as the token that has most of them. Waits for the device."""
    values, best = values.topk(max(1, int((values > 0).sum(dim=1).max())), dim=1, sorted=False)
    return values, indices.gather(1, best)


@torch.no_grad()
def sparse_step(
    z: Tensor,
    centered: Tensor,
    weights: Weights,
    values: Tensor,
    indices: Tensor,
    aux: AuxK | None,
    ends: Tensor | None = None,
) -> Step:
    """The loss of `topk_step` and its gradients where the active features (B, K) are known; a value of 0 is none.

    `ends` (P), ascending and the last of them F, make it the mean of P losses: of the first ends[0] features, of the
    first ends[1], and so on, each with all of b_dec (Bussmann et al. 2025). AuxK sees what all features leave.
    """
    W_enc, W_dec, mesh = weights.W_enc, weights.W_dec, weights.mesh
    variance = variation(z).clamp_min(SMALLEST_VARIANCE)
    scale = -2 / variance
    if ends is None:
        part, error = None, centered - mesh.sum_tokens(decode(values, indices, W_dec))
        nested = errors = error
    else:
        part, nested = nested_errors(centered, values, indices, weights, ends)
        error = nested[-1]
        errors = nested.flip(0).cumsum(0).flip(0).div_(len(ends)).flatten(0, 1)  # of all losses a feature is in
    normalized_mse = squared_norm(error) / variance
    loss = normalized_mse if ends is None else squared_norm(nested.flatten(0, 1)) / variance / len(ends)
    used, dense = [Used(indices, values, scale * (values > 0), errors, scale, part)], None
    auxk = z.new_zeros(())
    if aux is not None and aux.total and aux.k and aux.coefficient:
        auxk, of_dead = auxk_loss(error, centered, weights, aux)
        loss = loss + aux.coefficient * auxk
        if isinstance(of_dead, Used):
            used.append(of_dead)
        else:
            dense = of_dead
    grad_W_enc, grad_b_enc, grad_W_dec = gradients(used, dense, centered, W_dec)
    return Step(
        loss=loss,
        normalized_mse=normalized_mse,
        auxk=auxk,
        l0=mesh.shards.total((values > 0).sum()) / len(z),
        values=values,
        indices=indices,
        W_enc=grad_W_enc,
        b_enc=grad_b_enc,
        W_dec=grad_W_dec,
        # It also enters every pre-activation, by the centering
        b_dec=scale * errors[: len(z)].sum(dim=0) - mesh.shards.total(W_enc @ grad_b_enc),
    )


def nested_errors(
    centered: Tensor, values: Tensor, indices: Tensor, weights: Weights, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """What the features up to each end leave, (P, B, D), and between which two ends each feature lies, (B, K)."""
    n_tokens, k = indices.shape
    ordered, order = indices.sort(dim=1)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    bags = torch.searchsorted(ordered, starts.expand(n_tokens, -1).contiguous())
    bags += torch.arange(0, n_tokens * k, k, device=bags.device).unsqueeze(1)
    amounts = values.gather(1, order).flatten()
    decoded = F.embedding_bag(ordered.flatten(), weights.W_dec, bags.flatten(), per_sample_weights=amounts, mode="sum")
    decoded = weights.mesh.sum_tokens(decoded.view(n_tokens, len(ends), -1)).transpose(0, 1)
    return torch.searchsorted(ends, indices, right=True), centered - decoded.cumsum(0)


def auxk_loss(error: Tensor, centered: Tensor, weights: Weights, aux: AuxK) -> tuple[Tensor, Used | Dense]:
    """How much of the error (B, D) the dead features leave, and which of them each token used, or their gradients.

    A token uses many of them: where that is a good part of all, products with all are faster than gathered rows.
    """
    dead, mesh, product = aux.dead, weights.mesh, operations(error.device).product
    k, rows = min(aux.k, aux.total), weights.W_dec.index_select(0, dead)
    pre = product(centered, weights.W_enc.T.index_select(0, dead).T).add_(weights.b_enc.index_select(0, dead))
    is_dense = len(dead) <= DENSE_AUXK * k
    values, indices = topk(pre, min(k, len(dead)))
    is_lost = lost(values, k, mesh.shards, min(k, max(aux.of_shards, default=k)))
    if is_dense:
        unused = torch.ones_like(pre, dtype=torch.bool).scatter_(1, indices, is_lost)
        used = pre.masked_fill_(unused, 0.0)
    else:
        values = values.masked_fill_(is_lost, 0.0)
    residual = error - mesh.sum_tokens(product(used, rows) if is_dense else decode(values, indices, rows))
    variance = variation(error)
    loss = squared_norm(residual) / variance
    finite = loss.isfinite()
    residual = torch.where(finite, residual, 0.0)
    scale = torch.where(finite, -2 * aux.coefficient / variance, 0.0)
    loss = torch.where(finite, loss, 0.0)
    if not is_dense:
        return loss, Used(dead.take(indices), values, scale * ~is_lost, residual, scale)
    residual *= scale
    grad_pre = product(residual, rows.T).masked_fill_(unused, 0.0)
    along = (used * grad_pre).sum(dim=0)
    return loss, Dense(dead, product(grad_pre.T, centered), grad_pre.sum(dim=0), product(used.T, residual), along)


def gradients(
    used: list[Used], dense: Dense | None, centered: Tensor, W_dec: Tensor
) -> tuple[MatrixGradient, Tensor, MatrixGradient]:
    """Gradients of W_enc, b_enc (F) and W_dec, which sum over the same terms: one sort by feature serves all three."""
    n_tokens, n_features, device = len(centered), len(W_dec), centered.device
    features, order = torch.cat([u.features.flatten().to(torch.int32) for u in used]).sort(stable=True)
    offsets = torch.searchsorted(features, torch.arange(n_features + 1, dtype=torch.int32, device=device))
    owners = torch.cat(list(_owners(used, n_tokens))).take(order)
    values, scaled, slopes = (
        torch.cat([part.flatten() for part in parts]).take(order)
        for parts in zip(*((u.values, u.values * u.scale, u.slopes) for u in used), strict=True)
    )
    errors = torch.cat([u.error for u in used]) if len(used) > 1 else used[0].error
    grad_W_dec = MatrixGradient(offsets, errors, owners, scaled, added=dense and (dense.features, dense.W_dec))
    products, squares = operations(device).row_products(grad_W_dec, W_dec)
    grad_values = products * slopes
    grad_b_enc, along = run_sums(grad_values, offsets), run_sums(values * grad_values, offsets)
    if dense is not None:
        grad_b_enc.index_add_(0, dense.features, dense.b_enc)
        along.index_add_(0, dense.features, dense.along)
    tokens = owners if len(errors) == n_tokens else owners % n_tokens
    grad_W_enc = MatrixGradient(offsets, centered, tokens, grad_values, dense and (dense.features, dense.W_enc))
    return grad_W_enc, grad_b_enc, grad_W_dec._replace(along=along, squares=squares)


def _owners(used: list[Used], n_tokens: int) -> Iterator[Tensor]:
    """Which row of all errors each feature of each loss has to do with."""
    above = 0
    for each in used:
        rows = torch.arange(above, above + n_tokens, device=each.features.device).unsqueeze(1)
        rows = rows.expand_as(each.features) if each.part is None else rows + n_tokens * each.part
        yield rows.flatten()
        above += len(each.error)


def variation(x: Tensor) -> Tensor:
    """The squared norm of x (B, D) about its mean over the batch, a scalar."""
    return squared_norm(x - x.mean(dim=0))
