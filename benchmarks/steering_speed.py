"""What steering adds to the time of a generated token.

    python -m benchmarks.steering_speed

Text is generated one token at a time with a KV cache, by models of random weights made on the device, with and without
an edit of one layer, which take turns in chunks of tokens so that a machine that slows down slows both; figures are
medians over chunks. Autoencoders have 32 times the model's width in features, like those for Mistral 7B. On a CPU the
models are the stand-in's size and one of an eighth of Mistral 7B's layers at a quarter of its width, beside which an
edit weighs more than beside the whole; on CUDA, Mistral 7B's own size is measured as well. `--smoke` runs tiny sizes
and saves nothing.
"""

import gc
import statistics
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.clock import DEVICE, wall
from benchmarks.machine import save
from benchmarks.random_mistral import MISTRAL_7B, SMOKE_MISTRAL, random_model
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata
from mistral_sae.steer.steering import steer

EXPANSION, K = 32, 128  # features over the model's width, active features
PROMPT, CHUNK = 32, 16  # tokens
ROUNDS = 25
THREADS = 1  # a machine with other work on it measures one thread well, and two badly
QUARTER = MISTRAL_7B | {"dim": 1024, "n_layers": 4, "hidden_dim": 3584, "n_heads": 8, "n_kv_heads": 2}
STANDIN = MISTRAL_7B | {
    "dim": 256, "n_layers": 6, "head_dim": 64, "hidden_dim": 704, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 4096,
}  # fmt: skip


def random_autoencoder(d_model: int, layer: int, device: torch.device) -> LoadedSAE:
    """A TopK autoencoder of random features."""
    sae = SparseAutoencoder(d_model, EXPANSION * d_model, min(K, EXPANSION * d_model), device=device)
    sae.initialize(torch.randn(64, d_model, device=device), seed=0)
    return LoadedSAE(sae, Metadata("random", f"blocks.{layer}.hook_resid_post", layer, True, None, None))


def edits(lm: LanguageModel, loaded: LoadedSAE) -> dict[str, AbstractContextManager]:
    """What is compared: fresh contexts by name."""
    one, eight = {1: 5.0}, {feature: 5.0 for feature in range(8)}
    return {
        "without steering": nullcontext(),
        "clamp, one feature": steer(lm, loaded, one),
        "clamp, eight features": steer(lm, loaded, eight),
        "add, one feature": steer(lm, loaded, one, "add"),
        "clamp, exact": steer(lm, loaded, one, exact=True),
    }


def measure(params: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds a generated token of each."""
    lm = random_model(params, None, DEVICE)
    lm.tokenizer = SimpleNamespace(bos_id=1, eos_id=-1)  # random weights end no text
    loaded = random_autoencoder(lm.d_model, lm.n_layers // 2, lm.device)
    prompt = torch.randint(lm.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, edit in edits(lm, loaded).items():
            with edit:
                tokens = lm.generate(prompt, CHUNK + 1)
                next(tokens)  # reads the prompt
                start = wall()
                for _ in tokens:
                    pass
                times.setdefault(name, []).append((wall() - start) / CHUNK)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is a warm-up


def main() -> None:
    """All sizes that the device has room for."""
    warnings.simplefilter("ignore")
    smoke = sys.argv[1:] == ["--smoke"]
    torch.set_num_threads(THREADS)
    sizes = {"the stand-in": STANDIN, "an eighth of the layers of Mistral 7B at a quarter of its width": QUARTER}
    if torch.cuda.is_available():
        sizes["Mistral 7B"] = MISTRAL_7B
    if smoke:
        sizes = {"smoke": SMOKE_MISTRAL}
    results = []
    for name, params in sizes.items():
        found = measure(params, 2 if smoke else ROUNDS)
        gc.collect()
        plain = found["without steering"]
        F = EXPANSION * params["dim"]
        print(f"{name}: D={params['dim']}, {params['n_layers']} layers, F={F}")
        for what, seconds in found.items():
            print(f"  {what:24}{1000 * seconds:9.3f} ms a token  {seconds / plain - 1:+7.1%}", flush=True)
        results.append({"model": name, "D": params["dim"], "layers": params["n_layers"], "F": F, "seconds": found})
    if not smoke:
        save("steering_speed", results)


if __name__ == "__main__":
    main()
