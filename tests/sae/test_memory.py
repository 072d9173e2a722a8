"""The memory plan: what 7B needs on a 24 GB card, and that the parts are what is allocated."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
from mistral_sae.constants import override
from mistral_sae.data.activations import Stream, shuffled_streams
from mistral_sae.data.tokens import Row
from mistral_sae.defaults import defaults
from mistral_sae.model.language_model import ModelSpec, inspect, load_model
from mistral_sae.sae.architectures import ARCHITECTURES
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.memory import MemoryPlan, explaining_needs, free_memory, training_needs
from mistral_sae.sae.trainer import TrainConfig, Trainer

CARD_24_GB = int(23.6 * 2**30 - 0.5e9)  # what a driver leaves of 24 GiB, less the CUDA context


def mistral_7b(vocab_size):
    """The sizes of Mistral 7B v0.1 (32,000 tokens) and v0.3 (32,768)."""
    dim, hidden, kv = 4096, 14336, 8 * 128
    layer = 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim + 2 * dim
    embedding = vocab_size * dim
    return ModelSpec("7b", "mistral-inference", dim, 32, vocab_size, embedding, (layer,) * 32, embedding + dim)


@pytest.fixture
def config_7b(monkeypatch):
    monkeypatch.delenv("MISTRAL_MODEL_PATH", raising=False)
    override(["MISTRAL_MODEL_PATH=models/7b"], config)
    for name, value, _ in defaults(config, mistral_7b(32_768), torch.device("cuda"), torch.bfloat16):
        setattr(config, name, value)
    yield config
    override([], config)


def plan_of(constants, spec, free, last_layer=16, dtype=torch.bfloat16, **changed):
    training = replace(TrainConfig.of(constants, spec.d_model), **changed)
    return on_one(training_needs([training], spec, last_layer=last_layer, dtype=dtype, on_cpu=False), free)


def on_one(needs, free):
    return needs.plans("cuda", "cuda", {"cuda": free}).by_device["cuda"]


def test_the_specs_of_the_tests_are_of_seven_billion_parameters():
    assert mistral_7b(32_000).parameters() == 7_241_732_096
    assert mistral_7b(32_768).parameters() == 7_248_023_552


@pytest.mark.parametrize("vocab_size", [32_000, 32_768])
def test_the_defaults_for_7b_fit_a_24_gb_card(config_7b, vocab_size):
    assert (config_7b.D_HIDDEN, config_7b.K, config_7b.TARGET_LAYER) == (131_072, 128, 16)
    plan = plan_of(config_7b, mistral_7b(vocab_size), CARD_24_GB)
    assert plan.fits
    assert sum(plan.parts.values()) <= 24e9
    # Cross-entropy waits for the end of the run
    assert not plan_of(config_7b, mistral_7b(vocab_size), CARD_24_GB, last_layer=None).fits


def test_the_page_on_7b_shows_this_plan(config_7b):
    page = Path(__file__).parent.parent.parent / "docs" / "mistral-7b.md"
    assert f"```\n{plan_of(config_7b, mistral_7b(32_768), CARD_24_GB)}\n```" in page.read_text(encoding="utf-8")


def test_with_float32_moments_the_defaults_for_7b_do_not_fit(config_7b):
    assert not plan_of(config_7b, mistral_7b(32_768), CARD_24_GB, moments_dtype="float32").fits


@pytest.mark.parametrize("changed", [{"d_hidden": 262_144}, {"buffer_tokens": 10**6}, {"rows_per_forward": 500}])
def test_what_a_run_could_lower_to_fit_is_in_the_plan(config_7b, changed):
    assert not plan_of(config_7b, mistral_7b(32_768), CARD_24_GB, **changed).fits


def test_on_an_80_gb_card_the_whole_model_fits_beside_the_run(config_7b):
    assert plan_of(config_7b, mistral_7b(32_768), int(79e9), last_layer=None).fits


def test_a_plan_fits_only_with_some_memory_to_spare_in_training_and_in_evaluation():
    assert MemoryPlan({"a": 40, "b": 50}, {"c": 80}, free=100).fits
    assert not MemoryPlan({"a": 40, "b": 59}, {"c": 80}, free=100).fits
    assert not MemoryPlan({"a": 40, "b": 50}, {"c": 99}, free=100).fits


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_parts_are_what_a_run_allocates(config_7b, mistral_folder, moments):
    """Up to what is not worth a line: a few numbers a feature and Adam's step count."""
    spec = inspect(mistral_folder)
    sizes = {"d_hidden": 512, "k": 8, "batch_size": 64, "buffer_tokens": 330, "rows_per_forward": 2}
    sizes |= {"last_layer": 1, "context_length": 12, "dtype": torch.float32, "moments_dtype": moments}
    plan = plan_of(config_7b, spec, free=0, **sizes).parts
    trainer = Trainer(TrainConfig(spec.d_model, 512, 8, moments_dtype=moments))
    sae = trainer.sae
    sae.initialize(torch.randn(64, spec.d_model), seed=0)
    model = load_model(mistral_folder, last_layer=1, dtype="float32", device="cpu")
    model_weights = {p.data_ptr(): p for p in model._engine.model.parameters()}

    def size(tensors):
        return sum(t.untyped_storage().nbytes() for t in tensors)

    assert plan["language model to layer 1 (float32)"] == size(model_weights.values())
    assert plan["autoencoder (float32)"] == size(sae.parameters())
    adam = [t for name, t in trainer.state().items() if name.startswith(("adam.first", "adam.second"))]
    assert plan[f"Adam's moments ({moments})"] == size(adam)
    rest = [t for t in trainer.state().values() if t.dtype == torch.int64]
    assert size(rest) < 0.05 * plan["autoencoder (float32)"] * spec.d_model  # they do not grow with the width


