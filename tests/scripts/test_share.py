"""share.py from end to end, after an offline run of explain.py on a small random model."""

import json
import shutil

import pytest
import torch
from explain_runs import CHOSEN

from mistral_sae.sae.checkpoint import load_sae, save_sae
from mistral_sae.sae.features import Statistics


@pytest.fixture
def shared(run_script, arguments, finished, tmp_path):
    """Run share.py on a copy of the finished run, and return its exit code, its output and its error line."""
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    loaded = load_sae(run_dir)
    known = Statistics(torch.ones(loaded.sae.n_features), torch.full((loaded.sae.n_features,), 0.1), None)
    save_sae(run_dir / "sae", loaded.sae, loaded.metadata, known)  # which spares it measuring them

    def share(**constants):
        code, out, err = run_script("share.py", arguments(run_dir, **constants))
        return code, out, err.strip().splitlines()[-1] if code else ""

    share.run_dir = run_dir
    return share


def test_features_that_are_explained_are_written_with_their_explanations(shared, tmp_path):
    code, out, _ = shared(FORM="neuronpedia", TO=tmp_path / "to")
    assert code == 0
    assert f"{len(CHOSEN)} in 1 files of SAE Dashboard" in out
    batch = json.loads((tmp_path / "to/batch-0.json").read_text())
    assert [record["feature_index"] for record in batch["features"]] == CHOSEN
    lines = (shared.run_dir / "explanations.jsonl").read_text().splitlines()
    explained = {str(line["feature"]): line["explanation"] for line in map(json.loads, lines) if line["explanation"]}
    written = [json.loads(line) for line in (tmp_path / "to/explanations.jsonl").read_text().splitlines()]
    assert {line["index"]: line["description"] for line in written} == explained


def test_an_autoencoder_for_sparsify_is_written_below_the_run(shared):
    code, out, _ = shared(FORM="sparsify")
    assert code == 0
    assert "note      it is for residuals after layer_norm" in out
    hook = load_sae(shared.run_dir / "sae").metadata.residual_layer
    assert load_sae(shared.run_dir / f"shared/sparsify/layers.{hook}").metadata.residual_layer == hook


@pytest.mark.parametrize(("form", "name"), [("control-vector", "control-vector.gguf"), ("lm-eval", "lm-eval.pt")])
def test_a_features_direction_is_written_for_other_programs(shared, form, name):
    code, out, _ = shared(FORM=form, FEATURE_INDEX=CHOSEN[0], COEFFICIENT=0.5)
    assert code == 0
    assert f"clamp: {CHOSEN[0]} set to 0.5 times its maximum" in out
    assert (shared.run_dir / "shared" / name).is_file()


def test_a_dry_run_shows_the_card_and_sends_nothing(shared, hub, tmp_path):
    with hub(tmp_path, name="me/mine") as asked:
        code, out, _ = shared(PUSH_TO="me/mine", DRY_RUN=1)
    assert code == 0
    assert 'SAE.from_pretrained("me/mine"' in out
    assert out.rstrip().endswith("nothing was sent")
    assert asked == []


@pytest.mark.parametrize(("form", "name"), [("sparsify", "sparsify"), ("lm-eval", "lm-eval.pt")])
def test_a_dry_run_says_where_a_form_would_be_and_writes_nothing(shared, form, name):
    code, out, _ = shared(FORM=form, FEATURE_INDEX=CHOSEN[0], DRY_RUN=1)
    assert code == 0
    assert out.endswith(f"form      {form}, into {shared.run_dir / 'shared' / name}\nnothing was written\n")
    assert not (shared.run_dir / "shared").exists()


def test_a_push_ends_with_how_to_load_it(shared, hub, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    with hub(folder, name="me/mine"):
        code, out, _ = shared(PUSH_TO="me/mine")
        assert code == 0
        (source,) = [line.partition("SAE_PATH=")[2] for line in out.splitlines() if line.startswith("load ")]
        assert load_sae(source).metadata == load_sae(shared.run_dir).metadata


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ({}, "found neither PUSH_TO nor FORM"),
        ({"PUSH_TO": "mine"}, "PUSH_TO is 'mine': expected owner/name"),
        ({"PUSH_TO": "me/mine", "SAE_PATH": "other"}, "found PUSH_TO with SAE_PATH"),
        ({"FORM": "control-vector", "FEATURE_INDEX": 3, "PROMPT": ""}, "found PROMPT ''"),
        ({"FORM": "onnx"}, "FORM is 'onnx': expected sparsify, neuronpedia, control-vector or lm-eval"),
        ({"FORM": "lm-eval"}, "FEATURE_INDEX is None: expected a feature's number"),
        ({"FORM": "lm-eval", "FEATURE_INDEX": 10**6}, "found feature 1000000"),
        ({"FORM": "neuronpedia", "EXPLAIN_TOKENS": 500}, "run explain.py first"),
    ],
    ids=str,
)
def test_what_share_cannot_do_is_one_line(shared, constants, words):
    code, _, error = shared(**constants)
    assert code == 2
    assert words in error
