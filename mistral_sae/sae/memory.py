"""What a run needs on its device, by part, before the model is loaded."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import psutil
import torch

from mistral_sae.cli import size_of
from mistral_sae.sae.architectures import PENALIZED, SLOTS, START, activation_of
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.evaluate import HELD_LOGITS, LOGITS_BYTES
from mistral_sae.sae.features import CHUNK_BYTES as CHUNK
from mistral_sae.sae.kernels.portable import BLOCK_BYTES
from mistral_sae.sae.kernels.step import chunk_bytes, margin
from mistral_sae.sae.trainer import TrainConfig

# A block holds its input, its attention's queries, keys, values and output, and about four times the residual's width
# in its feed-forward layer three times over
FORWARD_WIDTHS = 8 + 3 * 4
# Of each activation of a shard: token, feature and value as they come and joined, then sorted, with their order
SORTED_BYTES = 80
# Of each pair of a token and an active feature, in a step of an architecture with a penalty: token, feature and value
# as they come and feature by feature, gradients, and places among the features of the token with the most
PAIR_BYTES = 160
UNBOUNDED_ACTIVE = 512  # features a token, taken for those of ReLU and JumpReLU autoencoders
UNEMBEDDED = 2**14  # rows of the output matrix that are in float32 at a time
SPARE = 0.03  # share of the free memory that a plan leaves to the allocator


class MemoryPlan(NamedTuple):
    """Bytes on a device in the stages of a run."""

    parts: dict[str, int]  # while training, while reading a corpus, or while generating
    afterwards: dict[str, int]  # while the finished autoencoder is evaluated, or its features are reported; may be {}
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
        if self.afterwards:
            lines.append(f"  {self.after:{width}}  {_size(sum(self.afterwards.values())):>7}")
        return "\n".join(lines)


class Stage(NamedTuple):
    """Bytes in a stage of a run, of the language model's device and of the autoencoder's, which may be the same."""

    model: dict[str, int]  # by part
    sae: dict[str, int]
    work: list[tuple[int, int]]  # what comes and goes, on each of the two, one after the other
    crossing: tuple[tuple[str, int], ...] = ()  # on the autoencoder's, where the two are not the same

    def parts(self, devices: int) -> list[dict[str, int]]:
        """The parts on one device, or on the model's and the autoencoder's."""
        if devices == 1:
            return [self.model | self.sae | {"activations": max(map(sum, self.work))}]
        of_model, of_sae = map(max, zip(*self.work, strict=True))
        return [self.model | {"activations": of_model}, self.sae | dict(self.crossing) | {"activations": of_sae}]


class Needs(NamedTuple):
    """What a run needs in its first stage and, where there is one, in that after it."""

    first: Stage
    later: Stage | None = None
    after: str = "the evaluation after it"

    def plans(self, device: str, sae_device: str, free: Mapping[str, int]) -> "Plans":
        """A plan for each device: the model's and the autoencoder's, which may be the same."""
        devices = list(dict.fromkeys((device, sae_device)))
        first = self.first.parts(len(devices))
        later = self.later.parts(len(devices)) if self.later else [{}, {}]
        each = zip(devices, first, later, strict=False)
        return Plans({name: MemoryPlan(parts, afterwards, free[name], self.after) for name, parts, afterwards in each})


class Plans(NamedTuple):
    """The plan of each device of a run."""

    by_device: dict[str, MemoryPlan]

    @property
    def fits(self) -> bool:
        """Whether all of them do."""
        return all(plan.fits for plan in self.by_device.values())

    def __str__(self) -> str:
        return "\n".join(f"memory    on {device}, by part\n{plan}" for device, plan in self.by_device.items())


class _Sizes(Protocol):
    """Those of a language model, before it is loaded."""

    @property
    def d_model(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def head_parameters(self) -> int: ...
    @property
    def cache_width(self) -> int: ...
    def parameters(self, last_layer: int | None = None) -> int: ...


def training_needs(
    configs: Sequence[TrainConfig], model: _Sizes, *, last_layer: int | None, dtype: torch.dtype, on_cpu: bool,
    layers: int = 1, streams: int = 1, mesh: tuple[int, int] = (1, 1),
) -> Needs:  # fmt: skip
    """Estimate the memory of a run on a model of the given sizes; `on_cpu` says where the autoencoders are.

    They are of so many layers, and learn from so many streams of batches. The weights and moments of all are there; of
    gradients, and of what a step takes beside, one has its own at a time. With `last_layer` None the whole model is
    there from the start, so that cross-entropy is measured during the run. Of a mesh of replicas and shards it is what
    each rank needs. Raises UserError for a mesh that cannot be.
    """
    (replicas, shards), kind, D = mesh, "cpu" if on_cpu else "cuda", model.d_model
    for config in configs:
        config.check_mesh(replicas, shards)
    first = configs[0]  # what follows is the same for all
    forward = first.rows_per_forward * first.context_length * D * FORWARD_WIDTHS * dtype.itemsize
    row_of_logits = 4 * first.context_length * model.vocab_size
    logits = HELD_LOGITS * max(min(LOGITS_BYTES, first.rows_per_forward * row_of_logits), row_of_logits)
    # Of several ranks each has a part of the buffer, and of a batch what it has and what all have
    buffer = layers * first.buffer_tokens // (replicas * shards) + streams * first.batch_size
    buffer = (buffer + (2 * first.batch_size if replicas * shards > 1 else 0)) * D * dtype.itemsize

    held = [(config, config.d_hidden // shards) for config in configs]
    weights = [(2 * D + 1) * F + D for _, F in held]
    moments = defaultdict[str, int](int)
    for config, numbers in zip(configs, weights, strict=True):
        bytes_of_one = getattr(torch, config.moments_dtype).itemsize
        moments[f"Adam's moments ({config.moments_dtype})"] += 2 * numbers * bytes_of_one
    encoder = max(_encoder(kind, activation_of(config.architecture), config.batch_size, F) for config, F in held)
    step = max(_step(config, D, kind, mesh) for config in configs)
    others = sum(2 * D * F for config, F in held[1:] if config.architecture not in PENALIZED)
    copies = others + 2 * D * max(F for _, F in held)  # of W_enc, in bfloat16
    evaluation = forward + logits, copies + encoder
    part, name = "" if last_layer is None else f" to layer {last_layer}", str(dtype).removeprefix("torch.")
    return Needs(
        Stage(
            {
                f"language model{part} ({name})": model.parameters(last_layer) * dtype.itemsize,
                f"buffer of residuals ({name})": buffer,
            },
            {
                "autoencoder (float32)": 4 * sum(weights),
                # A block of features at a time; on a GPU a feature at a time, in registers
                **({"its gradients (float32)": 4 * min(max(weights), BLOCK_BYTES["cpu"])} if on_cpu else {}),
                **moments,
            },
            [(forward, copies), (0, others + step), *([evaluation] if last_layer is None else [])],
            ((f"batches sent ahead ({name})", buffer),),
        ),
        Stage(
            {"language model": model.parameters() * dtype.itemsize},
            {"autoencoder": 4 * sum(weights)},
            [(forward + logits, encoder)],
        ),
    )


def wire(configs: Sequence[TrainConfig], mesh: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each rank of a mesh of replicas and shards receives in a step, by what they are; reckoned.

    A sum over shards is received twice, as PyTorch makes it: the parts of it first, and then the sums of other ranks.
    """
    total: dict[str, float] = defaultdict(float)
    for config in configs:
        (replicas, shards), B, D = mesh, config.batch_size, config.d_model
        others, shared, held = (shards - 1) / shards, (replicas - 1) / replicas, config.d_hidden // shards
        slots = {"topk": config.k, "batchtopk": SLOTS * config.k, "matryoshka": SLOTS * config.k}
        kept, k_aux = slots.get(config.architecture, 0), min(config.k_aux, config.auxk_features, held)
        nominees = min(kept + margin(kept), held) if kept else 0  # in bfloat16, and then their exact values
        thresholds = 0 if config.architecture == "topk" else 1  # BatchTopK's is of the whole batch
        decoded = 4 * B * D * (config.matryoshka_levels if config.architecture == "matryoshka" else 1)
        total["residuals"] += B * D * dtype.itemsize * (1 - 1 / (replicas * shards))
        total["largest values of other shards"] += (6 / replicas + 4 * thresholds) * B * nominees * (shards - 1)
        total["active features of other replicas"] += 12 * B * nominees * shared
        total["what features decode to"] += 2 * decoded * others / replicas
        total["the same from other replicas"] += decoded * shared
        if kept and config.auxk_coefficient:
            total["all of it again, of dead features"] += (
                4 * B * (k_aux * (shards - 1) + D * (2 * others / replicas + shared))
            )
    return {what: int(size) for what, size in total.items()}


