"""The two libraries that run a Mistral, behind the four things `LanguageModel` needs of them.

Each has `blocks`, the loaded layers; `run`, token ids to the final norm's output (its last loaded layer's,
where only the first layers are loaded); `norm` and `head`, the last layer's output to logits, or None; and
`new_cache`.

Shapes: B rows, T positions, D model width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mistral_sae.model import attention
from mistral_sae.model.folder import ModelError, ModelFolder, check_tensors


class MistralInference:
    """A model of a mistral-inference folder: dense, sliding-window or mixture-of-experts."""

    def __init__(self, folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype):
        attention.install()
        from mistral_inference.args import TransformerArgs
        from mistral_inference.moe import MoeArgs
        from mistral_inference.transformer import Transformer

        names = check_tensors(folder, last_layer)
        params = folder.config
        sizes = ["dim", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"]
        moe = params.get("moe")
        args = TransformerArgs(
            **{name: params[name] for name in sizes},
            n_layers=params["n_layers"] if last_layer is None else last_layer + 1,
            moe=MoeArgs(moe["num_experts"], moe["num_experts_per_tok"]) if moe else None,
        )
        with torch.device("meta"):
            model = Transformer(args)
        if last_layer is not None:
            model.norm = model.output = None
        model.load_state_dict(_read_tensors(folder, names, device, dtype), assign=True)
        self._model = model.eval().requires_grad_(False)
        self._args, self._device, self._dtype = args, device, dtype
        self._windows = _windows(params)[: args.n_layers]
        # Mistral 7B v0.1, the one with a sliding window, has 10,000, which its params.json does not say
        self._theta = params.get("rope_theta") or (1e6 if self._windows[0] is None else 1e4)
        self._rotary_table: torch.Tensor | None = None
        self.blocks = list(model.layers.values())
        self.norm, self.head = model.norm, model.output

    def run(self, tokens_BT: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        """Hidden states (B, T, D) of rows that begin at position `start`; `cache` is of `new_cache`."""
        B, T = tokens_BT.shape
        if cache is None:
            view_of = {window: attention.CausalView(B, T, window) for window in set(self._windows)}
            views = [view_of[window] for window in self._windows]
        else:
            metadata = cache.get_input_metadata([T] * B)
            views = [cache.get_view(layer, data) for layer, data in enumerate(metadata)]
        rotary = self._rotary(start + T)[start:].repeat(B, 1)
        hidden = self._model.tok_embeddings(tokens_BT.flatten())
        for block, view in zip(self.blocks, views, strict=True):
            hidden = block(hidden, rotary, view)
        if cache is not None:
            cache.update_seqlens([T] * B)
        if self._model.norm is not None:
            hidden = self._model.norm(hidden)
        return hidden.view(B, T, -1)

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache; of a layer with a sliding window it keeps the window only."""
        from mistral_inference.cache import BufferCache

        windows = [length if window is None else min(window, length) for window in self._windows]
        heads, width = self._args.n_kv_heads, self._args.head_dim
        return BufferCache(len(windows), rows, length, heads, width, windows).to(self._device, self._dtype)

    def _rotary(self, length: int) -> torch.Tensor:
        """Rotary factors (length, head_dim / 2), from a table that grows with the longest row seen."""
        from mistral_inference.rope import precompute_freqs_cis

        if self._rotary_table is None or len(self._rotary_table) < length:
            size = 1 << max(10, (length - 1).bit_length())
            table = precompute_freqs_cis(self._args.head_dim, size, self._theta)
            self._rotary_table = table.to(self._device)
        return self._rotary_table[:length]


class Transformers:
    """A Mistral or Mixtral of a Hugging Face folder."""

    def __init__(self, folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype):
        with _quiet_transformers():
            from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
            from transformers.utils import is_accelerate_available

            config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
            if last_layer is not None:
                # Layers beyond the configuration stay in the file, and so does the output matrix
                config.num_hidden_layers = last_layer + 1
            loader = AutoModelForCausalLM if last_layer is None else AutoModel
            on_device = device.type != "cpu" and is_accelerate_available()
            model, report = loader.from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
                device_map={"": device} if on_device else None,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the report names the tensor, the error would not
                output_loading_info=True,
            )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ModelError(f"{folder.path} has no tensor {missing[0]} ({len(missing)} missing): get the whole model")
        if report["mismatched_keys"]:
            name, found, expected = sorted(report["mismatched_keys"])[0]
            raise ModelError(
                f"{name} in {folder.path} has shape {tuple(found)}: expected {tuple(expected)} by "
                "config.json, which belongs to another model or was edited"
            )
        model = model.to(device).eval().requires_grad_(False)
        self._config = config
        self._body = model if last_layer is not None else model.model
        self.blocks = list(self._body.layers)
        self.norm: nn.Module | None = None if last_layer is not None else self._body.norm
        self.head: nn.Module | None = None if last_layer is not None else model.lm_head
        # transformers 5.24 renamed it, and warns of the old name
        renamed = "cache" in inspect.signature(self._body.forward).parameters
        self._cache = "cache" if renamed else "past_key_values"

    def run(self, tokens_BT: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        """Hidden states (B, T, D); the cache knows where the rows begin."""
        given = {self._cache: cache, "use_cache": cache is not None}
        return self._body(input_ids=tokens_BT, **given).last_hidden_state

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache, which grows as it is used."""
        from transformers import DynamicCache

        return DynamicCache(config=self._config)


def _windows(params: dict[str, Any]) -> list[int | None]:
    """The sliding window of each layer, None for full attention; a shorter list is a pattern."""
    window = params.get("sliding_window") or params.get("_sliding_window")
    pattern = window if isinstance(window, list) else [window]
    return [pattern[layer % len(pattern)] for layer in range(params["n_layers"])]


def _read_tensors(
    folder: ModelFolder, names: list[str], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The named tensors and no others, straight to the device."""
    from safetensors import safe_open

    tensors = {}
    with ExitStack() as stack:
        files = {}
        for name in names:
            path, _ = folder.tensors[name]
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, "pt", device=str(device)))
            tensors[name] = files[path].get_tensor(name).to(dtype)
    return tensors


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing a bar and from listing the layers that are left out on purpose."""
    from transformers.utils import logging as library

    logger = logging.getLogger("transformers")
    level, bars = logger.level, library.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    library.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            library.enable_progress_bar()
