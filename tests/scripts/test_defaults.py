"""What the constants are that config.py leaves to the model and the device."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small_models import PARAMS

import config
from mistral_sae.cli import UserError
from mistral_sae.constants import override
from mistral_sae.defaults import defaults, fill, shown
from mistral_sae.model.language_model import ModelSpec
from mistral_sae.sae.trainer import TrainConfig

MISTRAL_7B = ModelSpec("mistralai/Mistral-7B-v0.3", "transformers", 4096, 32, 32_768, 1, (1,) * 32, 1)
SMOL = ModelSpec("SmolLM2-135M-Instruct", "transformers", 576, 30, 49_152, 1, (3_540_096,) * 30, 1)
GPU, CPU = (torch.device("cuda"), torch.bfloat16), (torch.device("cpu"), torch.float32)


@pytest.fixture
def constants(monkeypatch):
    monkeypatch.delenv("MISTRAL_MODEL_PATH", raising=False)

    def of(*arguments):
        override(["MISTRAL_MODEL_PATH=somewhere", *arguments], config)
        return config

    yield of
    override([], config)


def values(constants, spec, where):
    return {name: value for name, value, _ in defaults(constants, spec, *where)}


def test_a_penalty_follows_the_width_over_k_where_there_is_one(constants):
    assert "SPARSITY_COEFFICIENT" not in values(constants("ARCHITECTURE=batchtopk"), MISTRAL_7B, GPU)
    for architecture, power in (("relu", 0.8), ("jumprelu", 1)):
        few, many = (
            values(constants(f"ARCHITECTURE={architecture}", f"K={k}"), MISTRAL_7B, GPU)["SPARSITY_COEFFICIENT"]
            for k in (64, 256)
        )
        assert few == pytest.approx(4**power * many)
        given = constants(f"ARCHITECTURE={architecture}", "SPARSITY_COEFFICIENT=2.0")
        assert "SPARSITY_COEFFICIENT" not in values(given, MISTRAL_7B, GPU)


def test_mistral_7b_on_a_gpu_has_the_sizes_that_config_py_shows_in_brackets(constants):
    found = values(constants(), MISTRAL_7B, GPU)
    assert found.pop("LEARNING_RATE") == 2e-4 / math.sqrt(8)
    assert found == {
        "RUN_DIR": "runs/Mistral-7B-v0.3",
        "TARGET_LAYER": 16,
        "D_HIDDEN": 131_072,
        "K": 128,
        "TRAIN_TOKENS": 1_000_000_000,
        "BATCH_SIZE": 4096,
        "WARM_UP_STEPS": 1000,
        "K_AUX": 2048,
        "DEAD_AFTER_TOKENS": 10_000_000,
        "MOMENTS_DTYPE": "bfloat16",
        "BUFFER_TOKENS": 32_768,
        "ROWS_PER_FORWARD": 32,
        "CHECKPOINT_EVERY": 5000,
        "SHUFFLE_ROWS": 16_384,
        "EVALUATION_ROWS": 256,
        "EVALUATIONS": 4,
        "EXPLAIN_TOKENS": 10_000_000,
    }


def test_a_model_of_135m_on_a_cpu_has_what_it_reads_in_ten_minutes(constants):
    found = values(constants(), SMOL, CPU)
    assert found.pop("LEARNING_RATE") == pytest.approx(1e-3 / math.sqrt(4000 / 2**14))
    assert found == {
        "RUN_DIR": "runs/SmolLM2-135M-Instruct",
        "TARGET_LAYER": 15,
        "D_HIDDEN": 4000,
        "K": 32,
        "TRAIN_TOKENS": 640_000,
        "BATCH_SIZE": 512,
        "WARM_UP_STEPS": 62,
        "K_AUX": 288,
        "DEAD_AFTER_TOKENS": 128_000,
        "MOMENTS_DTYPE": "float32",
        "BUFFER_TOKENS": 65_536,
        "ROWS_PER_FORWARD": 16,
        "CHECKPOINT_EVERY": 500,
        "SHUFFLE_ROWS": 2500,
        "EVALUATION_ROWS": 32,
        "EVALUATIONS": 1,
        "EXPLAIN_TOKENS": 213_333,
    }


def test_on_a_gpu_it_has_a_share_of_what_mistral_7b_has(constants):
    found = values(constants(), SMOL, GPU)
    expected = {"D_HIDDEN": 18_432, "TRAIN_TOKENS": 140_625_000, "DEAD_AFTER_TOKENS": 1_406_250}
    expected |= {"CHECKPOINT_EVERY": 1700, "EXPLAIN_TOKENS": 1_406_250, "SHUFFLE_ROWS": 16_384}
    assert found.items() >= expected.items()


def test_a_short_run_warms_up_and_decays_within_itself(constants):
    found = values(constants("TRAIN_TOKENS=500_000", "D_HIDDEN=3072"), SMOL, GPU)
    steps = 500_000 // found["BATCH_SIZE"]
    assert found["BATCH_SIZE"] == 512
    assert found["WARM_UP_STEPS"] == steps // 20
    assert found["LEARNING_RATE"] == pytest.approx(1e-3 / math.sqrt(3072 / 2**14))
    assert found["DEAD_AFTER_TOKENS"] == 100_000


def test_what_is_set_stays_and_what_follows_from_it_follows(constants):
    module = constants("D_HIDDEN=32_768", "K=64", "RUN_DIR=runs/mine", "LEARNING_RATE=0.01", "CONTEXT_LENGTH=1024")
    found = values(module, MISTRAL_7B, GPU)
    assert not found.keys() & {"D_HIDDEN", "K", "RUN_DIR", "LEARNING_RATE"}
    assert found["TRAIN_TOKENS"] == 250_000_000
    assert found["BATCH_SIZE"] == 2048
    assert found["ROWS_PER_FORWARD"] == 8
    assert module.K == 64


def test_few_features_bring_no_more_active_ones_than_there_are(constants):
    assert values(constants("D_HIDDEN=16"), SMOL, CPU)["K"] == 16


def test_fewer_tokens_than_a_feature_wants_are_refused_as_less_than_a_batch(constants, mistral_folder):
    module = constants(f"MISTRAL_MODEL_PATH={mistral_folder}", "DEVICE=cpu", "TRAIN_TOKENS=100")
    with pytest.raises(UserError, match="TRAIN_TOKENS is 100: expected at least one batch, 512"):
        fill(module)


def test_filling_sets_the_constants_once_and_checks_them_again(constants, mistral_folder):
    module = constants(f"MISTRAL_MODEL_PATH={mistral_folder}", "DEVICE=cpu")
    filled, spec, _ = fill(module)
    assert (spec.d_model, filled.D_HIDDEN, filled.RUN_DIR) == (PARAMS["dim"], 32 * PARAMS["dim"], "runs/tiny")
    sizes = asdict(TrainConfig.of(module, spec.d_model))
    assert sizes["d_hidden"] == 32 * PARAMS["dim"]
    assert [name for name, value in sizes.items() if value is None] == ["sparsity_coefficient"]  # which topk has not
    assert fill(module)[2] == []
    with pytest.raises(UserError, match=r"K is 100000: expected 1 to D_HIDDEN, "):
        fill(constants(f"MISTRAL_MODEL_PATH={mistral_folder}", "DEVICE=cpu", "K=100_000"))


def test_none_on_the_command_line_is_computed_on_the_stand_in_too(constants):
    module = constants("MISTRAL_MODEL_PATH=None", "DEVICE=cpu")
    assert fill(module)[2] == []
    module = constants("MISTRAL_MODEL_PATH=None", "DEVICE=cpu", "D_HIDDEN=None", "TARGET_LAYER=None")
    filled, _, found = fill(module)
    assert (filled.D_HIDDEN, filled.TARGET_LAYER) == (7500, 3)
    assert [default.name for default in found] == ["TARGET_LAYER", "D_HIDDEN", "LEARNING_RATE"]
    assert filled.LEARNING_RATE == pytest.approx(1e-3 / math.sqrt(7500 / 2**14))


def test_the_page_on_7b_shows_what_is_computed_and_each_line_can_be_given(constants):
    module = constants()
    found = shown(defaults(module, MISTRAL_7B, *GPU))
    page = Path(__file__).parent.parent.parent / "docs" / "mistral-7b.md"
    assert f"```\n{found}\n```" in page.read_text(encoding="utf-8")
    lines = found.splitlines()
    assert lines[2].split() == ["D_HIDDEN=131_072", "32", "times", "the", "model's", "width,", "4,096"]
    override(["MISTRAL_MODEL_PATH=somewhere", *(line.split()[0] for line in lines)], module)
    assert defaults(module, MISTRAL_7B, *GPU) == []
