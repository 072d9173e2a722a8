"""Grids: several autoencoders on the same pass of the model, each of which ends as it would alone."""

import json
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch
import train_runs
from safetensors.torch import load_file
from train_runs import CONTRACT_FILES, STEPS, assert_refused, contents_of, in_a_fork, metrics_of, step_of_checkpoint

from mistral_sae import files
from mistral_sae.files import SAEError, locked
from mistral_sae.loading import sae_source
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae import resume, shards
from mistral_sae.sae.trainer import Trainer

corpus, arguments, here = train_runs.corpus, train_runs.arguments, train_runs.here

GRID = {"TARGET_LAYER": [0, 1], "SEED": [0, 3]}
NAMES = ["layer0-seed0", "layer0-seed3", "layer1-seed0", "layer1-seed3"]
SWEEP = {"sweep.json", "sweep.png"}


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder and the output of a whole grid of two layers and two seeds."""
    run_dir = tmp_path_factory.mktemp("grid") / "run"
    return run_dir, in_a_fork(arguments(run_dir, **GRID))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def assert_same_tensors(found, expected, but=()):
    """Two folders hold the same autoencoder and the same last checkpoint, bit by bit."""
    assert (found / "sae/cfg.json").read_bytes() == (expected / "sae/cfg.json").read_bytes()
    for name in ("sae/sae_weights", "sae/sparsity", f"checkpoints/step-{STEPS}"):
        ours, theirs = load_file(found / f"{name}.safetensors"), load_file(expected / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), f"{found} {name}"
    assert without_times(found) == without_times(expected)
    assert json.loads((found / "evaluation.json").read_text()) == json.loads((expected / "evaluation.json").read_text())


def without_times(run_dir):
    return [
        {key: value for key, value in record.items() if key != "tokens_per_second"} for record in metrics_of(run_dir)
    ]


# ---- as alone ----


def test_each_of_a_grid_has_the_folder_of_a_run_named_by_what_varies(finished):
    run_dir, ran = finished
    assert (ran.code, ran.err) == (0, "")
    assert set(contents_of(run_dir)) == SWEEP | {f"{name}/{file}" for name in NAMES for file in CONTRACT_FILES}


@pytest.mark.parametrize("name", NAMES[1:3])
def test_an_autoencoder_of_a_grid_ends_with_the_bits_that_it_has_alone(finished, here, arguments, tmp_path, name):
    layer, seed = map(int, re.findall(r"\d+", name))
    ran = here(arguments(tmp_path / "alone", TARGET_LAYER=layer, SEED=seed))
    assert ran.code == 0, ran.err
    assert_same_tensors(finished[0] / name, tmp_path / "alone")


def test_a_grid_from_residuals_on_disk_ends_as_alone_too(here, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_sae.data.stored.SHARD_TOKENS", 256)
    kept = {"ACTIVATIONS_PATH": tmp_path / "kept"}
    assert here(arguments(tmp_path / "run", **GRID, **kept)).code == 0
    assert here(arguments(tmp_path / "alone", TARGET_LAYER=1, SEED=3, **kept)).code == 0
    assert_same_tensors(tmp_path / "run/layer1-seed3", tmp_path / "alone")


def test_other_architectures_widths_and_rates_end_as_alone_too(here, arguments, tmp_path):
    grid = {"ARCHITECTURE": "[matryoshka, relu]", "D_HIDDEN": [64, 96], "LEARNING_RATE": [0.001, 0.002]}
    assert here(arguments(tmp_path / "run", **grid)).code == 0
    assert len(list((tmp_path / "run").glob("*/sae"))) == 8
    alone = {"ARCHITECTURE": "relu", "D_HIDDEN": 64, "LEARNING_RATE": 0.002}
    assert here(arguments(tmp_path / "relu", **alone)).code == 0
    assert_same_tensors(tmp_path / "run/relu-features64-lr0.002", tmp_path / "relu")
    alone |= {"ARCHITECTURE": "matryoshka", "D_HIDDEN": 96}
    assert here(arguments(tmp_path / "matryoshka", **alone)).code == 0
    assert_same_tensors(tmp_path / "run/matryoshka-features96-lr0.002", tmp_path / "matryoshka")


def test_the_model_runs_once_for_all_and_no_further_than_the_deepest_layer(here, arguments, tmp_path, monkeypatch):
    read = []
    residuals = LanguageModel.residuals_by_layer

    def counted(self, tokens, layers):
        read.append(sorted(layers))
        return residuals(self, tokens, layers)

    def forwards_of(**changed):
        read.clear()
        assert here(arguments(tmp_path / f"run{len(changed)}", EVALUATIONS=1, TRAIN_TOKENS=640, **changed)).code == 0
        return [layers for layers in read if layers != [2]]

    monkeypatch.setattr(LanguageModel, "residuals_by_layer", counted)
    training = [layers for layers in forwards_of(TARGET_LAYER=[0, 1], K=[4, 8]) if len(layers) == 2]
    alone = forwards_of()
    assert set(map(tuple, training)) == {(0, 1)}
    assert 0 < len(training) < len(alone)  # which has those of its evaluation, too


def test_lists_of_one_value_are_a_run_in_run_dir_itself(here, arguments, tmp_path):
    assert here(arguments(tmp_path / "run", K=[8], SEED="[0]", TRAIN_TOKENS=640)).code == 0
    assert (tmp_path / "run/sae/cfg.json").exists()
    assert not (tmp_path / "run/sweep.json").exists()


def test_a_constant_that_follows_from_one_that_varies_is_as_it_is_alone(here, tmp_path):
    dry = ["DRY_RUN=1", "DEVICE=cpu"]
    ran = here([*dry, "D_HIDDEN=[1024, 4096]", "K=[16, 32]", f"RUN_DIR={tmp_path}"])
    assert ran.code == 0, ran.err
    for width in (1024, 4096):
        alone = 1.8e-3 / (width / 2**14) ** 0.5  # as config.py has it
        assert ran.out.count(f"{width:,} features, of which 16 are active on a token, learning rate {alone:.3g},") == 1


def test_constants_that_all_share_and_that_would_differ_are_asked_for_in_one_line(here, arguments, tmp_path):
    left = [text for text in arguments(tmp_path / "x", TARGET_LAYER=[0, 1]) if not text.startswith("TRAIN_TOKENS")]
    assert_refused(here(left), "expected one value for all of the grid: set TRAIN_TOKENS")


# ---- what is told ----


def test_the_end_is_a_table_and_a_picture_and_sweep_json_has_the_same_figures(finished):
    run_dir, ran = finished
    points = json.loads((run_dir / "sweep.json").read_text())
    assert [point["name"] for point in points] == NAMES
    for point in points:
        figures = json.loads((run_dir / point["name"] / "evaluation.json").read_text())
        assert point["figures"] == figures
        (row,) = re.findall(rf"^{point['name']} +([\d.]+) +([\d.]+) +(-?[\d.]+%) ", ran.out, re.MULTILINE)
        l0, error, recovered = figures["l0"], figures["normalized_mse"], figures["ce_loss_recovered"]
        assert row == (f"{l0:.1f}", f"{error:.3f}", f"{recovered:.1%}")
    assert (run_dir / "sweep.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_dry_run_names_all_and_plans_the_memory_of_all(here, arguments, tmp_path):
    def planned(**changed):
        ran = here(arguments(tmp_path / "run", DRY_RUN=1, D_HIDDEN=4096, **changed))
        assert ran.code == 0, ran.err
        return ran.out, {part: float(size) for part, size in re.findall(r"^  (\S.*?) +(\d+) [MG]B", ran.out, re.M)}

    _, of_one = planned()
    out, of_all = planned(**GRID)
    assert all(f"\n  {name} " in out for name in NAMES)
    for part in ("autoencoder (float32)", "Adam's moments (bfloat16)"):
        assert of_all[part] == pytest.approx(4 * of_one[part], abs=2)
    assert of_all["its gradients (float32)"] == of_one["its gradients (float32)"]
    assert list(tmp_path.iterdir()) == []


def test_status_tells_of_each(here, copied):
    ran = here([f"RUN_DIR={copied}", "STATUS=1"])
    assert (ran.code, ran.err) == (0, "")
    assert f"grid      4 autoencoders in {copied}, not at work" in ran.out
    assert ran.out.count("step      40 of 40 (100%)") == 4
    assert all(f"\n{name}\n" in ran.out for name in NAMES)


def test_the_run_dir_of_a_grid_is_no_autoencoder_and_the_line_names_those_in_it(finished):
    with pytest.raises(SAEError, match=rf"RUN_DIR={finished[0]}/layer0-seed0, layer0-seed3, layer1-seed0"):
        sae_source(type("", (), {"SAE_PATH": None, "RUN_DIR": str(finished[0])}))
    assert sae_source(type("", (), {"SAE_PATH": None, "RUN_DIR": str(finished[0] / NAMES[2])}))


# ---- stopped and started again ----


def kill_at_save(number):
    """Let a run be killed as it begins to write its number-th checkpoint."""
    saves = []

    def save_state(*args, save=files.save_state):
        saves.append(1)
        if len(saves) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args)

    files.save_state = shards.save_state = save_state


@pytest.mark.parametrize(("save", "steps"), [(2, 0), (7, 10)])
def test_a_grid_killed_between_two_saves_goes_on_from_what_all_have_to_the_same_bits(
    finished, here, arguments, tmp_path, save, steps
):
    """At the save of the second of four after step 10, and of the third after step 20, with one checkpoint kept."""
    run_dir, changed = tmp_path / "run", GRID | {"KEEP_CHECKPOINTS": 1}
    assert in_a_fork(arguments(run_dir, **changed), partial(kill_at_save, save)).code == -9
    assert step_of_checkpoint(run_dir / NAMES[0]) == steps + 10
    assert bool(resume.checkpoints(run_dir / NAMES[3])) == bool(steps)
    ran = here(arguments(run_dir, **changed))
    assert ran.code == 0, ran.err
    assert (f"continuing after step {steps}\n" in ran.out) == bool(steps)
    kept = {file for file in CONTRACT_FILES if "step-30" not in file}
    assert set(contents_of(run_dir)) == SWEEP | {f"{name}/{file}" for name in NAMES for file in kept}
    for name in NAMES:
        assert_same_tensors(run_dir / name, finished[0] / name)


def test_a_damaged_checkpoint_of_one_takes_all_back_to_the_step_before(finished, here, arguments, copied):
    newest = copied / NAMES[2] / "checkpoints/step-40.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    ran = here(arguments(copied, **GRID))
    assert ran.code == 0, ran.err
    assert ran.out.count("the checkpoint before it is used") == 1
    assert "continuing after step 30\n" in ran.out
    for name in NAMES:
        assert_same_tensors(copied / name, finished[0] / name)


def test_one_of_a_grid_goes_on_alone_in_its_folder(here, arguments, copied):
    ran = here(arguments(copied / NAMES[3], TARGET_LAYER=1, SEED=3))
    assert ran.code == 0, ran.err
    assert "continuing after step 40\n" in ran.out


def test_one_of_a_grid_at_work_is_refused_to_a_run_of_its_own(here, arguments, copied):
    with locked(copied, resume.LOCK):
        assert_refused(here(arguments(copied / NAMES[3], TARGET_LAYER=1, SEED=3)), "found the grid in")


# ---- folders that hold something else ----


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"SEED": [0, 3, 4]},
            "holds a grid of layer0-seed0, layer0-seed3, layer1-seed0, layer1-seed3, expected a grid",
        ),
        ({"TARGET_LAYER": 1, "SEED": 0}, "holds a grid of layer0-seed0, layer0-seed3, layer1-seed0, layer1-seed3, ex"),
        ({"K": 4}, "another K (8 there, 4 here)"),
    ],
)
def test_other_constants_in_the_folder_of_a_grid_are_refused_and_nothing_is_touched(
    here, arguments, copied, changed, said, monkeypatch
):
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)
    before = contents_of(copied)
    assert_refused(here(arguments(copied, **(GRID | changed))), said)
    assert contents_of(copied) == before


def test_a_grid_is_refused_in_the_folder_of_a_run_and_where_one_of_its_folders_is_a_run(here, arguments, tmp_path):
    few = {"TRAIN_TOKENS": 640}
    assert here(arguments(tmp_path / "run/k8", **few)).code == 0
    assert_refused(here(arguments(tmp_path / "run/k8", K=[4, 8], **few)), "holds a run of one autoencoder, expected a")
    before = contents_of(tmp_path)
    assert_refused(here(arguments(tmp_path / "run", K=[4, 8], **few)), "holds a run of one autoencoder in k8, expected")
    assert contents_of(tmp_path) == before


def test_a_grid_that_lost_the_checkpoints_of_one_is_refused(here, arguments, copied):
    shutil.rmtree(copied / NAMES[1])
    before = contents_of(copied)
    assert_refused(here(arguments(copied, **GRID)), f"found no checkpoint of {NAMES[1]} in")
    assert contents_of(copied) == before


def test_resume_false_sets_the_grid_aside_whole(here, arguments, copied):
    before = contents_of(copied)
    ran = here(arguments(copied, TRAIN_TOKENS=640, K=[4, 8], RESUME=False))
    assert ran.code == 0, ran.err
    assert f"the earlier run is now in {copied / 'previous-1'}\n" in ran.out
    assert contents_of(copied / "previous-1") == before
    assert {path.name for path in copied.iterdir() if path.name[0] != "."} == {"previous-1", "k4", "k8", *SWEEP}


# ---- one that explodes ----


def test_one_that_explodes_is_named_and_stopped_and_the_others_go_on_to_the_same_bits(
    here, arguments, tmp_path, monkeypatch
):
    def broken(self, *args, step=Trainer.step):
        figures = step(self, *args)
        if self.config.k == 4 and self.adam.steps == 13:
            self.sae.W_enc.fill_(float("nan"))
        return figures

    assert here(arguments(tmp_path / "alone")).code == 0
    monkeypatch.setattr(Trainer, "step", broken)
    grid = arguments(tmp_path / "run", K=[4, 8])
    for line in (
        r"^the normalized MSE of k4 is nan, .* at step 15, .*; the others go on without it$",
        "^k4 is left out, ",
    ):
        ran = here(grid)
        assert ran.code == 1
        assert ran.last_line.startswith("error: k4 exploded and was stopped")
        assert len(re.findall(line, ran.out, re.MULTILINE)) == 1
        assert_same_tensors(tmp_path / "run/k8", tmp_path / "alone")
    assert step_of_checkpoint(tmp_path / "run/k4") == 10
    assert "stopped   the normalized MSE of k4" in here([*grid, "STATUS=1"]).out
    monkeypatch.undo()


def test_where_all_explode_the_run_fails(here, arguments, tmp_path):
    ran = here(arguments(tmp_path / "run", LEARNING_RATE=[10.0, 20.0], WARM_UP_STEPS=0))
    assert_refused(ran, "no other is left", code=1)
