"""Whatever part of a run the memory does not suffice for: one line, and the checkpoint before it stays good."""

import pytest
import torch
from test_pretended_device import SIZES

from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import Metadata
from mistral_sae.sae.checkpoint import load_sae, save_sae
from mistral_sae.sae.features import Statistics


@pytest.fixture
def run(run_script, text, tmp_path):
    """train.py or explain.py in tiny sizes: exit code, output, error stream."""

    def run(script="train.py", **changed):
        constants = {"DATA_PATH": text, "RUN_DIR": tmp_path / "run", "EXPLAINER": "offline"} | SIZES | changed
        return run_script(script, [f"{name}={value}" for name, value in constants.items()])

    return run


def fails_at(call: int, function):
    """The function, whose so-manyth call finds no memory."""
    calls = 0

    def of(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return function(*args, **kwargs)

    return of


STAGES = {
    "mistral_sae.model.engines._read_tensors": (1, "the language model: lower TARGET_LAYER, or DTYPE to bfloat16"),
    "mistral_sae.sae.trainer.SAEAdam": (1, "the autoencoder: lower D_HIDDEN, or MOMENTS_DTYPE to bfloat16"),
    "mistral_sae.data.activations.residuals_of_layers": (
        9,
        "a buffer of residuals: lower BUFFER_TOKENS or ROWS_PER_FORWARD",
    ),
    "mistral_sae.sae.trainer.topk_step": (25, "a step: lower BATCH_SIZE, AUXK_FEATURES or D_HIDDEN"),
    "mistral_sae.sae.evaluate.reconstruction": (1, "evaluating: lower ROWS_PER_FORWARD"),
    "mistral_sae.sae.shards.save_state": (
        2,
        "this run: lower BATCH_SIZE, BUFFER_TOKENS, ROWS_PER_FORWARD or D_HIDDEN",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_without_memory_ends_with_one_line_and_goes_on_from_its_checkpoint(run, stage, monkeypatch, tmp_path):
    call, line = STAGES[stage]
    module, name = stage.rsplit(".", 1)
    with monkeypatch.context() as patched:
        function = getattr(__import__(module, fromlist=[name]), name)
        patched.setattr(stage, fails_at(call, function))
        code, _, err = run()
    assert (code, err.splitlines()[-1]) == (1, f"error: the device is out of memory for {line}")
    assert "Traceback" not in err
    if (tmp_path / "run" / "checkpoints").exists():
        code, out, _ = run()
        assert code == 0
        assert "continuing after step 20" in out
        assert load_sae(tmp_path / "run" / "sae").sae.n_features == SIZES["D_HIDDEN"]
    else:
        assert call < 20


AFTER_TRAINING = {
    "explain.py": {
        "mistral_sae.loading.load_sae": (1, "the autoencoder: use another SAE_DEVICE"),
        "mistral_sae.model.engines._read_tensors": (1, "the language model: use another DEVICE, or DTYPE=bfloat16"),
        "mistral_sae.explain.cache.active": (2, "this run: lower ROWS_PER_FORWARD"),
        "mistral_sae.explain.examples.logit_lens": (1, "this run: lower ROWS_PER_FORWARD"),
    },
    "demo.py": {
        "mistral_sae.loading.load_sae": (1, "the autoencoder: use another SAE_DEVICE"),
        "mistral_sae.model.engines._read_tensors": (1, "the language model: use another DEVICE, or DTYPE=bfloat16"),
        "mistral_sae.steer.steering.make_edit": (1, "this run: lower NEW_TOKENS, SWEEP_SAMPLES or CHAT_CONTEXT"),
        "mistral_sae.steer.sweep.measure": (1, "this run: lower NEW_TOKENS, SWEEP_SAMPLES or CHAT_CONTEXT"),
    },
}
CASES = [(script, stage) for script, stages in AFTER_TRAINING.items() for stage in stages]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an autoencoder of the stand-in."""
    sae = SparseAutoencoder(256, SIZES["D_HIDDEN"], SIZES["K"])
    sae.initialize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), 0)
    path, ones = tmp_path_factory.mktemp("run"), torch.ones(sae.n_features)
    metadata = Metadata("standin", "blocks.2.hook_resid_post", 2, True, 64, None)
    save_sae(path / "sae", sae, metadata, Statistics(ones, 0.1 * ones, None))
    return path


@pytest.mark.parametrize(("script", "stage"), CASES)
def test_explain_and_demo_without_memory_end_with_one_line(run, trained, script, stage, monkeypatch):
    call, line = AFTER_TRAINING[script][stage]
    module, name = stage.rsplit(".", 1)
    monkeypatch.setattr(stage, fails_at(call, getattr(__import__(module, fromlist=[name]), name)))
    code, _, err = run(script, SAE_PATH=trained / "sae", FEATURE_INDEX=3, COEFFICIENT=1, NEW_TOKENS=8, SELECT="0-3")
    assert (code, err.splitlines()[-1]) == (1, f"error: the device is out of memory for {line}")
    assert "Traceback" not in err


@pytest.mark.parametrize(("script", "lowered"), [("explain.py", "ROWS_PER_FORWARD"), ("demo.py", "NEW_TOKENS")])
def test_what_has_no_room_is_refused_with_its_plan_before_the_model_is_loaded(
    run, trained, script, lowered, monkeypatch
):
    monkeypatch.setattr("mistral_sae.loading.free_memory", lambda device: 10**6)
    monkeypatch.setattr("mistral_sae.loading.load_model", None)
    code, out, err = run(script, SAE_PATH=trained / "sae")
    assert code == 2
    assert "memory    on cpu, by part" in out
    assert f"more memory than is free: lower {lowered}" in err.splitlines()[-1]
