"""Constants from the command line, a script's first line and its end, progress."""

import ast
import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config
from mistral_sae import cli
from mistral_sae.cli import Progress, UserError
from mistral_sae.constants import described, override

ROOT = Path(__file__).parent.parent.parent
CONSTANTS = """
from mistral_sae.cli import expect
WIDTH: int = 8
HEIGHT: int = 2 * WIDTH if WIDTH > 4 else 1
RATE: float = 0.5
AREA: float = 100 / WIDTH
NAME: str = "tiny"
VERBOSE: bool = False
IS_WIDE = WIDTH > 4
FOLDER: str | None = None
COUNT: int | None = 3
API_KEY: str | None = None
EITHER: int | float = 1
lower = 1


def check():
    expect("RATE", RATE, RATE < 10, "below 10")
"""


@pytest.fixture
def constants(tmp_path):
    path = tmp_path / "constants.py"
    path.write_text(CONSTANTS)
    spec = importlib.util.spec_from_file_location("constants", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def defaults(monkeypatch):
    """`config` as the file has it, before and after the test."""
    monkeypatch.delenv("MISTRAL_MODEL_PATH", raising=False)
    override([], config)
    yield config
    monkeypatch.delenv("MISTRAL_MODEL_PATH", raising=False)
    override([], config)


def error_of(constants, *arguments):
    with pytest.raises(UserError) as caught:
        override(list(arguments), constants)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("WIDTH", "3", 3),
        ("WIDTH", "-3", -3),
        ("WIDTH", "1e6", 1_000_000),
        ("WIDTH", "1_000", 1000),
        ("RATE", "2", 2.0),
        ("RATE", "1e-4", 1e-4),
        ("VERBOSE", "1", True),
        ("VERBOSE", "True", True),
        ("VERBOSE", "true", True),
        ("VERBOSE", "0", False),
        ("VERBOSE", "False", False),
        ("VERBOSE", "false", False),
        ("NAME", "plain words", "plain words"),
        ("NAME", "'quoted'", "quoted"),
        ("NAME", "7", "7"),
        ("NAME", "None", "None"),
        ("NAME", "{[]}", "{[]}"),
        ("NAME", "a=b", "a=b"),
        ("FOLDER", r"C:\models\new", r"C:\models\new"),
        ("FOLDER", "mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("FOLDER", "~/models/7b", "~/models/7b"),
        ("FOLDER", "None", None),
        ("COUNT", "None", None),
        ("COUNT", "4", 4),
        ("EITHER", "2", 2),
        ("EITHER", "2.5", 2.5),
    ],
)
def test_a_value_has_the_type_of_the_annotation_or_of_the_default(constants, name, text, value):
    override([f"{name}={text}"], constants)
    found = getattr(constants, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "type_name"),
    [
        ("WIDTH", "abc", "int"),
        ("WIDTH", "1.5", "int"),
        ("WIDTH", "1e400", "int"),
        ("WIDTH", "True", "int"),
        ("WIDTH", "None", "int"),
        ("WIDTH", "", "int"),
        ("WIDTH", "(1, 2)", "int"),
        ("RATE", "fast", "float"),
        ("RATE", "True", "float"),
        ("VERBOSE", "yes", "bool"),
        ("VERBOSE", "2", "bool"),
        ("COUNT", "x", "int or nothing"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type_expected(constants, name, text, type_name):
    message = error_of(constants, f"{name}={text}")
    assert message.startswith(f"{name} must be of type {type_name}")
    assert repr(text) in message


def edited(tmp_path, line):
    """A module as it is after its file was edited."""
    path = tmp_path / "edited.py"
    path.write_text(line + "\ndef check(): pass\n")
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("TOKENS: int = 1e6", 1_000_000),
        ("TOKENS: float = 2", 2.0),
        ("TOKENS: bool = 1", True),
        ("TOKENS: int | None = None", None),
        ("TOKENS: int | str = 'all'", "all"),
    ],
)
def test_a_value_in_the_file_has_the_type_of_its_annotation(tmp_path, line, value):
    module = edited(tmp_path, line)
    override([], module)
    assert module.TOKENS == value
    assert type(module.TOKENS) is type(value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("TOKENS: int = '8'", "int: found '8'"),
        ("TOKENS: int = 0.5", "int: found 0.5"),
        ("TOKENS: int = True", "int: found True"),
        ("TOKENS: str = 8", "str: found 8"),
        ("TOKENS: float | None = 'cheap'", "float or nothing (None): found 'cheap'"),
        ("TOKENS: bool = 2", "bool: found 2"),
    ],
)
def test_a_mistake_in_the_file_is_named_as_one_in_an_argument_is(tmp_path, line, expected):
    assert error_of(edited(tmp_path, line)) == f"TOKENS must be of type {expected}"


