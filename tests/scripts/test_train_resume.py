"""train.py that is stopped, killed, damaged and started again, on a small random model and a small corpus."""

import json
import os
import re
import resource
import shutil
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
import train_runs
from safetensors.torch import load_file, save_file
from train_runs import CONTRACT_FILES, STEPS, assert_refused, contents_of, in_a_fork, metrics_of, step_of_checkpoint

from mistral_sae import files
from mistral_sae.files import SAEError
from mistral_sae.sae import resume, shards
from mistral_sae.sae.checkpoint import load_sae
from mistral_sae.sae.trainer import TrainConfig, Trainer

corpus, arguments, here = train_runs.corpus, train_runs.arguments, train_runs.here
finished, copied = train_runs.finished, train_runs.copied


def kill_while_it_saves():
    """Let a run be killed while it writes its second checkpoint."""

    def save_state(path, tensors, metadata, save=files.save_state):
        if metadata["step"] == 20:
            left = path.with_name(path.name + ".partial")
            left.mkdir()
            (left / ".tmp123").write_bytes(b"half of it")  # as safetensors names what it has not written whole
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, tensors, metadata)

    files.save_state = shards.save_state = save_state


def signal_at_step_13(number, again=False):
    """Let a run send itself a signal as its step 13 begins, and perhaps a second one."""
    steps = []

    def step(self, *args, step=Trainer.step):
        steps.append(1)
        if len(steps) == 13:
            for _ in range(1 + again):
                os.kill(os.getpid(), number)
        return step(self, *args)

    Trainer.step = step


def assert_same_end(run_dir, finished):
    """All that two runs have written is the same bit by bit, but for times."""
    expected, found = contents_of(finished), contents_of(run_dir)
    assert set(found) == set(expected) == CONTRACT_FILES
    for name in CONTRACT_FILES - {"metrics.jsonl", "training.png", *checkpoints_in(CONTRACT_FILES)}:
        assert found[name] == expected[name], name
    for name in checkpoints_in(CONTRACT_FILES):
        theirs, ours = load_file(finished / name), load_file(run_dir / name)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), name
    assert without_times(metrics_of(run_dir)) == without_times(metrics_of(finished))


def checkpoints_in(names):
    return [name for name in names if name.startswith("checkpoints/")]


def without_times(metrics):
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in metrics]


# ---- stopped and started again ----


