"""What a run needs on its device, by part, before the model is loaded."""

from typing import NamedTuple, Protocol

import psutil
import torch

from mistral_sae.sae.architectures import DENSE, SLOTS
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.evaluate import HELD_LOGITS, LOGITS_BYTES
from mistral_sae.sae.features import CHUNK_BYTES as CHUNK
from mistral_sae.sae.kernels import chunk_bytes
from mistral_sae.sae.kernels.portable import BLOCK_BYTES
from mistral_sae.sae.trainer import TrainConfig

# A block holds its input, its attention's queries, keys, values and output, and about four times the residual's width
# in its feed-forward layer three times over
FORWARD_WIDTHS = 8 + 3 * 4
# Of each activation of a shard: token, feature and value as they come and joined, then sorted, with their order
SORTED_BYTES = 80
UNEMBEDDED = 2**14  # rows of the output matrix that are in float32 at a time
SPARE = 0.03  # share of the free memory that a plan leaves to the allocator


class MemoryPlan(NamedTuple):
    """Bytes on the device in the two stages of a run."""

    parts: dict[str, int]  # while training, or while reading a corpus
    afterwards: dict[str, int]  # while the finished autoencoder is evaluated, or its features are reported
    free: int  # on the device now
    after: str = "the evaluation after it"

    @property
    def fits(self) -> bool:
        """Whether both find room."""
        return max(sum(self.parts.values()), sum(self.afterwards.values())) <= self.free * (1 - SPARE)

    def __str__(self) -> str:
        width = max(map(len, (*self.parts, self.after)))
        lines = [f"  {part:{width}}  {_size(size):>7}" for part, size in self.parts.items()]
        lines.append(f"  {'all':{width}}  {_size(sum(self.parts.values())):>7} of {_size(self.free)} free")
        lines.append(f"  {self.after:{width}}  {_size(sum(self.afterwards.values())):>7}")
        return "\n".join(lines)


