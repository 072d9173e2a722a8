"""Planted hierarchies of features, and which architecture's features are absorbed by others.

A parent is present on some tokens, and on some of these one of its children is, too: never a child without its parent.
An autoencoder does with one feature less where a child's feature also writes the parent and the parent's stays silent:
absorption (Chanin et al. 2024). Matryoshka is made against it (Bussmann et al. 2025).

Shapes: N tokens, D width, P parents, C children of each, F features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_sae.sae.trainer import TrainConfig, Trainer

D, P, C = 64, 16, 3
F = P * (1 + C)
PRESENT, WITH_CHILD = 0.12, 0.2  # share of the tokens, and of its parent's, that each child has
K = 3  # a token has 3.1 on average
BATCH, RATE = 512, 3e-3


class Planted(NamedTuple):
    """What a token holds: parents first, then the children of each."""

    directions_FD: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int) -> "Planted":
        """Directions drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1), generator)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Some tokens (N, D), and what is present on them (N, F)."""
        parent_NP1 = torch.rand(n, P, 1, generator=self.generator) < PRESENT
        drawn_NP1 = torch.rand(n, P, 1, generator=self.generator) / WITH_CHILD
        child_NPC = parent_NP1 & (drawn_NP1.floor() == torch.arange(C))
        present_NF = torch.cat([parent_NP1.flatten(1), child_NPC.flatten(1)], dim=1)
        strength = 1 + 0.1 * torch.randn(n, F, generator=self.generator)
        return (present_NF * strength) @ self.directions_FD, present_NF


def trained(architecture: str, planted: Planted, seed: int, steps: int) -> Trainer:
    """As many features as were planted, as many active a token."""
    sizes = {"matryoshka_levels": 3, "k_aux": D // 2, "dead_after_tokens": 20_000, "seed": seed}
    trainer = Trainer(TrainConfig(D, F, K, architecture, train_tokens=steps * BATCH, batch_size=BATCH, **sizes))
    trainer.initialize(planted.sample(4096)[0])
    for step in range(steps):
        trainer.step(planted.sample(BATCH)[0], RATE * min(1, (steps - step) / (0.3 * steps)))
        if step % 20 == 0:
            trainer.find_dead()
    return trainer


def figures(architecture: str, seed: int, steps: int = 600) -> dict[str, Any]:
    """How often the feature of a parent is silent where the parent is present, with a child and alone.

    A parent's feature is the one whose firing agrees with it best, by F1.
    """
    planted = Planted.of(seed)
    sae = trained(architecture, planted, seed, steps).sae
    x, present_NF = planted.sample(8192)
    fires_NF = sae.encode(x).dense(F) > 0
    parent_NP, child_NPC = present_NF[:, :P], present_NF[:, P:].view(-1, P, C)
    hits_PF = parent_NP.float().T @ fires_NF.float()
    f1_P, feature_P = (2 * hits_PF / (parent_NP.sum(0)[:, None] + fires_NF.sum(0)).clamp_min(1)).max(dim=1)
    silent_NP, has_child_NP = ~fires_NF[:, feature_P], child_NPC.any(dim=2)
    alone_NP = parent_NP & ~has_child_NP
    return {
        "architecture": architecture,
        "seed": seed,
        "l0": float(fires_NF.float().sum(dim=1).mean()),
        "f1 of parents": float(f1_P.mean()),
        "silent with a child": float((silent_NP & has_child_NP).sum() / has_child_NP.sum()),
        "silent alone": float((silent_NP & alone_NP).sum() / alone_NP.sum()),
    }
