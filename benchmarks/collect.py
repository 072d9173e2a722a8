"""What collecting examples costs beside encoding, and that its memory does not grow with the corpus.

    python -m benchmarks.collect

Four parts. In the first, encoded tokens are made up: each has K active features, of densities that fall over three
decades as those of trained autoencoders do, in documents of 500 tokens. Millions of them go through the bookkeeping
alone; beside its time stands that of the encoder's product for as many tokens. In the second, the bookkeeping of such
tokens takes turns with the forward pass, language model up to the middle and encoder, of models of random weights: on
CUDA of Mistral 7B's own size, on a CPU of the smaller one of `steering_speed`. In the third, rows of the standard
library go through the stand-in and an autoencoder, by stages. The fourth says what Mistral 7B's settings ask of a
device in memory and operations. `--smoke` is a run of seconds that saves nothing.
"""

import sys
import time
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import DEVICE, MISTRAL_7B, SMOKE_MISTRAL, random_model, wall
from benchmarks.machine import save
from benchmarks.steering_speed import EXPANSION, QUARTER, K, random_autoencoder
from mistral_sae.data import tokens as text
from mistral_sae.explain.collect import Collector, Settings, encode
from mistral_sae.model import language_model as models
from mistral_sae.sae.autoencoder import SparseAutoencoder

THREADS = 2
T, DOCUMENT, VOCABULARY = 256, 500, 32_768
FULL = {"F": 32_768, "K": 64, "D": 1024, "rows": 32, "millions": [1, 2, 5, 10], "standin_rows": 1200}
SMOKE = {"F": 512, "K": 8, "D": 64, "rows": 4, "millions": [0.01, 0.02], "standin_rows": 16}
TURNS = 250 if DEVICE.type == "cuda" else 50  # of the forward pass and the bookkeeping, each a batch of rows
AT_7B = {"F": 131_072, "K": 128}


class MadeUp:
    """Rows of made-up documents with made-up activations, drawn from some that are kept, each batch scaled anew."""

    def __init__(self, size: dict[str, Any]):
        self.size, self.number = size, 0
        generator = torch.Generator().manual_seed(0)
        # By the inverse of 1/x's distribution; now and then a token has a feature twice, which counts as two firings
        shape = (8 * size["rows"], T, size["K"])
        uniform = torch.rand(shape, generator=generator)
        self.indices = ((1000**uniform - 1) / 999 * size["F"]).long().clamp_(max=size["F"] - 1)
        self.values = -torch.rand(shape, generator=generator).log_()
        self.tokens = np.random.default_rng(0).integers(3, VOCABULARY, (8 * size["rows"], T))

    def batch(self) -> tuple[list[text.Row], torch.Tensor, torch.Tensor]:
        """Rows, values and indices."""
        rows = []
        chosen = np.random.default_rng(self.number).integers(len(self.tokens), size=self.size["rows"])
        for row in chosen:
            document = (self.number * self.size["rows"] + len(rows)) * T // DOCUMENT
            places = np.zeros(T, dtype=np.int64)
            places[0] = -1
            rows.append(text.Row(self.tokens[row], places, [f"made-up document {document}"]))
        self.number += 1
        scale = 0.5 + torch.rand(1, generator=torch.Generator().manual_seed(self.number))
        return rows, self.values[chosen] * scale, self.indices[chosen]


