"""What edits along directions do to a model: what it predicts when they are taken away, what it writes when pushed.

Both are edits of `steer`. Ablating takes away what a feature writes, where it fires; a control takes as much away there
along another direction. Adding pushes the residual by a share of its own length along a direction, while the model
writes: then a concept can be counted in what it wrote.

Shapes: N tokens, R rows, T positions, C concepts, G documents, P prompts, K kinds of direction, Z sizes, D model width.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.analysis.concepts import token_spans
from mistral_sae.analysis.sample import Activity, Texts
from mistral_sae.cli import Progress
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.steering import steer
from mistral_sae.steer.sweep import Measured, Trials, settings_read_at_once

ROWS = 12  # of text on which a feature fires, that it is ablated in
SIZES = (0.2, 0.4)  # pushes that are tried, as shares of the residual's length; at about a half no text is fluent
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TEMPERATURE = 16, 24, 48, 0.7
DEFINITION = re.compile(r"^(?=(def|class) )", re.M)  # what a prompt begins with


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
) -> Divergences:
    """Take away each feature's activation along its own direction and others, on ROWS rows where it fires."""

    def placed(values_N: Tensor) -> Tensor:
        return torch.zeros(texts.kept_RT.shape, dtype=values_N.dtype).masked_scatter_(texts.kept_RT, values_N)

    score_RT, document_RT = placed(~texts.fit_N)[:, :-1], placed(texts.document_N)[:, :-1]
    shape = (2, len(features), len(texts.documents))
    at_once = settings_read_at_once(1, texts.tokens_RT.shape[1], model.vocab_size)
    sums, tokens = {kind: torch.zeros(shape) for kind in along}, torch.zeros(shape)
    for c, feature in enumerate(Progress(features, "ablating", len(features), unit=" features", leave=False)):
        fires_RT = placed(((activity.indices_NK == feature) & (activity.values_NK > 0)).any(dim=1))[:, :-1]
        rows = (fires_RT & score_RT).any(dim=1).nonzero().squeeze(1)
        rows = rows[torch.linspace(0, max(0, len(rows) - 1), min(ROWS, len(rows))).long()]
        for some in rows.split(at_once) if len(rows) else ():
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
    scored_G = texts.scored_G
    document_RT = torch.full(texts.kept_RT.shape, -1).masked_scatter_(texts.kept_RT, texts.document_N)
    found: dict[int, Prompt] = {}
    for ids_T, document_T in zip(texts.tokens_RT, document_RT, strict=True):
        strings = model.tokenizer.strings(ids_T.tolist())
        begins = {begin: t for t, begin in enumerate(accumulate(map(len, strings[:-1]), initial=0))}
        for match in DEFINITION.finditer("".join(strings)):
            t = begins.get(match.start(), len(strings))
            document, theirs_t = int(document_T[min(t, len(strings) - 1)]), document_T[t : t + PROMPT_TOKENS]
            is_whole = len(theirs_t) == PROMPT_TOKENS and bool((theirs_t == document).all())
            if is_whole and document >= 0 and scored_G[document] and document not in found:
                ids = ids_T[t : t + PROMPT_TOKENS].tolist()
                found[document] = Prompt(
                    document, [model.tokenizer.bos_id, *ids], "".join(strings[t : t + PROMPT_TOKENS])
                )
    different = {prompt.text: prompt for prompt in found.values()}
    return list(different.values())[:PROMPTS]


def rate_of(text: str, begin: int, concept: str) -> float:
    """How often a concept begins in a thousand characters of a text, from the one at `begin` on."""
    begins = [start for start, _ in token_spans(text).get(concept, ()) if start >= begin]
    return 1000 * len(begins) / max(1, len(text) - begin)


class Written(NamedTuple):
    """What was written under each edit: by prompt, kind, concept and size."""

    rate_PKCZ: Tensor  # of the concept, see `rate_of`
    own_PC: Tensor  # the same in the model's own text
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
    unsteered = (settings[0][0], 0, math.nan)  # in the same batch

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

    rates, own_rates, measured, own = [], [], [], []
    for i, prompt in enumerate(Progress(prompts, "steered texts", len(prompts), unit=" prompts", leave=False)):
        trials = Trials(model, loaded, prompt.ids, [seed + i], NEW_TOKENS, TEMPERATURE)
        written = list(trials.steered([unsteered, *settings], context, lambda setting: [features[setting[1]]], False))
        texts = [prompt.text + trials.text_of(each.texts[0]) for each in written]
        begin = len(prompt.text)
        rates.append([rate_of(text, begin, concepts[c]) for text, (_, c, _) in zip(texts[1:], settings, strict=True)])
        own_rates.append([rate_of(texts[0], begin, concept) for concept in concepts])
        own.append(written[0].measured[0])
        measured.append([each.measured[0] for each in written[1:]])
    shape = (len(prompts), len(along), len(concepts), len(SIZES))
    return Written(torch.tensor(rates).view(shape), torch.tensor(own_rates), measured, own)
