"""Compiled layers: equal to those that are not, one compilation for all, and the bytes that they move at 7B."""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.scheduler import Scheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import MISTRAL_7B
from mistral_sae.model import compiled
from mistral_sae.model.attention import Past, install_attention
from mistral_sae.model.language_model import load_model
from mistral_sae.model.params import config_for_transformers

ENGINES = ["mistral-inference", "transformers"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiled, "MANY", 16)
    with torch._inductor.config.patch(compile_threads=1):  # others would be processes of their own
        yield


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_layers_equal_others_by_one_compilation(mistral_folder, tokens_BT, engine):
    model = load_model(mistral_folder, engine=engine)
    expected = model.forward(tokens_BT), model.residuals(tokens_BT, 1), list(model.generate([1, 30, 31], 5))
    compiled.compile_blocks(model._engine.blocks)
    found = model.forward(tokens_BT), model.residuals(tokens_BT, 1), list(model.generate([1, 30, 31], 5))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found[2] == expected[2]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_without_a_working_compiler_the_model_runs_as_it_is(mistral_folder, tokens_BT, capsys):
    model = load_model(mistral_folder)
    expected = model.forward(tokens_BT)
    compiled.compile_blocks(model._engine.blocks)
    with patch("torch._inductor.compile_fx.compile_fx", side_effect=RuntimeError("Failed to find C compiler")):
        assert torch.equal(model.forward(tokens_BT), expected)
        assert torch.equal(model.forward(tokens_BT), expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the language model runs without PyTorch's compiler, which fails: ")
    assert "Failed to find C compiler" in line


def test_layers_with_experts_are_left_as_they_are():
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(2, 2)])
    compiled.compile_blocks([block])
    assert "forward" not in vars(block)


# ---- what a forward moves ----

TOKENS_BT, LAYERS = (32, 256), 17  # to layer 16, as config.py has it for Mistral 7B


class _Planned(Exception):
    """Raised once the compiler has decided what becomes one kernel, in place of making code of it."""


def bytes_moved(block: nn.Module, *args, **kwargs) -> float:
    """What PyTorch's compiler counts for the kernels of a block: what each reads and writes, once."""
    moved = []

    def count(scheduler: Scheduler) -> None:
        moved.extend(node.get_read_write_buffers_sizes() for node in scheduler.nodes)
        raise _Planned

    def backend(graph, inputs):
        try:
            return compile_fx(graph, inputs)
        except Exception as error:
            if not moved:
                raise error
            return graph.forward

    as_on_a_gpu = torch._inductor.config.patch(fx_graph_cache=False, force_pointwise_cat=True)
    with patch.object(Scheduler, "codegen", count), as_on_a_gpu:
        torch.compile(block.forward, backend=backend, fullgraph=True)(*args, **kwargs)
    return sum(moved)


@pytest.fixture
def _bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def block_of_7b(engine: str) -> tuple[nn.Module, tuple, dict]:
    """A layer of Mistral 7B without values, and what it is called with beside the residuals."""
    sizes = MISTRAL_7B
    if engine == "mistral-inference":
        install_attention()
        from mistral_inference.transformer_layers import TransformerBlock

        names = ["dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim", "norm_eps"]
        block = TransformerBlock(**{name: sizes[name] for name in names})
        rotary = torch.empty(TOKENS_BT[1], sizes["head_dim"] // 2, 2, dtype=torch.float32)
        return block, (rotary, Past(TOKENS_BT[0], None)), {}
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

    config = config_for_transformers(sizes)
    config._attn_implementation = "sdpa"
    angles = torch.empty(1, TOKENS_BT[1], sizes["head_dim"])
    return MistralDecoderLayer(config, 0), (), {"attention_mask": None, "position_embeddings": (angles, angles)}


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("engine", ENGINES)
def test_7b_to_its_middle_layer_moves_at_most_60_gb_for_8192_tokens(engine):
    rows, length = TOKENS_BT
    shape = (rows * length, 4096) if engine == "mistral-inference" else (rows, length, 4096)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        block, args, kwargs = block_of_7b(engine)
        moved = LAYERS * bytes_moved(block, torch.empty(shape), *args, **kwargs)
    weights = LAYERS * 2 * sum(p.numel() for p in block.parameters())
    print(f"{moved / 1e9:.1f} GB")
    assert weights < moved <= 60e9
