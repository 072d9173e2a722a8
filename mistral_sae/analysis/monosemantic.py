"""Do directions stand for single concepts? The best for each concept, chosen on some files and scored on others.

Neurons, rotations, principal components, random directions and the features of a model that has learned nothing go
through the same as the features do.

Shapes: N tokens, n of them, C concepts, M directions of a code, K of them, S resamples, G documents.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_sae.analysis.codes import Code, Sorted, Sparse
from mistral_sae.analysis.probing import Probe, k_sparse
from mistral_sae.analysis.sample import Texts

LEAST_TOKENS, LEAST_DOCUMENTS = 20, 3  # of a concept in each half, to be scored
WIDE = 0.2  # share of the tokens from which on a concept is no single thing that a direction could stand for
PRECISE = 0.8  # of the tokens on which a direction fires that must be of one concept
LEAST_FIRINGS = 10  # in each half, to judge a direction by
MOST_FEATURES = 16  # of a union
JUMP = 0.03  # by which one feature more must raise F1 to count as part of a concept, as in SAEBench
# SAEBench's bounds of absorption (Chanin et al. 2024): the cosine with the probe, and the share of its projection
PROBE_COSINE, PROBE_SHARE = 0.025, 0.4


# ---- the best direction ----


class Best(NamedTuple):
    """The best direction of a code for each concept (C), by F1 with its threshold, and by AUROC."""

    by_f1: Tensor  # int64
    f1: Tensor  # where it was chosen
    threshold: Tensor  # a token is said to be of the concept where the reading is at least this
    by_auroc: Tensor  # int64


def best_directions(code: Code, fit: Tensor, labels_nC: Tensor) -> Best:
    """Search all directions and all thresholds, on the tokens `fit` (indices) with their labels."""
    n_concepts = labels_nC.shape[1]
    f1_C, auroc_C = torch.zeros(n_concepts), torch.full((n_concepts,), -1.0)
    threshold_C = torch.full((n_concepts,), torch.inf)
    by_f1, by_auroc = torch.zeros(2, n_concepts, dtype=torch.int64)
    for part in code.parts(fit):
        called_E = _called(part)
        for concept in range(n_concepts):
            f1, entry, auroc, direction = _best_of(part, called_E, labels_nC[:, concept])
            if f1 > f1_C[concept]:
                f1_C[concept], threshold_C[concept] = f1, part.value_E[entry]
                by_f1[concept] = part.first + int(torch.searchsorted(part.offsets, entry, right=True)) - 1
            if auroc > auroc_C[concept]:
                auroc_C[concept], by_auroc[concept] = auroc, part.first + direction
    return Best(by_f1, f1_C, threshold_C, by_auroc)


def _called(part: Sorted) -> Tensor:
    """How many tokens read at least as much of its direction as each entry does (E): equal readings are not parted."""
    entry_E = torch.arange(len(part.value_E))
    is_last_E = torch.ones(len(entry_E), dtype=torch.bool)  # of those that are equal
    is_last_E[:-1] = part.value_E[1:] != part.value_E[:-1]
    is_last_E[part.offsets[1:][part.offsets.diff() > 0] - 1] = True
    last = is_last_E.nonzero().squeeze(1)
    begin_E = part.offsets[:-1].repeat_interleave(part.offsets.diff())
    return last[torch.searchsorted(last, entry_E)] - begin_E + 1


def _best_of(part: Sorted, called_E: Tensor, label_n: Tensor) -> tuple[float, int, float, int]:
    """The highest F1 and the entry at which it is cut, the highest AUROC and the direction that has it.

    F1 is highest at a token of the concept, so only those are gone through.
    """
    entry_H = label_n[part.token_E].nonzero().squeeze(1)  # H hits, direction by direction
    offsets = torch.searchsorted(entry_H, part.offsets)
    lengths, found = part.offsets.diff(), offsets.diff()
    hits_H = torch.arange(1, len(entry_H) + 1) - offsets[:-1].repeat_interleave(found)
    positives = int(label_n.sum())
    negatives = len(label_n) - positives
    f1_H = 2 * hits_H / (called_E[entry_H] + positives)
    # Each hit is above all negatives that come after it; tokens without a reading are ties
    place_H = entry_H - part.offsets[:-1].repeat_interleave(found)
    above = torch.cat([offsets.new_zeros(1), (negatives - place_H - 1 + hits_H).cumsum(0)])[offsets].diff()
    rest, rest_negative = positives - found, negatives - (lengths - found)
    auroc = (above + 0.5 * rest * rest_negative) / max(1, positives * negatives)
    best = int(f1_H.argmax()) if len(f1_H) else 0
    f1, entry = (float(f1_H[best]), int(entry_H[best])) if len(f1_H) else (0.0, 0)
    return f1, entry, float(auroc.max()), int(auroc.argmax())


def auroc(reading_n: Tensor, label_n: Tensor) -> float:
    """The chance that a token of the concept reads higher than another one, ties counted as half."""
    _, inverse, counts = reading_n.unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0) - (counts - 1) / 2
    positives = int(label_n.sum())
    negatives = len(label_n) - positives
    above = float(rank[inverse][label_n].double().sum()) - positives * (positives + 1) / 2
    return above / max(1, positives * negatives)


def threshold_of(reading_nC: Tensor, labels_nC: Tensor) -> Tensor:
    """For each concept the threshold (C) of its own reading with the highest F1."""
    found = []
    for reading, label in zip(reading_nC.T, labels_nC.T, strict=True):
        value, token = reading.sort(descending=True)
        part = Sorted(0, torch.tensor([0, len(value)]), token, value)
        found.append(value[_best_of(part, _called(part), label)[1]])
    return torch.stack(found)


# ---- what is scored ----


class Calls(NamedTuple):
    """Of each concept and document (C, G): tokens called and of it, tokens called, tokens of it."""

    hits: Tensor
    called: Tensor
    positives: Tensor

    def f1(self) -> Tensor:
        """(C)."""
        return 2 * self.hits.sum(dim=1) / (self.called + self.positives).sum(dim=1).clamp_min(1)

    def resampled(self, weights_SG: Tensor) -> Tensor:
        """F1 (S, C) with documents drawn anew."""
        return 2 * (weights_SG @ self.hits.T) / (weights_SG @ (self.called + self.positives).T).clamp_min(1e-9)


class Found(NamedTuple):
    """What a code has for the concepts, scored on the other half of the files."""

    calls: Calls  # of the best direction, or of the probe
    f1: Tensor  # (C)
    auroc: Tensor  # (C), of the best direction by AUROC
    direction: Tensor  # (C) int64, the best by F1; -1 for a probe
    fit_f1: Tensor  # (C) where it was chosen
    threshold: Tensor  # (C)
    sparse: Mapping[int, Tensor]  # F1 (C) of probes on k directions, by k; none for a probe


class Halves(NamedTuple):
    """Where to choose and where to score."""

    fit: Tensor  # indices of tokens
    score: Tensor
    labels_NC: Tensor
    document_N: Tensor
    n_documents: int

    @classmethod
    def of(cls, texts: Texts) -> "Halves":
        """Of some texts."""
        fit, score = texts.fit_N.nonzero().squeeze(1), (~texts.fit_N).nonzero().squeeze(1)
        return cls(fit, score, texts.labels_NC, texts.document_N, len(texts.documents))

    def has_enough(self) -> Tensor:
        """Which concepts (C) can be chosen for and scored."""
        enough = torch.ones(self.labels_NC.shape[1], dtype=torch.bool)
        for half in (self.fit, self.score):
            labels, document = self.labels_NC[half], self.document_N[half]
            documents = torch.zeros(self.n_documents, labels.shape[1]).index_add_(0, document, labels.float())
            enough &= (labels.sum(dim=0) >= LEAST_TOKENS) & ((documents > 0).sum(dim=0) >= LEAST_DOCUMENTS)
        return enough

    def calls(self, called_nC: Tensor) -> Calls:
        """Of what was called on the tokens to score."""
        labels_nC, document_n = self.labels_NC[self.score], self.document_N[self.score]
        zeros_GC = torch.zeros(self.n_documents, labels_nC.shape[1])
        each = (called_nC & labels_nC, called_nC, labels_nC)
        return Calls(*(zeros_GC.index_add(0, document_n, some.float()).T for some in each))


def search(code: Code, halves: Halves) -> Found:
    """The best direction of a code for each concept, and probes on its best few."""
    labels_nC = halves.labels_NC[halves.fit]
    best = best_directions(code, halves.fit, labels_nC)
    reading_NC = code.readings(best.by_f1[:, None]).squeeze(2)
    calls = halves.calls(reading_NC[halves.score] >= best.threshold)
    sparse = {}
    for k, logits_NC in k_sparse(code, halves.fit, labels_nC).items():
        sparse[k] = _scored(logits_NC, halves)[0].f1()
    areas = _areas(code.readings(best.by_auroc[:, None]).squeeze(2), halves)
    return Found(calls, calls.f1(), areas, best.by_f1, best.f1, best.threshold, sparse)


def probed(z_ND: Tensor, halves: Halves) -> tuple[Found, Tensor, Tensor]:
    """What logistic regression on the whole residual finds, its directions (C, D), and which tokens it calls (N, C)."""
    probe = Probe(z_ND[halves.fit], halves.labels_NC[halves.fit])
    logits_NC = probe.logits(z_ND)
    calls, threshold_C = _scored(logits_NC, halves)
    nothing = torch.full_like(threshold_C, -1)
    found = Found(calls, calls.f1(), _areas(logits_NC, halves), nothing.long(), nothing, threshold_C, {})
    return found, probe.directions_CD(), logits_NC >= threshold_C


def _scored(reading_NC: Tensor, halves: Halves) -> tuple[Calls, Tensor]:
    """What is called of each concept by its own reading, and the threshold (C)."""
    threshold_C = threshold_of(reading_NC[halves.fit], halves.labels_NC[halves.fit])
    return halves.calls(reading_NC[halves.score] >= threshold_C), threshold_C


def _areas(reading_NC: Tensor, halves: Halves) -> Tensor:
    pairs = zip(reading_NC[halves.score].T, halves.labels_NC[halves.score].T, strict=True)
    return torch.tensor([auroc(reading, label) for reading, label in pairs])


# ---- from the directions' side ----


class Precise(NamedTuple):
    """How many directions stand for one concept, of those that fire often enough in both halves to tell."""

    judged: int
    precise: int  # PRECISE of the tokens on which they fire are of one concept, in the half that it was not chosen on
    concepts: int  # different ones among them


def precise_directions(code: Code, halves: Halves) -> Precise:
    """Each direction's concept is the one it is most precise for in one half; how precise it is, the other half says.

    Concepts as wide as WIDE are left out: whatever fires at random would be precise for them.
    """
    fit_nC, score_nC = halves.labels_NC[halves.fit], halves.labels_NC[halves.score]
    narrow = halves.labels_NC.float().mean(dim=0) < WIDE
    firings = [code.counts(half, torch.ones(len(half), 1)).squeeze(1) for half in (halves.fit, halves.score)]
    judged = (firings[0] >= LEAST_FIRINGS) & (firings[1] >= LEAST_FIRINGS)
    if not narrow.any() or not judged.any():
        return Precise(int(judged.sum()), 0, 0)
    of_fit = code.counts(halves.fit, fit_nC[:, narrow])[judged]
    of_score = code.counts(halves.score, score_nC[:, narrow])[judged]
    concept = of_fit.argmax(dim=1)
    precision = of_score.gather(1, concept[:, None]).squeeze(1) / firings[1][judged]
    is_precise = precision >= PRECISE
    return Precise(int(judged.sum()), int(is_precise.sum()), len(concept[is_precise].unique()))


# ---- a concept over several features ----


class Union(NamedTuple):
    """The features whose firing together calls a concept best, chosen one after another, and F1 with the first k."""

    features: list[int]
    fit_f1: list[float]
    f1: list[float]  # on the half that they were not chosen on

    @property
    def needed(self) -> int:
        """How many the concept is split over: each that raised F1 by JUMP where it was chosen, and those before it."""
        rises = [after - before for before, after in zip([0.0, *self.fit_f1], self.fit_f1, strict=False)]
        return max((i for i, rise in enumerate(rises, 1) if rise >= JUMP), default=1)


def union_of(code: Sparse, halves: Halves, concept: int) -> Union:
    """Greedy: the feature that raises F1 most, up to MOST_FEATURES or until none raises it."""
    labels = [halves.labels_NC[half, concept] for half in (halves.fit, halves.score)]
    called = [torch.zeros(len(half), dtype=torch.bool) for half in (halves.fit, halves.score)]
    values, indices = code.values_NK[halves.fit], code.indices_NK[halves.fit]
    fires = values > 0
    found = Union([], [], [])
    for _ in range(MOST_FEATURES):
        new = fires & ~called[0][:, None]
        gained = torch.bincount(indices[new], minlength=code.n_directions)
        right = torch.bincount(indices[new & labels[0][:, None]], minlength=code.n_directions)
        hits, total = int((called[0] & labels[0]).sum()), int(called[0].sum()) + int(labels[0].sum())
        f1 = 2 * (hits + right) / (total + gained)
        best = int(f1.argmax())
        if float(f1[best]) <= (found.fit_f1[-1] if found.fit_f1 else 0.0):
            break
        found.features.append(best)
        found.fit_f1.append(float(f1[best]))
        for i, half in enumerate((halves.fit, halves.score)):
            called[i] |= ((code.indices_NK[half] == best) & (code.values_NK[half] > 0)).any(dim=1)
        true, all_called = int((called[1] & labels[1]).sum()), int(called[1].sum())
        found.f1.append(2 * true / max(1, all_called + int(labels[1].sum())))
    return found


def absorbed(
    code: Sparse, rows_FD: Tensor, halves: Halves, concept: int, main: list[int], probe: tuple[Tensor, Tensor]
) -> float | None:
    """The share of a concept's tokens on which its own features are silent and one other speaks for it.

    By the bounds of SAEBench's full absorption (Chanin et al. 2024): of the tokens to score that a probe, given as its
    direction (D) and its calls (N), finds rightly, those where none of `main` fires, and of the features that do, the
    one with the largest projection on the probe has PROBE_SHARE of all their projections and a cosine of PROBE_COSINE.
    It departs from it in that concepts are of tokens of running text, not the first letters of words in a prompt, in
    that `main` are not of a sparse probe, and in that the share is of what the features project on the probe, not of
    what the residual does. `rows_FD` are the decoder's, float on the CPU. None where the probe finds nothing.
    """
    direction_D, called_N = probe
    right = halves.score[(called_N & halves.labels_NC[:, concept])[halves.score]]
    if not len(right):
        return None
    values, indices = code.values_NK[right], code.indices_NK[right]
    speaks = torch.isin(indices, torch.tensor(main)) & (values > 0)
    unit_D = direction_D / direction_D.norm()
    along_F = rows_FD @ unit_D
    projected = values * along_F[indices]
    largest, at = projected.max(dim=1)
    others, place = indices.gather(1, at[:, None]).squeeze(1).unique(return_inverse=True)
    cosine = (along_F[others] / rows_FD[others].norm(dim=1).clamp_min(1e-12))[place]
    dominates = (largest >= PROBE_SHARE * projected.sum(dim=1).clamp_min(0)) & (largest > 0)
    return float((~speaks.any(dim=1) & dominates & (cosine >= PROBE_COSINE)).float().mean())
