"""What a training step of full size moves on a GPU, counted without one, is bounded and is what the pages show."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import accounting, traffic
from benchmarks.machine import RESULTS
from mistral_sae.sae.memory import training_needs

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux on x86-64")


@pytest.fixture(scope="module")
def counts():
    sizes = traffic.Sizes()
    return {
        "mistral-sae": traffic.our_step(sizes),
        "mistral-sae, 8,192 features dead": traffic.our_step(sizes._replace(dead=8192)),
        "mistral-sae, moments in float32": traffic.our_step(sizes._replace(moments="float32")),
    }


def gigabytes(count):
    return sum(cost.bytes for cost in count.costs.values()) / 1e9


def test_a_step_moves_at_most_ninety_gigabytes_and_a_hundred_with_dead_features(counts):
    plain, dead, float32 = map(gigabytes, counts.values())
    assert plain <= 90
    assert plain < dead <= 100
    assert plain < float32


def test_a_step_needs_at_most_twelve_and_a_half_gigabytes(counts):
    plain, dead, _ = counts.values()
    weights_and_moments = (2 * 4096 * 131_072) * (4 + 2 + 2)
    assert weights_and_moments < plain.peak <= dead.peak <= 12.5e9


def test_nothing_in_a_step_waits_for_the_device_or_runs_on_the_host(counts):
    for name, count in counts.items():
        assert count.costs, name
        assert (count.waits, count.on_host) == ([], []), name


def test_the_memory_plan_has_room_for_the_step(counts):
    class Nothing:
        d_model, vocab_size = 4096, 1

        def parameters(self, last_layer=None):
            return 0

    config = traffic.config_of(traffic.Sizes())
    needs = training_needs([config], Nothing(), last_layer=0, dtype=torch.bfloat16, on_cpu=False)
    (parts,) = needs.first.parts(1)
    buffer = parts["buffer of residuals (bfloat16)"]
    assert counts["mistral-sae, 8,192 features dead"].peak <= sum(parts.values()) - buffer


def test_the_committed_figures_are_those_of_todays_code(counts):
    saved = json.loads((RESULTS / "traffic.json").read_text())["results"]
    assert saved["sizes"] == traffic.Sizes()._asdict()
    for name, count in counts.items():
        assert saved["steps"][name] == json.loads(json.dumps(traffic.as_json(count))), (
            "run python -m benchmarks.traffic"
        )
    ours, theirs = (saved["steps"][name]["all"]["seconds"] * 1000 for name in ("mistral-sae", "sparsify"))
    assert f"about {ours:.0f} ms" in " ".join((ROOT / "docs/mistral-7b.md").read_text().split())
    assert f"{ours:.0f} ms on an H100, {theirs:.0f} ms" in " ".join((ROOT / "docs/benchmarks.md").read_text().split())


# ---- the rules ----


def counted(function, *shapes, dtype=torch.float32):
    count = accounting.Count({}, {})
    with accounting.pretended_gpu(), count:
        arguments = [torch.empty(*shape, device="cuda", dtype=dtype) for shape in shapes]
        count.start()
        function(*arguments)
    return count


@pytest.mark.parametrize(("function", "expected"), [
    (lambda x: x + 1, 2 * 800),
    (lambda x: x.T.view(20, 10), 0),
    (lambda x: x.add_(1.0), 2 * 800),
    (lambda x: x.sum(), 804),
    (lambda x: x[2:4] * 1, 2 * 160),
    (lambda x: x + x.new_empty(1, 20).expand(10, 20), 2 * 800 + 80),
    (lambda x: x.topk(3, sorted=False), 5 * 800 + 10 * 3 * (4 + 8)),
    (lambda x: x.zero_(), 800),
])  # fmt: skip
def test_an_operator_counts_what_it_reads_and_writes(function, expected):
    count = counted(function, (10, 20))
    assert sum(cost.bytes for cost in count.costs.values()) == expected


def test_a_gather_counts_each_row_that_is_asked_for():
    def gather(x):
        x.index_select(0, torch.zeros(7, dtype=torch.int64, device="cuda"))

    count = counted(gather, (10, 20))
    assert gigabytes(count) * 1e9 == pytest.approx(2 * 7 * 80 + 7 * 8 + 7 * 8)  # the indices are made, too


def test_waits_and_operators_on_the_host_are_told():
    assert counted(lambda x: x + 1, (3,)).waits == []
    assert counted(lambda x: x.to("cpu"), (3,)).waits == ["aten::_to_copy"]
    assert counted(lambda x: torch.ones(3) + 1, (3,)).on_host != []


def test_a_product_takes_as_long_as_its_operations_where_that_is_longer():
    (cost,) = counted(torch.mm, (4096, 4096), (4096, 4096), dtype=torch.bfloat16).costs.values()
    assert cost.flops == 2 * 4096**3
    assert cost.seconds == pytest.approx(cost.flops / accounting.H100.bfloat16)
