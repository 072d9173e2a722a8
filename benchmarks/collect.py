"""What writing the cache of activations costs beside model and encoder, that its memory does not grow, and reading it.

    python -m benchmarks.collect

Three parts. In the first, made-up activations of millions of tokens are written: each token has K active features, of
densities that fall over three decades as those of trained autoencoders do, in documents of 500 tokens; beside the
writing stands the encoder. In the second, writing takes turns with the forward pass, language model up to the middle
and encoder, of models of random weights: on CUDA of Mistral 7B's own size, on a CPU of the smaller one of
`steering_speed`. In the third, rows of the standard library go through the stand-in and an autoencoder, by stages, and
200 features are read. `--smoke` is a run of seconds that saves nothing.
"""

import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.clock import DEVICE, wall
from benchmarks.machine import save
from benchmarks.random_mistral import MISTRAL_7B, SMOKE_MISTRAL, random_model
from benchmarks.steering_speed import QUARTER, random_autoencoder
from mistral_sae.data.tokens import Corpus, Row
from mistral_sae.explain import cache
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import Encoded, SparseAutoencoder
from mistral_sae.sae.kernels.step import bf16_pays

THREADS = 2
T, DOCUMENT, VOCABULARY = 256, 500, 32_768
FULL = {"F": 32_768, "K": 64, "D": 1024, "rows": 32, "millions": [1, 2, 5, 10], "standin_rows": 1200, "features": 200}
SMOKE = {"F": 512, "K": 8, "D": 64, "rows": 4, "millions": [0.01, 0.02], "standin_rows": 16, "features": 5}
MADE_FROM: dict[str, Any] = dict.fromkeys(cache.OTHER, "a benchmark")
TOKENIZER = SimpleNamespace(bos_id=1, eos_id=2)