def test_a_killed_run_started_again_ends_with_the_same_bits_as_an_uninterrupted_one(
    finished, here, arguments, tmp_path
):
    run_dir = tmp_path / "run"
    assert in_a_fork(arguments(run_dir), kill_while_it_saves).code == -9
    assert metrics_of(run_dir)[-1]["step"] == 20
    assert step_of_checkpoint(run_dir) == 10
    ran = here(arguments(run_dir))
    assert ran.code == 0, ran.err
    assert "continuing after step 10\n" in ran.out
    assert not list(run_dir.rglob("*.partial"))
    assert_same_end(run_dir, finished[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_finish_the_step_save_and_say_where_and_the_run_goes_on_to_the_same_end(
    finished, here, arguments, tmp_path, number, code
):
    run_dir = tmp_path / "run"
    ran = in_a_fork(arguments(run_dir), partial(signal_at_step_13, number))  # between two records and checkpoints
    assert ran.code == code
    path = run_dir / "checkpoints/step-13.safetensors"
    assert ran.last_line == f"error: stopped after step 13: started again, it goes on from {path}"
    assert "Traceback" not in ran.err
    assert step_of_checkpoint(run_dir) == 13
    ran = here(arguments(run_dir))
    assert ran.code == 0, ran.err
    assert "continuing after step 13\n" in ran.out
    assert_same_end(run_dir, finished[0])


def test_a_second_ctrl_c_ends_a_run_at_once_and_the_checkpoint_before_stays(arguments, tmp_path):
    ran = in_a_fork(arguments(tmp_path / "run"), partial(signal_at_step_13, signal.SIGINT, again=True))
    assert ran.code == -signal.SIGINT  # 130 in a shell
    assert "Traceback" not in ran.err
    assert step_of_checkpoint(tmp_path / "run") == 10


def test_the_maxima_that_are_saved_are_those_of_the_last_part_of_the_run(
    finished, here, arguments, tmp_path, monkeypatch
):
    forgotten, steps = [], []
    step, forget = Trainer.step, Trainer.forget_counts
    monkeypatch.setattr(Trainer, "step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    monkeypatch.setattr(Trainer, "forget_counts", lambda self: (forgotten.append(len(steps)), forget(self))[1])
    assert here(arguments(tmp_path / "run")).code == 0
    assert forgotten == [int(0.8 * STEPS)]  # where the learning rate begins to fall
    maximum, checkpoint = load_sae(finished[0]).maximum_F, load_file(finished[0] / "checkpoints/step-40.safetensors")
    assert torch.equal(maximum, checkpoint["maximum"])
    assert (maximum > 0).any()


def test_a_finished_run_started_again_trains_nothing_and_writes_its_autoencoder_again(
    here, arguments, copied, monkeypatch
):
    before = contents_of(copied)
    shutil.rmtree(copied / "sae")
    monkeypatch.setattr(Trainer, "step", None)
    ran = here(arguments(copied))
    assert ran.code == 0, ran.err
    after = contents_of(copied)
    unchanged = CONTRACT_FILES - {"training.png", "evaluation.json"}
    assert {name for name in CONTRACT_FILES if after[name] == before[name]} >= unchanged
    old, new = json.loads(before["evaluation.json"]), json.loads(after["evaluation.json"])
    assert new == pytest.approx(old, rel=1e-4)


def test_a_copy_of_a_run_goes_on_elsewhere_with_its_text_and_model(
    here, arguments, finished, tmp_path, corpus, mistral_folder
):
    run_dir = tmp_path / "elsewhere" / "another name"
    shutil.copytree(finished[0], run_dir)
    (run_dir / "checkpoints/step-40.safetensors").unlink()
    text = shutil.copy2(corpus, tmp_path / corpus.name)
    model = shutil.copytree(mistral_folder, tmp_path / mistral_folder.name)
    ran = here(arguments(run_dir, DATA_PATH=text, MISTRAL_MODEL_PATH=model))
    assert ran.code == 0, ran.err
    assert f"going on with another MISTRAL_MODEL_PATH ({mistral_folder} there, {model} here), DATA_PATH" in ran.out
    assert "continuing after step 30\n" in ran.out
    for name in ("sae/sae_weights.safetensors", "sae/sparsity.safetensors"):
        assert (run_dir / name).read_bytes() == (finished[0] / name).read_bytes()


# ---- other settings ----


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"K": 4}, "another K (8 there, 4 here): choose another RUN_DIR, or RESUME=False"),
        ({"SEED": 3}, "another SEED (0 there, 3 here)"),
        ({"TRAIN_TOKENS": 64_000}, "TRAIN_TOKENS (2565 there, 64000 here)"),
        ({"K": 4, "SHUFFLE_ROWS": 9, "DTYPE": "bfloat16"}, "K (8 there, 4 here), SHUFFLE_ROWS ("),
        ({"DRY_RUN": 1, "K": 4}, "another K (8 there, 4 here)"),
    ],
)
def test_other_settings_in_the_folder_of_a_run_are_refused_before_the_model_is_loaded_and_nothing_is_touched(
    here, arguments, copied, changed, said, monkeypatch
):
    before = contents_of(copied)
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)
    assert_refused(here(arguments(copied, **changed)), said)
    assert contents_of(copied) == before