def wire_plan(configs: Sequence[TrainConfig], mesh: tuple[int, int], dtype: torch.dtype) -> Iterator[str]:
    """What `wire` reckons, in words, line by line; none for one process."""
    if mesh != (1, 1):
        yield "mesh      {} replicas of {} shards; a rank's memory is above, and in a step it receives".format(*mesh)
        for what, size in wire(configs, mesh, dtype).items():
            yield f"  {what:35} {size_of(size):>8}"


def _step(config: TrainConfig, D: int, kind: str, mesh: tuple[int, int]) -> int:
    """What comes and goes in a step, on a device of kind "cpu" or "cuda"."""
    (replicas, shards), B, K = mesh, config.batch_size, config.k
    F = config.d_hidden // shards
    # Standardised, centered, error; indices and values
    batch = 4 * B * (6 * D + 8 * K)
    if config.architecture in PENALIZED:  # as many pairs as at first, and the rows that relu's penalty adds
        rows = 4 * D * F if config.architecture == "relu" else 0
        return _encoder(kind, "topk", B, F) + batch + PAIR_BYTES * B * min(F, START * K) + rows
    if config.architecture in ("batchtopk", "matryoshka"):  # and the error of each nested autoencoder
        parts = 3 * config.matryoshka_levels if config.architecture == "matryoshka" else 1
        batch = 4 * B * ((5 + parts) * D + 8 * SLOTS * K)
    # Of the dead features: pre-activations, with two such matrices beside them at a time and the indices of those used
    # (as many as half of them), and four times their rows: of both matrices and of both gradients
    auxk = 4 * min(config.auxk_features, F) * (4 * B + 4 * D)
    if shards > 1:  # and of the values that all shards nominate, which are chosen
        slots = K if config.architecture == "topk" else SLOTS * K
        batch += 6 * B // replicas * shards * min(slots + margin(slots), F)
    encoder = max(_encoder(kind, "topk", B // replicas, F, dtype) for dtype in (torch.float32, torch.bfloat16))
    return 2 * D * F + encoder + batch + auxk


def _encoder(kind: str, activation: str, tokens: int, n_features: int, dtype: torch.dtype = torch.float32) -> int:
    """Pre-activations of some tokens at a time and the selection's work space, on a GPU that of an eighth of them.

    Without a number of features to select, what is above a threshold is as large again, beside a mask.
    """
    work = 2.0 if kind == "cpu" else 1.25
    if activation != "topk":
        work += 1.25
    return int(work * min(chunk_bytes(kind, dtype, n_features), 4 * tokens * n_features))


def explaining_needs(
    sae: SparseAutoencoder,
    model: _Sizes,
    *,
    last_layer: int | None,
    dtype: torch.dtype,
    tokens: int,
    shard_tokens: int,
    reply_tokens: int = 0,
) -> Needs:
    """Estimate the memory of explaining features: of the pass over a corpus, and of what the report says of each.

    The model is there up to `last_layer` with its head, or all of it; `tokens` go through it at a time, and the
    activations of `shard_tokens` are sorted at a time. Where the model explains itself, a prompt and its reply have
    `reply_tokens`.
    """
    D, F, k = sae.d_model, sae.n_features, _active(sae)
    held = _weights(sae, model, last_layer, dtype)
    of_model, encoding = _passing(sae, model, tokens, dtype)
    sorting = SORTED_BYTES * shard_tokens * k
    cosines, logits = 4 * min(CHUNK, 4 * F * F), 3 * min(CHUNK, 4 * F * model.vocab_size)
    unembedding = 4 * min(UNEMBEDDED, model.vocab_size) * D + logits
    replying = _cache(model, reply_tokens, dtype) + _passing(sae, model, reply_tokens, dtype)[0]
    return Needs(
        Stage(*held, [(of_model, 0), (0, encoding), (0, sorting)]),
        Stage(*held, [(max(unembedding, replying), 0), (0, cosines)]),
        after="the features after it",
    )


def steering_needs(sae: SparseAutoencoder, model: _Sizes, *, dtype: torch.dtype, tokens: int, read: int) -> Needs:
    """Estimate the memory of steered texts, so many tokens of which are made together and so many read back."""
    of_model, encoding = _passing(sae, model, max(tokens, read), dtype)
    held_model, held_sae = _weights(sae, model, None, dtype)
    logits = HELD_LOGITS * 4 * read * model.vocab_size
    cache = {"keys and values of texts": _cache(model, tokens, dtype)}
    return Needs(Stage(held_model | cache, held_sae, [(of_model + logits, 0), (0, encoding)]))


def _weights(
    sae: SparseAutoencoder, model: _Sizes, last_layer: int | None, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Those of a model up to a layer with its head, or of all of it, and those of an autoencoder."""
    part = "" if last_layer is None else f" to layer {last_layer}, and its head"
    parameters = model.parameters(last_layer) + (0 if last_layer is None else model.head_parameters)
    name = f"language model{part} ({str(dtype).removeprefix('torch.')})"
    return {name: parameters * dtype.itemsize}, {"autoencoder (float32)": sum(4 * p.numel() for p in sae.parameters())}


def _passing(sae: SparseAutoencoder, model: _Sizes, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """What so many tokens take at a time in the model, and in the autoencoder's encoder."""
    D, F, kind = model.d_model, sae.n_features, "cpu" if sae.W_dec.device.type == "cpu" else "cuda"
    chunk = max(chunk_bytes(kind, number, F) for number in (torch.float32, torch.bfloat16))
    copies = 2 if sae.activation == "topk" else 3  # without a number of features to select: see `_encoder`
    pre = copies * min(chunk, 4 * tokens * F) + 2 * D * F  # with W_enc in bfloat16, which may choose the features
    encoding = pre + 4 * tokens * (4 * D + 8 * _active(sae)) + tokens * D * dtype.itemsize
    return tokens * D * FORWARD_WIDTHS * dtype.itemsize, encoding


def _active(sae: SparseAutoencoder) -> int:
    """Active features a token, at most; where no number bounds them as many as those of published ones have."""
    return sae.k if sae.activation == "topk" else min(sae.n_features, UNBOUNDED_ACTIVE)


def _cache(model: _Sizes, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of so many tokens."""
    return model.cache_width * tokens * dtype.itemsize


def row_bytes(rows: int, context_length: int) -> int:
    """Bytes of main memory of rows of tokens that are shuffled together, with as many that are read ahead of them."""
    return 2 * rows * context_length * 8


def free_memory(device: str) -> int:
    """Bytes free on a device ("cpu", "cuda", "cuda:1")."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
