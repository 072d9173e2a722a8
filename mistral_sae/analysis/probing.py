"""Probes: how well a concept can be read from all of a residual, or from the best few directions of a code.

Shapes: N tokens, n those that are fitted on, C concepts, D inputs, K directions, M directions of a code.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mistral_sae.analysis.codes import Code

RIDGE = 1e-4  # on the weights of standardised inputs
STEPS = 60  # of L-BFGS, at most
BALANCED = 2000  # tokens of a concept that a sparse probe is fitted on, and as many others, as in SAEBench
KS = (1, 2, 5, 16)  # as SAEBench has them, but for the larger ones


class Probe:
    """Logistic regressions on shared inputs (N, D), or on each concept's own (N, C, D), all fitted together."""

    def __init__(self, x: Tensor, labels_nC: Tensor):
        self.mean, self.std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
        scaled, y_nC = (x - self.mean) / self.std, labels_nC.float()
        self.weight_CD = torch.zeros(y_nC.shape[1], x.shape[-1], requires_grad=True)
        rate_C = y_nC.mean(dim=0).clamp(1e-5, 1 - 1e-5)
        self.bias_C = (rate_C / (1 - rate_C)).log().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [self.weight_CD, self.bias_C], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            each = binary_cross_entropy_with_logits(self._of_scaled(scaled), y_nC, reduction="none").mean(dim=0)
            total = each.sum() + RIDGE * self.weight_CD.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        self.weight_CD, self.bias_C = self.weight_CD.detach(), self.bias_C.detach()

    def _of_scaled(self, x: Tensor) -> Tensor:
        by_concept = x.ndim == 3
        return (x * self.weight_CD).sum(dim=2) + self.bias_C if by_concept else x @ self.weight_CD.T + self.bias_C

    def logits(self, x: Tensor) -> Tensor:
        """(N, C)."""
        return self._of_scaled((x - self.mean) / self.std)

    def directions_CD(self) -> Tensor:
        """What it projects its inputs on, before they were standardised."""
        return self.weight_CD / self.std


def most_different(code: Code, some: Tensor, labels_nC: Tensor, k: int) -> Tensor:
    """The k directions (C, K) that read most more in the mean on a concept's tokens than on the others, best first."""
    ones_n1 = torch.ones(len(labels_nC), 1)
    inside_MC, all_M1 = code.sums(some, labels_nC), code.sums(some, ones_n1)
    count_C = labels_nC.sum(dim=0).clamp_min(1)
    difference_MC = inside_MC / count_C - (all_M1 - inside_MC) / (len(labels_nC) - count_C).clamp_min(1)
    return difference_MC.topk(min(k, code.n_directions), dim=0).indices.T


def k_sparse(code: Code, some: Tensor, labels_nC: Tensor, seed: int = 0) -> dict[int, Tensor]:
    """Logits (N, C) of probes on the k most different directions of each concept, for each k of KS.

    As Gurnee et al. 2023 and SAEBench choose and fit them, on as many tokens of the concept as others; but a feature
    that reads less on a concept's tokens is not among them.
    """
    readings_NCK = code.readings(most_different(code, some, labels_nC, max(KS)))
    generator = torch.Generator().manual_seed(seed)
    chances_Cn = torch.stack([labels_nC.T, ~labels_nC.T]).float()
    drawn_nC = torch.cat([torch.multinomial(each, BALANCED, True, generator=generator) for each in chances_Cn], dim=1).T
    of_n = (torch.arange(2 * BALANCED) < BALANCED)[:, None].expand(-1, labels_nC.shape[1])
    fitted = readings_NCK[some[drawn_nC], torch.arange(labels_nC.shape[1])]
    return {k: Probe(fitted[..., :k], of_n).logits(readings_NCK[..., :k]) for k in KS}
