"""Arguments that no run can use: the same one line from each of the scripts, and nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.fuzz import READERS

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("train.py", "explain.py", "demo.py")
EVERY = (*SCRIPTS, "analyse.py", "share.py")
DIGITS = "9" * 300
# What no script takes, and words of what each says
REFUSED = {
    "RUN_DIR=": "RUN_DIR is empty: give it a value, or RUN_DIR=None",
    "RUN_DIR=~nosuchuser/run": "RUN_DIR is '~nosuchuser/run': expected a user of this machine after ~",
    "MISTRAL_MODEL_PATH=~nosuchuser": "expected a user of this machine",
    "SAE_PATH=~nosuchuser/sae": "expected a user of this machine",
    "DATA_PATH=~nosuchuser/text": "expected a user of this machine",
    "DATA_PATH=": "DATA_PATH is '': expected a path or a name",
    "DATA_PATH= ": "DATA_PATH is ' ': expected a path or a name",
    f"RUN_DIR={'a' * 300}": "expected a shorter path",
    f"SAE_PATH={'é' * 200}": "expected a shorter path",
    f"MISTRAL_MODEL_PATH=/tmp/{'a' * 5000}": "expected a shorter path",
    f"DATA_PATH={'text/' * 2}{'b' * 256}": "expected a shorter path",
    f"K={DIGITS}": "expected at most 134,217,728",
    f"SEED={DIGITS}": "expected at most 4,294,967,295",
    f"D_HIDDEN={DIGITS}0000000000": "expected at most 134,217,728",
    f"TRAIN_TOKENS={DIGITS}": "expected at most 1,000,000,000,000,000",
    f"LEARNING_RATE={DIGITS}": "expected at most 1,000,000,000",
    f"LEARNING_RATE={DIGITS}{DIGITS}": "LEARNING_RATE must be of type float",
    f"K={'9' * 5000}": "K must be of type int",
    "ROWS_PER_FORWARD=0": "expected at least 1",
    "ROWS_PER_FORWARD=1e9": "expected at most 1,048,576",
    "EXAMPLES_PER_INTERVAL=1e10": "expected at most 10,000",
    "EXAMPLES_PER_INTERVAL=0": "expected at least 1",
    "EXPLAIN_STRIDE=1e21": "expected at most 1,000,000,000",
    "EXPLAIN_STRIDE=0": "expected at least 1",
    "AUXK_FEATURES=-1": "expected at least 0",
    "EVALUATIONS=-1": "expected at least 1",
    "EVALUATIONS=1e9": "expected at most 10,000",
    "HELD_OUT_FRACTION=-1": "expected between 0 and 1",
    "HELD_OUT_FRACTION=0": "expected between 0 and 1",
    "HELD_OUT_FRACTION=1e999": "expected between 0 and 1",
    "SHUFFLE_ROWS=1e12": "expected at most 134,217,728",
    "SHUFFLE_ROWS=0": "expected at least 1",
    "BUFFER_TOKENS=1": "expected at least 2",
    "BUFFER_TOKENS=1e15": "expected at most 4,294,967,296",
    "TARGET_LAYER=-1": "expected at least 0",
    "TARGET_LAYER=1000": "expected at most 999",
    "CONTEXT_LENGTH=2": "expected at least 3",
    "CONTEXT_LENGTH=1e9": "expected at most 1,048,576",
    "D_HIDDEN=-1": "D_HIDDEN is -1: expected at least 1",
    "D_HIDDEN=1e12": "expected at most 134,217,728",
    "K=0": "expected at least 1",
    "K=10000": "K is 10000: expected 1 to D_HIDDEN, 8192",
    "SEED=-1": "expected at least 0",
    "BATCH_SIZE=1": "expected at least 2",
    "BATCH_SIZE=1e12": "expected at most 16,777,216",
    "LEARNING_RATE=0": "expected above 0",
    "LEARNING_RATE=-1": "expected above 0",
    "LEARNING_RATE=1e999": "expected at most 1,000,000,000",
    "WARM_UP_STEPS=-1": "expected at least 0",
    "DECAY_FRACTION=0": "expected above 0",
    "DECAY_FRACTION=1.5": "expected at most 1",
    "MAX_GRADIENT_NORM=0": "expected above 0",
    "MAX_GRADIENT_NORM=1e999": "expected at most 1,000,000,000",
    "AUXK_COEFFICIENT=-0.5": "expected at least 0",
    "K_AUX=-3": "expected at least 0",
    "DEAD_AFTER_TOKENS=0": "expected at least 1",
    "MOMENTS_DTYPE=float8": "expected float32 or bfloat16",
    "EVALUATION_ROWS=0": "expected at least 1",
    "EVALUATION_STRIDE=0": "expected at least 1",
    "LOG_EVERY=0": "expected at least 1",
    "CHECKPOINT_EVERY=0": "expected at least 1",
    "KEEP_CHECKPOINTS=0": "expected at least 1",
    "TRAIN_TOKENS=100": "expected at least one batch, 1024",
    "EXPLAIN_TOKENS=10": "expected at least one row, CONTEXT_LENGTH",
    "TOKENS_BEFORE=-1": "expected at least 0",
    "TOKENS_AFTER=1e9": "expected at most 1,048,576",
    "EXPLAINER=gpt": "expected openai, mistral or offline",
    "EXPLAINER=mistral": "expected another, as the stand-in cannot explain",
    "SCORERS=guessing": "expected any of detection, fuzzing, simulation",
    "CONCURRENCY=0": "expected at least 1",
    "CONCURRENCY=1e9": "expected at most 10,000",
    "MAX_REPLY_TOKENS=0": "expected at least 1",
    "REQUEST_TIMEOUT=0": "expected above 0",
    "REQUEST_DEADLINE=1e300": "expected at most 1,000,000",
    "MAX_FAILED_SHARE=2": "expected at most 1",
    "MAX_DOLLARS=-1": "expected above 0",
    "MAX_API_TOKENS=0": "expected above 0",
    "PROMPT_DOLLARS=-1": "expected at least 0",
    "COMPLETION_DOLLARS=1e999": "expected at most 1,000,000",
    "SAMPLING=warm": "SAMPLING must be of type dict: found 'warm'",
    "SAMPLING={'stop': {1, 2}}": "expected fields of a request, as JSON can hold them",
    "SAMPLING={'top_p': 1e999}": "expected fields of a request, as JSON can hold them",
    "EXCLUDE_TOKENS=[None]": "expected tokens or their ids",
    "EXCLUDE_TOKENS=[1.5]": "expected tokens or their ids",
    "EXCLUDE_TOKENS=5": "EXCLUDE_TOKENS must be of type list: found '5'",
    "TEXT= ": "expected some text",
    "METHOD=push": "expected clamp, add, ablate or raw",
    "POSITIONS=first": "expected all or generated",
    "COEFFICIENT=1e999": "expected a finite number",
    "COEFFICIENT=strong": "COEFFICIENT must be of type float",
    "TEMPERATURE=-1": "expected at least 0",
    "TEMPERATURE=1e-300": "expected 0 for the likeliest token, or at least 0.001",
    "NEW_TOKENS=0": "expected at least 1",
    "NEW_TOKENS=1e12": "expected at most 1,048,576",
    "SWEEP_SAMPLES=0": "expected at least 1",
    "SWEEP_COEFFICIENTS=[2, 1]": "expected numbers above 0, from weak to strong",
    "SWEEP=2": "SWEEP must be of type bool: found '2'",
    "CHAT_CONTEXT=0": "expected at least 1",
    "RESUME=maybe": "RESUME must be of type bool: found 'maybe'",
    "D_HIDEN=3": "there is no constant D_HIDEN: the closest is D_HIDDEN",
    "\x1b[2JK=3": "there is no constant \\x1b[2JK: the closest is K",
    "K": "expected NAME=value, as in SEED=1 (--help lists all): found 'K'",
    "--verbose": "expected NAME=value",
    f"{'x' * 5000}": "expected NAME=value",
    "PROMPT=\udcff": "expected text in UTF-8",
    f"SAMPLING={'[' * 10_000}": "SAMPLING must be of type dict",
}


# What is common to them refuses: one gets all arguments, the others some
ASKED = [("train.py", argument) for argument in REFUSED]
ASKED += [(script, argument) for script in EVERY[1:] for argument in list(REFUSED)[::12]]


@pytest.mark.parametrize(("script", "argument"), ASKED, ids=lambda value: ascii(value[:40]))
def test_every_script_refuses_an_argument_with_the_same_line(run_script, tmp_path, script, argument):
    elsewhere = [] if argument.startswith("RUN_DIR") else [f"RUN_DIR={tmp_path / 'run'}"]
    code, out, error = run_script(script, [argument, *elsewhere])
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert REFUSED[argument] in error
    assert len(error) < 700
    assert error[:-1].isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_the_users(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, error = run_script("demo.py", ["RUN_DIR=~/run"])
    assert code == 2
    assert f"found no autoencoder in {tmp_path / 'run' / 'sae'}" in error


# What is found wrong when the model is looked at
WITH_A_MODEL = {
    "MISTRAL_MODEL_PATH=/no/such/model": "is not a folder: expected one with a model",
    "MISTRAL_MODEL_PATH=/dev/null": "is not a folder: expected one with a model",
    "ENGINE=vllm": "ENGINE is 'vllm': expected mistral-inference or transformers",
    "DEVICE=tpu": "found device 'tpu': expected cpu, cuda",
    "DEVICE=cuda:99999999999999999999": "expected cpu, cuda",
    "DTYPE=int8": "expected float",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argument", WITH_A_MODEL)
def test_every_script_refuses_what_no_model_can_be_run_with(run_script, tmp_path, script, argument):
    code, _, error = run_script(script, [f"RUN_DIR={tmp_path / 'run'}", argument])
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert WITH_A_MODEL[argument] in error
    assert list(tmp_path.iterdir()) == []


# ---- as a user runs them ----


def replaced(old: bytes, new: bytes):
    return lambda content: content.replace(old, new)


# Reader of tools/fuzz.py, the file that is edited, how, and the script that is told to use it
FILES = [
    ("params.json and weights", "params.json", replaced(b'"n_layers": 2', b'"n_layers": 1000000000'), "train.py"),
    ("params.json and weights", "params.json", lambda _: b"[" * 1_000_000, "explain.py"),
    ("config.json, index and weights", "config.json", lambda _: b" " * 200_000_000, "demo.py"),
    ("params.json and weights", "consolidated.safetensors", lambda _: b"\xff" * 8, "train.py"),
    ("autoencoder", "cfg.json", replaced(b'"d_sae": 8', b'"d_sae": 2000000000'), "demo.py"),
    ("autoencoder", "cfg.json", replaced(b'"hook_name": "', b'"hook_name": "\\u001b[2J'), "explain.py"),
]


@pytest.mark.parametrize(("reader", "file", "edit", "script"), FILES)
def test_a_bad_file_is_one_line_in_little_memory(tmp_path, reader, file, edit, script):
    folder, run_dir = tmp_path / "folder", tmp_path / "run"
    folder.mkdir()
    READERS[reader].write(folder)
    (folder / file).write_bytes(edit((folder / file).read_bytes()))
    given = "SAE_PATH" if reader == "autoencoder" else "MISTRAL_MODEL_PATH"
    arguments = [f"{given}={folder}", f"RUN_DIR={run_dir}", "DATA_PATH=stdlib", "DRY_RUN=1"]
    process = subprocess.Popen(
        [sys.executable, script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, error = (pipe.read() for pipe in (process.stdout, process.stderr))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2
    assert error.startswith(b"error: ")
    assert error.count(b"\n") == 1
    assert b"\x1b" not in out + error
    assert usage.ru_maxrss < 2_000_000  # KB
    assert not run_dir.exists() or list(run_dir.iterdir()) in ([], [run_dir / ".lock"])
