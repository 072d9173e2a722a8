"""Numbers that are not finite: which of the model, its dtype, the edit and the training they come from is said."""

import pytest
import torch
from explain_runs import SETTINGS, write_sae
from small_models import PARAMS, random_weights, write_mistral_folder

SIZES = {"D_HIDDEN": 64, "K": 4, "BATCH_SIZE": 64, "TRAIN_TOKENS": 640, "BUFFER_TOKENS": 256, "EVALUATION_ROWS": 4}
SMALL = SETTINGS | SIZES | {"TARGET_LAYER": 1, "LOG_EVERY": 5, "CHECKPOINT_EVERY": 5, "EVALUATIONS": 1}


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """A NaN in a layer's weights, or residuals beyond float16."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    if how == "nan":
        weights["layers.0.attention.wq.weight"][3, 5] = torch.nan
    else:
        weights["tok_embeddings.weight"] *= 1e5
    return weights


@pytest.fixture(params=["nan", "float16"])
def model(request, tmp_path):
    """Arguments that name such a model, and what is to be said of it."""
    folder = write_mistral_folder(tmp_path / "broken", PARAMS, broken(random_weights(PARAMS), request.param))
    if request.param == "nan":
        return [f"MISTRAL_MODEL_PATH={folder}"], "its weights are damaged, get them again"
    return [f"MISTRAL_MODEL_PATH={folder}", "DTYPE=float16"], "float16 ends at 65,504, set DTYPE to bfloat16 or float32"


@pytest.mark.parametrize(
    ("script", "what"),
    [("train.py", "residuals of layer 1"), ("explain.py", "residuals of layer"), ("demo.py", "")],
)
def test_a_model_whose_numbers_are_not_finite_is_told_by_its_own_name(
    run_script, tmp_path, corpus, model, script, what
):
    arguments, do = model
    write_sae(tmp_path / "run/sae") if script != "train.py" else None
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    code, out, err = run_script(script, [*settings, f"DATA_PATH={corpus}", f"RUN_DIR={tmp_path / 'run'}", *arguments])
    assert code in (1, 2)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"found NaN or infinity in the {what}" in line
    assert line.endswith(do)
    assert "LEARNING_RATE" not in line
    assert "nan" not in out.lower().replace("finance", "")


@pytest.mark.parametrize(("method", "coefficient"), [("clamp", "1e38"), ("raw", "-1e30"), ("add", "1e38")])
def test_an_edit_for_which_there_is_no_room_is_refused_before_text_is_made(
    run_script, tmp_path, corpus, mistral_folder, method, coefficient
):
    write_sae(tmp_path / "run/sae")
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    steered = [
        f"METHOD={method}",
        "FEATURE_INDEX=3",
        f"COEFFICIENT={coefficient}",
        f"MISTRAL_MODEL_PATH={mistral_folder}",
    ]
    code, out, err = run_script("demo.py", [*settings, f"DATA_PATH={corpus}", f"RUN_DIR={tmp_path / 'run'}", *steered])
    assert code == 2
    assert "expected a finite number of at most 1.8e+19, for which float32 has room: lower COEFFICIENT" in err
    assert "without steering" not in out
