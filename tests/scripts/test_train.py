"""train.py from end to end, on a small random model and a small corpus.

Each step of a real run happens in a process of its own where the process matters (signals, the streams, what is
imported), and else in this one, which spares it the imports.
"""

import gc
import json
import re
import sys
import warnings
from types import SimpleNamespace

import psutil
import pytest
import torch
import train_runs
from safetensors.torch import load_file
from train_runs import CONTRACT_FILES, ROOT, STEPS, assert_refused, contents_of, metrics_of, step_of_checkpoint

import config
from mistral_sae import files
from mistral_sae.data.tokens import Corpus
from mistral_sae.model.language_model import STANDIN, LanguageModel, load_model
from mistral_sae.sae import memory, resume
from mistral_sae.sae.checkpoint import load_sae
from mistral_sae.sae.memory import Stage, training_needs
from mistral_sae.sae.trainer import Trainer

corpus, arguments, here = train_runs.corpus, train_runs.arguments, train_runs.here
finished, copied = train_runs.finished, train_runs.copied


# ---- a run ----


def test_a_run_writes_the_files_of_the_contract_and_nothing_else(finished):
    run_dir, ran = finished
    assert ran.code == 0, ran.err
    assert set(contents_of(run_dir)) == CONTRACT_FILES


def test_without_a_terminal_a_run_of_seconds_leaves_the_error_stream_empty(finished):
    assert finished[1].err == ""


def test_the_output_says_the_plan_then_the_results_and_where_they_are(finished, mistral_folder, corpus):
    run_dir, ran = finished
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"train: {mistral_folder}")
    for stage in ("layer     1 of 0 to 2", "corpus    1 file", "tokens    2,565 in 40 steps of 64", "features  128"):
        assert any(line.startswith(stage) for line in lines), stage
    assert any("free" in line for line in lines)
    assert "cross-entropy recovered" in ran.out
    assert str(run_dir / "sae") in ran.out


def test_every_logged_step_is_one_object_of_metrics(finished):
    metrics = metrics_of(finished[0])
    assert [record["step"] for record in metrics] == [5, 10, 15, 20, 25, 30, 35, 40]
    keys = {"loss", "normalized_mse", "auxk", "l0", "dead", "learning_rate", "gradient_norm", "tokens"}
    for record in metrics:
        assert keys <= set(record)
        assert record["tokens"] == 64 * record["step"]
        assert 0 < record["l0"] <= 8
        assert record["loss"] == pytest.approx(record["normalized_mse"] + record["auxk"] / 32, rel=1e-4)
        assert record["gradient_norm"] > 0
    assert metrics[-1]["normalized_mse"] < metrics[0]["normalized_mse"]
    assert max(record["dead"] for record in metrics) > 0  # some have not fired for 100 tokens, which AuxK needs
    assert max(record["auxk"] for record in metrics) > 0


def test_the_learning_rate_warms_up_stays_and_decays(finished):
    rates = {record["step"]: record["learning_rate"] / 0.003 for record in metrics_of(finished[0])}
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == rates[20] == rates[30] == pytest.approx(1)
    assert rates[35] == pytest.approx(6 / 8)
    assert rates[40] == pytest.approx(1 / 8)


def test_the_run_is_evaluated_on_the_way_too(finished):
    evaluated = {record["step"]: record for record in metrics_of(finished[0]) if "held_out_normalized_mse" in record}
    assert list(evaluated) == [20]
    assert {"ce_loss_clean", "ce_loss_recovered", "kl", "held_out_explained_variance"} <= set(evaluated[20])


def test_the_evaluation_has_the_keys_of_the_contract_and_values_that_fit_together(finished):
    found = json.loads((finished[0] / "evaluation.json").read_text())
    keys = "tokens l0 normalized_mse explained_variance ce_loss_clean ce_loss_with_sae ce_loss_ablated"
    assert {*keys.split(), "ce_loss_recovered", "dead_fraction", "ce_loss_zero_ablated", "kl"} <= set(found)
    assert 10 * 31 - 10 < found["tokens"] < 10 * 31  # the BOS tokens between documents are left out
    assert 0 < found["l0"] <= 8
    assert 0 < found["normalized_mse"] < 1
    recovered = (found["ce_loss_ablated"] - found["ce_loss_with_sae"]) / (
        found["ce_loss_ablated"] - found["ce_loss_clean"]
    )
    assert found["ce_loss_recovered"] == pytest.approx(recovered)
    assert found["dead_fraction"] == metrics_of(finished[0])[-1]["dead"] / 128


