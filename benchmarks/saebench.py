"""What of SAEBench (Karvonen et al. 2025) can be computed on the stand-in: ours beside SAE Lens, over K.

    python -m benchmarks.saebench          after benchmarks.architectures, whose data and trainings it goes on with

TopK autoencoders of both trainers, on the same residuals, each at its own tuned learning rate. Each metric follows one
of SAEBench's, and departs from it:

* core: L0, and the cross-entropy recovered. As there, but for what recovers nothing: the layer's mean, not zero.
* sparse probing: accuracy of a logistic regression on the k features whose mean differs most, on as many tokens of a
  concept as others, on files it was not fitted on. There the inputs are means over a text and the concepts are topics
  or languages; here they are tokens and concepts of Python, and features that read less on a concept are left out.
* absorption: of the tokens of a concept that a probe finds, the share on which the concept's own features are silent
  and one other stands in (full), and the mean part of the probe's projection that up to three others take over
  (fraction), with the same bounds. There concepts are first letters of words in a prompt; the concept's own features
  are those whose union raises F1 by 0.03 each, there those of a sparse probe that do; the projection is of z - b_dec,
  which is what features are to rebuild, there of the residual; a probe finds a token at its threshold of the best F1.

Unlearning, disentanglement (RAVEL, SCR, TPP) and automated interpretability need facts that this model does not know,
or another model as a judge.
"""

import json
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.architectures import FOLDER, OURS, SEEDS, THEIRS, Bench, Cell, K, trained
from benchmarks.machine import save
from mistral_sae.analysis.codes import Code, Dense, Sparse
from mistral_sae.analysis.monosemantic import PROBE_COSINE, PROBE_SHARE, Halves, union_of
from mistral_sae.analysis.probing import Probe, k_sparse
from mistral_sae.sae.autoencoder import SparseAutoencoder

SPARSITIES = (16, K)  # benchmarks.architectures has ours at 64 as well
PROBED = (1, 2, 5)  # features
ABSORBERS, ABSORBER_COSINE = 3, 0.1  # SAEBench's bounds for the fraction


def accuracy(logits_nC: Tensor, labels_nC: Tensor) -> float:
    """The mean over concepts of the accuracy with as many tokens of the concept as others."""
    right_nC = (logits_nC > 0) == labels_nC
    sides = [(right_nC & some).sum(dim=0) / some.sum(dim=0) for some in (labels_nC, ~labels_nC)]
    return float(sum(sides).mean() / 2)


def sparse_probing(code: Code, halves: Halves) -> dict[str, float]:
    """Accuracy of probes on a few directions, by their number."""
    found = k_sparse(code, halves.fit, halves.labels_NC[halves.fit])
    return {f"top {k}": accuracy(found[k][halves.score], halves.labels_NC[halves.score]) for k in PROBED}


def whole_residual(z_ND: Tensor, halves: Halves) -> float:
    """Accuracy of probes on all of the residual, each fitted on as many tokens of its concept as others."""
    found = []
    for c in range(halves.labels_NC.shape[1]):
        label_n = halves.labels_NC[halves.fit, c]
        inside, outside = (halves.fit[some] for some in (label_n, ~label_n))
        drawn = torch.randint(len(outside), (len(inside),), generator=torch.Generator().manual_seed(c))
        some = torch.cat([inside, outside[drawn]])
        logits = Probe(z_ND[some], halves.labels_NC[some, c : c + 1]).logits(z_ND[halves.score])
        found.append(accuracy(logits, halves.labels_NC[halves.score, c : c + 1]))
    return statistics.mean(found)


def absorption(
    code: Sparse, sae: SparseAutoencoder, z_ND: Tensor, some: Tensor, main: list[int], direction_D: Tensor
) -> tuple[float, float]:
    """How often a concept's `main` features are fully absorbed on `some` tokens (indices), and the mean fraction."""
    unit_D = normalize(direction_D, dim=0)
    cosine_F = normalize(sae.W_dec.detach().float(), dim=1) @ unit_D
    values, indices = code.values_NK[some], code.indices_NK[some]
    projected, cosine = values * cosine_F[indices], cosine_F[indices]
    whole = (z_ND[some] - sae.b_dec) @ unit_D
    is_main = torch.isin(indices, torch.tensor(main)) & (values > 0)

    largest, at = projected.max(dim=1)
    aligned = cosine.gather(1, at[:, None]).squeeze(1) >= PROBE_COSINE
    full = ~is_main.any(dim=1) & aligned & (whole > 0) & (largest >= PROBE_SHARE * whole)

    by_main = (projected * is_main).sum(dim=1)
    others = (projected * (~is_main & (cosine >= ABSORBER_COSINE))).clamp_min(0)
    by_others = others.topk(min(ABSORBERS, others.shape[1]), dim=1).values.sum(dim=1)
    taken = torch.minimum(by_others, whole - by_main)
    fraction = torch.where(by_main <= 0, 1.0, taken / (taken + by_main))
    counts = (whole > 0) & (by_main < whole) & (by_others >= PROBE_SHARE * whole)
    return float(full.float().mean()), float((fraction * counts).mean())


def figures(bench: Bench, cell: Cell) -> dict[str, Any]:
    """All metrics of one training."""
    core = bench.recovered(cell)
    path = FOLDER / cell.name / "saebench.json"
    if not path.exists():
        halves, z_ND, (directions_CD, called_NC) = bench.concepts
        sae = trained(cell).requires_grad_(False)
        encoded = sae.encode(z_ND)
        code, absorbed, split = Sparse(encoded.values, encoded.indices, sae.n_features), [], []
        for c, direction_D in enumerate(directions_CD):
            union = union_of(code, halves, c)
            found = halves.score[(called_NC[:, c] & halves.labels_NC[:, c])[halves.score]]
            if len(found):
                main = union.features[: union.needed]
                absorbed.append(absorption(code, sae, z_ND, found, main, direction_D))
            split.append(union.needed)
        full, fraction = (statistics.mean(column) for column in zip(*absorbed, strict=True))
        result = sparse_probing(code, halves) | {
            "absorbed fully": full,
            "absorbed part": fraction,
            "features a concept": statistics.mean(split),
        }
        path.write_text(json.dumps(result))
        print(cell.name, {name: round(value, 3) for name, value in result.items()}, flush=True)
    return core | json.loads(path.read_text())


def main() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    bench = Bench()
    best = [bench.best(trainer, "topk").cell for trainer in (OURS, THEIRS)]
    cells = [
        cell._replace(sparsity=k, seed=s) for cell in best for k in SPARSITIES for s in (SEEDS if k == K else SEEDS[:1])
    ]
    found = [figures(bench, cell) for cell in cells]
    halves, z_ND, _ = bench.concepts
    residual = sparse_probing(Dense(z_ND, 0.01), halves) | {"all": whole_residual(z_ND, halves)}
    save("saebench", {"autoencoders": found, "residual": residual})


if __name__ == "__main__":
    main()
