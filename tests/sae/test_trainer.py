"""Training recovers known features, counts dead ones in tokens, and goes on from its state."""

import math

import pytest
import torch

from mistral_sae import files
from mistral_sae.sae import trainer as trainer_module
from mistral_sae.sae.trainer import TrainConfig, Trainer

D, F, K = 16, 80, 5


def make_trainer(d_model=D, d_hidden=F, k=K, bf16=None, **changes):
    return Trainer(
        TrainConfig(d_model, d_hidden, k, k_aux=d_model // 2, **{"dead_after_tokens": 50_000} | changes), bf16=bf16
    )


@pytest.mark.parametrize(
    ("architecture", "coefficient", "steps", "expected"),
    [
        ("topk", 0.0, 1200, 0.97),
        ("batchtopk", 0.0, 600, 0.95),
        ("matryoshka", 0.0, 600, 0.95),
        ("relu", 2.0, 600, 0.95),
        ("jumprelu", 1.0, 600, 0.95),
    ],
)
def test_training_recovers_a_known_dictionary_in_superposition(architecture, coefficient, steps, expected):
    """256 directions in 64 dimensions, 4 of them active at a time: every one is found by some feature."""
    true_features, width, active = 256, 64, 4
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(true_features, width, generator=generator), dim=1)

    def sample(tokens):
        chosen = torch.rand(tokens, true_features, generator=generator).topk(active, dim=1).indices
        strength = 1 + torch.rand(tokens, active, generator=generator)
        return torch.einsum("bk,bkd->bd", strength, directions[chosen])

    sizes = {"batch_size": 512, "train_tokens": 512 * steps, "bandwidth": 0.1, "matryoshka_levels": 3}
    trainer = make_trainer(
        width, true_features, active, architecture=architecture, sparsity_coefficient=coefficient, **sizes
    )
    trainer.initialize(sample(4096))
    for step in range(steps):
        trainer.step(sample(512), 3e-3 * min(1, (steps - step) / (0.3 * steps)))
        if step % 50 == 0:
            trainer.find_dead()

    # The autoencoder sees the directions without their mean over the width, which standardising removes
    centered = torch.nn.functional.normalize(directions - directions.mean(dim=1, keepdim=True), dim=1)
    best = (centered @ torch.nn.functional.normalize(trainer.sae.W_dec, dim=1).T).max(dim=1).values
    assert best.mean() >= expected
    found = trainer.sae.encode(sample(2048))  # as it is used afterwards, by a threshold in the place of the batch
    assert 0.75 * active <= (found.values > 0).sum() / 2048 <= 3 * active


def test_decoder_rows_keep_unit_norm_and_dead_features_are_counted_in_tokens():
    trainer = make_trainer(dead_after_tokens=250)
    x = torch.randn(100, D, generator=torch.Generator().manual_seed(6))
    trainer.initialize(x)
    trainer.sae.b_enc[:10] = -1e6  # these never fire
    for _ in range(2):
        trainer.step(x, 1e-3)
        assert not set(trainer.find_dead().tolist()) & set(range(10))
    trainer.step(x[:40], 1e-3)  # 240 tokens, and then 280
    assert len(trainer.find_dead()) == 0
    trainer.step(x[:40], 1e-3)
    assert set(range(10)) <= set(trainer.find_dead().tolist())
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(F))
    assert math.isclose(trainer.counts.fired_F.sum().item(), 280 * K, rel_tol=0.05)
    assert (trainer.counts.fired_F[:10] == 0).all()


def test_the_auxiliary_loss_revives_dead_features():
    def dead_at_the_end(coefficient):
        generator = torch.Generator().manual_seed(7)
        trainer = make_trainer(dead_after_tokens=1000, auxk_coefficient=coefficient)
        trainer.initialize(torch.randn(1000, D, generator=generator))
        trainer.sae.b_enc[:40] = -3.0
        for _ in range(300):
            trainer.step(torch.randn(200, D, generator=generator), 3e-3)
            trainer.find_dead()
        return len(trainer.dead)

    assert dead_at_the_end(0.0) >= 25
    assert dead_at_the_end(1 / 32) <= 10


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "relu", "jumprelu"])
def test_a_trainer_continues_bit_for_bit_from_its_state(architecture):
    settings = {"architecture": architecture, "sparsity_coefficient": 0.5, "bandwidth": 0.5, "dead_after_tokens": 200}
    batches = torch.randn(6, 100, D, generator=torch.Generator().manual_seed(8))
    through = make_trainer(**settings)
    through.initialize(batches[0])
    for i, x in enumerate(batches):
        if i == 3:
            state = {name: tensor.clone() for name, tensor in through.state().items()}
        through.step(x, 1e-2)
        through.find_dead()
    continued = make_trainer(**settings)
    continued.load(state)
    for x in batches[3:]:
        continued.step(x, 1e-2)
        continued.find_dead()
    for name, tensor in through.state().items():
        assert torch.equal(continued.state()[name], tensor), name


def test_the_second_loss_looks_at_a_bounded_number_of_dead_features(monkeypatch):
    seen, topk_step = [], trainer_module.topk_step
    monkeypatch.setattr(trainer_module, "topk_step", lambda *args: (seen.append(args[3].dead), topk_step(*args))[1])
    trainer = make_trainer(8, 64, 4, dead_after_tokens=1, auxk_features=5)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    trainer.initialize(x)
    trainer.since_fired.fill_(100)
    assert len(trainer.find_dead()) == 64
    trainer.step(x, 1e-3)
    assert seen[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pays", [False, True])
def test_the_product_is_in_bfloat16_where_that_pays(monkeypatch, pays):
    monkeypatch.setattr(trainer_module, "bf16_pays", lambda device: pays)
    assert make_trainer().bf16 is pays
    assert make_trainer(bf16=not pays).bf16 is not pays


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_trainer_that_loads_the_state_of_another_goes_on_like_it(tmp_path, moments):
    def made():
        return make_trainer(16, 64, 4, moments_dtype=moments, dead_after_tokens=50)

    x = torch.randn(6, 40, 16, generator=torch.Generator().manual_seed(0))
    first, second = made(), made()
    first.initialize(x[0])
    for batch in x[:3]:
        first.step(batch, 1e-2)
    assert len(first.find_dead())
    files.save_state(tmp_path / "state.safetensors", first.state(), {})
    second.load(files.load_state(tmp_path / "state.safetensors")[0])
    for trainer in (first, second):
        for i, batch in enumerate(x[3:]):
            torch.manual_seed(i)
            trainer.step(batch, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(first.state().values(), second.state().values(), strict=True))


def test_a_trainer_keeps_each_features_maximum_since_it_was_told_to_forget():
    trainer = make_trainer(16, 64, 4, dead_after_tokens=50)
    x = torch.randn(6, 40, 16, generator=torch.Generator().manual_seed(0))
    trainer.initialize(x[0])
    for i, batch in enumerate(x):
        if i == 3:
            before = trainer.counts.maximum_F.clone()
            trainer.forget_counts()
            expected = torch.zeros(64)
        seen = trainer.sae.encode(batch).dense(64).amax(dim=0)  # by the weights that the step begins with
        trainer.step(batch, 1e-2)
        if i >= 3:
            expected = torch.maximum(expected, seen)
    torch.testing.assert_close(trainer.counts.maximum_F, expected, rtol=1e-4, atol=1e-5)
    assert (before > trainer.counts.maximum_F).any()
