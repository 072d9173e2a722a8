"""The benchmarks' smoke runs: everything in tiny sizes, nothing saved."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import architectures, hierarchy

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def smoke(run_script):
    """A benchmark's smoke run in this process, as what it prints; it must leave the committed results alone."""

    def printed(name: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in RESULTS.glob("*")}
        code, out, err = run_script(f"benchmarks/{name}.py", ["--smoke"])
        assert code == 0
        assert {path: path.stat().st_mtime_ns for path in RESULTS.glob("*")} == before
        assert "Traceback" not in err
        return out

    return printed


def test_the_gpu_benchmark_runs_every_part_on_any_device(smoke):
    printed = smoke("gpu")
    for part in ("step, B=64, moments in float32", "step, B=128, moments in bfloat16", "end to end, B=128"):
        assert f"\n{part}\n" in printed
    assert "out of memory" not in printed
    assert len(re.findall(r"x the floor", printed)) == 4
    assert len(re.findall(r"[\d,]+ tokens/s, of whose time the language model takes \d+%", printed)) == 2
    assert "x ours" in printed or "sparsify is not installed" in printed


def test_a_part_that_runs_out_of_memory_leaves_the_others_alone(capsys):
    from benchmarks.gpu import attempt

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    results = {}
    attempt(results, "large", too_large)
    attempt(results, "small", lambda: {"seconds": 1.0})
    assert results == {"large": {"failed": "out of memory"}, "small": {"seconds": 1.0}}
    assert "more memory than is free" in capsys.readouterr().out


def test_the_speed_of_steering_is_measured_beside_the_model_alone(smoke):
    printed = smoke("steering_speed")
    found = dict(re.findall(r"^  (\S.*?) +[\d.]+ ms a token +([+-][\d.]+)%$", printed, re.M))
    assert found.pop("without steering") == "+0.0"
    assert set(found) == {"clamp, one feature", "clamp, eight features", "add, one feature", "clamp, exact"}


def test_the_cost_of_the_cache_of_activations_is_measured_beside_model_and_encoder(smoke):
    printed = smoke("collect")
    assert len(re.findall(r"tokens +[\d.]+ us a token since the line before +[\d,]+ MB resident", printed)) == 2
    assert re.search(r"MB on disk, [\d,]+ bytes a token", printed)
    stages = dict(re.findall(r"^  ([a-z].*?) +([\d.]+) us a token$", printed, re.M))
    assert list(stages)[:4] == ["reading and tokenizing", "language model", "encoder", "writing"]
    assert all(float(value) > 0 for value in stages.values())
    assert re.search(r"writing [\d,]+ tokens adds [\d.]+%", printed)


def test_the_cost_of_a_grid_is_measured_beside_one_autoencoder(smoke):
    printed = smoke("grid")
    assert re.search(r"^one autoencoder [\d.]+ s, four on the same pass [\d.]+ s: [\d.]+ times as long$", printed, re.M)


def test_the_stages_of_a_run_add_up_to_it(smoke):
    printed = smoke("pipeline")
    stages = {name: float(ms) for name, ms in re.findall(r"^([a-zAK].*?) +([\d.]+) +[\d.]+%$", printed, re.M)}
    background = sum(stages.pop(name) for name in ("reading, tokenizing and packing", "of which tokenizing"))
    whole = stages.pop("all")
    assert sum(stages.values()) == pytest.approx(whole, abs=0.01 * len(stages))
    assert background > 0
    assert {"language model", "encoder product", "top-k", "evaluation"} < stages.keys()
    assert stages["AuxK"] == 0  # nothing is dead after ten steps


def test_residuals_from_disk_are_measured_beside_the_model(smoke):
    printed = smoke("stored")
    assert len(re.findall(r"tokens/s, normalized MSE 0\.[\d]+$", printed, re.M)) == 2
    assert re.search(r"^[\d.]+ times as fast; written at [\d,]+ tokens/s$", printed, re.M)


def test_features_of_parents_are_absorbed_less_in_matryoshka_than_in_topk():
    topk, matryoshka = (hierarchy.figures(name, seed=0, steps=300) for name in ("topk", "matryoshka"))
    assert matryoshka["silent with a child"] < 0.1 < 0.5 < topk["silent with a child"]
    assert matryoshka["f1 of parents"] > 0.9


@pytest.mark.parametrize(("architecture", "best"), [("topk", 2e-3), ("relu", 16e-3)])
def test_each_side_is_compared_at_its_best_learning_rate_and_where_k_features_are_active(architecture, best):
    """L0 falls by a power of the coefficient; the error has its minimum over rates, and falls with L0."""
    tried = []

    def measure(cell):
        tried.append(cell)
        l0 = architectures.K if architecture == "topk" else 50 * cell.sparsity**-1.3
        off = math.log2(cell.rate / best)
        return {"l0": l0, "normalized_mse": 0.2 * (l0 / architectures.K) ** -0.5 * (1 + 0.1 * off**2)}

    found = architectures.tuned("anyone", architecture, measure)
    assert found.cell.rate == pytest.approx(best)
    figures = measure(found.cell)
    assert abs(math.log(figures["l0"] / architectures.K)) < architectures.NEAR
    assert found.at_k(figures) == pytest.approx(0.2, rel=1e-3)
    assert len(set(tried)) < 12
