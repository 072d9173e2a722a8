"""A Mistral with random weights: its speed and its memory do not depend on what it has learned."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from mistral_sae.data.tokens import Row
from mistral_sae.model import engines
from mistral_sae.model.folder import MISTRAL_INFERENCE, PARAMS, ModelFolder, Stored
from mistral_sae.model.language_model import LanguageModel, ModelSpec
from mistral_sae.model.params import shapes_of_params
from mistral_sae.model.source import Source

MISTRAL_7B = {  # params.json of v0.3
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32768,
    "rope_theta": 1e6,
}
SMOKE_MISTRAL = MISTRAL_7B | {
    "dim": 64, "n_layers": 3, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128,
}  # fmt: skip


def spec_of(params: dict[str, Any]) -> ModelSpec:
    """Sizes of a mistral-inference model."""
    shapes = shapes_of_params(params, None)

    def parameters(*prefixes: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))

    return ModelSpec(
        "random weights",
        MISTRAL_INFERENCE,
        params["dim"],
        params["n_layers"],
        params["vocab_size"],
        parameters("tok_embeddings"),
        tuple(parameters(f"layers.{layer}.") for layer in range(params["n_layers"])),
        parameters("norm.", "output."),
    )


def random_model(params: dict[str, Any], last_layer: int | None, device: torch.device) -> LanguageModel:
    """A mistral-inference model, up to `last_layer` if one is given, with random weights made on the device."""
    spec, shapes = spec_of(params), shapes_of_params(params, None)
    stored = {name: Stored(Path("random"), name, shape) for name, shape in shapes.items()}
    folder = ModelFolder(Source(Path("random")), spec, PARAMS, params, stored)

    def random_tensors(wanted, device, dtype):
        tensors = {name: torch.empty(stored.shape, device=device, dtype=dtype) for name, stored in wanted.items()}
        for tensor in tensors.values():
            tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(std=tensor.shape[1] ** -0.5)
        return tensors

    with patch.object(engines, "_read_tensors", random_tensors):
        engine = engines.MistralInference(folder, last_layer, device, torch.bfloat16, last_layer is None)
    tokenizer = SimpleNamespace(bos_id=1, eos_id=-1)  # no text ends
    return LanguageModel(spec, tokenizer, engine, last_layer, device, torch.bfloat16)


def random_rows(vocab_size: int, length: int, seed: int) -> Iterator[Row]:
    """Rows of random tokens behind a BOS."""
    generator = np.random.default_rng(seed)
    while True:
        row = generator.integers(vocab_size, size=length)
        row[0] = 1
        yield Row(row, np.full(length, -1), [])