def test_every_constant_can_be_set_but_the_one_that_follows_from_the_models_path(defaults):
    bare = {
        target.id
        for node in ast.parse((ROOT / "config.py").read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }
    assert bare == {"ON_STANDIN"}


@pytest.mark.parametrize("name", ["FOLDER", "COUNT"])
def test_an_empty_value_is_not_taken_for_none(constants, name):
    assert error_of(constants, f"{name}=") == f"{name} is empty: give it a value, or {name}=None"


FROM_THE_ENVIRONMENT = ["MISTRAL_MODEL_PATH", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"]


def test_the_environment_sets_four_constants_and_no_others(defaults, monkeypatch):
    names = [name for name in vars(config) if name.isupper()]
    for name in names:
        monkeypatch.setenv(name, "7" if name != "OPENAI_BASE_URL" else "http://localhost")
    before = {name: getattr(config, name) for name in names}
    override(["MISTRAL_MODEL_PATH=None"], config)
    changed = [name for name in names if getattr(config, name) != before[name]]
    assert sorted([*changed, "MISTRAL_MODEL_PATH"]) == sorted(
        [*FROM_THE_ENVIRONMENT, "PROMPT_DOLLARS", "COMPLETION_DOLLARS"]
    )
    override([], config)
    assert config.MISTRAL_MODEL_PATH == "7"
    for name in names:
        monkeypatch.delenv(name)


def test_the_check_sees_the_given_values(constants):
    assert error_of(constants, "RATE=10") == "RATE is 10.0: expected below 10"


def test_what_follows_without_an_annotation_follows_too_and_cannot_be_given(constants):
    override(["WIDTH=2"], constants)
    assert constants.IS_WIDE is False
    assert "there is no constant IS_WIDE" in error_of(constants, "IS_WIDE=1")


def test_constants_computed_from_a_given_one_follow_it(constants):
    override(["WIDTH=10"], constants)
    assert constants.HEIGHT == 20
    assert constants.AREA == 10.0
    override(["WIDTH=2"], constants)
    assert constants.HEIGHT == 1


def test_a_computed_constant_that_is_given_stays_as_given(constants):
    override(["HEIGHT=5", "WIDTH=10"], constants)
    assert (constants.HEIGHT, constants.AREA) == (5, 10.0)


def test_without_arguments_every_constant_has_its_default(constants):
    override(["WIDTH=2", "NAME=other"], constants)
    override([], constants)
    assert (constants.WIDTH, constants.HEIGHT, constants.NAME) == (8, 16, "tiny")


def test_a_constant_that_cannot_follow_is_an_error_that_shows_the_cause(constants):
    assert error_of(constants, "WIDTH=0").startswith("AREA cannot be computed with WIDTH=0")


def test_no_error_repeats_a_key(constants):
    assert "secret" not in error_of(constants, "API_KEY=secret", "WIDTH=0")
    assert "secret" not in error_of(constants, "API_KEYS=secret")


@pytest.mark.parametrize(
    ("wrong", "closest"), [("WIDHT", "WIDTH"), ("width", "WIDTH"), ("lower", "FOLDER"), ("VERBOS", "VERBOSE")]
)
def test_an_unknown_name_is_an_error_that_names_the_closest(constants, wrong, closest):
    message = error_of(constants, f"{wrong}=1")
    assert f"there is no constant {wrong}:" in message
    assert f"closest is {closest} " in message


@pytest.mark.parametrize("argument", ["WIDTH", "--help", "8"])
def test_an_argument_without_a_value_is_an_error(constants, argument):
    assert f"found {argument!r}" in error_of(constants, argument)


def test_the_learning_rate_follows_the_number_of_features_unless_it_is_given(defaults):
    default = config.LEARNING_RATE
    override([f"D_HIDDEN={4 * config.D_HIDDEN}"], config)
    assert config.LEARNING_RATE == pytest.approx(default / 2)
    override([f"D_HIDDEN={config.D_HIDDEN}", "LEARNING_RATE=0.1"], config)
    assert config.LEARNING_RATE == 0.1


OF_ANOTHER_MODEL = {
    "TARGET_LAYER": None,
    "D_HIDDEN": None,
    "LEARNING_RATE": None,
    "DATA_PATH": "monology/pile-uncopyrighted",
    "RUN_DIR": None,
}


@pytest.mark.parametrize("through", ["argument", "environment"])
def test_a_models_path_leaves_sizes_to_be_computed_in_place_of_the_stand_ins(defaults, monkeypatch, through):
    assert (config.MISTRAL_MODEL_PATH, config.D_HIDDEN, config.DATA_PATH) == (None, 8192, "stdlib")
    if through == "environment":
        monkeypatch.setenv("MISTRAL_MODEL_PATH", "models/7b")
    override(["MISTRAL_MODEL_PATH=models/7b"] if through == "argument" else [], config)
    assert config.MISTRAL_MODEL_PATH == "models/7b"
    assert {name: getattr(config, name) for name in OF_ANOTHER_MODEL} == OF_ANOTHER_MODEL


def test_an_argument_beats_the_environment_and_none_is_the_stand_in(defaults, monkeypatch):
    monkeypatch.setenv("MISTRAL_MODEL_PATH", "models/7b")
    override(["MISTRAL_MODEL_PATH=other"], config)
    assert config.MISTRAL_MODEL_PATH == "other"
    override(["MISTRAL_MODEL_PATH=None"], config)
    assert (config.MISTRAL_MODEL_PATH, config.D_HIDDEN) == (None, 8192)


# ---- how a script ends ----


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a bad constant"), 2, "error: a bad constant\n"),
        (cli.Failed("no luck"), 1, "error: no luck\n"),
        (FileExistsError(17, "File exists", "runs/x"), 1, "error: [Errno 17] File exists: 'runs/x'\n"),
    ],
)
def test_a_known_error_ends_a_script_with_its_code_and_one_line(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main, out_of_memory="K or BATCH_SIZE")
    assert ended.value.code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),  # pinned memory
        RuntimeError("MPS backend out of memory (MPS allocated: 17.97 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 7.45 GiB for an array"),
    ],
)
def test_too_little_memory_is_said_with_what_helps(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, out_of_memory="K or BATCH_SIZE")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: the device is out of memory for this run: lower K or BATCH_SIZE\n"


