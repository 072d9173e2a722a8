"""Does the model use a concept's best feature? Edits along it, beside edits of the same size along other directions.

Directions and strengths are chosen on other documents than those that are scored.

Shapes: C concepts, G documents, P prompts, K kinds of direction, Z sizes, S resamples, D model width, H neurons.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.analysis.concepts import told_by_tokens
from mistral_sae.analysis.edits import Divergences, Written, ablate, prompts_of, push
from mistral_sae.analysis.intervals import interval, resamples
from mistral_sae.analysis.monosemantic import WIDE, Found
from mistral_sae.analysis.sample import Activity, Texts, down_projection
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.sweep import Measured, is_fluent, pooled, random_directions

FEATURE, MEANS, NEURON, OTHER, RANDOM = (
    "feature", "difference of means", "neuron", "another feature", "random direction",
)  # fmt: skip
CONCEPTS = 10
FIRES = 20  # tokens on which a feature has to fire to stand in as another one


def concepts_to_ask(features: Found, texts: Texts, only: set[str] | None) -> list[int]:
    """The CONCEPTS that a feature tells best where it was chosen, by F1, each with a feature of its own.

    Wide ones are left out, and those that are not among `only`.
    """
    taken: dict[int, int] = {}
    narrow_C = texts.labels_NC.float().mean(dim=0) < WIDE
    for c in features.fit_f1.argsort(descending=True).tolist():
        if narrow_C[c] and (only is None or texts.concepts[c] in only):
            taken.setdefault(int(features.direction[c]), c)
    return list(taken.values())[:CONCEPTS]


def directions_to_edit(
    model: LanguageModel,
    loaded: LoadedSAE,
    texts: Texts,
    activity: Activity,
    neurons: Found,
    features: Sequence[int],
    concepts: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """What each edit writes along, by its kind, (C, D): all as long as the features' decoder rows.

    A neuron's direction is what it writes into the residual, of a neuron that tells the concept best; where `neurons`
    are the residual's own dimensions, it is that dimension. The difference of means is of the concept's tokens from the
    others, the baseline that AxBench (Wu et al. 2025) found hard to beat. Another feature is any that fires.
    """
    rows_CD = loaded.sae.W_dec.detach().float().cpu()[list(features)]
    z_nD, y_nC = activity.z_ND[texts.fit_N], texts.labels_NC[texts.fit_N][:, list(concepts)].float()
    inside_C1 = y_nC.sum(dim=0)[:, None]
    sums_CD = y_nC.T @ z_nD
    means_CD = sums_CD / inside_C1 - (z_nD.sum(dim=0) - sums_CD) / (len(z_nD) - inside_C1)

    down = down_projection(model, loaded.metadata.residual_layer)
    writes_HD = torch.eye(z_nD.shape[1]) if down is None else down.weight.detach().float().cpu().T
    best_C = neurons.direction[list(concepts)]
    sign_C = 1.0 - 2 * (best_C >= len(writes_HD)).float()
    neurons_CD = sign_C[:, None] * writes_HD[best_C % len(writes_HD)]

    fired_F = torch.bincount(activity.indices_NK[activity.values_NK > 0], minlength=loaded.sae.n_features) >= FIRES
    fired_F[list(features)] = False
    others = fired_F.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = others[torch.randint(len(others), (len(rows_CD),), generator=generator)] if len(others) else features
    given = {
        FEATURE: rows_CD,
        MEANS: means_CD,
        NEURON: neurons_CD,
        OTHER: loaded.sae.W_dec.detach().float().cpu()[drawn],
        RANDOM: random_directions(rows_CD, seed),
    }
    length_C1 = rows_CD.norm(dim=1, keepdim=True)
    return {kind: length_C1 * F.normalize(each_CD, dim=1) for kind, each_CD in given.items()}


# ---- the answer ----


def causality(
    model: LanguageModel,
    loaded: LoadedSAE,
    texts: Texts,
    activity: Activity,
    found: Mapping[str, Found],
    is_python: bool,
    seed: int,
) -> dict[str, Any]:
    """What both edits do, by what they write along, with 95 % intervals over documents, and by concept.

    `found` has the best features and neurons of each concept. Without a parser for what the model writes nothing is
    pushed. A concept has no KL, None, where its feature fires on no token that is scored.
    """
    neurons = found.get("neurons of the MLP", found["basis directions"])
    concepts = concepts_to_ask(found["features"], texts, told_by_tokens() if is_python else None)
    unclear: dict[str, Any] = {"answer": "unclear", "pushed": None, "concepts": []}
    if not concepts:
        return unclear | {"sentence": "Not asked: the text has no narrow concept."}
    features = found["features"].direction[concepts].tolist()
    along = directions_to_edit(model, loaded, texts, activity, neurons, features, concepts, seed)
    names = [texts.concepts[c] for c in concepts]
    rows: list[dict[str, Any]] = [{"concept": n, "feature": f} for n, f in zip(names, features, strict=True)]
    taken = ablate(model, loaded, texts, activity, features, along)
    if not taken.tokens.sum(dim=(1, 2)).all():
        return unclear | {"sentence": "Not shown: features fire on none of the tokens that are scored, or on all."}
    ablated = ablated_by_kind(taken, resamples(texts.scored_G, seed))
    for c, row in enumerate(rows):
        tokens = taken.tokens[0, c].sum()
        row["kl"] = {kind: (sums[0, c].sum() / tokens).item() if tokens else None for kind, sums in taken.sums.items()}
    pushed = None
    prompts = prompts_of(texts, model) if is_python else []
    if len(prompts) >= 4:
        pushed = pushed_by_kind(push(model, loaded, prompts, names, features, along, seed), list(along), rows, seed)
    word, sentence = verdict(ablated, pushed)
    return {"answer": word, "sentence": sentence, "ablated": ablated, "pushed": pushed, "concepts": rows}


def ablated_by_kind(taken: Divergences, weights_SG: Tensor) -> dict[str, dict[str, Any]]:
    """KL where features fire and elsewhere, the mean over concepts, and how much higher it is along the feature."""

    def mean(sums_2CG: Tensor, weights_SG: Tensor) -> Tensor:
        """(S, 2); a concept that is in none of the documents drawn is left out."""
        return (sums_2CG @ weights_SG.T / (taken.tokens @ weights_SG.T)).nanmean(dim=1).T

    ones_1G = torch.ones(1, weights_SG.shape[1])
    own_S2 = mean(taken.sums[FEATURE], weights_SG)
    found = {}
    for kind, sums_2CG in taken.sums.items():
        inside, elsewhere = mean(sums_2CG, ones_1G)[0].tolist()
        drawn_S2 = mean(sums_2CG, weights_SG)
        low, high = interval(drawn_S2[:, 0])
        ahead = interval((own_S2 - drawn_S2)[:, 0])
        found[kind] = {"fires": inside, "low": low, "high": high, "elsewhere": elsewhere, "feature less it": ahead}
    return found


def pushed_by_kind(written: Written, kinds: list[str], rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """How often a text has a concept, the mean over concepts, and what it costs; by concept into `rows`.

    Of each direction's sizes the one that raises the rate most while texts stay fluent: for every other prompt the one
    that does so on the rest.
    """
    rate_PKCZ, n = written.rate_PKCZ, len(written.own)
    own = pooled(written.own)
    weights_SP = resamples(torch.ones(n, dtype=torch.bool), seed) / n
    taken_KPC, sizes = torch.zeros(rate_PKCZ.shape[1], n, len(rows)), range(rate_PKCZ.shape[3])
    found: dict[str, Any] = {}
    for k, kind in enumerate(kinds):
        figures: list[Measured] = []
        for c, row in enumerate(rows):
            first = (k * len(rows) + c) * len(sizes)
            for score, choose in (range(0, n, 2), range(1, n, 2)), (range(1, n, 2), range(0, n, 2)):
                theirs = pooled([written.own[p] for p in choose])
                tried = [pooled([written.measured[p][first + z] for p in choose]) for z in sizes]
                fluent = [z for z in sizes if is_fluent(tried[z], theirs)] or [0]
                z = max(fluent, key=lambda z: float(rate_PKCZ[choose, k, c, z].mean()))
                taken_KPC[k, score, c] = rate_PKCZ[score, k, c, z]
                figures += [written.measured[p][first + z] for p in score]
            row.setdefault("rate", {})[kind] = taken_KPC[k, :, c].mean().item()
        drawn_S, along_S = (weights_SP @ taken_KPC[i].mean(dim=1) for i in (k, kinds.index(FEATURE)))
        low, high = interval(drawn_S)
        found[kind] = {
            "rate": taken_KPC[k].mean().item(),
            "low": low,
            "high": high,
            "feature less it": interval(along_S - drawn_S),
            "nats more": pooled(figures).cross_entropy - own.cross_entropy,
        }
    for c, row in enumerate(rows):
        row["own rate"] = written.own_PC[:, c].mean().item()
    raised_P = (taken_KPC[kinds.index(FEATURE)] - written.own_PC).mean(dim=1)
    return found | {
        "own rate": written.own_PC.mean().item(),
        "raised": interval(weights_SP @ raised_P),
    }


def verdict(ablated: Mapping[str, Any], pushed: Mapping[str, Any] | None) -> tuple[str, str]:
    """The answer in a word, "yes", "partly" or "no", and in words.

    "yes" takes both edits: each has to do more along the feature than along a neuron, another feature and a random
    direction, by all of its interval. The difference of means is told beside, and asked for nothing.
    """
    names = {NEURON: "a neuron", OTHER: OTHER, RANDOM: "a random direction", MEANS: "the difference of means"}

    def beside(edit: Mapping[str, Any], figure: str, form: str) -> str:
        listed = ", ".join(f"{name} {edit[kind][figure]:{form}}" for kind, name in names.items())
        level = [name for kind, name in names.items() if edit[kind]["feature less it"][0] <= 0]
        return f"along {listed}" + (f" (not surely less along {' and '.join(level)})" if level else "")

    def leads(edit: Mapping[str, Any]) -> bool:
        return all(edit[kind]["feature less it"][0] > 0 for kind in (NEURON, OTHER, RANDOM))

    own = ablated[FEATURE]
    works = [leads(ablated) and own["fires"] > own["elsewhere"]]
    said = (
        f"taking it away moves the next token's distribution by {own['fires']:.3f} nats where it fires "
        f"({own['low']:.3f} to {own['high']:.3f}) and by {own['elsewhere']:.3f} elsewhere; as much "
        f"{beside(ablated, 'fires', '.3f')}"
    )
    if pushed is None:
        said += ". What the model writes when it is pushed was not counted"
    else:
        works.append(leads(pushed) and pushed["raised"][0] > 0)
        said += (
            f". Pushed along it the model writes the concept {pushed[FEATURE]['rate']:.1f} times in 1,000 characters, "
            f"by itself {pushed['own rate']:.1f}; {beside(pushed, 'rate', '.1f')}"
        )
    word = "yes" if all(works) else "partly" if any(works) else "no"
    return word, f"{word.capitalize()}: {said}."
