"""What the time of a run goes to, by stage, measured from outside: functions are wrapped while a block runs.

    stages = Stages()
    with stages.wrapping(step_parts(x.device)):
        trainer.step(x, learning_rate)
    stages.seconds["encoder product"]

Every moment of the thread that made it counts to one stage, the innermost, so that the stages add up to the whole.
On a GPU the device is waited for at every border, and what would overlap is counted one after the other.
"""

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from mistral_sae.sae import trainer
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.kernels import portable
from mistral_sae.sae.kernels import step as topk_step
from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.trainer import Trainer

REST = "everything else"


class Part(NamedTuple):
    """A function and the stage that its time counts to."""

    owner: Any  # module or class
    name: str  # of the function in it
    stage: str
    whole: bool = False  # stages inside count to this one too


def step_parts(device: torch.device) -> list[Part]:
    """The parts of a training step on a device, under the names of benchmarks/traffic.py's terms."""
    kernels = operations(device)
    return [
        Part(Trainer, "step", "biases, what fired"),
        Part(SparseAutoencoder, "standardize", "standardise"),
        Part(trainer, "topk_step", "losses, gradients of biases"),
        Part(topk_step, "encode", "encoder product"),
        Part(topk_step, "topk", "top-k"),
        Part(kernels, "inner_products", "exact values of candidates"),
        Part(topk_step, "decode", "decode"),
        Part(topk_step, "auxk_loss", "AuxK", whole=True),
        Part(topk_step, "gradients", "sort by feature"),
        Part(kernels, "row_products", "gradient of activations, norm of the decoder's"),
        Part(kernels, "squares", "norm of the encoder's gradient"),
        Part(portable, "most_squares", "norm of the encoder's gradient"),
        Part(kernels, "adam_rows", "gradients, projection, Adam, rounding, rows"),
    ]


class Stages:
    """Seconds of each stage, those between the stages being REST's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._current, self._whole = REST, False
        self._thread, self._since = threading.current_thread(), time.perf_counter()

    @contextmanager
    def stage(self, name: str, whole: bool = False) -> Iterator[None]:
        """Count the time of the block to `name`."""
        if self._whole or threading.current_thread() is not self._thread:
            yield
            return
        before, self._whole = self._current, whole
        self._enter(name)
        try:
            yield
        finally:
            self._whole = False
            self._enter(before)

    def call(self, function: Callable, name: str, whole: bool = False) -> Callable:
        """The same function, its calls counted."""

        @functools.wraps(function)
        def counted(*args, **kwargs):
            with self.stage(name, whole):
                return function(*args, **kwargs)

        return counted

    def items(self, iterator: Iterable, name: str) -> Iterator:
        """The same items, the time it takes to get them counted."""
        iterator = iter(iterator)
        try:
            while True:
                with self.stage(name):
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                yield item
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    @contextmanager
    def wrapping(self, parts: Iterable[Part]) -> Iterator[None]:
        """Count all calls of some functions while the block runs."""
        with ExitStack() as stack:
            for owner, name, stage, whole in parts:
                stack.enter_context(patch.object(owner, name, self.call(getattr(owner, name), stage, whole)))
            yield

    def stop(self) -> None:
        """Count what has passed since the last border."""
        self._enter(self._current)

    def _enter(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._current] += now - self._since
        self._current, self._since = name, now