def test_an_error_of_the_programs_own_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run(main, out_of_memory="K or BATCH_SIZE")


# ---- train.py before torch is there ----


def train(folder, *arguments, torch="", **environment):
    """Run train.py with a module in torch's place."""
    (folder / "torch.py").write_text(f"import os\n{torch or 'os._exit(77)'}\n")
    hidden = ("MISTRAL_MODEL_PATH", "PYTHONUNBUFFERED")  # the latter would do what a script has to do itself
    known = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=known | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_first_line_names_the_model_and_reaches_a_pipe_before_torch_is_imported(tmp_path, mistral_folder):
    ran = train(tmp_path, f"MISTRAL_MODEL_PATH={mistral_folder}")
    assert ran.returncode == 77  # it got as far as the import
    assert ran.stdout == f"train: {mistral_folder}\n"
    assert ran.stderr == ""


def test_the_stand_in_is_never_presented_as_mistral_7b(tmp_path):
    ran = train(tmp_path)
    assert "stand-in" in ran.stdout
    assert "not Mistral 7B" in ran.stdout


@pytest.mark.parametrize("script", ["train", "explain", "demo", "analyse"])
def test_help_lists_the_constants_that_a_script_reads(script):
    lines = list(described(config, script))
    listed = [line.strip().partition("=")[0] for line in lines if re.match("  [A-Z]", line)]
    groups = [line.strip() for line in lines if line.startswith("\n")]
    assert {"MISTRAL_MODEL_PATH", "SEED", "RUN_DIR"} <= set(listed) <= set(config.__annotations__)
    assert len(listed) == len(set(listed))
    assert len(groups) == len(set(groups)) > 4
    assert not [each for each in groups if ".py" in each and f"{script}.py" not in each]
    assert max(map(len, lines)) <= 120


def test_help_lists_every_constant_of_some_script_with_its_comments():
    texts = ["\n".join(described(config, script)) for script in ("train", "explain", "demo", "analyse", "share")]
    for name in config.__annotations__:
        assert any(f"\n  {name}=" in text for text in texts), name
    assert "\n  DECAY_FRACTION=0.2\n      last share of the steps, over which" in texts[0]
    assert "\n  K=32\n      active features a token (128)" in texts[0]
    assert "\n  OPENAI_MODEL='gpt-4o-mini'\n      The server's name for it\n" in texts[1]


def test_help_ends_well_and_shows_what_other_arguments_set_but_no_key(tmp_path):
    ran = train(tmp_path, "--help", "K=7", "OPENAI_API_KEY=sk-secret")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\n  K=7\n" in ran.stdout
    assert "sk-secret" not in ran.stdout + "".join(described(config, "explain"))
    assert train(tmp_path, "-h", "K=none").returncode == 2


