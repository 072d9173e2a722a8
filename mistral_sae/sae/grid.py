"""The autoencoders of a run, trained on the same pass of the language model: one, or one for each point of a grid.

Each ends as it would alone, and its folder is that of a run of its own: the only one's is RUN_DIR, those of a grid lie
below it, and RUN_DIR/sweep.json tells which there are.

Shapes: S streams, B tokens, D model width.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_sae.cli import Failed, UserError, rank
from mistral_sae.files import append_line, write_text
from mistral_sae.sae import resume
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import Metadata
from mistral_sae.sae.checkpoint import save_sae
from mistral_sae.sae.evaluate import reconstruction
from mistral_sae.sae.shards import save_trainer
from mistral_sae.sae.trainer import TrainConfig, Trainer

EXPLODED = 10.0  # normalized MSE: ten times that of predicting the mean


@dataclass
class Member:
    """An autoencoder in training: its sizes, its folder and its state."""

    name: str  # "" of the only one
    folder: Path
    layer: int
    config: TrainConfig
    run: resume.Run = field(init=False)
    found: list[Path] = field(default_factory=list)  # checkpoints that it may go on from
    figures: list[Tensor] = field(default_factory=list)  # of the steps since its last record
    record: dict[str, Any] = field(default_factory=dict)
    stream: int = 0  # the number of its residuals in a batch (S, B, D)
    trainer: Trainer = field(init=False)
    metadata: Metadata = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.point = resume.Point(
            name=self.name, layer=self.layer, architecture=config.architecture, d_hidden=config.d_hidden, k=config.k,
            learning_rate=config.learning_rate, seed=config.seed,
        )  # fmt: skip

    def step(self, x_BD: Tensor, step: int) -> None:
        """Train on the batch of this step, counted from 0."""
        if step == 0:
            self.trainer.initialize(x_BD)
        if step == self.config.decay_step:  # from here on features move little
            self.trainer.forget_counts()
        torch.manual_seed(self.config.seed * self.config.steps + step)  # bfloat16 moments are rounded at random
        self.figures.append(torch.stack(self.trainer.step(x_BD, self.config.learning_rate_at(step))))

    def measure(self, step: int, seconds: float) -> bool:
        """Make the record of the steps since the last one; False if residuals among them were not finite."""
        self.record = self.trainer.record(step, self.figures, seconds)
        return self.record.pop("finite") == 1

    def explosion(self, x_BD: Tensor | None) -> str:
        """What is wrong where a normalized MSE is far above that of predicting the mean or a loss no number, or "".

        A record's mean hides a loss that exploded just now, and no loss has seen the weights that are to be saved:
        those are tried on x, where it is given.
        """
        latest = self.figures[-1][1].item()
        if x_BD is not None:
            latest = reconstruction(self.trainer.sae, [x_BD]).normalized_mse
        worst = latest if not latest <= EXPLODED else self.record["normalized_mse"]  # a NaN is not smaller, either
        if worst <= EXPLODED and math.isfinite(self.record["loss"]):
            return ""
        of, (step, loss) = f" of {self.name}" if self.name else "", (self.record["step"], self.record["loss"])
        return (
            f"the normalized MSE{of} is {worst:.3g}, the loss {loss:.3g} at step {step:,}, expected below {EXPLODED:g}"
        )

    def log(self) -> None:
        """Add the record to the log, and begin the next."""
        self.run.history.append(self.record)
        if not rank():
            append_line(self.folder / "metrics.jsonl", self.record)
        self.figures = []

    def save_sae(self) -> None:
        """Write the autoencoder in SAE Lens's format."""
        save_sae(self.folder / "sae", self.trainer.sae, self.metadata, self.trainer.counts.statistics())

    def finish(self) -> tuple[SparseAutoencoder, Tensor, float]:
        """The autoencoder, its features' densities and the share that is dead; the rest of the trainer is let go."""
        trainer = self.trainer
        del self.trainer
        trainer.find_dead()
        return trainer.sae, trainer.counts.density_F(), trainer.n_dead / self.config.d_hidden


