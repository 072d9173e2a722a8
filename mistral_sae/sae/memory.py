"""What a training run needs on its device, by part, before anything is loaded."""

from typing import NamedTuple

from mistral_sae.model.language_model import ModelSpec
from mistral_sae.sae.evaluate import HELD_LOGITS, LOGITS_BYTES
from mistral_sae.sae.kernels import CHUNK_BYTES
from mistral_sae.sae.optimizer import BLOCK_BYTES

SPARE = 0.03  # share of the free memory that a plan leaves to the allocator
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class MemoryPlan(NamedTuple):
    """Bytes on the device while training and while the finished autoencoder is evaluated."""

    training: dict[str, int]  # by part
    evaluation: dict[str, int]  # by part, after the run
    free: int  # on the device now

    @property
    def fits(self) -> bool:
        """Whether the run, and its evaluation afterwards, find room."""
        return max(sum(self.training.values()), sum(self.evaluation.values())) <= self.free * (1 - SPARE)

    def __str__(self) -> str:
        width = max(map(len, self.training))
        lines = [f"  {part:{width}}  {_size(size):>7}" for part, size in self.training.items()]
        lines.append(f"  {'all':{width}}  {_size(sum(self.training.values())):>7} of {_size(self.free)} free")
        lines.append(f"  {'the evaluation after it':{width}}  {_size(sum(self.evaluation.values())):>7}")
        return "\n".join(lines)


def memory_plan(
    spec: ModelSpec,
    *,
    last_layer: int | None,
    model_dtype: str,
    n_features: int,
    k: int,
    auxk_features: int,
    batch_size: int,
    buffer_tokens: int,
    moments_dtype: str,
    rows_per_forward: int,
    context_length: int,
    device: str,
    free: int,
) -> MemoryPlan:
    """Estimate the memory of a run on a model of the given sizes; `free` is what its device has, in bytes.

    With `last_layer` None the whole model is there from the start, so that cross-entropy is measured during the run.
    """
    kind = device.partition(":")[0]
    model_bytes, moment_bytes = ELEMENT_BYTES[model_dtype], ELEMENT_BYTES[moments_dtype]
    weights = (2 * spec.d_model + 1) * n_features + spec.d_model
    tokens = rows_per_forward * context_length
    forward = spec.forward_bytes(tokens, model_bytes)
    chunk = max(size for (where, _), size in CHUNK_BYTES.items() if where == kind)
    encoder = min(chunk, 4 * batch_size * n_features) * 2  # pre-activations and the selection's work space
    nominate = 2 * spec.d_model * n_features  # W_enc in bfloat16, in training
    batch = 4 * batch_size * (6 * spec.d_model + 8 * k)  # standardised, centered, error, ...; indices, values, bags
    # Of the dead features: pre-activations, with two such matrices beside them at a time and the indices of those used
    # (as many as half of them), and four times their rows: of both matrices and of both gradients
    auxk = 4 * min(auxk_features, n_features) * (4 * batch_size + 4 * spec.d_model)
    logits = HELD_LOGITS * max(min(LOGITS_BYTES, 4 * tokens * spec.vocab_size), 4 * context_length * spec.vocab_size)
    step = encoder + nominate + batch + auxk
    evaluation = forward + logits + encoder
    part = "" if last_layer is None else f" to layer {last_layer}"
    return MemoryPlan(
        training={
            f"language model{part} ({model_dtype})": spec.parameters(last_layer) * model_bytes,
            "autoencoder (float32)": 4 * weights,
            "its gradients (float32)": 4 * weights if kind == "cuda" else min(4 * weights, 4 * BLOCK_BYTES[kind]),
            f"Adam's moments ({moments_dtype})": 2 * weights * moment_bytes,
            f"buffer of residuals ({model_dtype})": (buffer_tokens + batch_size) * spec.d_model * model_bytes,
            "activations": max(forward, step, evaluation if last_layer is None else 0),
        },
        evaluation={
            "language model": spec.parameters() * model_bytes,
            "autoencoder": 4 * weights,
            "activations": evaluation,
        },
        free=free,
    )


def free_memory(device: str) -> int:
    """Bytes free on a device ("cpu", "cuda", "cuda:1")."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
