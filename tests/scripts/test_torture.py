"""A small count of what tools/torture.py does at a large one."""

import json
import os
import subprocess
import sys

import pytest
from train_runs import ROOT

from mistral_sae.model.language_model import STANDIN


@pytest.mark.skipif(not (STANDIN / "consolidated.safetensors").exists(), reason="the stand-in has no weights")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_train_and_explain_end_bit_by_bit_the_same_after_a_power_cut():
    smaller = {"TRAIN_TOKENS": 256 * 20, "SELECT": "random 10", "EXPLAIN_TOKENS": 3_000, "D_HIDDEN": 128}
    code = f"import json; from tools import torture; torture.SIZES |= {smaller}; print(json.dumps(torture.resume(1)))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | {"MISTRAL_MODEL_PATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    for script, found in json.loads(ran.stdout.splitlines()[-1]).items():
        assert (found["kills"], found["of them power cuts"]) == (1, 1), script
        assert found["files compared a run"] > 5
        assert found["files that differ"] == []
