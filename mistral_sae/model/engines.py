"""The two libraries that run a Mistral, behind what `LanguageModel` needs of them.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mistral_sae.cli import expect, is_out_of_memory, one_line
from mistral_sae.model import compiled
from mistral_sae.model.attention import Past, install_attention, rotary_table
from mistral_sae.model.folder import (
    CONFIG,
    MISTRAL_INFERENCE,
    PARAMS,
    TRANSFORMERS,
    ModelFolder,
    Stored,
    check_layer,
    layouts,
    misshapen,
    part_of,
    read_folder,
)
from mistral_sae.model.params import shapes_of_params, theta_of, to_halves, windows_of
from mistral_sae.model.source import ModelError, find, quiet_transformers

META = torch.device("meta")


class Engine(Protocol):
    """A model, or its first layers, in one of the libraries."""

    model: nn.Module  # all that is loaded
    blocks: list[nn.Module]  # its layers
    norm: nn.Module | None  # the final norm, and
    head: nn.Linear | None  # its output to logits; None where they are not loaded

    def run(self, tokens_BT: Tensor, start: int, cache: Any, padding_B: Tensor | None) -> Tensor:
        """The final norm's output (B, T, D), or the last loaded layer's, of rows that begin at position `start`.

        The first positions of each row, as many as `padding_B` says, are seen by no later one.
        """

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache for `run`."""


def open_folder(path: str | Path, engine: str | None = None, last_layer: int | None = None) -> ModelFolder:
    """What a folder holds, in the terms of the engine that is to run it. Raises ModelError for what cannot be run.

    All that the engine needs for layers 0..last_layer, or for all of the model, is checked by the headers. Without
    `engine` the first that works is taken: mistral-inference, where it is installed and the folder is in its layout,
    else transformers. Of both layouts the second is taken where the first cannot be used.
    """
    expect("ENGINE", engine, engine in (None, MISTRAL_INFERENCE, TRANSFORMERS), "mistral-inference or transformers")
    source = find(path)
    found, failures = layouts(source), dict[str, str]()
    installed = find_spec("mistral_inference") is not None
    if engine == MISTRAL_INFERENCE and not (installed and PARAMS in found):
        why = "it is not installed here" if PARAMS in found else f"{source.path} has no params.json"
        raise ModelError(f"ENGINE is {engine}, but {why}: use ENGINE=transformers, which reads both layouts")
    for described_by, runs_it in ((PARAMS, MISTRAL_INFERENCE), (CONFIG, TRANSFORMERS), (PARAMS, TRANSFORMERS)):
        if described_by not in found or described_by in failures or engine not in (None, runs_it):
            continue
        if runs_it == MISTRAL_INFERENCE and not installed:
            continue
        notes = [source.note, *(f"not by its {name}: {why}" for name, why in failures.items())]
        if engine is None and described_by == PARAMS and not installed and not failures:
            notes.append("mistral-inference is not installed")
        try:
            folder = read_folder(source, described_by, runs_it, "; ".join(filter(None, notes)))
            if last_layer is not None:
                check_layer(folder.spec, last_layer)
            ENGINES[runs_it].check(folder, last_layer)
            return folder
        except ModelError as error:
            failures[described_by] = str(error)
    raise ModelError("; ".join(dict.fromkeys(failures.values())))


def load_engine(
    folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype, head: bool = False
) -> Engine:
    """The model of a folder, or its embedding and layers 0..last_layer, with its head or without. Raises ModelError."""
    engine = ENGINES[folder.spec.engine](folder, last_layer, device, dtype, head or last_layer is None)
    if compiled.pays(device):
        compiled.compile_blocks(engine.blocks)
    return engine


# ---- transformers ----


