"""The log of a training in TensorBoard, and in two stand-ins with the interface of wandb and trackio."""

import sys
from types import SimpleNamespace

import pytest

from mistral_sae.cli import UserError
from mistral_sae.sae.resume import Run
from mistral_sae.sae.trackers import check, tracked


def run_of(*steps, **settings):
    run = Run.new(settings, {})
    run.history += [record(step) for step in steps]
    return run


def record(step, loss=0.5):
    return {"step": step, "loss": loss + step, "dead": 3}


def scalars(run_dir):
    """What TensorBoard shows: values by figure and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Fake:
    """The part of wandb's and trackio's interface that is used."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fakes(monkeypatch):
    made = {name: Fake() for name in ("wandb", "trackio")}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return made


def test_tensorboard_shows_each_figure_of_each_record_once_though_the_run_was_stopped(tmp_path):
    with tracked("tensorboard", tmp_path, {"": run_of()}) as track:
        for step in (1, 2, 3):
            track("", record(step))
    assert scalars(tmp_path) == {"loss": [(1, 1.5), (2, 2.5), (3, 3.5)], "dead": [(1, 3), (2, 3), (3, 3)]}
    with tracked("tensorboard", tmp_path, {"": run_of(1, 2)}) as track:  # it goes on from a checkpoint after step 2
        track("", record(3, loss=0.25))
    assert scalars(tmp_path)["loss"] == [(1, 1.5), (2, 2.5), (3, 3.25)]


def test_wandb_and_trackio_are_given_the_settings_and_every_record(tmp_path, fakes):
    run_dir = tmp_path / "k64"
    with tracked("wandb, trackio", run_dir, {"": run_of(1, k=64)}) as track:
        track("", record(2))
    for name, fake in fakes.items():
        (options,) = fake.started
        assert options["config"] == {"k": 64}
        assert (options["project"], options["name"], options.get("dir")) == (
            "mistral-sae", "k64", run_dir if name == "wandb" else None
        )  # fmt: skip
        assert fake.logged == [(1, {"loss": 1.5, "dead": 3}), (2, {"loss": 2.5, "dead": 3})]
        assert fake.finished == 1


def test_the_autoencoders_of_a_grid_stand_side_by_side(tmp_path, fakes):
    with tracked("wandb", tmp_path, {"k8": run_of(1, 2, k=8), "k16": run_of(1, k=16)}) as track:
        track("k16", record(2))
    assert fakes["wandb"].started[0]["config"] == {"k8": {"k": 8}, "k16": {"k": 16}}
    assert [step for step, _ in fakes["wandb"].logged] == [1, 1, 2, 2]  # which may not go back
    assert {key for _, figures in fakes["wandb"].logged for key in figures} == {
        "loss/k8", "dead/k8", "loss/k16", "dead/k16"
    }  # fmt: skip


def test_a_log_ends_though_the_training_does_not_end_well(tmp_path, fakes):
    with pytest.raises(KeyboardInterrupt), tracked("wandb trackio", tmp_path, {"": run_of()}):
        raise KeyboardInterrupt
    assert [fake.finished for fake in fakes.values()] == [1, 1]


def test_a_tracker_that_does_not_start_or_is_not_there_is_named(tmp_path, fakes, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no API key configured.\nUse `wandb login`")

    monkeypatch.setattr(fakes["wandb"], "init", refuse)
    words = r"^wandb did not start \(no API key configured. Use `wandb login`\)"
    with pytest.raises(UserError, match=words), tracked("trackio wandb", tmp_path, {"": run_of()}):
        pass
    assert fakes["trackio"].finished == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else True)
    check("wandb")
    with pytest.raises(UserError, match="pip install trackio"):
        check("wandb trackio")


def test_other_ranks_than_the_first_log_nothing(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr("mistral_sae.sae.trackers.rank", lambda: 1)
    with tracked("wandb", tmp_path, {"": run_of(1)}) as track:
        track("", record(2))
    assert fakes["wandb"].started == []
