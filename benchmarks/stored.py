"""Training from residuals on disk beside training through the model: train.py on the stand-in, both in turn.

    python -m benchmarks.stored

Timed is the training loop, each with the time it waits for its batches, without evaluations in between. The ratio is of
medians over RUNS runs of each; both autoencoders' figures on held-out text stand beside them. Writing the residuals is
timed once. `--smoke` is a run of seconds that saves nothing.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import config
import train
from benchmarks.machine import save
from mistral_sae import constants
from mistral_sae.data.stored import SHARD_TOKENS, StoredResiduals

# Short runs: little text to tokenize before the first batch, and nearly all of three buffers trained on
RUNS, TOKENS = 3, 96_256
SETTINGS = ["SHUFFLE_ROWS=1024", "BUFFER_TOKENS=32768", "EVALUATION_ROWS=32"]
SMOKE = ["D_HIDDEN=1024", "EVALUATION_ROWS=4", "SHUFFLE_ROWS=128", "DEVICE=cpu"]


def timed(seconds: list[float], function):
    """The function, whose calls' seconds are added to a list."""

    def call(*args, **kwargs):
        begin = time.perf_counter()
        function(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)

    return call


def run(folder: str, name: str, *arguments: str) -> dict[str, Any]:
    """Seconds of the loop and of writing, and the evaluation of a run of train.py."""
    loop: list[float] = []
    writing: list[float] = []
    constants.override([f"RUN_DIR={folder}/{name}", "EVALUATIONS=1", "RESUME=False", *arguments], config)
    with (
        patch.object(train, "train", timed(loop, train.train)),
        patch.object(StoredResiduals, "fill", timed(writing, StoredResiduals.fill)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        train.main()
    evaluation = json.loads(Path(folder, name, "evaluation.json").read_text())
    return {"loop": loop[0], "writing": sum(writing), "evaluation": evaluation}


def main() -> None:
    """Run both in turn, print, save."""
    assert config.ON_STANDIN, "unset MISTRAL_MODEL_PATH: the runs are on the stand-in"
    smoke = sys.argv[1:] == ["--smoke"]
    tokens, settings = (20_480, SMOKE) if smoke else (TOKENS, SETTINGS)
    found: dict[str, list[dict[str, Any]]] = {"through the model": [], "from disk": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 if smoke else RUNS):
            for name, runs in found.items():
                kept = [f"ACTIVATIONS_PATH={folder}/kept"] if name == "from disk" else []
                runs.append(
                    run(folder, f"{name[0]}{number}", f"TRAIN_TOKENS={tokens}", f"SEED={number}", *kept, *settings)
                )
    rates = {name: statistics.median(tokens / each["loop"] for each in runs) for name, runs in found.items()}
    errors = {name: [each["evaluation"]["normalized_mse"] for each in runs] for name, runs in found.items()}
    for name, rate in rates.items():
        print(f"{name:18} {rate:8,.0f} tokens/s, normalized MSE {', '.join(f'{error:.4f}' for error in errors[name])}")
    results = {
        "settings": [f"TRAIN_TOKENS={tokens}", *settings],
        "tokens/s": rates,
        "ratio": rates["from disk"] / rates["through the model"],
        "written, tokens/s": -(-tokens // SHARD_TOKENS) * SHARD_TOKENS / found["from disk"][0]["writing"],
        "loop, seconds": {name: [each["loop"] for each in runs] for name, runs in found.items()},
        "normalized MSE": errors,
    }
    print(f"{results['ratio']:.2f} times as fast; written at {results['written, tokens/s']:,.0f} tokens/s")
    if not smoke:
        save("stored", results)


if __name__ == "__main__":
    main()
