"""The control for the stand-in's figures: the same training on the same architecture with random weights.

    python -m benchmarks.control

Runs train.py's own `main` twice with the stand-in's constants, on the stand-in and on random weights. What an
autoencoder reaches on random weights comes from the tokens alone; what it reaches beyond that, from what was learned.
"""

import json
import shutil
import tempfile
from pathlib import Path

import config
import train
from benchmarks.machine import save
from tools.make_standin import FOLDER, new_model, write_weights


def trained_on(model_path: str | None, run_dir: Path) -> dict[str, float]:
    """Evaluation of an autoencoder trained with config.py's constants for the stand-in."""
    config.MISTRAL_MODEL_PATH, config.RUN_DIR = model_path, str(run_dir)
    train.main()
    return json.loads((run_dir / "evaluation.json").read_text())


def main() -> None:
    """Stand-in, control, result."""
    assert config.ON_STANDIN, "unset MISTRAL_MODEL_PATH: the control is of the stand-in"
    with tempfile.TemporaryDirectory() as folder:
        random_model = Path(folder, "random")
        write_weights(new_model(), random_model)
        shutil.copy(FOLDER / "tekken.json", random_model)
        results = {
            "stand-in": trained_on(None, Path(folder, "run")),
            "random weights": trained_on(str(random_model), Path(folder, "run-random")),
        }
    save("control", results)


if __name__ == "__main__":
    main()