def test_a_reader_of_the_help_who_has_seen_enough_gets_no_traceback():
    reads, writes = os.pipe()
    os.close(reads)
    ran = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert ran.stderr == b""


def test_the_environment_variable_chooses_the_model_of_a_script(tmp_path, mistral_folder):
    ran = train(tmp_path, MISTRAL_MODEL_PATH=str(mistral_folder))
    assert ran.stdout.startswith(f"train: {mistral_folder}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["K=abc"], "K must be of type int or nothing (None) or list: found 'abc'"),
        (["D_HIDEN=64"], "there is no constant D_HIDEN: the closest is D_HIDDEN"),
        (["D_HIDDEN=0"], "D_HIDDEN is 0: expected at least 1"),
        (["TRAIN_TOKENS=0"], "TRAIN_TOKENS is 0: expected at least 1"),
        (["AUXK_FEATURES=-1"], "AUXK_FEATURES is -1: expected at least 0"),
        (["EVALUATIONS=0"], "EVALUATIONS is 0: expected at least 1"),
        (["D_HIDDEN=-1"], "D_HIDDEN is -1: expected at least 1"),
        (["K"], "expected NAME=value"),
        (["K=0"], "K is 0: expected at least 1"),
    ],
)
def test_a_bad_argument_ends_train_with_code_2_and_one_line_without_torch(tmp_path, arguments, said):
    ran = train(tmp_path, *arguments)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train", "explain", "analyse", "demo", "share"])
@pytest.mark.parametrize(
    ("line", "path", "said"),
    [
        ("K: int = 0", None, "K is 0: expected at least 1"),
        ('K: int = "a"', None, "K must be of type int: found 'a'"),
        ('RUN_DIR: str = "~nosuchuser/run"', None, "RUN_DIR is '~nosuchuser/run': expected a user of this machine"),
        ("", " ", "MISTRAL_MODEL_PATH is ' ': expected a path or a name"),
        ("", "a" * 300, "expected a shorter path"),
        ("", b"\xff", "found MISTRAL_MODEL_PATH in another encoding: expected text in UTF-8"),
    ],
)
def test_a_mistake_in_the_file_or_the_environment_is_one_line_of_any_script(tmp_path, script, line, path, said):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    text = (ROOT / "config.py").read_text()
    name = line.partition(":")[0]
    (tmp_path / "config.py").write_text(re.sub(rf"(?m)^{name}: .*$", line, text) if line else text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"MISTRAL_MODEL_PATH": path} if path else {})
    ran = subprocess.run(
        [sys.executable, tmp_path / f"{script}.py"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_ctrl_c_during_the_imports_is_one_line_and_no_traceback(tmp_path):
    ran = train(tmp_path, torch="raise KeyboardInterrupt")
    assert (ran.returncode, ran.stderr) == (130, "error: stopped\n")


@pytest.mark.parametrize("value", ["(1, 0.5)", "(1, 'a')", "()", "[0]", "(1, 1e999)"])
def test_coefficients_are_numbers_that_rise(defaults, value):
    override(["SWEEP_COEFFICIENTS=[0.5, 1, 2.0]"], config)
    with pytest.raises(UserError, match=r"SWEEP_COEFFICIENTS is .*: expected numbers above 0, from weak to strong"):
        override([f"SWEEP_COEFFICIENTS={value}"], config)


# ---- progress ----


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(cli, "QUIET_SECONDS", 0.2)
    for _ in Progress(range(60), desc="reading"):
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(line.startswith("reading: ") for line in lines)
    assert "60/60" in lines[-1]


def test_without_a_terminal_what_is_done_at_once_needs_no_line(capsys):
    with Progress(total=3) as progress:
        progress.set_postfix_str("fast")
        progress.update(3)
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_bar_within_another_leaves_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(cli, "QUIET_SECONDS", 0.05)
    for i in Progress(range(3), desc="outer"):
        for _ in Progress(range(10), desc=f"inner {i}", leave=False):
            time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("inner ", "outer: ")) for line in lines)
    assert len(lines) == len(set(lines))


def test_a_bar_that_does_not_move_shows_what_it_waits_for(capsys, monkeypatch):
    monkeypatch.setattr(cli, "QUIET_SECONDS", 0)
    words = iter(["asked", "nobody answers", "done"])

    async def main():
        with Progress(total=3, desc="asking") as progress:
            async with progress.showing(lambda: next(words)):
                await asyncio.sleep(1.5)

    asyncio.run(main())
    shown = [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown[1:] == ["asked]", "nobody answers]", "done]"]


def test_the_rate_is_the_mean_of_the_run():
    assert Progress(range(3)).smoothing == 0
