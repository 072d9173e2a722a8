"""95 % intervals over documents, since tokens of one document are alike.

Shapes: S resamples, G documents.
"""

import torch
from torch import Tensor

INTERVAL = torch.tensor([0.025, 0.975])


def resamples(scored_G: Tensor, seed: int, count: int = 1000) -> Tensor:
    """How often each document is drawn (S, G), of those that are scored (bool)."""
    ids = scored_G.nonzero().squeeze(1)
    drawn = torch.randint(len(ids), (count, len(ids)), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(count, len(scored_G)).scatter_add_(1, ids[drawn], torch.ones(drawn.shape))


def interval(drawn_S: Tensor) -> list[float]:
    """The lowest and the highest of what was drawn, without the outermost, and without draws that gave no number."""
    return drawn_S.nanquantile(INTERVAL).tolist()