def bookkeeping(size: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a token of bookkeeping, along the way, and the memory of the process at those points."""
    made_up, settings = MadeUp(size), Settings()
    collector = Collector(size["F"], VOCABULARY, settings, "cpu")
    process, tokens, seconds, rows = psutil.Process(), 0, 0.0, []
    print(f"\nbookkeeping alone, F={size['F']:,}, K={size['K']}: state {collector.bytes() / 1e6:,.0f} MB")
    for millions in size["millions"]:
        before, tokens_before = seconds, tokens
        while tokens < millions * 1e6:
            batch = made_up.batch()
            start = time.perf_counter()
            collector.add(*batch)
            seconds += time.perf_counter() - start
            tokens += size["rows"] * T
        figures = {
            "tokens": tokens,
            "microseconds_a_token": 1e6 * (seconds - before) / (tokens - tokens_before),
            "resident_megabytes": process.memory_info().rss / 1e6,
            "state_megabytes": collector.bytes() / 1e6,
            "documents_named": len(collector.names),
        }
        rows.append(figures)
        print(
            f"  {tokens:12,} tokens   {figures['microseconds_a_token']:6.2f} us a token since the line before   "
            f"{figures['resident_megabytes']:8,.0f} MB resident",
            flush=True,
        )
    return {"size": size, "along_the_way": rows, "encoder_microseconds_a_token": encoder(size)}


def encoder(size: dict[str, Any]) -> float:
    """Microseconds a token of the encoder at the same size."""
    sae = SparseAutoencoder(size["D"], size["F"], size["K"])
    sae.initialize(torch.zeros(2, size["D"]), seed=0)
    x = torch.randn(size["rows"], T, size["D"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encode(sae, x[:1])
        start = time.perf_counter()
        encode(sae, x)
        microseconds = 1e6 * (time.perf_counter() - start) / x[..., 0].numel()
    print(f"  {microseconds:.2f} us a token for the encoder, D={size['D']:,}")
    return microseconds


def beside_the_forward_pass(params: dict[str, Any], rows: int, turns: int) -> dict[str, Any]:
    """Seconds a batch of the forward pass and of the bookkeeping for it, each waited for: as if nothing overlapped."""
    layer, F = params["n_layers"] // 2, EXPANSION * params["dim"]
    lm = random_model(params, layer)
    sae = random_autoencoder(lm.d_model, layer, lm.device).sae
    made_up = MadeUp({"F": F, "K": min(K, F), "rows": rows})
    collector = Collector(F, lm.vocab_size, Settings(), lm.device)
    times = []
    with torch.no_grad():
        for _ in range(turns + 1):
            batch, *encoded = made_up.batch()
            tokens = torch.from_numpy(np.stack([row.tokens for row in batch])) % lm.vocab_size
            encoded = [tensor.to(lm.device) for tensor in encoded]
            start = wall()
            x = lm.residuals(tokens, layer)
            after_model = wall()
            encode(sae, x)
            after_encoder = wall()
            collector.add(batch, *encoded)
            times.append((after_model - start, after_encoder - after_model, wall() - after_encoder))
    collector.finish()
    model, encoder, bookkeeping = np.array(times[1:]).T  # the first is a warm-up
    forward = model + encoder
    last = slice(-(-turns // 4) * -1, None)
    found = {
        "sizes": {"D": lm.d_model, "layers": layer + 1, "F": F, "K": min(K, F), "tokens a batch": rows * T},
        "tokens": turns * rows * T,
        "forward_seconds": float(np.median(forward)),
        "of which the encoder": float(np.median(encoder)),
        "bookkeeping_seconds_of_the_last_quarter": float(np.median(bookkeeping[last])),
        "bookkeeping_over_forward": float(bookkeeping.sum() / forward.sum()),
        "bookkeeping_over_forward_in_the_last_quarter": float(bookkeeping[last].sum() / forward[last].sum()),
    }
    if lm.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(
        f"\nbeside the forward pass on {lm.device.type}, D={lm.d_model:,}, {layer + 1} layers, F={F:,}, K={min(K, F)}: "
        f"the bookkeeping of {found['tokens']:,} tokens adds {found['bookkeeping_over_forward']:.1%}, of the last "
        f"quarter {found['bookkeeping_over_forward_in_the_last_quarter']:.1%}"
    )
    return found


def standin(size: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a token of each stage of the real chain on the stand-in, with an autoencoder as it starts out."""
    lm, settings = models.load(None, device="cpu"), Settings()
    sae = SparseAutoencoder(lm.d_model, 8192, 32)
    corpus = text.Corpus("stdlib", context_length=T)
    start = time.perf_counter()
    rows = list(islice(corpus.rows_with_documents(lm.tokenizer, held_out=True), size["standin_rows"]))
    seconds = {"reading and tokenizing": time.perf_counter() - start, "language model to layer 2": 0.0}
    seconds |= {"encoder": 0.0, "bookkeeping": 0.0}
    collector = Collector(sae.n_features, lm.vocab_size, settings, "cpu")
    with torch.no_grad():
        for batch in (rows[i : i + 16] for i in range(0, len(rows), 16)):
            times = [time.perf_counter()]
            x = lm.residuals(torch.from_numpy(np.stack([row.tokens for row in batch])), 2)
            times.append(time.perf_counter())
            if not collector.n_rows:
                sae.initialize(sae.standardize(x[:, 1:].flatten(0, 1))[0], seed=0)
                times[-1] = time.perf_counter()
            encoded = encode(sae, x)
            times.append(time.perf_counter())
            collector.add(batch, *encoded)
            times.append(time.perf_counter())
            for name, begin, end in zip(list(seconds)[1:], times[:-1], times[1:], strict=True):
                seconds[name] += end - begin
        start = time.perf_counter()
        collector.finish()
        seconds["choosing at the end"] = time.perf_counter() - start
    tokens = len(rows) * T
    print(f"\nthe stand-in, {tokens:,} tokens, F=8,192, K=32, in {sum(seconds.values()):.1f} s")
    for name, value in seconds.items():
        print(f"  {name:28}{1e6 * value / tokens:8.2f} us a token")
    return {"tokens": tokens, "seconds": seconds}


class Operations(TorchDispatchMode):
    """Counts the operations that run inside, views and empty tensors aside: most start one kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not (operation.is_view or "empty" in operation.name())
        return operation(*args, **(kwargs or {}))


def operations(size: dict[str, Any], batches: int) -> int:
    """The most operations that the bookkeeping of a batch takes."""
    made_up, collector, counts = MadeUp(size), Collector(size["F"], VOCABULARY, Settings(), "cpu"), []
    for _ in range(batches):
        with Operations() as operations:
            collector.add(*made_up.batch())
        counts.append(operations.count)
    return max(counts)


def at_7b() -> dict[str, Any]:
    """What Mistral 7B's settings ask of a device: memory, computed on one without any, and operations a batch.

    Of these there are as many whatever the sizes, so that they are counted at small ones.
    """
    settings = Settings()
    state = Collector(AT_7B["F"], VOCABULARY, settings, "meta").bytes()
    pool = settings.pool_rows * T * AT_7B["K"] * 6
    count = operations(SMOKE, batches=12)
    print(
        f"\nat F={AT_7B['F']:,}, K={AT_7B['K']}: state {state / 1e9:.2f} GB, pool of rows {pool / 1e9:.2f} GB, "
        f"{count} operations a batch"
    )
    return {"state_gigabytes": state / 1e9, "pool_gigabytes": pool / 1e9, "operations_a_batch": count}


def main() -> None:
    """All parts."""
    smoke = sys.argv[1:] == ["--smoke"]
    if not smoke:  # which may have to share the cores with others
        torch.set_num_threads(THREADS)
    size = SMOKE if smoke else FULL
    params = SMOKE_MISTRAL if smoke else MISTRAL_7B if DEVICE.type == "cuda" else QUARTER
    found = {
        "bookkeeping": bookkeeping(size),
        "beside the forward pass": beside_the_forward_pass(params, size["rows"], 4 if smoke else TURNS),
        "standin": standin(size),
        "at 131,072 features": at_7b(),
    }
    if not smoke:
        save("collect", found)


if __name__ == "__main__":
    main()