def test_another_corpus_under_the_same_name_is_refused(here, arguments, copied, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)
    text = tmp_path / corpus.name
    text.write_text(corpus.read_text() + json.dumps({"text": "one more"}))
    assert_refused(here(arguments(copied, DATA_PATH=text)), "another CORPUS (its files, or what is in them)")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("owner/name@a1", "owner/name@b2", ["CORPUS (owner/name@a1 there, owner/name@b2 here)"]),
        ("owner/name@a1", "owner/other@a1", ["CORPUS (owner/name@a1 there, owner/other@a1 here)"]),
        ("owner/name", "owner/other@a1", ["CORPUS (its files, or what is in them)"]),
        ("owner/name", "owner/name@a1", []),  # known now
        ("owner/name@a1", "owner/name", []),  # cannot be asked: reading it will say so
        ("0f3a", "0f3b", ["CORPUS (its files, or what is in them)"]),
    ],
)
def test_another_commit_of_a_dataset_on_the_hub_is_another_corpus(old, new, said):
    assert resume._differences({"corpus": old, "k": 8}, {"corpus": new, "k": 8}) == said


def test_a_model_with_other_weights_is_refused(here, arguments, copied, mistral_folder, tmp_path):
    model = shutil.copytree(mistral_folder, tmp_path / mistral_folder.name)
    weights = load_file(model / "consolidated.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, model / "consolidated.safetensors")
    before = contents_of(copied)
    assert_refused(here(arguments(copied, MISTRAL_MODEL_PATH=model)), "on a model with other weights")
    assert contents_of(copied) == before


def test_a_second_run_in_the_folder_is_refused_and_nothing_is_touched(here, arguments, copied):
    before = contents_of(copied)
    with files.locked(copied, ".train.lock"):
        assert_refused(here(arguments(copied, RESUME=False)), "another run at work")
    assert contents_of(copied) == before


def test_settings_that_do_not_shape_the_result_may_change_and_are_said(here, arguments, copied):
    ran = here(arguments(copied, CHECKPOINT_EVERY=33, EVALUATIONS=1, LEARNING_RATE=0.001))
    assert ran.code == 0, ran.err
    assert "going on with another CHECKPOINT_EVERY (10 there, 33 here), EVALUATIONS (2 there, 1 here), " in ran.out
    assert "LEARNING_RATE (0.003 there, 0.001 here)" in ran.out


def test_fewer_rows_at_a_time_may_go_on_even_of_a_run_that_had_to_keep_them(here, arguments, copied):
    for path in resume.checkpoints(copied):
        saved_again(lambda _, run: run["settings"].update(rows_per_forward=run["others"].pop("rows_per_forward")))(path)
    ran = here(arguments(copied, ROWS_PER_FORWARD=1))
    assert ran.code == 0, ran.err
    assert "going on with another ROWS_PER_FORWARD (3 there, 1 here)" in ran.out


# ---- an earlier run ----


def test_resume_false_sets_the_earlier_run_aside_whole_and_trains_anew(here, arguments, copied):
    before = contents_of(copied)
    of_the_run = {"explanations.jsonl": b"{}\n", "analysis.json": b"{}", "analysis-1.json": b"{}"}
    of_the_run |= {"feature_statistics.safetensors": b"{}"}
    for name, content in of_the_run.items():
        (copied / name).write_bytes(content)
    (copied / "notes.txt").write_text("mine")
    ran = here(arguments(copied, K=4, TRAIN_TOKENS=256, RESUME=False))
    assert ran.code == 0, ran.err
    assert f"the earlier run is now in {copied / 'previous-1'}\n" in ran.out
    assert contents_of(copied / "previous-1") == before | of_the_run
    assert (copied / "notes.txt").read_text() == "mine"
    assert not (copied / "explanations.jsonl").exists()  # they name features of the earlier autoencoder
    assert json.loads((copied / "sae/cfg.json").read_text())["k"] == 4
    assert [record["step"] for record in metrics_of(copied)] == [2, 4]


def test_a_run_that_fails_before_it_has_saved_costs_the_earlier_one_nothing(here, arguments, copied, monkeypatch):
    def stopped(*_):
        raise SystemExit(9)

    before = contents_of(copied)
    monkeypatch.setattr(Trainer, "step", stopped)
    for _ in range(2):
        assert here(arguments(copied, RESUME=False)).code == 9
    assert contents_of(copied / "previous-1") == before
    assert set(contents_of(copied)) == {"metrics.jsonl"} | {f"previous-1/{name}" for name in before}


def test_results_without_a_checkpoint_are_not_overwritten(here, arguments, copied, monkeypatch):
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)
    shutil.rmtree(copied / "checkpoints")
    before = contents_of(copied)
    assert_refused(here(arguments(copied)), "found sae and evaluation.json in")
    assert contents_of(copied) == before


