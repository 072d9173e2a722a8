"""Both answers, in words and as JSON, from what was measured.

Shapes: N tokens, C concepts, F features, K active features, S resamples, G documents.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mistral_sae.analysis.codes import Code, Dense, Sparse, strongest
from mistral_sae.analysis.intervals import interval, resamples
from mistral_sae.analysis.monosemantic import (
    LEAST_FIRINGS,
    Found,
    Halves,
    absorbed,
    precise_directions,
    probed,
    search,
    union_of,
)
from mistral_sae.analysis.sample import Activity, Texts
from mistral_sae.analysis.superposition import fits, interference, rivals, verdict
from mistral_sae.cli import Progress, UserError
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.features import decoder_geometry

FEATURES, PROBE, UNTRAINED = "features", "a probe on the whole residual", "features of an untrained model"
MOST_TOKENS = 4096  # on which dictionaries are fitted, K directions a token


def codes_of(activity: Activity, sae: SparseAutoencoder, seed: int) -> dict[str, Code]:
    """The features and their controls, by name: all read the same residuals, standardised.

    Directions that are never silent count as firing as seldom as the median feature does: what fires more seldom is
    more easily precise.
    """
    z_ND, width = activity.z_ND, activity.values_NK.shape[1]
    features = Sparse(activity.values_NK, activity.indices_NK, sae.n_features)
    codes: dict[str, Code] = {FEATURES: features}
    fired_F = features.counts(torch.arange(len(z_ND)), torch.ones(len(z_ND), 1)).squeeze(1)
    often_F = fired_F[fired_F >= 2 * LEAST_FIRINGS]
    density = float((often_F if len(often_F) else fired_F).median()) / len(z_ND)
    for name, rows in rivals(z_ND, sae.n_features, seed).items():
        is_basis = len(rows) == z_ND.shape[1]
        codes[name] = Dense(z_ND @ rows.T, density) if is_basis else strongest(z_ND, rows, width)
    if activity.neurons_NH is not None:
        codes["neurons of the MLP"] = Dense(activity.neurons_NH, density)
    return codes


# ---- do features stand for single concepts? ----


def with_enough(texts: Texts) -> Texts:
    """The texts with the concepts that can be chosen for and scored. Raises UserError where there are none."""
    enough_C = Halves.of(texts).has_enough()
    if not enough_C.any():
        raise UserError("found no concept on enough tokens of both halves of the files: raise ANALYSE_ROWS")
    names = [name for name, is_enough in zip(texts.concepts, enough_C.tolist(), strict=True) if is_enough]
    return texts._replace(labels_NC=texts.labels_NC[:, enough_C], concepts=names)


def searched(codes: Mapping[str, Code], texts: Texts) -> dict[str, Found]:
    """The best direction of each code for each concept."""
    halves = Halves.of(texts)
    return {name: search(code, halves) for name, code in Progress(list(codes.items()), "directions", unit=" codes")}


def monosemanticity(
    texts: Texts,
    activity: Activity,
    codes: Mapping[str, Code],
    found: Mapping[str, Found],
    sae: SparseAutoencoder,
    seed: int,
) -> dict[str, Any]:
    """How well the best direction of each code tells each concept: chosen on half of the files, scored on the others.

    `texts` are those `with_enough`, `found` what was `searched` in the codes. The rows of "concepts" have F1 by code,
    beside a probe's, how many features a concept takes, and how much of it is absorbed; "codes" the means over concepts
    with their 95 % intervals, and how many directions stand for one concept.
    """
    halves, found = Halves.of(texts), dict(found)
    found[PROBE], directions_CD, called_NC = probed(activity.z_ND, halves)
    weights_SG = resamples(texts.scored_G, seed)
    features, rows_FD, rows = codes[FEATURES], sae.W_dec.detach().float().cpu(), []
    assert isinstance(features, Sparse)
    for c, name in enumerate(texts.concepts):
        union = union_of(features, halves, c)
        main = union.features[: union.needed]
        rows.append(
            {
                "concept": name,
                "tokens": int(halves.labels_NC[:, c].sum()),
                "f1": {code: round(float(each.f1[c]), 3) for code, each in found.items()},
                "auroc": {code: round(float(each.auroc[c]), 3) for code, each in found.items()},
                "feature": int(found[FEATURES].direction[c]),
                "features": union.needed,
                "f1 of their union": round(union.f1[union.needed - 1], 3) if union.f1 else None,
                "absorbed": absorbed(features, rows_FD, halves, c, main, (directions_CD[c], called_NC[:, c])),
                "f1 of k features": {k: round(float(f1_C[c]), 3) for k, f1_C in found[FEATURES].sparse.items()},
            }
        )
    summaries = {name: _summary(each, weights_SG) for name, each in found.items()}
    for name, code in codes.items():
        summaries[name] |= precise_directions(code, halves)._asdict()
    word, sentence = monosemantic(found, weights_SG, summaries)
    f1_CC = overlaps(features, halves, found[FEATURES])
    return {
        "answer": word, "sentence": sentence, "codes": summaries, "concepts": rows,
        "matrix": [[round(f1, 3) for f1 in row] for row in f1_CC.tolist()],
    }  # fmt: skip


def overlaps(features: Sparse, halves: Halves, best: Found) -> Tensor:
    """F1 (C, C) with which the best feature of each concept (column) tells each concept (row), as `best` scored it."""
    reading_NC = features.readings(best.direction[:, None]).squeeze(2)
    called_nC = (reading_NC[halves.score] >= best.threshold).float()
    labels_nC = halves.labels_NC[halves.score].float()
    return 2 * (labels_nC.T @ called_nC) / (labels_nC.sum(dim=0)[:, None] + called_nC.sum(dim=0)).clamp_min(1)


def _summary(found: Found, weights_SG: Tensor) -> dict[str, Any]:
    low, high = interval(found.calls.resampled(weights_SG).mean(dim=1))
    return {"mean f1": float(found.f1.mean()), "low": low, "high": high, "mean auroc": float(found.auroc.mean())}


def monosemantic(
    found: Mapping[str, Found], weights_SG: Tensor, summaries: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str]:
    """The answer in a word, "yes", "partly" or "no", and in words: beside the best of the controls, from both sides.

    "yes" takes features that tell concepts better than any control does and as well as the probe, and of which a larger
    share stands for one concept than of any control's directions.
    """
    rival = max((n for n in found if n not in (FEATURES, PROBE)), key=lambda name: float(found[name].f1.mean()))
    means = [found[name].calls.resampled(weights_SG).mean(dim=1) for name in (FEATURES, rival)]
    low, high = interval(means[0] - means[1])
    own, theirs = summaries[FEATURES], summaries[rival]
    ahead = int((found[FEATURES].f1 > found[rival].f1).sum())
    said = (
        f"the best single feature tells a concept with a mean F1 of {own['mean f1']:.2f} ({own['low']:.2f} to "
        f"{own['high']:.2f}), the best of {rival} with {theirs['mean f1']:.2f} (the difference lies between {low:+.2f} "
        f"and {high:+.2f}; it is ahead on {ahead} of {len(found[FEATURES].f1)} concepts), {PROBE} with "
        f"{summaries[PROBE]['mean f1']:.2f}"
    )
    shares = {name: each["precise"] / max(1, each["judged"]) for name, each in summaries.items() if "precise" in each}
    most = max((name for name in shares if name != FEATURES), key=shares.__getitem__)
    precise = shares[FEATURES] > shares[most]
    said += (
        f". From the other side they {'lead, too' if precise else 'do not lead'}: {shares[FEATURES]:.1%} of features "
        f"stand for one concept on most tokens on which they fire, of {most} {shares[most]:.1%}"
    )
    if low <= 0:
        return "no", f"No more than {rival}: {said}."
    if own["mean f1"] < 0.5 or own["mean f1"] < summaries[PROBE]["mean f1"] or not precise:
        return "partly", f"Partly: {said}."
    return "yes", f"Yes: {said}."


# ---- are they in superposition? ----


def superposition(texts: Texts, activity: Activity, sae: SparseAutoencoder, seed: int) -> dict[str, Any]:
    """How the decoder shares the dimensions, and how well as many directions of a basis, or at random, do instead."""
    fired_F = torch.zeros(sae.n_features, dtype=torch.bool)
    fired_F[activity.indices_NK[activity.values_NK > 0]] = True
    geometry = decoder_geometry(sae.W_dec.cpu(), fired_F)
    if geometry is None:
        return {"answer": "unclear", "sentence": "Not shown: fewer than two features fired."}
    some = torch.linspace(0, len(activity.z_ND) - 1, min(MOST_TOKENS, len(activity.z_ND))).long()
    z_ND = activity.z_ND[some]
    dictionaries = {FEATURES: sae.W_dec.detach().cpu()[fired_F]} | rivals(z_ND, int(fired_F.sum()), seed)
    k = max(1, round(float((activity.values_NK > 0).sum() / len(activity.values_NK))))
    found = fits(z_ND, dictionaries, k, texts.document_N[some], seed)
    word, sentence = verdict(geometry, sae.d_model, found, FEATURES)
    met = interference(sae.W_dec.cpu(), activity.values_NK[some], activity.indices_NK[some], seed)
    return {
        "answer": word,
        "sentence": sentence,
        "directions a token": k,
        "unexplained": {name: fit._asdict() for name, fit in found.items()},
        "features that fire": geometry.features,
        "dimensions": sae.d_model,
        "median dimensionality": geometry.median_dimensionality,
        "sum of dimensionalities": sum(geometry.dimensionality_F),
        "median cosine with the nearest": geometry.median_nearest,
        "of random directions": geometry.nearest_random,
        "Welch's bound": geometry.welch,
        "neurons a feature": geometry.participation,
        "neurons a random direction": geometry.participation_random,
        "features a neuron": geometry.median_writers,
        "interference": met._asdict(),
    }
