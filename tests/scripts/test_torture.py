"""A small count of what tools/torture.py does at a large one."""

import json
import os
import subprocess
import sys

import pytest
from train_runs import ROOT

from mistral_sae.explain.types import Judgement, Label
from mistral_sae.model.language_model import STANDIN
from tools import torture_server


@pytest.mark.skipif(not (STANDIN / "consolidated.safetensors").exists(), reason="the stand-in has no weights")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_train_and_explain_end_bit_by_bit_the_same_after_a_power_cut_while_they_write():
    smaller = {"TRAIN_TOKENS": 256 * 20, "SELECT": "random 10", "EXPLAIN_TOKENS": 3_000, "D_HIDDEN": 128}
    code = f"import json; from tools import torture; torture.SIZES |= {smaller}; print(json.dumps(torture.writes(1)))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | {"MISTRAL_MODEL_PATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    for script, found in json.loads(ran.stdout.splitlines()[-1]).items():
        assert (found["kills"], found["of them power cuts"]) == (1, 1), script
        assert found["files compared a run"] > 5
        assert found["files that differ"] == []


def test_labels_of_another_feature_and_faults_that_were_not_are_told_from_true_ones():
    judged = (Judgement("detection", "held_out", 0, True, True), Judgement("detection", "random", 0, False, None))
    true = Label(1, "prompt a: some tokens", "server", "ok", {}, judged)
    asked = {
        "prompt a": '1. "x"\n2. "y"',
        "prompt b": '1. "z"',
        "prompt c": '1. "y"',
    }
    met = {asked["prompt a"]: {"ok", "overflow"}}

    def agrees(outcomes=met, **changed):
        return torture_server._agrees(true._replace(**changed), true, asked, outcomes)

    assert agrees()
    assert agrees(explanation="prompt c: some tokens")  # of some of the same passages
    assert not agrees(explanation="prompt b: some tokens")
    assert not agrees({asked["prompt a"]: {"ok"}}, explanation="prompt c: some tokens")  # nothing was too long
    assert not agrees(judgements=(judged[0]._replace(verdict=False), judged[1]))
    assert agrees(explanation="", status="overflow")
    for status in ("failed", "refused", "stopped"):
        assert not agrees(explanation="", status=status)