def test_a_move_that_was_cut_off_is_finished_by_the_next(copied, monkeypatch):
    before = contents_of(copied)
    rename, moved = Path.rename, []

    def cut_off(self, target):
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", cut_off)
    with pytest.raises(KeyboardInterrupt):
        resume.set_aside(copied)
    assert resume.set_aside(copied) == copied / "previous-1"
    assert contents_of(copied / "previous-1") == before
    assert resume.set_aside(copied) is None


# ---- damaged checkpoints ----


def flip(path, place):
    """Flip one bit of a file: at this share of its length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def saved_again(change):
    """Save a checkpoint with other contents, and a checksum that is right for them."""

    def damage(path):
        tensors, metadata = files.load_state(path)
        change(tensors, metadata)
        files.save_state(path, tensors, metadata)

    return damage


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 100),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    **{f"a bit flipped at {place}": lambda path, place=place: flip(path, place) for place in (0, 0.01, 0.3, 0.7, 1)},
    "no tensor": saved_again(lambda tensors, _: tensors.pop("maximum")),
    "a shape": saved_again(lambda tensors, _: tensors.update(b_enc=torch.zeros(1))),
    "a type": saved_again(lambda tensors, _: tensors.update(W_dec=tensors["W_dec"].double())),
    "no step": saved_again(lambda _, metadata: metadata.pop("step")),
    "a list": saved_again(lambda _, metadata: metadata.update(settings=[1])),
    "a text": saved_again(lambda _, metadata: metadata.update(step="forty")),
    "negative": saved_again(lambda _, metadata: metadata.update(step=-1)),
    "half": saved_again(lambda _, metadata: metadata.update(step=1.5)),
    "null": saved_again(lambda _, metadata: metadata.update(history=None)),
    "a log of lists": saved_again(lambda _, metadata: metadata.update(history=[[1]])),
    "a log of words": saved_again(lambda _, metadata: metadata.update(history=[{"step": "x"}])),
    "no model": saved_again(lambda _, metadata: metadata.update(model=None)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_one_before_it_is_used(copied, damage, capsys):
    newest, before = resume.checkpoints(copied)
    run = files.load_metadata(newest, resume.Run)
    trainer = trainer_of(run)
    DAMAGES[damage](newest)
    fresh = run.model_copy(update={"step": 0, "history": [], "figures": []})
    resume.load_checkpoints([(resume.find_checkpoints(copied, fresh, True), trainer, fresh)])
    assert fresh.step == fresh.history[-1]["step"] == 30
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1, said
    assert str(newest) in said[0]
    assert "expected" in said[0]
    assert said[0].endswith("the checkpoint before it is used")
    expected = load_file(before)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.state().items())

    DAMAGES[damage](before)
    with pytest.raises(SAEError, match="found no whole checkpoint") as error:
        resume.load_checkpoints([(resume.find_checkpoints(copied, fresh, True), trainer, fresh)])
    assert "\n" not in str(error.value)


def trainer_of(run):
    return Trainer(TrainConfig(**{name: run.settings[name] for name in TRAINER_SETTINGS}))


TRAINER_SETTINGS = {field.name for field in fields(TrainConfig)} - {"learning_rate", "rows_per_forward"}


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_end(
    finished, here, arguments, copied
):
    flip(copied / "checkpoints/step-40.safetensors", 0.5)
    ran = here(arguments(copied))
    assert ran.code == 0, ran.err
    assert f"found a damaged {copied / 'checkpoints/step-40.safetensors'}" in ran.out
    assert "continuing after step 30\n" in ran.out
    assert_same_end(copied, finished[0])


def test_where_all_checkpoints_are_damaged_one_line_says_so_and_nothing_is_touched(here, arguments, copied):
    for path in resume.checkpoints(copied):
        flip(path, 0.5)
    before = contents_of(copied)
    assert_refused(here(arguments(copied)), "found no whole checkpoint")
    assert contents_of(copied) == before


def test_as_many_checkpoints_are_kept_as_asked_for_and_none_of_a_later_step(here, arguments, copied):
    (copied / "checkpoints/step-40.safetensors").unlink()
    shutil.copy(copied / "checkpoints/step-30.safetensors", copied / "checkpoints/step-99.safetensors")
    flip(copied / "checkpoints/step-99.safetensors", 0.5)
    assert here(arguments(copied, KEEP_CHECKPOINTS=1)).code == 0
    assert [path.name for path in resume.checkpoints(copied)] == ["step-40.safetensors"]


# ---- a full disk ----


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_while_a_run_saves_is_one_line_and_the_earlier_checkpoint_stays(arguments, copied):
    """The limit on a file's size is the kernel's, as is its error; only the largest files are above it."""
    newest = copied / "checkpoints/step-40.safetensors"
    size = newest.stat().st_size - 1000
    newest.unlink()
    before = contents_of(copied)
    assert_refused(in_a_fork(arguments(copied), partial(limit_files, size)), f"could not write {newest} (", code=1)
    after = contents_of(copied)
    assert {name: after[name] for name in before if name != "metrics.jsonl"} == {
        name: data for name, data in before.items() if name != "metrics.jsonl"
    }
    assert set(after) == set(before)  # no half-written file stays


# ---- STATUS ----


def test_status_tells_how_far_a_run_is(here, arguments, copied):
    flip(copied / "checkpoints/step-40.safetensors", 0.5)
    before = contents_of(copied)
    ran = here([f"RUN_DIR={copied}", "STATUS=1"])
    assert (ran.code, ran.err) == (0, "")
    assert f"\nrun       {copied}, not at work\n" in ran.out
    assert "\nstep      40 of 40 (100%), 2,560 tokens\n" in ran.out
    assert re.search(r"^loss      0\.\d+, normalized MSE 0\.\d+, dead features \d+$", ran.out, re.MULTILINE)
    assert re.search(r"^rate      [\d,]+ tokens a second$", ran.out, re.MULTILINE)
    assert re.search(r"^saved     found a damaged .*step-40\.safetensors", ran.out, re.MULTILINE)
    assert re.search(r"^saved     .*step-30\.safetensors, .* kB, whole, \d", ran.out, re.MULTILINE)
    assert "\nevaluated yes, " in ran.out
    assert contents_of(copied) == before


def test_status_of_an_unfinished_run_at_work_tells_the_time_left(here, copied):
    os.truncate(copied / "metrics.jsonl", (copied / "metrics.jsonl").stat().st_size - 5)  # a line is being written
    (copied / "evaluation.json").unlink()
    with files.locked(copied, ".train.lock"):
        ran = here([f"RUN_DIR={copied}", "STATUS=1"])
    assert ran.code == 0
    assert f"at work: process {os.getpid()}" in ran.out
    assert "step      35 of 40 (88%)" in ran.out
    assert re.search(r"^rate      .* tokens a second, about \d+ seconds left$", ran.out, re.MULTILINE)
    assert "\nevaluated not yet" in ran.out


def test_status_of_a_folder_without_a_run_is_one_line(here, tmp_path):
    assert_refused(here([f"RUN_DIR={tmp_path / 'nothing'}", "STATUS=1"]), "found no run in")
    assert list(tmp_path.iterdir()) == []
