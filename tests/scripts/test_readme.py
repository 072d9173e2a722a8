"""What README.md, docs/ and the other pages show works, and names what is there."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import config
from benchmarks import tables
from mistral_sae.constants import override
from mistral_sae.data.place import BEGINNING
from mistral_sae.data.stored import write_shard
from mistral_sae.explain.labels import write_labels
from mistral_sae.explain.types import STATUSES, Label, Score
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, save_sae
from mistral_sae.sae.evaluate import summary
from mistral_sae.sae.features import Statistics
from mistral_sae.steer.chat import HELP

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in tables.PAGES}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}


def blocks(text: str, language: str = "") -> list[str]:
    """The blocks of code of a page, without their fences."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def without_figures(text: str) -> str:
    return re.sub(r"[\d.,]*\d", "N", text)


@pytest.fixture
def standin_run(tmp_path, monkeypatch):
    """A folder with an untrained autoencoder in runs/standin, residuals in acts, and ae.pt, where the examples run."""
    write_shard(tmp_path / "acts/00000.arrow", {2: torch.zeros(16_384, 256)}, BEGINNING)
    sae = SparseAutoencoder(256, 8192, 8)
    sae.initialize(torch.randn(100, 256), seed=0)
    metadata = Metadata("standin", "blocks.2.hook_resid_post", 2, True, 256, "stdlib")
    folder = tmp_path / "runs/standin/sae"
    save_sae(folder, sae, metadata, Statistics(torch.full((8192,), 9.0), torch.full((8192,), 0.01), None))
    torch.save({"bias": torch.zeros(4)}, tmp_path / "ae.pt")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def constants(monkeypatch):
    """`config` as its file has it, before and after the test."""
    for name in ("MISTRAL_MODEL_PATH", "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    yield config
    override([], config)


# ---- the README as a whole ----


def test_the_readme_can_be_finished():
    assert len(README.split()) < 1900
    assert len(README.splitlines()) <= 210


def test_the_tables_are_made_from_the_committed_results():
    for path in tables.PAGES:
        text = path.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{path.name}: run python -m benchmarks.tables"
    shown = {name for text in PAGES.values() for name in re.findall(r"<!-- table: (\w+) -->", text)}
    assert shown == set(tables.TABLES)


# ---- code ----


def test_the_ten_lines_of_the_readme_read_encode_decode_and_steer(standin_run, capsys):
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 10
    exec(code, names := {})
    torch.testing.assert_close(names["x_hat"], names["loaded"].sae(names["x"]))
    assert names["encoded"].values.shape == (1, len(names["prompt"]), 8)
    steered = capsys.readouterr().out
    exec(code.replace("2 * loaded.maximum_F[feature]", "None"), {})
    assert len(steered) > 20
    assert capsys.readouterr().out != steered


@pytest.mark.parametrize(
    "name", [name for name, text in PAGES.items() if name != "README.md" and blocks(text, "python")]
)
def test_the_examples_of_a_page_run(name, standin_run, capsys):
    for code in blocks(PAGES[name], "python"):
        exec(code, {})
        assert capsys.readouterr().out


def test_the_tour_runs_from_its_first_cell_to_its_last(standin_run, capsys):
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    scores = {"detection": Score(0.7, top_token=0.6)}
    labels = [Label(feature, f"about {feature}", "offline", "ok", scores) for feature in range(8192)]
    write_labels(Path("runs/standin/explanations.jsonl"), labels)
    Path("runs/standin/evaluation.json").write_text('{"l0": 8.0, "normalized_mse": 0.5}')
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        assert cell["execution_count"]
        assert {output["output_type"] for output in cell["outputs"]} <= {"execute_result", "stream"}
    assert len(names["active"]) == len(names["explained"]) == 8 * (len(names["ids"]) - 1)
    assert set(names["table"].columns) == {"explanation", "detection", "its top token", "density", "maximum"}
    own, steered = capsys.readouterr().out.removeprefix("the model's own:\n").split("\nwith feature ")
    assert f": {own}" != steered[steered.index(":") :]


# ---- commands ----


def commands() -> Iterator[tuple[str, str]]:
    """The lines of code that call a script, a module, or make, with the page that shows each."""
    for name, text in PAGES.items():
        for line in "".join(blocks(text)).splitlines():
            if re.match(r"(\.venv/bin/|make |export )", line):
                yield name, line


def test_every_command_that_a_page_shows_is_one(constants):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = list(commands())
    assert len(found) > 20
    for page, line in found:
        for command in line.split(" && "):
            program, *arguments = shlex.split(command)
            if program == "make":
                assert set(arguments) <= set(targets), (page, line)
            elif program == "export":
                override(arguments, constants)
            elif program == ".venv/bin/python" and arguments[0].endswith(".py"):
                assert (ROOT / arguments[0]).is_file(), (page, line)
                override(arguments[1:], constants)  # raises for what is no constant, or has another type
            elif program == ".venv/bin/python" and arguments[1].startswith("benchmarks"):
                assert (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file(), (page, line)


def test_every_constant_that_a_page_names_is_one():
    words = {"HF_TOKEN", "OLLAMA_CONTEXT_LENGTH", "MAX_TOKENS", "NAME"}  # of other places, or of before
    constants = set(config.__annotations__)
    for page, text in PAGES.items():
        text = re.sub(r"<!-- table.*?<!-- end -->", "", text, flags=re.DOTALL)  # which name tokens of a model
        named = set(re.findall(r"`([A-Z][A-Z_]{2,})(?:=[^`]*)?`", text)) - words
        assert named <= constants, (page, named - constants)


def test_every_link_leads_somewhere():
    anchors = {
        name: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for name, text in PAGES.items()
    }
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
            target, _, anchor = link.partition("#")
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), (page, link)
            if anchor:
                assert anchor in anchors[path.resolve().relative_to(ROOT).as_posix()], (page, link)


def test_the_modules_that_contributors_are_sent_to_are_there():
    for name in re.findall(r"`([a-z_]+/[a-z_]+(?:\.py)?)`", PAGES["CONTRIBUTING.md"]):
        folders = (ROOT / "mistral_sae", ROOT)
        assert any((folder / name).exists() or (folder / f"{name}.py").exists() for folder in folders), name


def test_the_tree_of_the_readme_is_there():
    (tree,) = [block for block in blocks(README) if "mistral_sae/\n" in block]
    folder = ROOT
    for line in tree.splitlines():
        names = re.match(r" *((?:[\w.]+/?(?: |$))+)", line)[1].split()
        folder = ROOT / "mistral_sae" if line.startswith(" ") else ROOT
        for name in names:
            assert (folder / name).exists(), line


# ---- what is printed ----


def test_the_plan_that_pages_show_is_what_train_py_prints(run_script, constants, tmp_path):
    code, printed, _ = run_script("train.py", ["DRY_RUN=1", "DEVICE=cpu", f"RUN_DIR={tmp_path / 'run'}"])
    assert code == 0
    printed = re.sub(r"CPython .* files|[\d.,]+ GB free", "N", printed)
    shown = [block for name in ("README.md", "docs/training.md") for block in blocks(PAGES[name]) if "train: " in block]
    whole = re.sub(r"CPython .* files|[\d.,]+ GB free", "N", shown[1])
    assert whole == printed
    start = re.sub(r"CPython .* files", "N", shown[0]).partition("...\n")[0]
    assert printed.startswith(start)


def test_the_evaluation_that_pages_show_has_the_lines_of_todays():
    figures = dict.fromkeys(
        ("normalized_mse", "explained_variance", "l0", "ce_loss_clean", "ce_loss_with_sae", "ce_loss_ablated"), 1.0
    ) | dict.fromkeys(("ce_loss_recovered", "dead_fraction", "rare_fraction"), 0.5)
    printed = without_figures(summary({"tokens": 1, **figures}))
    (whole,) = [block for block in blocks(PAGES["docs/training.md"]) if block.startswith("on ")]
    assert without_figures(whole).rstrip() == printed
    (shortened,) = [block for block in blocks(README) if "held-out tokens" in block]
    for line in without_figures(shortened.partition("...\n")[2]).splitlines():
        assert line in printed


def test_the_statuses_of_the_page_are_those_of_the_code():
    rows = re.findall(r"^\| `([a-z ]+)` \| ([^|]+) \|$", PAGES["docs/explaining.md"], re.MULTILINE)
    for status, outcome in STATUSES.items():
        assert (status, outcome.meaning) in rows


def test_the_commands_of_a_conversation_are_those_of_its_help():
    assert HELP in [block.rstrip() for block in blocks(PAGES["docs/steering.md"])]


# ---- habits ----


def test_the_hooks_lint_with_the_pinned_ruff():
    (pinned,) = re.findall(r"ruff==([\d.]+)\.\*", (ROOT / "requirements-dev.txt").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(rf"ruff-pre-commit\n    rev: v{re.escape(pinned)}\.", hooks)


def test_the_citation_has_the_version_of_the_package():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert set(re.findall(r"^ *version: (.*)$", citation, re.MULTILINE)) == {version}