class _Sizes(Protocol):
    """Those of a language model, before it is loaded."""

    @property
    def d_model(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def head_parameters(self) -> int: ...
    def parameters(self, last_layer: int | None = None) -> int: ...


def memory_plan(
    config: TrainConfig, model: _Sizes, *, last_layer: int | None, dtype: torch.dtype, device: str, free: int
) -> MemoryPlan:
    """Estimate the memory of a run on a model of the given sizes; `free` is what its device has, in bytes.

    With `last_layer` None the whole model is there from the start, so that cross-entropy is measured during the run.
    """
    kind, D, F = "cpu" if device == "cpu" else "cuda", model.d_model, config.d_hidden
    model_dtype = str(dtype).removeprefix("torch.")
    model_bytes, moment_bytes = dtype.itemsize, getattr(torch, config.moments_dtype).itemsize
    weights = (2 * D + 1) * F + D
    tokens = config.rows_per_forward * config.context_length
    forward = tokens * D * FORWARD_WIDTHS * model_bytes
    # Pre-activations and the selection's work space, on a GPU that of an eighth of them
    work = 2.0 if kind == "cpu" else 1.25
    chunks = [chunk_bytes(kind, torch.float32, F), chunk_bytes(kind, torch.bfloat16, F)]
    encoder_float32, encoder_bf16 = (int(work * min(size, 4 * config.batch_size * F)) for size in chunks)
    bf16_encoder = 2 * D * F  # a copy of W_enc, in training
    slots, parts = 1, 1
    if config.architecture in ("batchtopk", "matryoshka"):
        slots, parts = SLOTS, 3 * config.matryoshka_levels if config.architecture == "matryoshka" else 1
    # Standardised, centered, error, and that of each nested autoencoder; indices, values, bags
    batch = 4 * config.batch_size * ((5 + parts) * D + 8 * slots * config.k)
    if config.architecture in DENSE:  # activations, their gradients and what they are made of; two whole gradients
        batch += 4 * F * (5 * config.batch_size + 3 * D)
    # Of the dead features: pre-activations, with two such matrices beside them at a time and the indices of those used
    # (as many as half of them), and four times their rows: of both matrices and of both gradients
    auxk = 4 * min(config.auxk_features, F) * (4 * config.batch_size + 4 * D)
    row_of_logits = 4 * config.context_length * model.vocab_size
    logits = HELD_LOGITS * max(min(LOGITS_BYTES, config.rows_per_forward * row_of_logits), row_of_logits)
    step = max(encoder_float32, encoder_bf16) + batch + auxk
    evaluation = forward + logits + encoder_float32
    part = "" if last_layer is None else f" to layer {last_layer}"
    return MemoryPlan(
        parts={
            f"language model{part} ({model_dtype})": model.parameters(last_layer) * model_bytes,
            "autoencoder (float32)": 4 * weights,
            # A block of features at a time; on a GPU a feature at a time, in registers
            **({"its gradients (float32)": min(4 * weights, 4 * BLOCK_BYTES["cpu"])} if kind == "cpu" else {}),
            f"Adam's moments ({config.moments_dtype})": 2 * weights * moment_bytes,
            f"buffer of residuals ({model_dtype})": (config.buffer_tokens + config.batch_size) * D * model_bytes,
            "activations": bf16_encoder + max(forward, step, evaluation if last_layer is None else 0),
        },
        afterwards={
            "language model": model.parameters() * model_bytes,
            "autoencoder": 4 * weights,
            "activations": evaluation,
        },
        free=free,
    )


def explaining_plan(
    sae: SparseAutoencoder,
    model: _Sizes,
    *,
    last_layer: int | None,
    dtype: torch.dtype,
    tokens: int,
    shard_tokens: int,
    free: int,
) -> MemoryPlan:
    """Estimate the memory of explaining features: of the pass over a corpus, and of what the report says of each.

    The model is there up to `last_layer` with its head, or all of it; `tokens` go through it at a time, and the
    activations of `shard_tokens` are sorted at a time. `free` is of the device before the autoencoder is on it.
    """
    D, F, k, kind = sae.d_model, sae.n_features, sae.k, sae.W_dec.device.type
    name = str(dtype).removeprefix("torch.")
    part = "" if last_layer is None else f" to layer {last_layer}, and its head"
    parameters = model.parameters(last_layer) + (0 if last_layer is None else model.head_parameters)
    weights = {
        f"language model{part} ({name})": parameters * dtype.itemsize,
        "autoencoder (float32)": sum(4 * p.numel() for p in sae.parameters()),
    }
    forward = tokens * D * FORWARD_WIDTHS * dtype.itemsize
    pre = 2 * min(_chunk(kind, F), 4 * tokens * F) + 2 * D * F  # with W_enc in bfloat16, which may choose the features
    encoding = pre + 4 * tokens * (4 * D + 8 * k)
    sorting = SORTED_BYTES * shard_tokens * k
    cosines, logits = 4 * min(CHUNK, 4 * F * F), 3 * min(CHUNK, 4 * F * model.vocab_size)
    unembedding = 4 * min(UNEMBEDDED, model.vocab_size) * D + logits
    return MemoryPlan(
        weights | {"activations": max(forward, encoding + tokens * D * dtype.itemsize, sorting)},
        weights | {"activations": max(unembedding, cosines)},
        free,
        after="the features after it",
    )


def row_bytes(rows: int, context_length: int) -> int:
    """Bytes of main memory of rows of tokens that are shuffled together, with as many that are read ahead of them."""
    return 2 * rows * context_length * 8


def free_memory(device: str) -> int:
    """Bytes free on a device ("cpu", "cuda", "cuda:1")."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available


def _chunk(kind: str, n_features: int) -> int:
    """Bytes of pre-activations that exist at a time, at most."""
    kind = "cpu" if kind == "cpu" else "cuda"
    return max(chunk_bytes(kind, dtype, n_features) for dtype in (torch.float32, torch.bfloat16))


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
