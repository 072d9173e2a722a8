"""All three scripts on a GPU that is pretended: nothing is mixed, and nothing waits that need not."""

import pytest
import torch
from pretended import OnDevice, pretended

from mistral_sae.data.activations import sent_to, shuffled_batches
from mistral_sae.data.tokens import Row
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.evaluate import Evaluator
from mistral_sae.sae.features import decoder_geometry
from mistral_sae.sae.trainer import TrainConfig, Trainer

SIZES = {"D_HIDDEN": 128, "K": 4, "K_AUX": 8, "BATCH_SIZE": 128, "TRAIN_TOKENS": 5120, "BUFFER_TOKENS": 1024}
SIZES |= {"ROWS_PER_FORWARD": 4, "CONTEXT_LENGTH": 64, "EVALUATION_ROWS": 4, "EVALUATION_STRIDE": 1, "LOG_EVERY": 10}
SIZES |= {"CHECKPOINT_EVERY": 20, "DEAD_AFTER_TOKENS": 1000, "EXPLAIN_TOKENS": 5120, "EXPLAIN_STRIDE": 1}
SIZES |= {"SHUFFLE_ROWS": 64}


@pytest.fixture
def gpu(monkeypatch):
    with pretended(monkeypatch) as device:
        yield device


@pytest.fixture
def two(monkeypatch):
    with pretended(monkeypatch, count=2) as device:
        yield device


# ---- what is pretended ----


def test_values_are_real_and_results_stay_on_the_device(gpu):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    first, second = (x @ x.T).unbind()
    assert x.device == first.device == torch.device("cuda", 0)
    assert x.is_cuda
    assert isinstance(second[0], OnDevice)
    assert (second.cpu().tolist(), second.cpu().device.type) == ([14.0, 50.0], "cpu")
    assert torch.zeros_like(x, device="cpu").device.type == "cpu"
    x[0] = 7.0
    assert x.sum().item() == 33.0


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, host: x + host,
        lambda x, host: host.add_(x),
        lambda x, host: torch.cat([x, host]),
        lambda x, host: torch.cat([x, torch.tensor([1.0])]),
        lambda x, host: host[x.long()],
        lambda x, host: x.index_select(0, torch.tensor([0])),
        lambda x, host: x.__setitem__(torch.tensor([0, 1]), host),
        lambda x, host: torch.nn.functional.linear(x, host.view(1, 2)),
        lambda x, host: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda x, host: x + torch.ones(2, device="cuda:1"),
        lambda x, host: torch.ones(2, device="cuda:2"),
    ],
)
def test_what_cuda_refuses_to_mix_is_refused(two, mix):
    with pytest.raises(RuntimeError, match=r"same device|generator|indices should be|invalid device"):
        mix(torch.ones(2, device="cuda"), torch.ones(2))


def test_scalars_of_the_host_and_copies_may_be_mixed(gpu):
    x = torch.ones(2, device="cuda")
    x.copy_(torch.tensor([1.0, 2.0]))
    assert (x * torch.tensor(3.0)).tolist() == [3.0, 6.0]


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x * 2 + x.sum(), []),
        (lambda x: x.item(), ["item"]),
        (lambda x: x > 0 and x < 2, ["__bool__"]),
        (lambda x: x.expand(3).nonzero(), ["nonzero"]),
        (lambda x: x.expand(3)[x.expand(3) > 0], ["index by a mask"]),
        (lambda x: x.expand(3)[torch.tensor([0, 2])], ["index from the host"]),
        (lambda x: x.cpu(), ["copy to the host"]),
        (lambda x: torch.tensor([1.0], device=x.device), ["tensor from the host"]),
        (lambda x: torch.ones(1).to(x.device, non_blocking=True), ["copy from pageable memory"]),
        (lambda x: torch.ones(1).pin_memory().to(x.device, non_blocking=True), []),
        (lambda x: torch.ones(1).pin_memory().to(x.device), ["copy from pageable memory"]),
    ],
)
def test_waits_are_recorded(gpu, call, waits):
    x = torch.ones((), device="cuda")
    gpu.waits.clear()
    call(x)
    assert [why for why, _ in gpu.waits] == waits


