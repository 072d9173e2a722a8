"""Runs of train.py for all files of its tests: on a small random model and a small corpus.

A test file takes the fixtures over by name: those of explain.py's tests have the same names.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from forks import Fork, in_a_new_process

from mistral_sae import files
from mistral_sae.sae import resume

ROOT = Path(__file__).parent.parent.parent
STEPS = 40
SETTINGS = {
    "TARGET_LAYER": 1,
    "DEVICE": "cpu",
    "CONTEXT_LENGTH": 32,
    "HELD_OUT_FRACTION": 0.3,
    "TRAIN_TOKENS": STEPS * 64 + 5,
    "D_HIDDEN": 128,
    "K": 8,
    "BATCH_SIZE": 64,
    "LEARNING_RATE": 0.003,
    "WARM_UP_STEPS": 10,
    "K_AUX": 16,
    "DEAD_AFTER_TOKENS": 100,
    "MOMENTS_DTYPE": "bfloat16",
    "BUFFER_TOKENS": 500,
    "ROWS_PER_FORWARD": 3,
    "EVALUATION_ROWS": 10,
    "EVALUATION_STRIDE": 1,
    "EVALUATIONS": 2,
    "LOG_EVERY": 5,
    "CHECKPOINT_EVERY": 10,
}
CONTRACT_FILES = {
    "sae/cfg.json",
    "sae/sae_weights.safetensors",
    "sae/sparsity.safetensors",
    "metrics.jsonl",
    "evaluation.json",
    "training.png",
    "checkpoints/step-30.safetensors",
    "checkpoints/step-40.safetensors",
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_line(self):
        return self.err.splitlines()[-1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty short documents that repeat themselves, so that there is something to learn."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    documents = [f"def f{i}(x):\n    return x + {i}\n\n\nclass A{i}:\n    y = f{i}({i})\n" * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def arguments(mistral_folder, corpus):
    """NAME=value of a run of seconds, changed by keywords."""

    def of(run_dir, **changed):
        constants = {"MISTRAL_MODEL_PATH": mistral_folder, "DATA_PATH": corpus, "RUN_DIR": run_dir}
        return [f"{name}={value}" for name, value in (constants | SETTINGS | changed).items()]

    return of


def in_a_fork(arguments, *prepare):
    """Run train.py in a process of its own, in which something is patched before."""
    return Ran(*Fork("train", arguments, *prepare).ended())


@pytest.fixture
def here(run_script):
    """Run train.py in this process."""
    return lambda arguments: Ran(*run_script("train.py", arguments))


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder and the output of a whole run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, Ran(*in_a_new_process("train", arguments(run_dir)))


@pytest.fixture
def copied(finished, tmp_path):
    """A folder like that of the finished run, which a test may change."""
    return shutil.copytree(finished[0], tmp_path / "run")


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def contents_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".train.lock", ".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_refused(ran, said, code=2):
    assert ran.code == code
    lines = [line for line in ran.err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Traceback" not in ran.out


def step_of_checkpoint(run_dir):
    """Of the newest, which is whole."""
    tensors, run = files.load_state(resume.checkpoints(run_dir)[0], resume.Run)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    return run.step
