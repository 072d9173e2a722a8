"""Does the model use a concept's best feature? Edits along it, beside edits of the same size along other directions.

Two edits, both of `steer`. Ablating takes away what the feature writes, where it fires; a control takes as much away
there along another direction. Adding pushes the residual by a share of its own length along a direction, while the
model writes: then the concept can be counted in what it wrote. Directions and strengths are chosen on other documents
than those that are scored.

Shapes: N tokens, R rows, T positions, C concepts, G documents, P prompts, S resamples, D model width, H neurons.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.analysis.concepts import token_spans, told_by_tokens
from mistral_sae.analysis.monosemantic import WIDE, Found, resamples
from mistral_sae.analysis.sample import Activity, Texts, down_projection
from mistral_sae.cli import Progress
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.steering import steer
from mistral_sae.steer.sweep import Measured, Trials, is_fluent, pooled, random_directions

FEATURE, MEANS, NEURON, OTHER, RANDOM = (
    "feature", "difference of means", "neuron", "another feature", "random direction",
)  # fmt: skip
CONCEPTS = 10
ROWS = 12  # of text on which a feature fires, that it is ablated in
FIRES = 20  # tokens on which a feature has to fire to stand in as another one
SIZES = (0.2, 0.4)  # pushes that are tried, as shares of the residual's length; at about a half no text is fluent
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TEMPERATURE = 16, 24, 48, 0.7  # half of the prompts are to choose a size on
DEFINITION = re.compile(r"^(?=(def|class) )", re.M)  # what a prompt begins with


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


# ---- taking away ----


class Divergences(NamedTuple):
    """KL of the edited model's predictions from its own in nats, summed where a feature fires and elsewhere.

    What reaches the tokens elsewhere does so through attention.
    """

    sums: Mapping[str, Tensor]  # (2, C, G) by what was written along
    tokens: Tensor  # (2, C, G)


@torch.no_grad()
def ablate(
    model: LanguageModel,
    loaded: LoadedSAE,
    texts: Texts,
    activity: Activity,
    features: Sequence[int],
    along: Mapping[str, Tensor],
    rows_per_forward: int,
) -> Divergences:
    """Take away each feature's activation along its own direction and others, on ROWS rows where it fires."""

    def placed(values_N: Tensor) -> Tensor:
        return torch.zeros(texts.kept_RT.shape, dtype=values_N.dtype).masked_scatter_(texts.kept_RT, values_N)

    score_RT, document_RT = placed(~texts.fit_N)[:, :-1], placed(texts.document_N)[:, :-1]
    shape = (2, len(features), len(texts.documents))
    sums, tokens = {kind: torch.zeros(shape) for kind in along}, torch.zeros(shape)
    for c, feature in enumerate(Progress(features, "ablating", len(features), unit=" features", leave=False)):
        fires_RT = placed(((activity.indices_NK == feature) & (activity.values_NK > 0)).any(dim=1))[:, :-1]
        rows = (fires_RT & score_RT).any(dim=1).nonzero().squeeze(1)
        rows = rows[torch.linspace(0, max(0, len(rows) - 1), min(ROWS, len(rows))).long()]
        for some in rows.split(rows_per_forward) if len(rows) else ():
            scored_BT = score_RT[some]
            place = (~fires_RT[some][scored_BT]).long() * shape[2] + document_RT[some][scored_BT]
            tokens[:, c] += torch.bincount(place, minlength=2 * shape[2]).view(2, -1)
            plain_BTV = model.log_probabilities(texts.tokens_RT[some])
            for kind, rows_CD in along.items():
                with steer(model, loaded, {feature: 0.0}, "ablate", exact=True, directions_SD=rows_CD[[c]]):
                    edited_BTV = model.log_probabilities(texts.tokens_RT[some])
                kl_BT = F.kl_div(plain_BTV, edited_BTV, log_target=True, reduction="none").sum(dim=-1).cpu()
                sums[kind][:, c] += torch.bincount(place, kl_BT[scored_BT], minlength=2 * shape[2]).view(2, -1)
    return Divergences(sums, tokens)


# ---- pushing ----


class Prompt(NamedTuple):
    """The beginning of a definition in a file."""

    document: int
    ids: list[int]  # BOS first
    text: str


