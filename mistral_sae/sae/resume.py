"""What a RUN_DIR holds of a training: the checkpoints that it goes on from, and how far it is.

A checkpoint is a state file (`files.save_state`), so it has a checksum. One that is damaged is named, and the one
before it is used.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mistral_sae.cli import UserError, duration_of, printable, rank, size_of
from mistral_sae.files import (
    SAEError,
    holder,
    load_metadata,
    load_state,
    locked,
    remove,
    sync_folder,
    write_text,
    writing,
)
from mistral_sae.sae.shards import files_of, load_trainer
from mistral_sae.sae.trainer import Trainer
from mistral_sae.schema import Schema, Total, Words, lines, parse, read

LOCK = ".train.lock"
SWEEP = "sweep.json"
ANEW = "RESUME=False trains anew and sets them aside, or choose another RUN_DIR"
SHOWN = {"step", "tokens", "loss", "normalized_mse", "dead", "tokens_per_second"}  # by STATUS, of a record of the log
LATEST = 20  # records of the log from which STATUS takes the rate
# What belongs to a run, its explanations included: they name features of its autoencoder
OF_A_RUN = (
    "checkpoint*", "sae", "metrics.jsonl", "tensorboard", "wandb", "evaluation.json", "training.png",
    "activations", "feature_statistics*", "explanations*.jsonl", "completions*.jsonl", "report.html", "text.html",
    "chat.jsonl", "analysis*.json", "shared", "sweep.png", SWEEP,
)  # fmt: skip
DAMAGED = "delete it or train again"  # what to do with a file of figures that is
OTHER_FILES = "its files, or what is in them"  # what its fingerprint says of a corpus

_FIGURES = dict[str, Total | float]
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


def path_of_step(run_dir: Path, step: int) -> Path:
    """The checkpoint after a step."""
    return run_dir / "checkpoints" / f"step-{step}.safetensors"


def remove_checkpoints(run_dir: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to a step; later ones are of a run that went on from a damaged one."""
    if rank():
        return
    kept = [_step_of(path) for path in checkpoints(run_dir) if _step_of(path) <= step][:keep]
    for path in (run_dir / "checkpoints").glob("step-*"):
        whole = re.fullmatch(r"step-(\d+)(\.\d+-of-\d+)?\.safetensors", path.name)
        if not whole or int(whole[1]) not in kept:
            remove(path)


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
    here, there = json.loads(run.model_dump_json()), runs[0]  # as it will be read
    for name in here["others"].keys() & there.settings:  # of an older version, where it had to stay the same
        there.others[name] = there.settings.pop(name)
    if changed := _differences(there.settings, here["settings"]):
        raise UserError(
            f"{run_dir} holds a run with another {', '.join(changed)}: choose another RUN_DIR, or RESUME=False to "
            "train anew in this one and set that run aside"
        )
    if changed := _differences(there.others, here["others"]):
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
    if checkpoints(run_dir):
        raise SAEError(f"found no whole checkpoint in {run_dir / 'checkpoints'}, expected one to go on from: {ANEW}")
    if found := [name for name in ("sae", "evaluation.json") if (run_dir / name).exists()]:
        raise UserError(f"found {' and '.join(found)} in {run_dir}, but no checkpoint to go on from: {ANEW}")


def load_checkpoints(saes: Sequence[tuple[list[Path], Trainer, Run]]) -> bool:
    """Bring trainers and runs to the newest step of which all have a whole checkpoint; prints which are damaged.

    Returns False, and changes nothing, if some have none. Raises SAEError if all do and none of a step is whole,
    UserError if one is of another model.
    """
    if not all(found for found, _, _ in saes):  # a run that was killed as it saved the first
        return False
    for step in sorted(set.intersection(*({_step_of(path) for path in found} for found, _, _ in saes)), reverse=True):
        try:
            for found, trainer, run in saes:
                _load(path_of_step(found[0].parent.parent, step), trainer, run)
            return True
        except SAEError as error:
            print(f"{error}; the checkpoint before it is used")
    folders = [found[0].parent.parent for found, _, _ in saes]
    if len(folders) == 1:
        _refuse_what_cannot_go_on(folders[0])
    raise SAEError(f"found no step that all have saved whole in {folders[0].parent}, expected one: {ANEW}")


def _load(path: Path, trainer: Trainer, run: Run) -> None:
    tensors, saved = load_trainer(path, trainer, Run)  # on the CPU: the trainer's own already fill the device
    if saved.model != run.model:
        raise UserError(
            f"{path} was trained on a model with other weights than {run.others.get('mistral_model_path')}: choose "
            "the same MISTRAL_MODEL_PATH or another RUN_DIR, or RESUME=False to train anew in this one"
        )
    trainer.load(tensors)
    for name in ("step", "stream", "history", "figures", "seconds"):
        setattr(run, name, getattr(saved, name))


# ---- grids ----


class Point(Schema):
    """An autoencoder of a grid, as sweep.json has it."""

    name: Annotated[str, Field(pattern=r"^(\w[\w.+-]*)?$")]  # of its folder
    layer: int
    architecture: Words
    d_hidden: int
    k: int
    learning_rate: float
    seed: int
    stopped: Words = ""  # why, if it was
    figures: dict[str, Number] = Field(default_factory=dict)  # evaluation.json, when all are done