class MadeUp:
    """Rows of made-up documents, and a model and autoencoder that give them made-up activations."""

    activation, tokenizer = "topk", TOKENIZER
    W_dec = torch.empty(0)  # which says on which device it is

    def __init__(self, size: dict[str, Any]):
        self.n_features, self.number = size["F"], 0
        generator = torch.Generator().manual_seed(0)
        shape = (8 * size["rows"] * T, size["K"])
        uniform = torch.rand(shape, generator=generator)  # densities by the inverse of 1/x's distribution
        self.indices = ((1000**uniform - 1) / 999 * size["F"]).long().clamp_(max=size["F"] - 1)
        self.values = -torch.rand(shape, generator=generator).log_()
        self.tokens = np.random.default_rng(0).integers(3, VOCABULARY, (8 * size["rows"], T))

    def row(self) -> Row:
        """The next row."""
        self.number += 1
        name = f"made-up document {self.number * T // DOCUMENT}"
        return Row(self.tokens[self.number % len(self.tokens)], np.r_[-1, np.zeros(T - 1, dtype=np.int64)], [name])

    def kept(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """All but the first position."""
        return torch.arange(T).expand_as(tokens_BT) > 0

    def residuals(self, tokens_BT: torch.Tensor, layer: int) -> torch.Tensor:
        """Nothing, of the right shape."""
        return torch.zeros(*tokens_BT.shape, 1)

    def check_finite(self, numbers: torch.Tensor, what: str) -> None:
        """The check that a model makes of its residuals; nothing to find here."""

    def encode(self, x: torch.Tensor, *, bf16: bool) -> Encoded:
        """Some of the activations that were made up."""
        start = np.random.default_rng(self.number).integers(len(self.values) - len(x) + 1)
        part = slice(start, start + len(x))
        return Encoded(self.values[part], self.indices[part], x, x)


def bookkeeping(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Microseconds a token of writing, along the way, and the memory of the process at those points."""
    made_up, process, along = MadeUp(size), psutil.Process(), []
    print(f"\nwriting alone, F={size['F']:,}, K={size['K']}")

    def rows():
        before, tokens, start = 0, 0, time.perf_counter()
        for millions in size["millions"]:
            while tokens < millions * 1e6:
                yield made_up.row()
                tokens += T
            figures = {
                "tokens": tokens,
                "microseconds_a_token": 1e6 * (time.perf_counter() - start) / (tokens - before),
                "resident_megabytes": process.memory_info().rss / 1e6,
            }
            along.append(figures)
            print(
                f"  {tokens:12,} tokens   {figures['microseconds_a_token']:6.2f} us a token since the line before   "
                f"{figures['resident_megabytes']:8,.0f} MB resident",
                flush=True,
            )
            before, start = tokens, time.perf_counter()

    cache.write(folder, MADE_FROM, rows(), made_up, made_up, 0, size["rows"])
    disk = sum(path.stat().st_size for path in folder.iterdir())
    print(f"  {disk / 1e6:,.0f} MB on disk, {disk / along[-1]['tokens']:,.0f} bytes a token")
    return {
        "size": size,
        "along_the_way": along,
        "bytes_a_token": disk / along[-1]["tokens"],
        "encoder_microseconds_a_token": encoder(size),
    }


def encoder(size: dict[str, Any]) -> float:
    """Microseconds a token of the encoder at the same size."""
    sae = SparseAutoencoder(size["D"], size["F"], size["K"])
    sae.initialize(torch.zeros(2, size["D"]), seed=0)
    x = torch.randn(size["rows"] * T, size["D"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.encode(x[:T], bf16=bf16_pays(x.device))
        start = time.perf_counter()
        sae.encode(x, bf16=bf16_pays(x.device))
        microseconds = 1e6 * (time.perf_counter() - start) / len(x)
    print(f"  {microseconds:.2f} us a token for the encoder, D={size['D']:,}")
    return microseconds


class Timed:
    """A model and an autoencoder whose time is measured, each call waited for: as if nothing overlapped."""

    def __init__(self, model, sae, tokenizer):
        self.model, self.sae, self.tokenizer = model, sae, tokenizer
        self.n_features, self.activation, self.W_dec = sae.n_features, sae.activation, sae.W_dec
        self.seconds = {"language model": 0.0, "encoder": 0.0}

    def kept(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As the model says."""
        return self.model.kept(tokens_BT)

    def residuals(self, tokens_BT: torch.Tensor, layer: int) -> torch.Tensor:
        """Those of the model."""
        return self._timed("language model", lambda: self.model.residuals(tokens_BT % self.model.vocab_size, layer))

    def check_finite(self, numbers: torch.Tensor, what: str) -> None:
        """As the model does."""
        self.model.check_finite(numbers, what)

    def encode(self, x: torch.Tensor, *, bf16: bool) -> Encoded:
        """As the autoencoder does."""
        return self._timed("encoder", lambda: self.sae.encode(x, bf16=bf16))

    def _timed(self, name: str, work):
        start = wall()
        done = work()
        self.seconds[name] += wall() - start
        return done

    def write(self, folder: Path, rows, layer: int, rows_per_forward: int) -> dict[str, float]:
        """Seconds of a pass by stage."""
        start = wall()
        cache.write(folder, MADE_FROM, rows, self, self, layer, rows_per_forward)
        return self.seconds | {"writing": wall() - start - sum(self.seconds.values())}


def beside_the_forward_pass(params: dict[str, Any], rows: int, shards: int, folder: Path) -> dict[str, Any]:
    """What writing adds to the forward pass, in whole shards of random rows."""
    layer = params["n_layers"] // 2
    model = random_model(params, layer, DEVICE)
    sae = random_autoencoder(model.d_model, layer, model.device).sae
    made_up = MadeUp({"F": sae.n_features, "K": sae.k, "rows": rows})
    n_rows = max(rows, shards * cache.SHARD_TOKENS // T)
    Timed(model, sae, TOKENIZER).write(folder / "warm", (made_up.row() for _ in range(rows)), layer, rows)
    seconds = Timed(model, sae, TOKENIZER).write(folder / "full", (made_up.row() for _ in range(n_rows)), layer, rows)
    forward = seconds["language model"] + seconds["encoder"]
    found = {
        "sizes": {"D": model.d_model, "layers": layer + 1, "F": sae.n_features, "K": sae.k, "tokens a batch": rows * T},
        "tokens": n_rows * T,
        "seconds": seconds,
        "writing_over_forward": seconds["writing"] / forward,
    }
    if model.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(
        f"\nbeside the forward pass on {model.device.type}, D={model.d_model:,}, {layer + 1} layers, "
        f"F={sae.n_features:,}, K={sae.k}: writing {found['tokens']:,} tokens adds {found['writing_over_forward']:.1%}"
    )
    return found


def standin(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Microseconds a token of each stage on the stand-in, with an autoencoder as it starts out, and of reading."""
    model = load_model(None, device="cpu")
    sae = SparseAutoencoder(model.d_model, 8192, 32)
    start = time.perf_counter()
    rows = list(islice(Corpus("stdlib").rows(model.tokenizer, held_out=True), size["standin_rows"]))
    seconds = {"reading and tokenizing": time.perf_counter() - start}
    x = model.residuals(torch.from_numpy(np.stack([row.tokens for row in rows[:16]], dtype=np.int64)), 2)
    sae.initialize(sae.standardize(x[:, 1:].flatten(0, 1))[0], seed=0)
    seconds |= Timed(model, sae, model.tokenizer).write(folder, rows, 2, 16)
    start = time.perf_counter()
    found, why = cache.open_cache(folder, MADE_FROM)
    assert found is not None, why
    list(FeatureRecords(found, range(size["features"]), model, sae, Settings()))
    seconds[f"records of {size['features']} features"] = time.perf_counter() - start
    tokens = len(rows) * T
    print(f"\nthe stand-in, {tokens:,} tokens, F=8,192, K=32, in {sum(seconds.values()):.1f} s")
    for name, value in seconds.items():
        print(f"  {name:28}{1e6 * value / tokens:8.2f} us a token")
    return {"tokens": tokens, "seconds": seconds}


def main() -> None:
    """All parts."""
    smoke = sys.argv[1:] == ["--smoke"]
    if not smoke:  # which may have to share the cores with others
        torch.set_num_threads(THREADS)
    size = SMOKE if smoke else FULL
    params = SMOKE_MISTRAL if smoke else MISTRAL_7B if DEVICE.type == "cuda" else QUARTER
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "bookkeeping": bookkeeping(size, Path(folder, "made up")),
            "beside the forward pass": beside_the_forward_pass(
                params, size["rows"], 0 if smoke else 4, Path(folder, "random")
            ),
            "standin": standin(size, Path(folder, "standin")),
        }
    if not smoke:
        save("collect", found)


if __name__ == "__main__":
    main()
