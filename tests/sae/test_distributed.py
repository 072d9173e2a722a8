"""Several ranks train as one process does: the same losses, the same weights, whatever the mesh."""

import shutil
from functools import cache
from typing import Any

import pytest
import torch
from forks import FORKS
from torch import distributed as dist

from mistral_sae import distributed
from mistral_sae.files import SAEError
from mistral_sae.sae.cfg import Metadata, hook_name
from mistral_sae.sae.checkpoint import load_sae, save_sae
from mistral_sae.sae.evaluate import reconstruction
from mistral_sae.sae.shards import load_trainer, part_of, save_trainer
from mistral_sae.sae.trainer import Figures, TrainConfig, Trainer

D, F, K, B, STEPS = 16, 96, 5, 48, 20
METADATA = Metadata("model", hook_name(1), 1, True, 64, "text")
RANKS, MESHES = 4, ("1x4", "2x2")
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu")
CASES = [
    ("topk", {}),
    ("topk", {"bf16": True}),
    ("topk", {"k": 40, "bf16": True}),  # more than a shard has
    ("topk", {"k_aux": 60}),  # more than are dead
    ("topk", {"k_aux": 1}),  # the dead ones are gathered rows
    *((architecture, {}) for architecture in ARCHITECTURES[1:]),
]


def trained(architecture, changes, mesh=distributed.ALONE):
    """Losses and norms (steps, 5) of a training with dead features, clipped gradients and a resumption; its weights."""
    changes = {"k": K, "k_aux": 8, "auxk_features": 40} | changes
    bf16 = changes.pop("bf16", False)
    settings = {"sparsity_coefficient": 0.5, "bandwidth": 0.5, "matryoshka_levels": 3, "max_gradient_norm": 0.05}
    config = TrainConfig(
        D,
        F,
        architecture=architecture,
        batch_size=B,
        train_tokens=B * STEPS,
        dead_after_tokens=150,
        **settings,
        **changes,
    )
    generator, figures, dead = torch.Generator().manual_seed(3), [], []
    # Few directions, so that many features never fire
    batches = torch.randn(STEPS + 1, B, 4, generator=generator) @ torch.randn(4, D, generator=generator)
    batches += 0.1 * torch.randn(STEPS + 1, B, D, generator=generator)
    trainer = Trainer(config, bf16=bf16, mesh=mesh)
    # On another batch than the first: JumpReLU's thresholds begin at pre-activations, which must not be compared again
    trainer.initialize(batches[-1])
    for step, x in enumerate(batches[:-1]):
        if step == STEPS // 2:
            state, trainer = trainer.state(), Trainer(config, bf16=bf16, mesh=mesh)
            trainer.load(state)
        figures.append(torch.stack(trainer.step(x, 1e-2)))
        trainer.find_dead()
        dead.append(trainer.n_dead)
    measured = reconstruction(trainer.sae, batches)
    shards = mesh.shards
    features = {"W_enc": trainer.sae.W_enc.T, "b_enc": trainer.sae.b_enc, "W_dec": trainer.sae.W_dec}
    features |= {"second": trainer.adam.second["W_enc"], "since_fired": trainer.since_fired}
    weights = {name: shards.gather(tensor.detach()) for name, tensor in features.items()}
    return {
        "figures": torch.stack(figures),
        "dead": torch.tensor(dead),
        "measured": torch.tensor(measured[:-1]),
        "density_F": measured.density_F,
        "b_dec": trainer.sae.b_dec.detach(),
        **weights,
    }


def run_as_rank(folder, rank):
    """What each of the processes does that the tests start."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    for name in MESHES:
        mesh = distributed.connect(name, "cpu")
        save_and_load(folder, mesh, name)
        for number, (architecture, changes) in enumerate(CASES):
            torch.save(trained(architecture, changes, mesh), folder / f"{name}-{number}-{rank}.pt")
    dist.destroy_process_group()


def state():
    """A trainer's after three steps, and its batches."""
    trainer = Trainer(TrainConfig(D, F, K, batch_size=B, train_tokens=B * STEPS, dead_after_tokens=20))
    batches = torch.randn(3, B, D, generator=torch.Generator().manual_seed(5))
    trainer.initialize(batches[0])
    for x in batches:
        trainer.step(x, 1e-2)
        trainer.find_dead()
    return trainer


def save_and_load(folder, mesh, name):
    """Go on from one process's state on a mesh without a step, and write it again; and a damaged one."""
    trainer = Trainer(state().config, mesh=mesh)
    tensors, metadata = load_trainer(folder / "one.safetensors", trainer, dict[str, Any])
    trainer.load(tensors)
    save_trainer(folder / f"{name}.safetensors", trainer, metadata)
    save_sae(folder / f"sae-{name}", trainer.sae, METADATA, trainer.counts.statistics())
    if mesh.ranks.rank == 0 and mesh.shards.size > 1:
        last = part_of(folder / f"{name}.safetensors", mesh.shards.size - 1, mesh.shards.size)
        shutil.copy(last, last.with_suffix(".whole"))
        last.write_bytes(last.read_bytes()[:-1] + b"?")
    mesh.ranks.wait()
    if mesh.shards.size > 1:
        with pytest.raises(SAEError, match="damaged"):
            load_trainer(folder / f"{name}.safetensors", trainer, dict[str, Any])
        if mesh.ranks.rank == 0:
            last.with_suffix(".whole").rename(last)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what each rank of each mesh got in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    save_trainer(folder / "one.safetensors", state(), {"step": 3})
    ranks = [FORKS.Process(target=run_as_rank, args=(folder, rank)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * RANKS
    return folder


@cache
def alone(number):
    """What one process gets."""
    return trained(*CASES[number])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name} {changes}" for name, changes in CASES])
def test_ranks_train_as_one_process_does(folder, mesh, number):
    results = [torch.load(path) for path in sorted(folder.glob(f"{mesh}-{number}-*.pt"))]
    for name, expected in alone(number).items():
        for found in results:
            assert torch.equal(found[name], results[0][name]), name
        torch.testing.assert_close(results[0][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_is_the_same_whatever_the_mesh(folder, mesh):
    expected = state()
    found = Trainer(expected.config)
    tensors, metadata = load_trainer(folder / f"{mesh}.safetensors", found, dict[str, Any])
    found.load(tensors)
    assert metadata == {"step": 3}
    assert len(found.dead)
    for name, tensor in expected.state().items():
        assert torch.equal(found.state()[name], tensor), name
    save_sae(folder / "sae-alone", expected.sae, METADATA, expected.counts.statistics())
    loaded, alone = load_sae(folder / f"sae-{mesh}"), load_sae(folder / "sae-alone")
    assert all(torch.equal(x, y) for x, y in zip(loaded.sae.parameters(), alone.sae.parameters(), strict=True))
    assert torch.equal(loaded.density_F, alone.density_F)
    assert torch.equal(loaded.maximum_F, alone.maximum_F)
    assert loaded.metadata == alone.metadata


def test_the_trainings_have_what_ranks_could_get_wrong():
    """Dead features, gradients that are clipped, and more dead features than the auxiliary loss takes."""
    found = alone(0)
    assert found["dead"].max() > 40
    assert found["figures"][:, Figures._fields.index("gradient_norm")].min() > 0.05