def prompts_of(texts: Texts, model: LanguageModel) -> list[Prompt]:
    """Up to PROMPTS of them, one a document to score on."""
    is_fit_G = torch.zeros(len(texts.documents), dtype=torch.bool)
    is_fit_G[texts.document_N[texts.fit_N]] = True
    document_RT = torch.full(texts.kept_RT.shape, -1).masked_scatter_(texts.kept_RT, texts.document_N)
    found: dict[int, Prompt] = {}
    for ids_T, document_T in zip(texts.tokens_RT, document_RT, strict=True):
        strings = model.tokenizer.strings(ids_T.tolist())
        begins = {begin: t for t, begin in enumerate(accumulate(map(len, strings[:-1]), initial=0))}
        for match in DEFINITION.finditer("".join(strings)):
            t = begins.get(match.start(), len(strings))
            document, theirs_t = int(document_T[min(t, len(strings) - 1)]), document_T[t : t + PROMPT_TOKENS]
            is_whole = len(theirs_t) == PROMPT_TOKENS and bool((theirs_t == document).all())
            if is_whole and document >= 0 and not is_fit_G[document] and document not in found:
                ids = ids_T[t : t + PROMPT_TOKENS].tolist()
                found[document] = Prompt(
                    document, [model.tokenizer.bos_id, *ids], "".join(strings[t : t + PROMPT_TOKENS])
                )
    return list(found.values())[:PROMPTS]


def share_of(text: str, begin: int, concept: str) -> float:
    """The share of a text's characters from the one at `begin` on that are of a concept."""
    is_it = np.zeros(len(text), dtype=bool)
    for start, end in token_spans(text).get(concept, ()):
        is_it[start:end] = True
    return float(is_it[begin:].mean()) if len(text) > begin else 0.0


class Written(NamedTuple):
    """What was written under each edit: by prompt, kind, concept and size."""

    share_PKCZ: Tensor  # of the text that is of the concept
    own_PC: Tensor  # the same of the model's own text
    measured: Sequence[Sequence[Measured]]  # by prompt; of the edits in that order
    own: Sequence[Measured]  # by prompt


@torch.no_grad()
def push(
    model: LanguageModel,
    loaded: LoadedSAE,
    prompts: Sequence[Prompt],
    concepts: Sequence[str],
    features: Sequence[int],
    along: Mapping[str, Tensor],
    seed: int,
) -> Written:
    """Let the model continue each prompt while it is pushed along each direction by each of SIZES."""
    settings = [(kind, c, size) for kind in along for c in range(len(concepts)) for size in SIZES]
    unsteered = (FEATURE, 0, math.nan)  # in the same batch

    @contextmanager
    def context(settings_B: list[tuple[str, int, float]]) -> Iterator[None]:
        with ExitStack() as edits:
            for kind in dict.fromkeys(kind for kind, _, _ in settings_B):
                coefficients = {
                    feature: torch.tensor(
                        [size if (own, at) == (kind, c) else math.nan for own, at, size in settings_B]
                    )
                    for c, feature in enumerate(features)
                }
                edits.enter_context(steer(model, loaded, coefficients, "add", directions_SD=along[kind]))
            yield

    shares, own_shares, measured, own = [], [], [], []
    for i, prompt in enumerate(Progress(prompts, "steered texts", len(prompts), unit=" prompts", leave=False)):
        trials = Trials(model, loaded, prompt.ids, [seed + i], NEW_TOKENS, TEMPERATURE)
        written = list(trials.steered([unsteered, *settings], context, lambda setting: [features[setting[1]]], False))
        texts = [prompt.text + trials.text_of(each.texts[0]) for each in written]
        shares.append(
            [share_of(text, len(prompt.text), concepts[c]) for text, (_, c, _) in zip(texts[1:], settings, strict=True)]
        )
        own_shares.append([share_of(texts[0], len(prompt.text), concept) for concept in concepts])
        own.append(written[0].measured[0])
        measured.append([each.measured[0] for each in written[1:]])
    shape = (len(prompts), len(along), len(concepts), len(SIZES))
    return Written(torch.tensor(shares).view(shape), torch.tensor(own_shares), measured, own)


# ---- the answer ----

INTERVAL = torch.tensor([0.025, 0.975])  # 95 %


def causality(
    model: LanguageModel,
    loaded: LoadedSAE,
    texts: Texts,
    activity: Activity,
    found: Mapping[str, Found],
    rows_per_forward: int,
    is_python: bool,
    seed: int,
) -> dict[str, Any]:
    """What both edits do, by what they write along, with 95 % intervals over documents, and by concept.

    `found` has the best features and neurons of each concept. Without a parser for what the model writes nothing is
    pushed.
    """
    neurons = found.get("neurons of the MLP", found["basis directions"])
    concepts = concepts_to_ask(found["features"], texts, told_by_tokens() if is_python else None)
    if not concepts:
        return {"answer": "unclear", "sentence": "Not asked: the text has too few concepts.", "concepts": []}
    features = found["features"].direction[concepts].tolist()
    along = directions_to_edit(model, loaded, texts, activity, neurons, features, concepts, seed)
    names = [texts.concepts[c] for c in concepts]
    rows: list[dict[str, Any]] = [{"concept": n, "feature": f} for n, f in zip(names, features, strict=True)]
    taken = ablate(model, loaded, texts, activity, features, along, rows_per_forward)
    scored_G = torch.zeros(len(texts.documents), dtype=torch.bool)
    scored_G[texts.document_N[~texts.fit_N]] = True
    ablated = ablated_by_kind(taken, resamples(len(scored_G), scored_G, seed))
    for c, row in enumerate(rows):
        row["kl"] = {kind: (sums[0, c].sum() / taken.tokens[0, c].sum()).item() for kind, sums in taken.sums.items()}
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
        low, high = drawn_S2[:, 0].quantile(INTERVAL).tolist()
        ahead = (own_S2 - drawn_S2)[:, 0].quantile(INTERVAL).tolist()
        found[kind] = {"fires": inside, "low": low, "high": high, "elsewhere": elsewhere, "feature less it": ahead}
    return found