def test_the_evaluation_is_of_the_saved_autoencoder_on_held_out_documents_alone(finished, mistral_folder, corpus):
    from mistral_sae.sae.evaluate import reconstruction

    model, sae = load_model(mistral_folder, device="cpu"), load_sae(finished[0]).sae
    rows = Corpus(str(corpus), held_out_fraction=0.3, context_length=32).held_out_rows(model.tokenizer, 10)
    expected = reconstruction(sae, [model.residuals(rows, 1)[model.kept(rows)]])
    found = json.loads((finished[0] / "evaluation.json").read_text())
    assert found["normalized_mse"] == pytest.approx(expected.normalized_mse, rel=1e-4)
    assert found["explained_variance"] == pytest.approx(expected.explained_variance, rel=1e-4)


def test_the_curves_are_a_png(finished):
    png = (finished[0] / "training.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 10_000


def test_the_saved_rows_have_unit_norm_and_the_sparsity_is_how_often_features_fired(finished):
    weights = load_file(finished[0] / "sae/sae_weights.safetensors")
    assert torch.allclose(weights["W_dec"].norm(dim=1), torch.ones(128), atol=1e-5)
    frequency = 10 ** load_file(finished[0] / "sae/sparsity.safetensors")["sparsity"].double()
    metrics = metrics_of(finished[0])
    late = [record["l0"] for record in metrics if record["step"] > 0.8 * STEPS]  # since the learning rate fell
    assert frequency.sum().item() == pytest.approx(sum(late) / len(late), rel=0.02)


def test_sae_lens_loads_the_run_and_finds_the_same_features(finished, mistral_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens")
        theirs = sae_lens.SAE.load_from_disk(finished[0] / "sae", device="cpu")
    ours = load_sae(finished[0]).sae
    tokens = torch.randint(20, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    x = load_model(mistral_folder, last_layer=1, device="cpu").residuals(tokens, 1)[:, 1:].flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).dense(128), theirs.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    metadata = theirs.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == (mistral_folder.name, "blocks.1.hook_resid_post")
    assert (metadata.prepend_bos, metadata.context_size) == (True, 32)
    assert metadata.model_fingerprint == load_model(mistral_folder, device="cpu").fingerprint(1)


@pytest.mark.skipif(not (STANDIN / "consolidated.safetensors").exists(), reason="the stand-in has no weights")
def test_a_few_steps_run_on_the_stand_in_and_the_standard_library(here, tmp_path):
    few = {"TRAIN_TOKENS": 2048, "BATCH_SIZE": 256, "D_HIDDEN": 512, "K": 8, "BUFFER_TOKENS": 2000, "DEVICE": "cpu"}
    few |= {"CONTEXT_LENGTH": 64, "EVALUATION_ROWS": 4, "EVALUATIONS": 1, "LOG_EVERY": 1, "RUN_DIR": tmp_path / "run"}
    ran = here([f"{name}={value}" for name, value in few.items()])
    assert ran.code == 0, ran.err
    assert "stand-in" in ran.out.splitlines()[0]
    others = {name for name in CONTRACT_FILES if not name.startswith("checkpoints/")}
    assert set(contents_of(tmp_path / "run")) == others | {"checkpoints/step-8.safetensors"}
    assert len(metrics_of(tmp_path / "run")) == 8


def test_memory_and_open_files_stay_flat_over_hundreds_of_steps(here, arguments, tmp_path, monkeypatch):
    process, step, found = psutil.Process(), Trainer.step, []

    def watched(self, *args):
        if (len(steps) + 1) % 100 == 0:  # between two checkpoints
            gc.collect()
            tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            found.append((process.num_fds(), tensors, process.memory_info().rss))
        steps.append(1)
        return step(self, *args)

    steps = []
    monkeypatch.setattr(Trainer, "step", watched)
    changed = {"TRAIN_TOKENS": 302 * 64, "EVALUATIONS": 8, "CHECKPOINT_EVERY": 30, "LOG_EVERY": 15}
    assert here(arguments(tmp_path / "run", **changed)).code == 0
    files_open, tensors, memory_used = zip(*found, strict=True)
    assert len(found) == 3
    assert files_open[0] == files_open[1] == files_open[2]
    assert max(tensors) - min(tensors) < 50  # those of batches that wait
    assert memory_used[2] - memory_used[1] < 50_000_000  # bytes, in a hundred steps


# ---- losses that explode ----


def test_too_large_a_learning_rate_stops_the_run_with_the_step(here, arguments, tmp_path):
    ran = here(arguments(tmp_path / "run", LEARNING_RATE=10.0, WARM_UP_STEPS=0))
    assert ran.code == 1
    assert re.match(
        r"error: the normalized MSE is \S+, the loss \S+ at step 5, .*lower LEARNING_RATE: there is no checkpoint",
        ran.last_line,
    )
    assert "Traceback" not in ran.err
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(("broken_at", "seen_at"), [(13, 15), (19, 20), (20, 20)])
@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_weights_that_break_stop_the_run_and_the_last_good_checkpoint_stays(
    here, arguments, tmp_path, monkeypatch, broken_at, seen_at, value
):
    """At step 20 a checkpoint is due: of weights that no loss has seen, or whose loss the mean of steps hides."""
    steps = []

    def broken(self, *args, step=Trainer.step):
        figures = step(self, *args)
        steps.append(1)
        if len(steps) == broken_at:
            self.sae.W_enc.fill_(value)
        return figures

    monkeypatch.setattr(Trainer, "step", broken)
    ran = here(arguments(tmp_path / "run"))
    assert ran.code == 1
    assert f" at step {seen_at}," in ran.last_line
    assert f"the last good checkpoint, {tmp_path / 'run/checkpoints/step-10.safetensors'}" in ran.last_line
    assert "Traceback" not in ran.err
    assert step_of_checkpoint(tmp_path / "run") == 10
    assert load_file(tmp_path / "run/sae/sae_weights.safetensors")["W_enc"].abs().max() < 1e3
    assert metrics_of(tmp_path / "run")[-1]["step"] < seen_at


def test_every_constant_is_known_to_shape_a_run_or_not_to(finished):
    run = files.load_metadata(finished[0] / "checkpoints/step-40.safetensors", resume.Run)
    saved = run.settings.keys() | run.others.keys()
    shaping = {SAVED_AS.get(name, name.upper()) for name in saved} - {"D_MODEL", "CORPUS"}
    constants = {name for name in vars(config) if name.isupper()} - {"ON_STANDIN"}
    source = (ROOT / "config.py").read_text()
    of_others = set(re.findall(r"^([A-Z_]+)\b", source[source.index("# ---- explain.py") :], re.MULTILINE))
    free = {"RUN_DIR", "RESUME", "DRY_RUN", "STATUS", "KEEP_CHECKPOINTS", "LOG_TO", "MESH"}
    assert "OPENAI_API_KEY" in of_others
    assert constants == shaping | free | of_others
    assert not shaping & (free | of_others)
    assert not run.settings.keys() & run.others.keys()


SAVED_AS = {"split": "DATA_SPLIT"}


# ---- the plan, and what it refuses ----


def test_a_dry_run_prints_the_plan_and_writes_nothing(here, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)
    ran = here(arguments(tmp_path / "run", DRY_RUN=1))
    assert (ran.code, ran.err) == (0, "")
    for part in (
        "language model (float32)",
        "autoencoder",
        "gradients",
        "moments (bfloat16)",
        "buffer",
        "activations",
    ):
        assert part in ran.out
    assert re.search(r"all +\S+ [MG]B of \S+ GB free", ran.out)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_what_was_computed_and_why(here, arguments, tmp_path):
    left = [text for text in arguments("x", DRY_RUN=1) if not text.startswith(("D_HIDDEN", "K=", "RUN_DIR"))]
    ran = here(left)
    assert (ran.code, ran.err) == (0, "")
    assert "\ncomputed  from the model and the device\n  RUN_DIR=runs/tiny " in ran.out
    assert re.search(r"^  D_HIDDEN=[\d_]+ +one for every 160 tokens, at most 32 times the width", ran.out, re.M)
    assert "TARGET_LAYER" not in ran.out


def test_layers_above_the_target_stay_out_where_they_have_no_room(here, arguments, tmp_path, monkeypatch):
    def little_room(configs, spec, *, last_layer, **options):
        needs = training_needs(configs, spec, last_layer=last_layer, **options)
        return needs if last_layer is not None else needs._replace(first=Stage({"all": 10**15}, {}, [(0, 0)]))

    monkeypatch.setattr(memory, "training_needs", little_room)
    ran = here(arguments(tmp_path / "run", TRAIN_TOKENS=1024))
    assert ran.code == 0
    assert "language model to layer 1 (float32)" in ran.out
    assert "loading the model up to layer 1" in ran.out
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not any("ce_loss_clean" in record for record in records)  # they need all of the model
    assert "ce_loss_clean" in json.loads((tmp_path / "run/evaluation.json").read_text())


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(here, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)
    ran = here(arguments(tmp_path / "run", D_HIDDEN=10**8))
    assert_refused(ran, "more memory than is free: lower D_HIDDEN")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"DATA_PATH": "/no/such/text.jsonl"}, "there is no file or folder '/no/such/text.jsonl'"),
        ({"MISTRAL_MODEL_PATH": "/no/such/model"}, "/no/such/model is not a folder"),
        ({"TARGET_LAYER": 3}, "TARGET_LAYER is 3: expected 0 to 2, of tiny"),
        ({"TARGET_LAYER": -1}, "TARGET_LAYER is -1"),
        ({"K": 129}, "K is 129: expected 1 to D_HIDDEN, 128"),
        ({"K": 0}, "K is 0"),
        ({"BATCH_SIZE": 1}, "BATCH_SIZE is 1"),
        ({"TRAIN_TOKENS": 63}, "TRAIN_TOKENS is 63: expected at least one batch, 64"),
        ({"BUFFER_TOKENS": 30}, "BUFFER_TOKENS is 30: expected at least one row, 31"),
        ({"CONTEXT_LENGTH": 2}, "CONTEXT_LENGTH is 2"),
        ({"HELD_OUT_FRACTION": 0}, "HELD_OUT_FRACTION is 0"),
        ({"DECAY_FRACTION": 0}, "DECAY_FRACTION is 0"),
        ({"MAX_GRADIENT_NORM": 0}, "MAX_GRADIENT_NORM is 0"),
        ({"LOG_EVERY": 0}, "LOG_EVERY is 0"),
        ({"CHECKPOINT_EVERY": 0}, "CHECKPOINT_EVERY is 0"),
        ({"EVALUATION_ROWS": 0}, "EVALUATION_ROWS is 0"),
        ({"EVALUATION_STRIDE": 0}, "EVALUATION_STRIDE is 0"),
        ({"ROWS_PER_FORWARD": 0}, "ROWS_PER_FORWARD is 0"),
        ({"DEAD_AFTER_TOKENS": 0}, "DEAD_AFTER_TOKENS is 0"),
        ({"SEED": -1}, "SEED is -1"),
        ({"MOMENTS_DTYPE": "float16"}, "MOMENTS_DTYPE is 'float16': expected float32 or bfloat16"),
        ({"DTYPE": "int8"}, "expected float32, bfloat16 or float16"),
        ({"DEVICE": "mps:1"}, "found device 'mps:1': expected cpu, cuda, cuda:0 or mps"),
        ({"DEVICE": "cuda:99"}, "found no CUDA device for 'cuda:99'"),
        ({"DEVICE": "gpu"}, "found device 'gpu'"),
        ({"TEXT_FIELD": "content"}, "'content'"),
        ({"ACTIVATIONS_TOKENS": 100}, "ACTIVATIONS_TOKENS is 100: expected ACTIVATIONS_PATH beside it"),
        ({"ACTIVATIONS_PATH": "train.py"}, "ACTIVATIONS_PATH is 'train.py': expected a folder"),
    ],
)
def test_a_setting_that_no_run_can_use_is_refused_in_one_line(here, arguments, tmp_path, monkeypatch, changed, said):
    monkeypatch.setattr("mistral_sae.model.language_model.load_model", None)  # before anything is loaded
    assert_refused(here(arguments(tmp_path / "run", **changed)), said)
    assert list(tmp_path.iterdir()) == []


