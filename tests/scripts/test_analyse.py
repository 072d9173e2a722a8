"""analyse.py from end to end, on a small random model."""

import json
import random

import pytest
from explain_runs import SETTINGS, write_sae

from mistral_sae.analysis.answers import FEATURES, PROBE, UNTRAINED
from mistral_sae.explain import cache
from mistral_sae.explain.report import MARKS
from mistral_sae.files import write_text
from mistral_sae.sae.checkpoint import hash_of_sae, load_sae

WORDS = ["yield", "lambda", "import", "return"]


@pytest.fixture
def spans(tmp_path):
    """Documents of words that come again and again, with four of these as concepts."""
    lines, chance = [], random.Random(0)
    for _ in range(40):
        words = chance.choices([*WORDS, "the"], k=60)
        text = " ".join(words)
        for word in WORDS:
            found = [(at, at + len(word)) for at in range(len(text)) if text.startswith(word, at)]
            lines.append(json.dumps({"text": text, "spans": found, "label": word}))
    (tmp_path / "spans.jsonl").write_text("\n".join(lines))
    return tmp_path / "spans.jsonl"


@pytest.fixture
def run(run_script, tmp_path, mistral_folder, corpus, spans):
    """Run analyse.py with some constants; its output."""
    sizes = {"D_HIDDEN": 64, "K": 4, "BATCH_SIZE": 64, "BUFFER_TOKENS": 256, "SHUFFLE_ROWS": 16, "ANALYSE_ROWS": 100}
    fixed = SETTINGS | sizes | {"MISTRAL_MODEL_PATH": mistral_folder, "DATA_PATH": corpus, "RUN_DIR": tmp_path / "run"}

    def of(**changed):
        constants = fixed | {"CONCEPTS_PATH": spans} | changed
        code, out, err = run_script("analyse.py", [f"{name}={value}" for name, value in constants.items()])
        assert code == 0, err
        return out

    return of


def test_all_questions_are_answered_beside_their_controls(run, tmp_path):
    run_dir = tmp_path / "run"
    write_sae(run_dir / "sae")
    out = run(CONTROL_TOKENS=640)
    for question in ("Are features monosemantic?", "Are they in superposition?", "Does the model use them?"):
        assert question in out
    found = json.loads((run_dir / "analysis.json").read_text())
    monosemantic, superposed, causal = found["monosemantic"], found["superposed"], found["causal"]
    assert monosemantic["answer"] in ("yes", "partly", "no")
    assert superposed["answer"] in ("superposition", "basis", "neurons", "unclear")
    assert causal["answer"] in ("yes", "partly", "no")
    assert causal["pushed"] is None  # nothing counts such concepts in what the model writes
    for row in causal["concepts"]:
        assert row["concept"] in WORDS
        assert all(kl >= 0 for kl in row["kl"].values())
    assert {row["concept"] for row in monosemantic["concepts"]} == set(WORDS)
    for row in monosemantic["concepts"]:
        assert {FEATURES, PROBE, UNTRAINED, "basis directions", "principal components"} <= set(row["f1"])
        assert all(0 <= f1 <= 1 for f1 in row["f1"].values())
        assert row["concept"] in out


def test_answers_of_another_autoencoder_replace_none_and_stay_out_of_the_report(run, tmp_path):
    run_dir = tmp_path / "run"
    own = hash_of_sae(load_sae(write_sae(run_dir / "sae")).sae)
    write_text(run_dir / cache.FOLDER / cache.MANIFEST, json.dumps({"made_from": {"autoencoder": own}}))
    report, answers = run_dir / "report.html", run_dir / "analysis.json"
    report.write_text("".join(MARKS))
    assert "the answers stand at its top" in run(CONTROL_TOKENS=0)
    before = report.read_bytes(), answers.read_bytes()
    out = run(CONTROL_TOKENS=0, SAE_PATH=write_sae(tmp_path / "other", seed=1))
    assert f"the answers of another autoencoder are in {run_dir / 'analysis-1.json'}\n" in out
    assert (report.read_bytes(), (run_dir / "analysis-1.json").read_bytes()) == before
    assert json.loads(answers.read_text())["autoencoder"] != own
    answers.write_text("{")
    assert "the answers of another" not in run(CONTROL_TOKENS=0)
    assert json.loads(answers.read_text())["autoencoder"] == own


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a", "spans": [[0, 9]], "label": "x"}', "outside of its text"),
        ('{"text": 3, "spans": [], "label": "x"}', "spans.jsonl"),
    ],
)
def test_spans_that_cannot_be_used_are_one_line(run_script, tmp_path, mistral_folder, corpus, content, said):
    (tmp_path / "spans.jsonl").write_text(content)
    write_sae(tmp_path / "run/sae")
    constants = SETTINGS | {"MISTRAL_MODEL_PATH": mistral_folder, "DATA_PATH": corpus, "RUN_DIR": tmp_path / "run"}
    constants |= {"CONCEPTS_PATH": tmp_path / "spans.jsonl"}
    code, _, err = run_script("analyse.py", [f"{name}={value}" for name, value in constants.items()])
    assert code == 2
    assert said in err
    assert "Traceback" not in err
