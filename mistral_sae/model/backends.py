"""The two libraries that run a Mistral, behind what `LanguageModel` needs of them.

mistral-inference calls xformers' `memory_efficient_attention`, which does not run on a CPU and whose compiled part
loads only with the PyTorch it was built for. The function of that name below takes its place, through PyTorch's scaled
dot product attention; of xformers only the descriptions of masks, which are plain Python, stay in use.

Shapes: B rows, T positions, D model width; in attention Q queries a row, K keys a row, H heads, E width of a head, S
and N queries and keys of all rows.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from mistral_sae.model.folder import MISTRAL_INFERENCE, ModelError, ModelFolder, check_tensors, misshapen


class Backend(Protocol):
    """A model, or its first layers, in one of the libraries."""

    blocks: list[nn.Module]  # the loaded layers
    norm: nn.Module | None  # the final norm; None where only the first layers are loaded
    head: nn.Linear | None  # its output to logits; None where it is not loaded

    def run(self, tokens_BT: Tensor, start: int, cache: Any) -> Tensor:
        """The final norm's output (B, T, D), or the last loaded layer's, of rows that begin at position `start`."""

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache for `run`."""


def load_backend(folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The model of a folder, or its embedding and layers 0..last_layer. Raises ModelError."""
    kind = MistralInference if folder.spec.backend == MISTRAL_INFERENCE else Transformers
    return kind(folder, last_layer, device, dtype)


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Let a library log nothing below an error: what it advises at load plays no part here."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Transformers:
    """A Mistral or Mixtral of a Hugging Face folder."""

    def __init__(self, folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype):
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        from transformers.utils import is_accelerate_available
        from transformers.utils import logging as library

        config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
        if last_layer is not None:
            config.num_hidden_layers = last_layer + 1  # the other layers stay in the file
        loader: Any = AutoModelForCausalLM if last_layer is None else AutoModel
        has_bars = library.is_progress_bar_enabled()
        library.disable_progress_bar()
        try:
            with quiet("transformers"):  # it lists the layers that are left out on purpose
                model, report = loader.from_pretrained(
                    folder.path,
                    config=config,
                    dtype=dtype,
                    device_map={"": device} if device.type != "cpu" and is_accelerate_available() else None,
                    attn_implementation="sdpa",
                    local_files_only=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # the report names the tensor, the error would not
                    output_loading_info=True,
                )
        finally:
            if has_bars:
                library.enable_progress_bar()
        for name in sorted(report["missing_keys"]):
            raise ModelError(f"{folder.path} has no tensor {name}: get the whole model")
        for name, found, expected in sorted(report["mismatched_keys"]):
            raise misshapen(folder, name, tuple(found), tuple(expected))
        model = model.to(device).eval().requires_grad_(False)
        self._config = config
        self._body = model.model if last_layer is None else model
        self.blocks = list(self._body.layers)
        self.norm: nn.Module | None = self._body.norm if last_layer is None else None
        self.head: nn.Linear | None = model.lm_head if last_layer is None else None
        # transformers 5.24 renamed it, and warns of the old name
        renamed = "cache" in inspect.signature(self._body.forward).parameters
        self._cache = "cache" if renamed else "past_key_values"

    def run(self, tokens_BT: Tensor, start: int, cache: Any) -> Tensor:
        """Hidden states (B, T, D)."""
        given = {self._cache: cache, "use_cache": cache is not None}  # which knows where the rows begin
        return self._body(input_ids=tokens_BT, **given).last_hidden_state

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache, which grows as it is used."""
        from transformers import DynamicCache

        return DynamicCache(config=self._config)


class MistralInference:
    """A model of a mistral-inference folder: dense, sliding-window or mixture-of-experts."""

    def __init__(self, folder: ModelFolder, last_layer: int | None, device: torch.device, dtype: torch.dtype):
        install_attention()
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
        # The sliding window of each layer, None for full attention; a shorter list is a pattern
        window = params.get("sliding_window") or params.get("_sliding_window")
        pattern = window if isinstance(window, list) else [window]
        self._windows = [pattern[layer % len(pattern)] for layer in range(args.n_layers)]
        # Mistral 7B v0.1, the one with a sliding window, has 10,000, which its params.json does not say
        self._theta = params.get("rope_theta") or (1e6 if self._windows[0] is None else 1e4)
        self._rotary = torch.empty(0)  # of as many positions as were needed so far, (N, head_dim / 2)
        self.blocks = list(model.layers.values())
        self.norm, self.head = model.norm, model.output

    def run(self, tokens_BT: Tensor, start: int, cache: Any) -> Tensor:
        """Hidden states (B, T, D)."""
        from mistral_inference.rope import precompute_freqs_cis

        B, T = tokens_BT.shape
        if len(self._rotary) < start + T:
            table = precompute_freqs_cis(self._args.head_dim, 2 * (start + T), self._theta)
            self._rotary = table.to(self._device)
        rotary = self._rotary[start : start + T].repeat(B, 1)
        views: list[Any]
        if cache is None:
            view_of = {window: CausalView(B, T, window) for window in set(self._windows)}
            views = [view_of[window] for window in self._windows]
        else:
            views = [cache.get_view(layer, data) for layer, data in enumerate(cache.get_input_metadata([T] * B))]
        hidden = self._model.tok_embeddings(tokens_BT.flatten())
        for block, view in zip(self.blocks, views, strict=True):
            hidden = block(hidden, rotary, view)
        if cache is not None:
            cache.update_seqlens([T] * B)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden.view(B, T, -1)

    def new_cache(self, rows: int, length: int) -> Any:
        """A KV cache; of a layer with a sliding window it keeps the window only."""
        from mistral_inference.cache import BufferCache

        windows = [length if window is None else min(window, length) for window in self._windows]
        heads, width = self._args.n_kv_heads, self._args.head_dim
        return BufferCache(len(windows), rows, length, heads, width, windows).to(self._device, self._dtype)


def _read_tensors(folder: ModelFolder, names: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The named tensors and no others, straight to the device."""
    with ExitStack() as stack:
        paths = {folder.tensors[name][0] for name in names}
        files = {path: stack.enter_context(safe_open(path, "pt", device=str(device))) for path in paths}
        return {name: files[folder.tensors[name][0]].get_tensor(name).to(dtype) for name in names}


# ---- attention for mistral-inference ----


def install_attention() -> None:
    """Let mistral-inference use this module's attention, in this process; a second call changes nothing."""
    with quiet("xformers"):  # it complains at import of compiled parts that are not used here
        from mistral_inference import transformer_layers

    transformer_layers.memory_efficient_attention = memory_efficient_attention


class CausalView:
    """What a block of mistral-inference needs of a cache when there is none: the causal mask.

    Without it the block calls attention with no mask at all, so that every token sees every other, of other
    rows too.
    """

    prefill = True

    def __init__(self, rows: int, length: int, window: int | None):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        mask = BlockDiagonalCausalMask.from_seqlens([length] * rows, device=torch.device("cpu"))
        self.mask = mask if window is None else mask.make_local_attention(window)

    def interleave_kv(self, key_NHE: Tensor, value_NHE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are: nothing lies before them."""
        return key_NHE, value_NHE

    def update(self, key_NHE: Tensor, value_NHE: Tensor) -> None:
        """Store nothing."""


def memory_efficient_attention(query_1SHE: Tensor, key_1NHE: Tensor, value_1NHE: Tensor, attn_bias: Any) -> Tensor:
    """Attention of flattened rows of equal length, each to its own keys only, (1, S, H, E) like the queries.

    `attn_bias` is one of xformers' causal block-diagonal masks: prefill with or without a sliding window, prefill
    after cached keys, and decoding over padded keys. Raises TypeError for any other mask, for none (that would be
    attention in both directions and across rows), and for rows of several lengths, which no model here is given.
    """
    from xformers.ops.fmha import attn_bias as masks

    to_bottom_right = masks.BlockDiagonalCausalFromBottomRightMask, masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
    if not isinstance(attn_bias, (masks.BlockDiagonalCausalMask, *to_bottom_right)):
        raise TypeError(f"found {type(attn_bias).__name__} as attention mask, expected a causal block-diagonal one")
    queries, keys = ([b - a for a, b in part.intervals()] for part in (attn_bias.q_seqinfo, attn_bias.k_seqinfo))
    B, Q, K = len(queries), queries[0], keys[0]
    if queries != [Q] * B or keys != [K] * B:
        raise TypeError(f"found rows of {queries} queries and {keys} keys, expected rows of equal length")
    query, key, value = (
        x.view(B, -1, *x.shape[2:])[:, :length].transpose(1, 2)  # keys may be padded
        for x, length in ((query_1SHE, Q), (key_1NHE, K), (value_1NHE, K))
    )
    offset = K - Q if isinstance(attn_bias, to_bottom_right) else 0
    window = getattr(attn_bias, "_window_size", None) or Q + offset
    needs_no_mask = Q + offset == K <= window and (Q == 1 or offset == 0)  # one query, or what PyTorch calls causal
    seen_QK = None
    if not needs_no_mask:
        last = torch.arange(Q, device=query.device)[:, None] + offset
        position = torch.arange(K, device=query.device)
        seen_QK = (position <= last) & (position > last - window)
    out_BHQE = F.scaled_dot_product_attention(query, key, value, seen_QK, is_causal=needs_no_mask and offset == 0)
    return out_BHQE.transpose(1, 2).reshape(query_1SHE.shape)