class Grid:
    """All of them; iterating gives those that are still trained."""

    def __init__(self, run_dir: Path, members: Iterable[Member]):
        self.run_dir, self.members = run_dir, list(members)
        self.is_single = not self.members[0].name
        self.points = [each.point for each in self.members]  # those of members that were stopped, too

    @classmethod
    def of(cls, constants: Mapping[str, Any], d_model: int) -> "Grid":
        """Those that constants such as config.py's describe, each under its name."""
        members = [
            Member(name, Path(each.RUN_DIR, name), each.TARGET_LAYER, TrainConfig.of(each, d_model))
            for name, each in constants.items()
        ]
        return cls(Path(next(iter(constants.values())).RUN_DIR), members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __str__(self) -> str:
        """A line for each: its folder, and what it is."""
        width = max(len(point.name) for point in self.points)
        return "\n".join(
            f"  {each.name:{width}}  layer {each.layer}, {each.config.d_hidden:,} features, {each.config.active()}, "
            f"learning rate {each.config.learning_rate:.3g}, seed {each.config.seed}"
            for each in self
        )

    @property
    def step(self) -> int:
        """The steps that all have gone."""
        return self.members[0].run.step

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.members[0].config.steps

    def progress(self) -> str:
        """The errors of the last records in words, and how many features are dead."""
        errors, dead = [each.record["normalized_mse"] for each in self], [each.record["dead"] for each in self]
        to = (f" to {max(errors):.3f}", f" to {max(dead)}") if len(errors) > 1 else ("", "")
        return f"normalized MSE {min(errors):.3f}{to[0]}, dead {min(dead)}{to[1]}"

    def find_checkpoints(self, go_on: bool) -> None:
        """Find what each can go on from; one that was stopped is left out. Raises UserError where that cannot be."""
        resume.check_folder(self.run_dir, [] if self.is_single else [each.name for each in self], go_on)
        stopped = {point.name: point.stopped for point in resume.read_points(self.run_dir) if go_on and point.stopped}
        for point in self.points:
            if point.name in stopped:
                point.stopped = stopped[point.name]
                print(f"{point.name} is left out, as it was stopped: {point.stopped}")
        self.members = [each for each in self if each.name not in stopped]
        if not self.members:
            raise Failed(f"all autoencoders in {self.run_dir} were stopped: RESUME=False sets them aside")
        for each in self:
            each.found = resume.find_checkpoints(each.folder, each.run, go_on)
        missing = [each.name for each in self if not each.found]
        if missing and any((each.folder / "sae").exists() for each in self if each.found):  # all had saved once
            raise UserError(
                f"found no checkpoint of {', '.join(missing)} in {self.run_dir}, expected one of each of its "
                "autoencoders: choose another RUN_DIR, or RESUME=False to train anew in this one and set them aside"
            )

    def start(self) -> bool:
        """Go on from the newest step that all have saved whole, which is True, or set an earlier run aside."""
        goes_on = resume.load_checkpoints([(each.found, each.trainer, each.run) for each in self])
        if not any(each.found for each in self):
            for folder in dict.fromkeys((self.run_dir, *(each.folder for each in self))):
                if moved_to := resume.set_aside(folder):
                    print(f"the earlier run is now in {moved_to}")
        for each in self:
            each.figures = list(torch.tensor(each.run.figures, device=each.trainer.dead.device))
            if not rank():  # the log as the checkpoint has it
                log = "".join(json.dumps(record) + "\n" for record in each.run.history)
                write_text(each.folder / "metrics.jsonl", log)
            if each.run.step == each.config.steps:  # nothing but its evaluation is left
                each.save_sae()
        if not self.is_single:
            resume.write_points(self.run_dir, self.points)
        return goes_on

    def train(self, x_SBD: Tensor, step: int) -> None:
        """Train all on the batches of a step, counted from 0."""
        for each in self:
            each.step(x_SBD[each.stream], step)

    def measure(
        self, x_SBD: Tensor, step: int, seconds: float, is_saved: bool, check_finite: Callable[[Tensor, str], None]
    ) -> None:
        """Make the records of the steps since the last ones, which took so many seconds; stop what exploded.

        Before weights are saved they are tried on x. `check_finite` raises for what the residuals of a layer were.
        """
        for each in list(self):
            if not each.measure(step, seconds):
                check_finite(torch.tensor(math.nan), f"residuals of layer {each.layer}")
            if why := each.explosion(x_SBD[each.stream] if is_saved else None):
                self.stop(each, why)

    def stop(self, member: Member, why: str) -> None:
        """Train one no further, whose loss exploded, while the others go on. Raises Failed if there are no others."""
        self.members.remove(member)
        good = resume.checkpoints(member.folder)
        kept = f"; it goes on from the last good checkpoint, {good[0]}" if good else ": there is no checkpoint yet"
        if self.is_single:
            raise Failed(f"{why}; start it again with a lower LEARNING_RATE{kept}")
        member.point.stopped = why
        resume.write_points(self.run_dir, self.points)
        print(f"{why}; the others go on without it")
        if not self.members:
            raise Failed(f"{why}, and no other is left: start again with a lower LEARNING_RATE and RESUME=False")

    def save(self, step: int, stream: dict[str, Any], seconds: float, keep: int) -> None:
        """Write what all can go on from, and then their autoencoders and remove all but the newest `keep` checkpoints.

        In this order, so that there is a step that all have saved, whenever the run is killed.
        """
        for each in self:
            each.run.step, each.run.stream = step, stream
            each.run.figures, each.run.seconds = [figures.tolist() for figures in each.figures], seconds
            save_trainer(resume.path_of_step(each.folder, step), each.trainer, each.run.model_dump())
        for each in self:
            resume.remove_checkpoints(each.folder, step, keep)
            each.save_sae()
