"""A frozen Mistral and its tokenizer, from a mistral-inference or a Hugging Face folder.

    model = load_model("path/to/model", last_layer=16)
    x_BTD = model.residuals(tokens_BT, layer=16)

Shapes: B rows, T positions, D model width, V vocabulary. Rows have equal length and never see each other.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mistral_sae.cli import not_finite
from mistral_sae.files import hash_of
from mistral_sae.model.engines import Engine, load_engine, open_folder
from mistral_sae.model.folder import ModelSpec, check_layer
from mistral_sae.model.hooks import edit_residual, read_residuals
from mistral_sae.model.params import NAMES
from mistral_sae.model.source import ModelError
from mistral_sae.model.tokenizer import Tokenizer, load_tokenizer

__all__ = ["STANDIN", "LanguageModel", "ModelError", "ModelSpec", "Tokenizer", "inspect", "load_model"]

STANDIN = Path(__file__).parent.parent / "standin"  # the bundled model
FINGERPRINTED = ["attention_norm", "attention.wv", "attention.wo", "ffn_norm"]  # alike in both engines
DRIVER = Path("/proc/driver/nvidia/version")  # is there where NVIDIA's driver is loaded
UNEMBEDDED = 2**14  # rows of the output matrix that are in float32 at a time


class Row(NamedTuple):
    """A text that is to go on, and how its next tokens are drawn."""

    ids: Sequence[int]  # its BOS first
    temperature: float  # 0 takes the likeliest token
    generator: torch.Generator  # on the CPU, so that a seed means the same on all devices

    @classmethod
    def of(cls, ids: Sequence[int], temperature: float, seed: int) -> Row:
        """One whose tokens are the same for the same seed."""
        return cls(ids, temperature, torch.Generator().manual_seed(seed))

    def after(self, ids: Sequence[int]) -> Row:
        """The row when these tokens have been drawn."""
        for _ in ids if self.temperature else ():
            torch.rand(1, generator=self.generator)
        return self._replace(ids=[*self.ids, *ids])


class NotFinite(ModelError):
    """A model whose residuals or logits are not finite."""


class LanguageModel:
    """A Mistral in evaluation mode, without gradients; `load_model` makes one.

    Attributes:
        name: the folder's name.
        spec: what was known of it before it was loaded.
        engine: the library that runs it, "mistral-inference" or "transformers".
        d_model, n_layers, vocab_size: sizes of the whole model.
        context_length: positions that it was made for; None if its folder does not say so.
        last_layer: the last layer that was loaded, or None if all of the model was.
        device, dtype: of the weights and the residuals.
        special_ids: of BOS, EOS, padding and what else was asked for, whose residuals say nothing.
        span: (B, T, start) of the forward in progress, or the last one, start being the position of its first token.
        tokens_BT: its tokens.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        engine: Engine,
        last_layer: int | None,
        device: torch.device,
        dtype: torch.dtype,
        special_ids: Sequence[int] = (),
    ):
        self.spec, self.name, self.engine = spec, spec.name, spec.engine
        self.d_model, self.n_layers = spec.d_model, spec.n_layers
        self.vocab_size, self.context_length = spec.vocab_size, spec.context_length
        self.tokenizer, self._engine, self.last_layer = tokenizer, engine, last_layer
        self.device, self.dtype, self.special_ids = device, dtype, list(special_ids)
        on_cpu = torch.tensor(self.special_ids, dtype=torch.long)
        self._special = {"cpu": on_cpu, device.type: on_cpu.to(device)}
        self.span, self.tokens_BT = (0, 0, 0), torch.zeros(0, 0, dtype=torch.long)

    def kept(self, tokens_BT: Tensor) -> Tensor:
        """Where residuals are trained on, scored and steered (B, T): not at the first position, nor at special tokens.

        The norms there are up to a hundred times the others', and say nothing.
        """
        kept_BT = ~self._is_special(tokens_BT)
        kept_BT[:, 0] = False
        return kept_BT

    @property
    def special_BT(self) -> Tensor:
        """Which tokens of the forward in progress are special."""
        return self._is_special(self.tokens_BT)

    def _is_special(self, tokens_BT: Tensor) -> Tensor:
        return torch.isin(tokens_BT, self._special[tokens_BT.device.type])

    def block(self, layer: int) -> nn.Module:
        """The module whose output is blocks.{layer}.hook_resid_post; ModelError if it is not loaded."""
        check_layer(self.spec, layer)
        if layer >= len(self._engine.blocks):
            loaded = f"{self.last_layer}, as {self.name} was loaded with last_layer={self.last_layer}"
            raise ModelError(f"found layer {layer}: expected 0 to {loaded}; load more of it")
        return self._engine.blocks[layer]

    def weights(self) -> Iterator[nn.Parameter]:
        """All weights that are loaded, as they lie in memory."""
        return self._engine.model.parameters()

    def fingerprint(self, layer: int) -> str:
        """A hash of sizes and of a few rows of each of layers 0..layer, the same whatever engine and dtype run it."""
        rows = {}
        for i in range(layer + 1):
            weights = dict(self.block(i).named_parameters())
            for name in FINGERPRINTED:
                theirs = f"{NAMES[name]}.weight"
                weight = weights[theirs] if theirs in weights else weights[f"{name}.weight"]
                rows[f"{i}.{name}"] = (weight if weight.ndim == 1 else weight[:4]).to(torch.bfloat16)
        return hash_of((self.d_model, self.n_layers, self.vocab_size), rows)[:16]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in float32, of token ids on any device. Raises ModelError.

        Ids that come from the CPU, where that costs no wait for a GPU, are checked against the vocabulary.
        """
        return self._logits(self._run(tokens_BT))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32 of what the model's last layer and norm give (..., D)."""
        _, head = self._output(of_all_layers=True)
        with torch.no_grad():
            return head(hidden).float()

    def log_probabilities(
        self, tokens_BT: Tensor, layer: int | None = None, replace: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Log-probabilities (B, T - 1, V) in float32 of the token after each position but the last.

        With `replace` the residual (B, T - 1, D) after `layer` becomes `replace(residual)` at the positions of `kept`.
        Raises ModelError.
        """
        if layer is None or replace is None:
            return self.forward(tokens_BT)[:, :-1].log_softmax(dim=-1)
        with edit_residual(self, layer, replace, first_position=1, special=False):
            return self.log_probabilities(tokens_BT)

    def check_finite(self, numbers: Tensor, what: str) -> None:
        """Raise NotFinite if some of the model's residuals or logits are not finite; waits for their device."""
        if not bool(numbers.isfinite().all()):
            if self.dtype == torch.float16:
                do = "float16 ends at 65,504, set DTYPE to bfloat16 or float32"
            else:
                do = "its weights are damaged, get them again"
            raise NotFinite(not_finite(f"the {what} of {self.name}", do))

    def unembed(self, x_ND: Tensor) -> Tensor:
        """Logits (N, V) in float32 of vectors as if each were the residual after the last layer: the logit lens.

        Through the final norm and the output matrix, so the vectors' lengths play no part (nostalgebraist 2020,
        "interpreting GPT: the logit lens"). Computed in float32 whatever the model's dtype: bfloat16 has ties among
        the strongest ten. Raises ModelError unless the whole model is loaded, or the head beside its first layers.
        """
        norm, head = self._output()
        with torch.no_grad():
            x_ND = norm(x_ND.to(self.device, torch.float32))
            parts = head.weight.split(UNEMBEDDED)
            return torch.cat([x_ND @ part_VD.float().T for part_VD in parts], dim=1)

    def _output(self, of_all_layers: bool = False) -> tuple[nn.Module, nn.Linear]:
        """The final norm and the output matrix. Raises ModelError where they, or layers before them, are left out."""
        is_cut = of_all_layers and self.last_layer is not None
        if self._engine.norm is None or self._engine.head is None or is_cut:
            raise ModelError(f"{self.name} was loaded with last_layer={self.last_layer}: logits need the whole model")
        return self._engine.norm, self._engine.head

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, BOS first."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def residuals(self, tokens_BT: Tensor | list[list[int]], layer: int) -> Tensor:
        """The residual stream after `layer`, (B, T, D) in the model's dtype; later layers do not run."""
        return self.residuals_by_layer(tokens_BT, [layer])[layer]

    def residuals_by_layer(self, tokens_BT: Tensor | list[list[int]], layers: Collection[int]) -> dict[int, Tensor]:
        """The same of several layers in one forward, by layer."""
        with read_residuals(self, layers) as residuals:
            self._run(torch.as_tensor(tokens_BT))
        return residuals

    def generate(
        self, prompt_ids: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Token ids that continue a prompt (which has its BOS), up to `max_tokens` or the EOS, not included.

        Temperature 0 takes the likeliest token; otherwise the same ones are drawn for the same seed. Hooks must be in
        place while the iterator is consumed. Raises ModelError for an empty prompt or a negative temperature.
        """
        for (id,) in self.next_tokens([Row.of(prompt_ids, temperature, seed)], max_tokens):
            yield id

    def sample(
        self,
        prompt_ids: Sequence[int],
        seeds: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        progress: Callable[[Iterator[list[int]]], Iterable[list[int]]] = iter,
        begun: Sequence[Sequence[int]] = (),
    ) -> list[list[int]]:
        """Continuations of one prompt, one for each seed, made in one batch: each as `generate` makes it.

        `progress`, such as tqdm, is given the tokens of all rows as they come. `begun` are the first tokens of each,
        where they are known: those that all have are not made again, but for the last of all.
        """
        known = min([max_tokens - 1, *map(len, begun)]) if begun else 0
        rows = [Row.of(prompt_ids, temperature, seed) for seed in seeds]
        if begun:
            rows = [row.after(ids[:known]) for row, ids in zip(rows, begun, strict=True)]
        steps = list(progress(self.next_tokens(rows, max_tokens - known)))
        new_by_seed = ([ids[row] for ids in steps] for row in range(len(seeds)))
        ids_by_seed = ([*row.ids[len(prompt_ids) :], *new] for row, new in zip(rows, new_by_seed, strict=True))
        return [list(itertools.takewhile(lambda id: id != self.tokenizer.eos_id, ids)) for ids in ids_by_seed]

    def next_tokens(self, rows: Sequence[Row], max_tokens: int) -> Iterator[list[int]]:
        """The next token of each row, a step at a time, until all rows have had their EOS; as `generate`.

        Rows that are shorter than the longest are padded with BOS on the left, so that all of them end together.
        """
        if not all(row.ids for row in rows):
            raise ModelError("found an empty prompt: expected at least the BOS token")
        if (least := min(row.temperature for row in rows)) < 0:
            raise ModelError(f"found temperature {least}: expected 0 or more")
        longest = max(len(row.ids) for row in rows)
        padding = [longest - len(row.ids) for row in rows]
        padding_B = torch.tensor(padding, device=self.device) if any(padding) else None
        cache, start = self._engine.new_cache(len(rows), longest + max_tokens), 0
        bos, ended = [self.tokenizer.bos_id], [False] * len(rows)
        tokens_BT = torch.tensor([bos * n + [*row.ids] for n, row in zip(padding, rows, strict=True)])
        for _ in range(max_tokens):
            logits_BV = self._logits(self._run(tokens_BT, start, cache, padding_B)[:, -1]).cpu()
            self.check_finite(logits_BV, "logits")
            ids = [choose_token(logits_V, row) for logits_V, row in zip(logits_BV, rows, strict=True)]
            ended = [before or id == self.tokenizer.eos_id for before, id in zip(ended, ids, strict=True)]
            if all(ended):
                return
            yield ids
            start += tokens_BT.shape[1]
            tokens_BT = torch.tensor(ids)[:, None]

    def _run(self, tokens_BT: Tensor, start: int = 0, cache: Any = None, padding_B: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) after the last loaded layer; every forward comes through here."""
        if tokens_BT.ndim != 2 or not tokens_BT.numel():
            raise ModelError(f"found tokens of shape {tuple(tokens_BT.shape)}: expected (rows, positions)")
        if tokens_BT.device.type == "cpu":
            for id in tokens_BT.min().item(), tokens_BT.max().item():
                if not 0 <= id < self.vocab_size:
                    expected = f"0 to {self.vocab_size - 1}, the vocabulary of {self.name}"
                    raise ModelError(f"found token id {id}: expected {expected}; use the model's own tokenizer")
        B, T = tokens_BT.shape
        tokens_BT = sent(tokens_BT, self.device)
        self.span, self.tokens_BT = (B, T, start), tokens_BT
        with torch.no_grad():
            return self._engine.run(tokens_BT, start, cache, padding_B)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, from pinned memory, which spares waiting for what a GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def inspect(path: str | Path, engine: str | None = None) -> ModelSpec:
    """Sizes of a model, before any weight is read, or fetched from the hub; `path` as of `load_model`.

    Raises ModelError for what that cannot load, as far as headers and tokenizer tell.
    """
    folder = open_folder(path, engine)
    load_tokenizer(folder)
    return folder.spec


def load_model(
    path: str | Path | None,
    *,
    last_layer: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str | None = None,
    exclude_tokens: Sequence[int | str] = (),
    head: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer: those of a folder, a .gguf file or owner/name on the hub; None is the stand-in.

    With `last_layer` only the embedding and layers 0..last_layer are read, which is what training needs, and with
    `head` the final norm and the output matrix, which `unembed` needs. `device` is by
    default CUDA if there is one, else the CPU; `dtype` (or its name) bfloat16 on CUDA, else float32; `engine`
    "mistral-inference" where that is installed and the folder is in its layout, else "transformers". `exclude_tokens`
    are ids or names of tokens that count as special beside BOS, EOS and padding. Raises ModelError.
    """
    folder = open_folder(STANDIN if path is None else path, engine, None if head else last_layer)
    spec = folder.spec
    if last_layer is not None:
        check_layer(spec, last_layer)
    tokenizer = load_tokenizer(folder)
    device, dtype = device_and_dtype(device, dtype)
    special_ids = tokenizer.special_ids(exclude_tokens)
    folder.fetch()
    loaded = load_engine(folder, last_layer, device, dtype, head)
    return LanguageModel(spec, tokenizer, loaded, last_layer, device, dtype, special_ids)


def device_and_dtype(
    device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """The torch device and dtype to use, found where they are None (see `load_model`). Raises ModelError."""
    name = str(device or ("cuda" if why_no_gpu() is None else "cpu"))
    if not re.fullmatch(r"mps|(cpu|cuda)(:[1-9]?\d)?", name):
        raise ModelError(f"found device {name!r}: expected cpu, cuda, cuda:0 or mps")
    found = torch.device(name)
    if found.type == "cuda":
        found = torch.device("cuda", found.index or 0)  # as tensors name it that are there
        if found.index >= torch.cuda.device_count():
            raise ModelError(f"found no CUDA device for {name!r}: use cpu, or a PyTorch built for your GPU's driver")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("found no Apple GPU for 'mps': use cpu, or a PyTorch built with it")
    name = str(dtype or ("bfloat16" if found.type == "cuda" else "float32")).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"found dtype {name}: expected float32, bfloat16 or float16")
    return found, getattr(torch, name)


def why_no_gpu() -> str | None:
    """Why a GPU of NVIDIA's cannot be used; "" if none is seen, None if one can be used."""
    with warnings.catch_warnings(record=True) as said:  # PyTorch warns, once, of a driver that is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not said and not DRIVER.exists():
        return ""
    return f"PyTorch {torch.__version__} cannot use the GPU: update its driver, or install a PyTorch built for it"


def choose_token(logits_V: Tensor, row: Row) -> int:
    """The next token's id, as `LanguageModel.generate` takes it."""
    if row.temperature == 0:
        return int(logits_V.argmax())
    up_to_V = torch.softmax(logits_V / row.temperature, dim=-1).cumsum(0, dtype=torch.float64)
    return int(torch.searchsorted(up_to_V, torch.rand(1, generator=row.generator) * up_to_V[-1], right=True))