def pushed_by_kind(written: Written, kinds: list[str], rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The share of a text that is of a concept, the mean over concepts, and what it costs; by concept into `rows`.

    Of each direction's SIZES the one that raises the share most while texts stay fluent, on half of the prompts; all
    figures are of the other half.
    """
    share_PKCZ, n = written.share_PKCZ, len(written.own)
    choose, score = range(0, n, 2), range(1, n, 2)
    is_scored_P = torch.arange(n) % 2 == 1
    weights_SP = resamples(n, is_scored_P, seed) / len(score)
    own, own_chosen = (pooled([written.own[p] for p in some]) for some in (score, choose))
    taken_KPC = torch.zeros(len(kinds), n, len(rows))
    found: dict[str, Any] = {}
    for k, kind in enumerate(kinds):
        figures, fluent = [], 0
        for c, row in enumerate(rows):
            first = (k * len(rows) + c) * len(SIZES)
            tried = [pooled([written.measured[p][first + z] for p in choose]) for z in range(len(SIZES))]
            may = [z for z, each in enumerate(tried) if is_fluent(each, own_chosen)] or [0]
            z = max(may, key=lambda z: float(share_PKCZ[choose, k, c, z].mean()))
            taken_KPC[k, :, c] = share_PKCZ[:, k, c, z]
            row.setdefault("share", {})[kind] = share_PKCZ[score, k, c, z].mean().item()
            figures.append(pooled([written.measured[p][first + z] for p in score]))
            fluent += is_fluent(figures[-1], own)
        drawn_S, drawn_own_S = (weights_SP @ taken_KPC[i].mean(dim=1) for i in (k, kinds.index(FEATURE)))
        found[kind] = {
            "share": taken_KPC[k, score].mean().item(),
            **dict(zip(("low", "high"), drawn_S.quantile(INTERVAL).tolist(), strict=True)),
            "feature less it": (drawn_own_S - drawn_S).quantile(INTERVAL).tolist(),
            "nats more": pooled(figures).cross_entropy - own.cross_entropy,
            "fluent": fluent,
        }
    for c, row in enumerate(rows):
        row["own share"] = written.own_PC[score, c].mean().item()
    found["own share"] = written.own_PC[score].mean().item()
    found["raised"] = (
        (weights_SP @ (taken_KPC[kinds.index(FEATURE)] - written.own_PC).mean(dim=1)).quantile(INTERVAL).tolist()
    )
    return found


def verdict(ablated: Mapping[str, Any], pushed: Mapping[str, Any] | None) -> tuple[str, str]:
    """The answer in a word, "yes", "partly" or "no", and in words.

    "yes" takes both edits: each has to do more along the feature than along a neuron, another feature and a random
    direction, by all of its interval. The difference of means is told beside, and asked for nothing.
    """
    controls = (NEURON, OTHER, RANDOM)
    own = ablated[FEATURE]
    behind = [kind for kind in controls if ablated[kind]["feature less it"][0] <= 0]
    sharp = own["fires"] > own["elsewhere"]
    said = (
        f"taking the feature away moves the next token's distribution by {own['fires']:.3f} nats where it fires "
        f"({own['low']:.3f} to {own['high']:.3f}) and by {own['elsewhere']:.3f} elsewhere; as much along "
        + ", ".join(f"a {kind} {ablated[kind]['fires']:.3f}" for kind in (NEURON, RANDOM))
        + f", along {OTHER} {ablated[OTHER]['fires']:.3f}, along the {MEANS} {ablated[MEANS]['fires']:.3f}"
    )
    works = [sharp and not behind]
    if pushed is not None:
        along = pushed[FEATURE]
        works.append(pushed["raised"][0] > 0 and all(pushed[kind]["feature less it"][0] > 0 for kind in controls))
        said += (
            f". Pushed along it the model writes the concept in {along['share']:.1%} of its text, by itself in "
            f"{pushed['own share']:.1%}; along a {NEURON} in {pushed[NEURON]['share']:.1%}, {OTHER} in "
            f"{pushed[OTHER]['share']:.1%}, a {RANDOM} in {pushed[RANDOM]['share']:.1%}, the {MEANS} in "
            f"{pushed[MEANS]['share']:.1%}"
        )
    word = "yes" if all(works) else "partly" if any(works) else "no"
    return word, f"{word.capitalize()}: {said}."
