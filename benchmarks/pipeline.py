"""Where a training step's time goes, by stage: train.py on the stand-in, with its constants, timed from outside.

    python -m benchmarks.pipeline

The stages of the main thread add up to the wall time of the run. Reading and tokenizing run in a thread beside it,
whose processor time is listed apart: the main thread pays for it only by what it waits. `--smoke` is a run of seconds
that saves nothing.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch

import config
import train
from benchmarks.machine import save
from benchmarks.stages import REST, Part, Stages, step_parts
from mistral_sae import constants
from mistral_sae.data import activations
from mistral_sae.data.tokens import Corpus
from mistral_sae.sae import grid
from mistral_sae.sae.evaluate import Evaluator
from mistral_sae.sae.trainer import TrainConfig, Trainer

SMOKE = ["TRAIN_TOKENS=10240", "BUFFER_TOKENS=4096", "D_HIDDEN=1024", "DEVICE=cpu"]
SMOKE += ["EVALUATION_ROWS=4", "EVALUATIONS=2"]

START = "start: plan, model, held-out text"
STEP = step_parts(torch.device("cpu"))
RUN = [
    Part(train, "make_plan", START, whole=True),
    Part(train, "open_model", START, whole=True),
    Part(Corpus, "held_out_rows", START, whole=True),
    Part(grid.Grid, "start", START, whole=True),
    Part(Trainer, "initialize", START, whole=True),
    Part(activations, "residuals_of_layers", "language model"),
    *STEP,
    Part(Trainer, "find_dead", "log"),
    Part(grid, "append_line", "log"),
    Part(Evaluator, "__call__", "evaluation", whole=True),
    Part(train, "plot_training", "evaluation", whole=True),
    Part(grid, "reconstruction", "checkpoints", whole=True),
    Part(grid.Grid, "save", "checkpoints", whole=True),
]
ORDER = ["waiting for text", "language model", "shuffling buffer"]
ORDER += [*(part.stage for part in STEP), "log", "evaluation", "checkpoints", START, REST]


class Background:
    """Processor seconds of the thread that reads and tokenizes."""

    def __init__(self) -> None:
        self.seconds = {"reading, tokenizing and packing": 0.0, "of which tokenizing": 0.0}

    def rows(self, rows: Iterable) -> Iterator:
        """The same rows, the time it takes to make them counted."""
        rows = iter(rows)
        while True:
            start = time.thread_time()
            row = next(rows, None)
            self.seconds["reading, tokenizing and packing"] += time.thread_time() - start
            if row is None:
                return
            yield row

    def encode(self, encode):
        """The same encoding, its time counted apart where it runs in the background."""

        def counted(string: str) -> list[int]:
            start = time.thread_time()
            ids = encode(string)
            if threading.current_thread() is not threading.main_thread():
                self.seconds["of which tokenizing"] += time.thread_time() - start
            return ids

        return counted


def profile() -> dict[str, Any]:
    """Run train.py's `main` and say how long it spent where."""
    stages, background = Stages(), Background()
    open_model, prefetch, shuffled_streams = train.open_model, train.prefetch, train.shuffled_streams

    def open_model_counted(*args, **kwargs):
        model = open_model(*args, **kwargs)
        model.tokenizer.encode = background.encode(model.tokenizer.encode)
        return model

    def prefetch_counted(rows, depth):
        return stages.items(prefetch(background.rows(rows), depth), "waiting for text")

    def batches_counted(*args, **kwargs):
        return stages.items(shuffled_streams(*args, **kwargs), "shuffling buffer")

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(config, "RUN_DIR", folder),
        patch.object(train, "open_model", open_model_counted),
        patch.object(train, "prefetch", prefetch_counted),
        patch.object(train, "shuffled_streams", batches_counted),
        stages.wrapping(RUN),
    ):
        train.main()
    stages.stop()
    training = TrainConfig.of(config, open_model(last_layer=0).d_model)
    return {
        "settings": asdict(training),
        "steps": training.steps,
        "seconds": {name: stages.seconds[name] for name in ORDER},
        "background_seconds": background.seconds,
    }


def table(found: dict[str, Any]) -> str:
    """Milliseconds a step and shares."""
    steps, seconds = found["steps"], found["seconds"]
    total = sum(seconds.values())
    lines = [f"{'':36}{'ms a step':>10}{'share':>9}"]
    for name, value in (seconds | {"all": total}).items():
        lines.append(f"{name:36}{1000 * value / steps:10.2f}{value / total:9.1%}")
    lines.append("\nin the background, processor time")
    for name, value in found["background_seconds"].items():
        lines.append(f"{name:36}{1000 * value / steps:10.2f}{value / total:9.1%}")
    tokens = steps * config.BATCH_SIZE
    return "\n".join([*lines, f"\n{steps:,} steps, {tokens:,} tokens in {total:.0f} s: {tokens / total:,.0f} tokens/s"])


def main() -> None:
    """Profile, print, save."""
    assert config.ON_STANDIN, "unset MISTRAL_MODEL_PATH: the profile is of a run on the stand-in"
    smoke = sys.argv[1:] == ["--smoke"]
    constants.override(SMOKE if smoke else [], config)
    found = profile()
    print(f"\n{table(found)}")
    if not smoke:
        save("pipeline", found)


if __name__ == "__main__":
    main()
