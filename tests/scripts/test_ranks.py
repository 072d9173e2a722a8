"""train.py under torchrun: killed, gone on with by one process and by two, it ends as one process alone does."""

import itertools
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import train_runs
from safetensors.torch import load_file
from train_runs import ROOT, STEPS, Ran, assert_refused, contents_of, metrics_of, step_of_checkpoint

from mistral_sae.sae.trainer import Trainer

corpus, arguments, here = train_runs.corpus, train_runs.arguments, train_runs.here

KILLED = """
import os, runpy, signal, sys
from mistral_sae.sae.trainer import Trainer

steps = []

def step(self, *args, step=Trainer.step):
    steps.append(1)
    if len(steps) == 13 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)

Trainer.step = step
sys.path.insert(0, os.getcwd())
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def on_two_ranks(arguments, script="train.py"):
    """Run a script in two processes that torchrun starts."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "MISTRAL_MODEL_PATH"}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


class Fails(Exception):
    pass


def failing_at_its(number, step):
    """A method that fails when it is called for the number-th time."""
    calls = itertools.count(1)

    def fail(*args):
        if next(calls) == number:
            raise Fails
        return step(*args)

    return fail


def test_two_ranks_one_process_and_two_ranks_end_a_run_as_one_process_does(arguments, here, tmp_path, monkeypatch):
    run_dir, alone, script = tmp_path / "run", tmp_path / "alone", tmp_path / "killed.py"
    settings = {"MOMENTS_DTYPE": "float32"}  # whose rounding at random is another on each mesh
    script.write_text(KILLED)
    started = time.monotonic()
    ran = on_two_ranks(arguments(run_dir, **settings), script)
    assert ran.code != 0
    assert time.monotonic() - started < 120  # its beginning included
    lines = [line for line in ran.err.splitlines() if "error: " in line and not line.startswith(("E1", "W1"))]
    assert lines == ["error: another rank ended: its own line says why; the last checkpoint is whole"]
    assert ran.out.count("loading the model") == 1
    assert step_of_checkpoint(run_dir) == 10
    assert (run_dir / "checkpoints/step-10.1-of-2.safetensors").exists()

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", failing_at_its(13, Trainer.step))
        with pytest.raises(Fails):
            here(arguments(run_dir, **settings))
    assert step_of_checkpoint(run_dir) == 20

    ran = on_two_ranks(arguments(run_dir, **settings))
    assert ran.code == 0, ran.err
    assert ran.out.count("continuing after step 20\n") == 1

    assert here(arguments(alone, **settings)).code == 0
    parts = {"checkpoints/step-30.1-of-2.safetensors", "checkpoints/step-40.1-of-2.safetensors"}
    assert set(contents_of(run_dir)) == set(contents_of(alone)) | parts
    for name in ("sae/sae_weights", "sae/sparsity"):
        found, expected = (load_file(folder / f"{name}.safetensors") for folder in (run_dir, alone))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = metrics_of(run_dir), metrics_of(alone)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    assert found[-1]["step"] == STEPS
    for one, other in zip(found, expected, strict=True):
        names = [name for name in other if name != "tokens_per_second"]
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4)

    (run_dir / "checkpoints/step-40.1-of-2.safetensors").unlink()
    said = here(arguments(run_dir, **settings, STATUS=1)).out  # of all files of a checkpoint
    assert re.search(r"^saved     .*step-40\.1-of-2\.safetensors", said, re.MULTILINE)
    assert re.search(r"^saved     .*step-30\.safetensors, .*, whole", said, re.MULTILINE)


def test_two_ranks_train_a_grid_from_activations_on_disk_as_one_process_does(arguments, here, tmp_path):
    def given(who):
        kept = tmp_path / f"{who}-activations"
        return arguments(tmp_path / who, K="[4, 8]", ACTIVATIONS_PATH=kept, MOMENTS_DTYPE="float32")

    ran = on_two_ranks(given("two"))
    assert ran.code == 0, ran.err
    assert here(given("one")).code == 0
    for folder in ("k4", "k8"):
        found, expected = (load_file(tmp_path / who / folder / "sae/sae_weights.safetensors") for who in ("two", "one"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_plan_for_a_mesh_needs_no_ranks_and_a_run_does(here, arguments, tmp_path):
    plan = here(arguments(tmp_path, MESH="2x4", DRY_RUN=True)).out
    assert "2 replicas of 4 shards" in plan
    assert "what features decode to" in plan
    placed = arguments(tmp_path, MESH="2x4", SAE_DEVICE="cpu", DRY_RUN=True)
    assert_refused(here(placed), "SAE_DEVICE is 'cpu': expected None on a mesh")
    assert_refused(here(arguments(tmp_path, MESH="2x4")), "replicas x shards that make 1, the number of processes")
    assert_refused(here(arguments(tmp_path, MESH="1x3", DRY_RUN=True)), "D_HIDDEN is 128: expected a multiple of the 3")
    assert_refused(here(arguments(tmp_path, MESH="many")), "MESH is 'many': expected replicas x shards")