def read_points(run_dir: Path) -> list[Point]:
    """The autoencoders of the grid in a RUN_DIR; none if it holds no grid."""
    path = run_dir / SWEEP
    return read(list[Point], path, f"remove it if {run_dir} holds no grid") if path.exists() else []


def write_points(run_dir: Path, points: Sequence[Point]) -> None:
    """Write sweep.json."""
    if not rank():
        write_text(run_dir / SWEEP, json.dumps([point.model_dump() for point in points], indent=1) + "\n")


def check_folder(run_dir: Path, names: Sequence[str], resume: bool) -> None:
    """Raise UserError where a RUN_DIR holds another grid than that of these names, or a grid and not a run, or a run.

    Without `resume` what it holds is set aside, so only a grid at work on a folder of its own is in the way.
    """
    if run_dir.name in [point.name for point in read_points(run_dir.parent)] and (by := holder(run_dir.parent, LOCK)):
        raise UserError(f"found the grid in {run_dir.parent} at work on {run_dir} ({by}): wait for it or stop it")
    there, found = [point.name for point in read_points(run_dir)], ""
    if there and set(there) != set(names):
        found = f"a grid of {', '.join(there)}"
    elif names and not there:
        taken = [folder for folder in (run_dir, *(run_dir / name for name in names)) if _holds_run(folder)]
        found = f"a run of one autoencoder{f' in {taken[0].name}' if taken[0] != run_dir else ''}" if taken else ""
    if found and resume:
        what = f"a grid of {', '.join(names)}" if names else "no grid"
        raise UserError(f"{run_dir} holds {found}, expected {what}: {ANEW}")


def _holds_run(folder: Path) -> bool:
    return bool(checkpoints(folder)) or any((folder / name).exists() for name in ("sae", "evaluation.json"))


# ---- an earlier run ----


def set_aside(run_dir: Path) -> Path | None:
    """Move the run that a RUN_DIR holds, with its explanations, into a folder in it; returns which, or None.

    That folder is a RUN_DIR. A move that was cut off is finished by the next.
    """
    if rank():
        return None
    partial = run_dir / "previous.partial"
    grid = [folder for point in read_points(run_dir) if (folder := run_dir / point.name).exists()]
    if not any(map(_holds_run, (run_dir, *grid))) and not partial.exists():  # half of the first one is left by a kill
        return None
    with ExitStack() as held, writing(partial):
        for folder in (run_dir, *grid):  # explain.py may be at work on it
            held.enter_context(locked(folder))
        partial.mkdir(exist_ok=True)
        for path in [*grid, *(path for name in OF_A_RUN for path in run_dir.glob(name))]:
            path.rename(partial / path.name)
        whole = next(path for i in count(1) if not (path := run_dir / f"previous-{i}").exists())
        sync_folder(partial)
        partial.rename(whole)
        sync_folder(run_dir)
    return whole


# ---- STATUS ----


def status(run_dir: Path) -> Iterator[str]:
    """How far the run in a RUN_DIR is, line by line; reads each checkpoint whole. Raises UserError if there is none."""
    by = holder(run_dir, LOCK)
    at_work = f"at work: {by}" if by else "not at work"
    if points := read_points(run_dir):
        yield f"grid      {len(points)} autoencoders in {run_dir}, {at_work}"
        for point in points:
            _, *rest = status(run_dir / point.name)
            yield from (f"\n{point.name}", *rest, *([f"stopped   {point.stopped}"] if point.stopped else []))
        return
    if not (run_dir / "metrics.jsonl").exists() and not checkpoints(run_dir):
        raise UserError(f"found no run in {run_dir}, expected what train.py writes: set RUN_DIR to the folder of one")
    yield f"run       {run_dir}, {at_work}"
    runs, saved = [], []
    for path in checkpoints(run_dir):
        age = time.time() - path.stat().st_mtime
        try:
            run = load_state(path, Run)[1]
            width = run.settings.get("d_hidden")
            files = files_of(path, width if isinstance(width, int) else 0)
            for other in files[1:]:
                load_state(other)
            size = size_of(sum(file.stat().st_size for file in files))
            runs.append(run)
            saved.append(f"saved     {path}, {size}, whole, {duration_of(age)} ago")
        except SAEError as error:
            saved.append(f"saved     {error}")
    log = [record for record in read_log(run_dir) if record.keys() >= SHOWN]
    yield from _progress(log, runs[0] if runs else None)
    yield from saved or ["saved     nothing yet"]
    done = (run_dir / "evaluation.json").exists()
    yield f"evaluated {'yes, in ' + str(run_dir / 'evaluation.json') if done else 'not yet: this comes at the end'}"


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    """What is in evaluation.json of a folder, {} where there is none. Raises SAEError if it is damaged."""
    path = run_dir / "evaluation.json"
    return read(_FIGURES, path, DAMAGED, SAEError) if path.exists() else {}


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The records in metrics.jsonl of a folder, [] where there is none. Raises SAEError if it is damaged.

    A last line without its end is left out: train.py may be writing it.
    """
    path = run_dir / "metrics.jsonl"
    every = lines(path, DAMAGED, SAEError) if path.exists() else []
    return [parse(_FIGURES, line, where, DAMAGED, SAEError) for where, line in every if line.endswith(b"\n")]


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
    yield f"rate      {rate:,.0f} tokens a second{f', about {duration_of(left)} left' if left > 0 else ''}"
