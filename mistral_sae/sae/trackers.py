"""The log of a training in the programs in which people compare trainings: TensorBoard, Weights & Biases, Trackio."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mistral_sae.cli import UserError, one_line, rank
from mistral_sae.constants import words_of
from mistral_sae.sae.resume import Run

PROJECT = "mistral-sae"

Record = Mapping[str, Any]
Log = Callable[[Record, int], Any]  # of a record at a step


def check(log_to: str) -> None:
    """Raise UserError for one of these trackers whose package is not installed."""
    for name in words_of(log_to):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"LOG_TO names {name}, and found no package {name}: pip install {name}")


@contextmanager
def tracked(log_to: str, run_dir: Path, runs: Mapping[str, Run]) -> Iterator[Callable[[str, Record], None]]:
    """Yield a function that logs a record of one of the autoencoders; "" is the name of the only one.

    What a run that goes on has logged before is logged anew, so that each log is whole by itself. In a grid a figure's
    name ends in the autoencoder's. Raises UserError where a tracker does not start, as without a key.
    """
    logs = list[Log]()

    def track(name: str, record: Record) -> None:
        figures = {f"{key}/{name}".rstrip("/"): value for key, value in record.items() if key != "step"}
        for log in logs:
            log(figures, record["step"])

    with ExitStack() as opened:
        for name in words_of(log_to) if not rank() else ():
            try:
                log, close = _open(name, run_dir, {each: run.settings for each, run in runs.items()})
            except Exception as error:  # each has its own
                raise UserError(
                    f"{name} did not start ({one_line(error)}): mend that, or leave it out of LOG_TO"
                ) from None
            opened.callback(close)
            logs.append(log)
        earlier = [(name, record) for name, run in runs.items() for record in run.history]
        for name, record in sorted(earlier, key=lambda each: each[1]["step"]):
            track(name, record)
        yield track


def _open(name: str, run_dir: Path, settings: Mapping[str, Any]) -> tuple[Log, Callable[[], Any]]:
    """A tracker's function for a record, and the one that ends its log."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run_dir / "tensorboard", purge_step=0)  # it hides what was logged there before

        def write(figures: Record, step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return write, writer.close
    where = {"dir": run_dir} if name == "wandb" else {}
    run = importlib.import_module(name).init(
        project=PROJECT, name=run_dir.name, config=settings.get("", settings), **where
    )
    return lambda figures, step: run.log(figures, step=step), run.finish
