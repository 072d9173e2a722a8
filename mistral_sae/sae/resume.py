"""What a RUN_DIR holds of a training: the checkpoints that it goes on from, and how far it is.

A checkpoint is a state file (`files.save_state`), so it has a checksum. One that is damaged is named, and the one
before it is used.
"""

import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mistral_sae.cli import UserError, printable, size_of
from mistral_sae.files import SAEError, holder, load_metadata, load_state, locked, save_state, sync_folder, writing
from mistral_sae.sae.trainer import Trainer
from mistral_sae.schema import Schema, Total, Words

LOCK = ".train.lock"
LATEST = 20  # records of the log from which STATUS takes the rate
# What belongs to a run, its explanations included: they name features of its autoencoder
OF_A_RUN = (
    "checkpoint*", "sae", "metrics.jsonl", "evaluation.json", "training.png", "activations", "explanations*.jsonl",
    "completions*.jsonl", "statistics*", "report.html", "text.html", "chat.jsonl",
)  # fmt: skip
OTHER_FILES = "its files, or what is in them"  # what its fingerprint says of a corpus

Number = int | Annotated[float, Field(allow_inf_nan=True)]


class Run(Schema):
    """A training so far: what a checkpoint holds beside the trainer's tensors."""

    settings: dict[str, Any]  # that shape the stream or the result: they stay the same
    others: dict[str, Any]  # that may change
    model: Words  # the model's fingerprint
    step: Total
    stream: dict[str, Any]  # where the text goes on
    history: list[dict[str, Number]]  # the log
    figures: list[list[Number]]  # of the steps since its last record
    seconds: float  # that they took

    @classmethod
    def new(cls, settings: dict[str, Any], others: dict[str, Any]) -> "Run":
        """A run before its first step."""
        nothing: dict[str, Any] = {"step": 0, "stream": {}, "history": [], "figures": [], "seconds": 0.0}
        return cls(settings=settings, others=others, model="", **nothing)


# ---- checkpoints ----


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a RUN_DIR, the newest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*.safetensors") if path.stem[5:].isdecimal()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem[5:])


def save_checkpoint(run_dir: Path, trainer: Trainer, run: Run, keep: int) -> Path:
    """Write all that continuing needs, and then remove all but the newest `keep` up to this step; returns its path."""
    path = run_dir / "checkpoints" / f"step-{run.step}.safetensors"
    save_state(path, trainer.state(), run.model_dump())
    kept = [other for other in checkpoints(run_dir) if _step_of(other) <= run.step][:keep]
    for other in path.parent.glob("step-*"):  # later ones are of a run that went on from a damaged one
        if other not in kept:
            other.unlink()
    return path


def find_checkpoints(run_dir: Path, run: Run, resume: bool) -> list[Path]:
    """The checkpoints that a run may go on from, the newest first; none without `resume`. Reads their metadata alone.

    Prints the settings that are other than they were, and each checkpoint that is damaged. Raises UserError if one
    differs that shapes the run, or if there are results without a checkpoint; SAEError if all are damaged.
    """
    if not resume:
        return []
    whole, runs = [], []
    for path in checkpoints(run_dir):
        try:
            runs.append(load_metadata(path, Run))
            whole.append(path)
        except SAEError as error:
            print(f"{error}; the checkpoint before it is used")
    if not whole:
        _refuse_what_cannot_go_on(run_dir)
        return []
    here = json.loads(run.model_dump_json())  # as it will be read
    if changed := _differences(runs[0].settings, here["settings"]):
        raise UserError(
            f"{run_dir} holds a run with another {', '.join(changed)}: choose another RUN_DIR, or RESUME=False to "
            "train anew in this one and set that run aside"
        )
    if changed := _differences(runs[0].others, here["others"]):
        print(f"going on with another {', '.join(changed)}")
    return whole


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    changed = [name for name in there | here if there.get(name) != here.get(name)]
    values = {name: (printable(str(there.get(name))), printable(str(here.get(name)))) for name in changed}
    return [
        f"{name.upper()} ({OTHER_FILES})" if name == "corpus" and "@" not in old else
        f"{name.upper()} ({old} there, {new} here)"
        for name, (old, new) in values.items() if name != "corpus" or not _may_be_the_same(old, new)
    ]  # fmt: skip


def _may_be_the_same(old: str, new: str) -> bool:
    """Whether two fingerprints of corpora differ in no more than a commit of the hub that one of them does not know."""
    (name, _, commit), (other, _, another) = old.partition("@"), new.partition("@")
    return name == other and not (commit and another and commit != another)