class Transformers:
    """A model that transformers runs, its weights from a folder of either layout."""

    def __init__(
        self, folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype, has_head: bool
    ):
        self.model = model = _load_in_transformers(folder, last_layer, device, dtype, has_head).requires_grad_(False)
        self._body = model.model if has_head else model
        self._config = self._body.config
        self.blocks = list(self._body.layers)
        self.norm: nn.Module | None = self._body.norm if has_head else None
        self.head: nn.Linear | None = model.lm_head if has_head else None
        # transformers 5.24 renamed it, and warns of the old name
        renamed = "cache" in inspect.signature(self._body.forward).parameters
        self._cache = "cache" if renamed else "past_key_values"

    @staticmethod
    def check(folder: ModelFolder, last_layer: int | None) -> None:
        """Raise ModelError if a tensor is missing or misshapen: a load without a value."""
        _load_in_transformers(folder, last_layer, META, torch.float32, last_layer is None)

    def run(self, tokens_BT: Tensor, start: int, cache: Any, padding_B: Tensor | None) -> Tensor:
        """Hidden states (B, T, D)."""
        given = {self._cache: cache, "use_cache": cache is not None}  # which knows where the rows begin
        if padding_B is not None:
            position_BK = torch.arange(start + tokens_BT.shape[1], device=tokens_BT.device) - padding_B[:, None]
            given |= {"attention_mask": position_BK >= 0, "position_ids": position_BK[:, start:].clamp_min(0)}
        return self._body(input_ids=tokens_BT, **given).last_hidden_state

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache: a block of memory for each layer that sees all positions; windows are short, and copied."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        class Block(DynamicLayer):
            """What a DynamicLayer returns, without copying all of it for each token: a gigabyte at 8,192 of a 7B."""

            def lazy_initialization(self, key_BGTE: Tensor, value_BGTE: Tensor) -> None:
                B, G, _, E = key_BGTE.shape
                self.block, self.device = key_BGTE.new_empty(2, B, G, length, E), key_BGTE.device
                self.keys, self.values = self.block[:, :, :, :0]
                self.is_initialized = True

            def update(self, key_BGTE: Tensor, value_BGTE: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                if not self.is_initialized:
                    self.lazy_initialization(key_BGTE, value_BGTE)
                start, end = self.keys.shape[2], self.keys.shape[2] + key_BGTE.shape[2]
                self.block[0, :, :, start:end], self.block[1, :, :, start:end] = key_BGTE, value_BGTE
                self.keys, self.values = self.block[:, :, :, :end]
                return self.keys, self.values

        cache = DynamicCache(config=self._config)
        cache.layers = [Block() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache


def _load_in_transformers(
    folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype, has_head: bool
) -> Any:
    """transformers' causal model, or the body of one without its head, up to the last layer, in evaluation mode."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config = copy.deepcopy(folder.config)
    kind = (MODEL_FOR_CAUSAL_LM_MAPPING if has_head else MODEL_MAPPING)[type(config)]
    if last_layer is not None:
        config.num_hidden_layers = last_layer + 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: last_layer + 1]
    parts = {"embedding", "head", *range(config.num_hidden_layers)}
    with ExitStack() as files, quiet_transformers():
        wanted = {name: stored for name, stored in folder.tensors.items() if part_of(name) in parts}
        paths = set() if device == META else {stored.file for stored in wanted.values()}
        opened = {path: files.enter_context(safe_open(path, "pt")) for path in paths}
        state = {
            name: torch.empty(stored.shape, device=META)
            if device == META
            else _Slice(opened[stored.file].get_slice(stored.name), config.head_dim if stored.is_rotated else None)
            for name, stored in wanted.items()
        }
        try:
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                device_map={"": device},
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # the report names the tensor, the error would not
                output_loading_info=True,
            )
        except Exception as error:  # what a config.json says wrongly is an error of any kind
            if is_out_of_memory(error):
                raise
            raise ModelError(f"{folder.path} cannot be loaded ({one_line(error)}): get the whole model") from error
    for name in sorted(set(report["missing_keys"]) - (set() if has_head else {"norm.weight"})):
        raise ModelError(f"{folder.path} has no tensor {name}: get the whole model")
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise misshapen(folder, name, tuple(found), tuple(expected))
    return model.eval()


class _Slice:
    """A tensor in a file for transformers, which reads it when it comes to it."""

    def __init__(self, tensor: Any, head_dim: int | None):
        self._tensor, self._head_dim = tensor, head_dim

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._tensor[...]
        return (tensor if self._head_dim is None else to_halves(tensor, self._head_dim))[index]


# ---- mistral-inference ----


class MistralInference:
    """A model of a mistral-inference folder: dense, sliding-window or mixture-of-experts."""

    def __init__(
        self, folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype, has_head: bool
    ):
        install_attention()
        from mistral_inference.args import TransformerArgs
        from mistral_inference.moe import MoeArgs
        from mistral_inference.transformer import Transformer

        params = folder.config
        sizes = ["dim", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"]
        moe = params.get("moe")
        args = TransformerArgs(
            **{name: params[name] for name in sizes},
            n_layers=params["n_layers"] if last_layer is None else last_layer + 1,
            moe=MoeArgs(moe["num_experts"], moe["num_experts_per_tok"]) if moe else None,
        )
        # On no device there is nothing to initialise, and to do so imports PyTorch's compiler, which takes seconds
        with META, patch.object(nn.Embedding, "reset_parameters"):
            model = Transformer(args)
        if not has_head:
            model.norm = model.output = None
        wanted = {name: folder.tensors[name] for name in shapes_of_params(params, last_layer, has_head)}
        weights = _read_tensors(wanted, device, dtype)
        if has_head and params.get("tied_embeddings"):
            weights["output.weight"] = weights["tok_embeddings.weight"]
        model.load_state_dict(weights, assign=True)
        self.model = model.eval().requires_grad_(False)
        self._args, self._device, self._dtype = args, device, dtype
        self._windows, self._theta = windows_of(params)[: args.n_layers], theta_of(params)
        self._rotary = torch.empty(0)  # of as many positions as were needed so far, (N, head_dim / 2, 2)
        self.blocks = list(model.layers.values())
        self.norm, self.head = model.norm, model.output

    @staticmethod
    def check(folder: ModelFolder, last_layer: int | None) -> None:
        """Raise ModelError if a tensor is missing or misshapen."""
        for name, shape in shapes_of_params(folder.config, last_layer).items():
            if name not in folder.tensors:
                expected = f"expected one of shape {shape}; get the whole model"
                raise ModelError(f"{folder.path} has no tensor {name}: {expected}")
            if folder.tensors[name].shape != shape:
                raise misshapen(folder, name, folder.tensors[name].shape, shape)

    def run(self, tokens_BT: Tensor, start: int, cache: Any, padding_B: Tensor | None) -> Tensor:
        """Hidden states (B, T, D). Positions count from the padding on, as attention sees only their differences."""
        B, T = tokens_BT.shape
        if len(self._rotary) < start + T:
            self._rotary = rotary_table(2 * (start + T), self._args.head_dim, self._theta, self._device)
        rotary = self._rotary[start : start + T]
        hidden = self.model.tok_embeddings(tokens_BT.flatten())
        for layer, (block, window) in enumerate(zip(self.blocks, self._windows, strict=True)):
            kept = () if cache is None else (start, *cache[:, layer])
            hidden = block(hidden, rotary, Past(B, window, padding_B, *kept))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden.view(B, T, -1)

    def new_cache(self, rows: int, length: int) -> Tensor:
        """Keys and values of all layers, (2, layers, B, G, N, E)."""
        sizes = len(self.blocks), rows, self._args.n_kv_heads, length, self._args.head_dim
        return torch.empty(2, *sizes, device=self._device, dtype=self._dtype)


def _read_tensors(wanted: dict[str, Stored], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The wanted tensors and no others, straight to the device."""
    with ExitStack() as stack:
        paths = {stored.file for stored in wanted.values()}
        files = {path: stack.enter_context(safe_open(path, "pt", device=str(device))) for path in paths}
        return {name: files[s.file].get_tensor(s.name).to(dtype) for name, s in wanted.items()}


ENGINES: dict[str, Any] = {MISTRAL_INFERENCE: MistralInference, TRANSFORMERS: Transformers}