def test_tensors_of_a_device_cannot_become_arrays(gpu):
    with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
        torch.ones(2, device="cuda").numpy()


# ---- the scripts ----


@pytest.fixture
def run(run_script, text, tmp_path):
    """Run a script in tiny sizes on the device; its output."""

    def run(script, **changed):
        short = {"TRAIN_TOKENS": 2560, "EXPLAIN_TOKENS": 2560}
        constants = {"DEVICE": "cuda", "DATA_PATH": text, "RUN_DIR": tmp_path / "run"} | SIZES | short | changed
        code, out, err = run_script(script, [f"{name}={value}" for name, value in constants.items()])
        assert code == 0, err
        return out

    return run


def test_train_explain_and_demo_run_whole(gpu, run):
    trained = run("train.py")
    assert "memory    on cuda:0, by part" in trained
    assert "cross-entropy recovered" in trained
    assert "8 features: " in run("explain.py", EXPLAINER="offline", SELECT="random 8")
    assert "with steering" in run("demo.py", FEATURE_INDEX=3, NEW_TOKENS=8)


@pytest.mark.parametrize(
    ("model_is_on", "sae_is_on", "edits"),
    [
        ("cuda:0", "cuda:1", [{"METHOD": "clamp"}, {"EXACT": True}, {"METHOD": "add"}]),
        ("cuda:0", "cpu", [{"EXACT": True}]),
        ("cpu", "cuda:1", [{"METHOD": "clamp"}]),
    ],
)
def test_model_and_autoencoder_may_be_on_two_devices(two, run, model_is_on, sae_is_on, edits, monkeypatch):
    seen = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, x, rate: (seen.append(x.device), step(self, x, rate))[1])
    devices = {"DEVICE": model_is_on, "SAE_DEVICE": sae_is_on, "DTYPE": "float32"}
    trained = run("train.py", **devices)
    model_plan, sae_plan = trained.split("memory    on ")[1:]
    assert model_plan.startswith(f"{model_is_on}, by part\n  language model")
    assert sae_plan.startswith(f"{sae_is_on}, by part\n  autoencoder")
    assert {str(device) for device in seen} == {sae_is_on}
    assert "cross-entropy recovered" in trained
    explained = run("explain.py", EXPLAINER="offline", SELECT="random 8", **devices)
    assert f"memory    on {sae_is_on}, by part\n  autoencoder" in explained
    for edit in edits:
        assert "with steering" in run("demo.py", FEATURE_INDEX=3, NEW_TOKENS=8, COEFFICIENT=1, **devices, **edit)


def test_where_the_autoencoder_is_changes_nothing_that_is_measured(two, tokens):
    sae = SparseAutoencoder(256, 64, 4)
    rows, models = torch.from_numpy(tokens[:4]), [load_model(None, device=d, dtype="float32") for d in ("cpu", "cuda")]
    sae.initialize(sae.standardize(models[0].residuals(rows, 2)[:, 1:].flatten(0, 1))[0], 0)
    expected = Evaluator(models[0], rows, 2, 2)(sae)
    there = SparseAutoencoder(256, 64, 4, device="cuda:1")
    for ours, given in zip(there.parameters(), sae.parameters(), strict=True):
        ours.data.copy_(given.data)
    assert Evaluator(models[1], rows, 2, 2)(there) == pytest.approx(expected, rel=1e-5)