def test_a_run_dir_that_is_a_file_is_refused(here, arguments, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert_refused(here(arguments(tmp_path / "taken")), "expected a folder")
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize(("count", "length"), [(1, 1000), (30, 1)])
def test_too_little_text_is_refused_in_one_line(here, arguments, tmp_path, count, length):
    """One document cannot be both trained on and held out; thirty of a few letters do not fill a held-out row."""
    path = tmp_path / "few.jsonl"
    path.write_text((json.dumps({"text": "word " * length}) + "\n") * count)
    assert_refused(here(arguments(tmp_path / "run", DATA_PATH=path)), "use more ")


def test_records_that_were_skipped_are_reported_with_file_and_line(here, arguments, corpus, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(corpus.read_text() + "{broken\n")
    ran = here(arguments(tmp_path / "run", DATA_PATH=path, TRAIN_TOKENS=128))
    assert ran.code == 0, ran.err
    assert "skipped 1 record: text.jsonl:61" in ran.out


# ---- residuals on disk ----


@pytest.mark.parametrize("path", ["run/activations", "run/../run/activations/", "link"])
def test_the_folder_that_explain_py_clears_is_refused_for_residuals(here, arguments, tmp_path, path):
    (tmp_path / "link").symlink_to("run/activations")
    ran = here(arguments(tmp_path / "run", ACTIVATIONS_PATH=f"{tmp_path}/{path}"))
    assert_refused(ran, "expected another than RUN_DIR/activations, which is explain.py's")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("mistral_sae.data.stored.SHARD_TOKENS", 256)
    monkeypatch.setattr("mistral_sae.data.stored.BLOCK_TOKENS", 16)


def test_a_training_from_residuals_on_disk_ends_about_as_well_as_through_the_model(
    here, arguments, finished, tmp_path, small_shards, monkeypatch
):
    kept = {"ACTIVATIONS_PATH": tmp_path / "kept", "MOMENTS_DTYPE": "float32"}
    planned = here(arguments(tmp_path / "first", **kept, DRY_RUN=1))
    assert re.search(r"^stored    2,565 residuals of layer 1 in .*: \S+ kB to write, of .* free", planned.out, re.M)
    assert list(tmp_path.iterdir()) == []
    assert here(arguments(tmp_path / "first", **kept)).code == 0
    forwards = []
    run = LanguageModel._run
    monkeypatch.setattr(LanguageModel, "_run", lambda self, *args: forwards.append(1) or run(self, *args))
    again = here(arguments(tmp_path / "second", **kept, EVALUATIONS=1, SEED=0))
    assert again.code == 0
    assert "in " + str(tmp_path / "kept") + ", all there" in again.out
    evaluation = len(forwards)
    here(arguments(tmp_path / "second", **kept, EVALUATIONS=1, SEED=0))  # nothing but its evaluation is left
    assert len(forwards) == 2 * evaluation

    first, second = (load_file(tmp_path / name / "sae/sae_weights.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path / "first", finished[0])
    )
    assert ours["normalized_mse"] == pytest.approx(theirs["normalized_mse"], rel=0.1)


def test_a_training_from_residuals_on_disk_that_was_stopped_goes_on_through_the_same_batches(
    here, arguments, tmp_path, small_shards, monkeypatch
):
    kept = {"ACTIVATIONS_PATH": tmp_path / "kept", "EVALUATIONS": 1}
    assert here(arguments(tmp_path / "whole", **kept)).code == 0
    steps, step = [], Trainer.step

    def stopped(self, *args):
        steps.append(1)
        if len(steps) == 23:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        here(arguments(tmp_path / "run", **kept))
    assert step_of_checkpoint(tmp_path / "run") == 20
    (tmp_path / "kept").rename(tmp_path / "moved")
    ran = here(arguments(tmp_path / "run", **kept | {"ACTIVATIONS_PATH": tmp_path / "moved"}))
    assert "going on with another ACTIVATIONS_PATH" in ran.out
    found, expected = (load_file(tmp_path / name / "sae/sae_weights.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_through_the_model_does_not_go_on_from_residuals_on_disk(here, arguments, copied, tmp_path):
    ran = here(arguments(copied, ACTIVATIONS_PATH=tmp_path / "kept"))
    assert_refused(ran, "another ACTIVATIONS_TOKENS (None there, 2565 here)")
    assert not (tmp_path / "kept").exists()


def test_every_record_reaches_the_trackers_as_it_is(here, arguments, tmp_path, monkeypatch):
    given = []
    tracker = SimpleNamespace(log=lambda figures, step: given.append({"step": step} | figures), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(__spec__=True, init=lambda **options: tracker))
    ran = here(arguments(tmp_path / "run", TRAIN_TOKENS=10 * 64, EVALUATIONS=1, LOG_TO="trackio"))
    assert ran.code == 0, ran.err
    assert given == metrics_of(tmp_path / "run")
    assert len(given) == 2