def test_the_buffer_of_the_plan_holds_that_of_a_run(config_7b, mistral_folder):
    spec = inspect(mistral_folder)
    model = load_model(mistral_folder, last_layer=0, dtype="float32", device="cpu")
    rows = (Row(tokens, tokens, []) for tokens in torch.randint(20, 4096, (40, 12)).numpy())
    options = {"batch_size": 64, "buffer_tokens": 330, "rows_per_forward": 2}
    batches = shuffled_streams(rows, model, [Stream(0, seed=0)], **options)
    batch = next(batches).x
    held = batches.gi_frame.f_locals["residuals"].values()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*held, batch]}
    plan = plan_of(config_7b, spec, free=0, dtype=torch.float32, **options).parts
    assert plan["buffer of residuals (float32)"] == (330 + 64) * spec.d_model * 4
    assert sum(storages.values()) == plan["buffer of residuals (float32)"]


def test_the_plan_shows_each_part_the_sum_and_what_is_free():
    plan = MemoryPlan(
        {"language model": 7_700_000_000, "autoencoder": 300_000_000}, {"all": 9_100_000_000}, 24_000_000_000
    )
    lines = str(plan).splitlines()
    assert lines[0].split() == ["language", "model", "7.7", "GB"]
    assert lines[1].split() == ["autoencoder", "300", "MB"]
    assert lines[2].split() == ["all", "8.0", "GB", "of", "24.0", "GB", "free"]
    assert lines[3].endswith("9.1 GB")


@pytest.mark.parametrize("last_layer", [16, None])
def test_explaining_7b_fits_a_24_gb_card(last_layer):
    """None: the model explains itself, and is there with all its layers."""
    with torch.device("meta"):
        sae = SparseAutoencoder(4096, 131_072, 128)
    sizes = {"dtype": torch.bfloat16, "tokens": 32 * 256, "shard_tokens": 2**16}
    plan = on_one(explaining_needs(sae, mistral_7b(32_768), last_layer=last_layer, **sizes), CARD_24_GB)
    assert plan.fits, str(plan)
    assert str(plan).splitlines()[-1].startswith("  the features after it")


def test_the_free_memory_of_the_cpu_is_between_nothing_and_all_of_it():
    import psutil

    assert 0 < free_memory("cpu") <= psutil.virtual_memory().total


class Peak(TorchDispatchMode):
    """The most bytes that were there at once of what is made in a block."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in self.parts(args)}
        out = func(*args, **kwargs or {})
        for tensor in self.parts(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live and storage._cdata not in known:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.bytes = max(self.bytes, sum(self.live.values()))
        return out

    @staticmethod
    def parts(tree):
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        sparse = [t for t in tensors if t.layout is torch.sparse_csr]
        of_sparse = [part for t in sparse for part in (t.crow_indices(), t.col_indices(), t.values())]
        return [t for t in tensors if t.layout is torch.strided] + of_sparse


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plan_holds_what_a_step_takes(config_7b, mistral_folder, architecture):
    spec = inspect(mistral_folder)
    sizes = {"d_hidden": 8192, "k": 16, "batch_size": 512, "architecture": architecture, "auxk_features": 0}
    sizes |= {"sparsity_coefficient": 0.1, "bandwidth": 0.1, "moments_dtype": "float32"}
    training = replace(TrainConfig.of(config_7b, spec.d_model), **sizes)
    trainer, x = Trainer(training), torch.randn(512, spec.d_model)
    trainer.initialize(x)
    with Peak() as peak:
        trainer.step(x, 1e-3)
    stage = training_needs([training], spec, last_layer=0, dtype=torch.float32, on_cpu=True).first
    planned = stage.work[1][1] + stage.sae["its gradients (float32)"]
    assert planned / 4 < peak.bytes <= planned


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_encoding_takes_no_more_for_many_tokens_than_for_some(activation):
    def peak_of(tokens):
        sae = SparseAutoencoder(16, 8192, 8, activation=activation).requires_grad_(False)
        x = torch.randn(tokens, 16)
        sae.initialize(x, seed=0)
        (sae.threshold if activation == "jumprelu" else sae.b_enc).fill_(3.0 if activation == "jumprelu" else -3.0)
        with Peak() as peak:
            sae.encode(x)
        return peak.bytes

    assert peak_of(4096) < 1.5 * peak_of(1024)