def _refuse_what_cannot_go_on(run_dir: Path) -> None:
    anew = "RESUME=False trains anew and sets them aside, or choose another RUN_DIR"
    if checkpoints(run_dir):
        raise SAEError(f"found no whole checkpoint in {run_dir / 'checkpoints'}, expected one to go on from: {anew}")
    if found := [name for name in ("sae", "evaluation.json") if (run_dir / name).exists()]:
        raise UserError(f"found {' and '.join(found)} in {run_dir}, but no checkpoint to go on from: {anew}")


def load_checkpoint(found: list[Path], trainer: Trainer, run: Run) -> None:
    """Bring a trainer and a run to the newest of the checkpoints that is whole; prints which are damaged.

    Raises SAEError if none is, UserError if it is of another model.
    """
    for path in found:
        try:
            tensors, saved = load_state(path, "cpu", Run)  # the trainer's own already fill the device
            trainer.check(tensors, path)
        except SAEError as error:
            print(f"{error}; the checkpoint before it is used")
            continue
        if saved.model != run.model:
            raise UserError(
                f"{path} was trained on a model with other weights than {run.others.get('mistral_model_path')}: choose "
                "the same MISTRAL_MODEL_PATH or another RUN_DIR, or RESUME=False to train anew in this one"
            )
        trainer.load(tensors)
        for name in ("step", "stream", "history", "figures", "seconds"):
            setattr(run, name, getattr(saved, name))
        return
    _refuse_what_cannot_go_on(found[0].parent.parent)


def set_aside(run_dir: Path) -> Path | None:
    """Move the run that a RUN_DIR holds, with its explanations, into a folder in it; returns which, or None.

    That folder is a RUN_DIR. A move that was cut off is finished by the next.
    """
    there = any((run_dir / name).exists() for name in ("sae", "evaluation.json", "previous.partial"))
    if not there and not checkpoints(run_dir):  # half of the first one is left by a kill
        return None
    partial = run_dir / "previous.partial"
    with locked(run_dir), writing(partial):  # explain.py may be at work on it
        partial.mkdir(exist_ok=True)
        for path in [path for name in OF_A_RUN for path in run_dir.glob(name)]:
            path.rename(partial / path.name)
        whole = next(path for i in count(1) if not (path := run_dir / f"previous-{i}").exists())
        sync_folder(partial)
        partial.rename(whole)
        sync_folder(run_dir)
    return whole


# ---- STATUS ----


def status(run_dir: Path) -> Iterator[str]:
    """How far the run in a RUN_DIR is, line by line; reads each checkpoint whole. Raises UserError if there is none."""
    if not (run_dir / "metrics.jsonl").exists() and not checkpoints(run_dir):
        raise UserError(f"found no run in {run_dir}, expected what train.py writes: set RUN_DIR to the folder of one")
    by = holder(run_dir, LOCK)
    yield f"run       {run_dir}, {f'at work: {by}' if by else 'not at work'}"
    runs, lines = [], []
    for path in checkpoints(run_dir):
        age, size = time.time() - path.stat().st_mtime, size_of(path.stat().st_size)
        try:
            runs.append(load_state(path, "cpu", Run)[1])
            lines.append(f"saved     {path}, {size}, whole, {_duration(age)} ago")
        except SAEError as error:
            lines.append(f"saved     {error}")
    yield from _progress(_log(run_dir), runs[0] if runs else None)
    yield from lines or ["saved     nothing yet"]
    done = (run_dir / "evaluation.json").exists()
    yield f"evaluated {'yes, in ' + str(run_dir / 'evaluation.json') if done else 'not yet: this comes at the end'}"


def _log(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a line that was cut off is left out."""
    records = []
    if (run_dir / "metrics.jsonl").exists():
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(Record.model_validate_json(line).model_dump())
            except ValueError:
                continue
    return records


class Record(Schema):
    """What STATUS reads of a record of the log."""

    step: Total
    tokens: Total
    normalized_mse: float
    loss: float
    dead: Total
    tokens_per_second: float


def _progress(log: list[dict[str, Any]], run: Run | None) -> Iterator[str]:
    if not log:
        yield "step      none logged yet"
        return
    last, rate = log[-1], sum(record["tokens_per_second"] for record in log[-LATEST:]) / len(log[-LATEST:])
    total = run.settings["train_tokens"] // run.settings["batch_size"] if run else None
    of = f" of {total:,} ({last['step'] / total:.0%})" if total else ", of how many is known with the first checkpoint"
    yield f"step      {last['step']:,}{of}, {last['tokens']:,} tokens"
    yield f"loss      {last['loss']:.4g}, normalized MSE {last['normalized_mse']:.4g}, dead features {last['dead']:,}"
    left = (total - last["step"]) * last["tokens"] / last["step"] / rate if total and rate > 0 else 0
    yield f"rate      {rate:,.0f} tokens a second{f', about {_duration(left)} left' if left > 0 else ''}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