def test_an_apple_gpu_which_has_no_float64_is_never_asked_for_it(monkeypatch, tokens):
    on_cpu = load_model(None, device="cpu")
    sae = SparseAutoencoder(on_cpu.d_model, 64, 4)
    rows = torch.from_numpy(tokens[:4])
    sae.initialize(sae.standardize(on_cpu.residuals(rows, 2)[:, 1:].flatten(0, 1))[0], 0)
    expected = Evaluator(on_cpu, rows, 2, 2)(sae)
    with pretended(monkeypatch, kind="mps") as device:
        with pytest.raises(TypeError, match="MPS Tensor to float64"):
            torch.ones(1, device="mps").double()
        model, there = load_model(None, device="mps"), SparseAutoencoder(on_cpu.d_model, 64, 4, device="mps")
        for ours, given in zip(there.parameters(), sae.parameters(), strict=True):
            ours.data.copy_(given.data)
        found = Evaluator(model, rows, 2, 2)(there)
        counts = decoder_geometry(there.W_dec)
    assert device.operators["linear"]
    assert counts.features == 64
    assert found == pytest.approx(expected, rel=1e-4)


# ---- what may wait ----


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, 4096, (64, 33), generator=generator).numpy()


def test_only_a_number_that_is_logged_waits_in_the_training_loop(gpu, tokens):
    model = load_model(None, last_layer=2, device="cuda", dtype="float32")
    config = TrainConfig(model.d_model, d_hidden=256, k=4, batch_size=64, k_aux=8, dead_after_tokens=256)
    trainer = Trainer(config, model.device)
    rows = (Row(row, row, []) for row in tokens)
    batches = shuffled_batches(rows, model, 2, batch_size=64, buffer_tokens=512, rows_per_forward=4, seed=0)
    trainer.initialize(next(batches).x)
    trainer.find_dead()
    figures = []
    gpu.waits.clear()
    for x, _ in batches:
        figures.append(torch.stack(trainer.step(x, 1e-3)))
        if len(figures) == 10:
            trainer.find_dead()
            assert sum(gpu.waits.values()) == 1
            gpu.waits.clear()
    assert (len(figures), len(trainer.dead) > 0) == (31, True)
    assert not gpu.waits


def test_nothing_waits_between_two_gpus_so_that_the_next_buffer_is_filled_while_the_last_is_trained_on(two, tokens):
    model = load_model(None, last_layer=2, device="cuda:0", dtype="float32")
    config = TrainConfig(model.d_model, d_hidden=256, k=4, batch_size=64, k_aux=8, dead_after_tokens=256)
    trainer = Trainer(config, "cuda:1")
    rows = (Row(row, row, []) for row in tokens)
    batches = shuffled_batches(rows, model, 2, batch_size=64, buffer_tokens=512, rows_per_forward=4, seed=0)
    batches = sent_to(batches, torch.device("cuda:1"))
    trainer.initialize(next(batches).x)
    two.waits.clear()
    figures = [trainer.step(batch.x, 1e-3) for batch in batches]
    assert (len(figures), figures[0].loss.device) == (31, torch.device("cuda:1"))  # of four buffers
    assert not two.waits


@pytest.mark.parametrize("engine", ["mistral-inference", "transformers"])
def test_generation_waits_for_the_sampled_tokens_only_and_is_that_of_the_cpu(gpu, engine):
    here = load_model(None, engine=engine, device="cpu")
    prompt = here.encode("def load(path):\n")
    expected = list(here.generate(prompt, 12, temperature=0.7))
    model = load_model(None, device="cuda", dtype="float32", engine=engine)
    gpu.waits.clear()
    assert list(model.generate(prompt, 12, temperature=0.7)) == expected
    assert [why for why, _ in gpu.waits] == ["copy to the host"]
    assert sum(gpu.waits.values()) == 12


@pytest.mark.parametrize("engine", ["mistral-inference", "transformers"])
def test_all_of_a_model_is_on_the_second_gpu_where_that_is_asked_for(two, engine, tokens):
    model = load_model(None, device="cuda:1", dtype="float32", engine=engine)
    assert model.residuals(torch.from_numpy(tokens[:2]), 3).device == torch.device("cuda", 1)
    assert len(model.sample(model.encode("def"), range(2), 4, temperature=1.0)) == 2
