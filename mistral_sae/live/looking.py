"""What the model and the autoencoder say of a text, of a feature and of an edit. Each is a job of the engine.

Shapes: T positions, K active features of a token, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mistral_sae.cli import UserError
from mistral_sae.explain.examples import related_by_weights
from mistral_sae.explain.pages import rounded
from mistral_sae.explain.reading import rows_of, strongest
from mistral_sae.explain.report import feature_record
from mistral_sae.explain.types import BINS, Feature
from mistral_sae.live import asked
from mistral_sae.live.known import Known
from mistral_sae.steer import sweep
from mistral_sae.steer.effect import Effect, share_of
from mistral_sae.steer.search import RAISED, Search, changes_of
from mistral_sae.steer.steering import Edit, Subject

CHANGED = 8  # tokens that a feature raises, and as many that it lowers


def rows_read(known: Known, text: str) -> list[list[int]]:
    """`rows_of` of a text that is to be read. Raises UserError for one that is empty or too long."""
    rows = rows_of(known.subject.model, text, known.context)
    n_tokens = sum(len(row) - 1 for row in rows)
    if not 0 < n_tokens <= asked.TOKENS:
        raise UserError(f"found a text of {n_tokens:,} tokens: expected 1 to {asked.TOKENS:,}")
    return rows


def read(known: Known, wanted: asked.Reading) -> Iterator[dict[str, Any]]:
    """The tokens of a text (T), and for each a list of the features that are active on it, strongest first."""
    subject, rows = known.subject, rows_read(known, wanted.text)
    ids = [id for row in rows for id in row[1:]]
    features = []
    for row in rows:
        features += strongest(subject.model, subject.loaded, row, wanted.top)
        yield {}  # others may run
    yield {
        "shape": [len(ids), max(map(len, features))],
        "ids": ids,
        "tokens": subject.model.tokenizer.strings(ids),
        "features": [[feature for feature, _ in each] for each in features],
        "activations": [[value for _, value in each] for each in features],
    }


def effect(known: Known, wanted: asked.Effect) -> Iterator[dict[str, Any]]:
    """The tokens after a position that a feature makes likelier and less likely: as it is, and held at 0."""
    model, rows = known.subject.model, rows_read(known, wanted.text)
    row, place = divmod(wanted.position, known.context - 1)
    if row >= len(rows) or place + 1 >= len(rows[row]):
        raise UserError(f"found position {wanted.position}: expected one of the text's")
    ids = torch.tensor([rows[row][: place + 2]] * 2)
    with Edit({wanted.feature: 0.0}, "ablate").alone_in(1, 2).context(known.subject, 1):
        logits_2V = model.forward(ids)[:, -1, : model.tokenizer.vocab_size]
    as_is_V, without_V = logits_2V.softmax(dim=-1).cpu()
    change_V = as_is_V - without_V
    found = {}
    for name, sign in (("raised", 1), ("lowered", -1)):
        best = (sign * change_V).topk(CHANGED)
        some = [id for id, by in zip(best.indices.tolist(), best.values.tolist(), strict=True) if by > 1e-6]
        found[name] = [[*model.tokenizer.strings([id]), float(as_is_V[id]), float(without_V[id])] for id in some]
    yield found


def page(known: Known, feature: int) -> Iterator[dict[str, Any]]:
    """What the view of a feature shows, in the report's form."""
    model, loaded, statistics, _ = known.subject
    if known.records is not None:
        found = known.records[feature]
    else:
        density, maximum = float(statistics.density_F[feature]), float(statistics.maximum_F[feature])
        related = related_by_weights(model, loaded.sae, [feature])[feature]
        found = Feature(feature, density, maximum, (0,) * BINS, **related)
    yield rounded(feature_record(found, known.labels.get(feature)))


# ---- figures over strengths ----


def strengths(known: Known, wanted: asked.Sweep) -> Iterator[dict[str, Any]]:
    """Figures of texts at no strength, then at one strength after another, and at last which is the strongest fluent.

    Several features keep their proportions, and one that is clamped at 0 stays there.
    """
    subject, whole = known.subject, wanted.steer.edit()
    edit, ids = whole.unit(), subject.model.encode(wanted.prompt)
    features = list(edit.coefficients)
    held = {feature: 0.0 for feature, c in whole.coefficients.items() if c == 0 and edit.method == "clamp"}
    if edit.method == "ablate" or not features:
        raise UserError(
            "found nothing to sweep over: expected a strength that is not 0, and another method than ablate"
        )
    known.check_length(len(ids), wanted.max_tokens)
    seeds = range(wanted.seed, wanted.seed + wanted.texts)
    trials = sweep.Trials(subject.model, subject.loaded, ids, seeds, wanted.max_tokens, wanted.temperature)
    search = Search(subject, trials, lambda n: torch.empty(0))
    own = trials.unsteered(features)
    yield row_of(trials, 0.0, own)
    found: dict[float, sweep.Trial] = {}

    def context(scales_B: list[float]) -> AbstractContextManager[None]:
        scaled = edit.times(torch.tensor(scales_B))
        return replace(scaled, coefficients={**scaled.coefficients, **held}).context(subject, len(ids))

    (scales,) = search.strengths([edit])
    for scale in scales:
        (found[scale],) = trials.steered([scale], context, lambda _: features, with_kl=False)
        yield row_of(trials, scale, found[scale])
    verdict = verdict_of(subject, edit, search.text_1T, found, own)
    if not any(c is not None and c > 0 for c in whole.coefficients.values()):
        verdict["visible"] = None  # what is to be seen less is not counted
    yield verdict


def row_of(trials: sweep.Trials, scale: float, trial: sweep.Trial) -> dict[str, Any]:
    """A line of the table, with the first of the texts."""
    return {"strength": scale, "text": trials.text_of(trial.texts[0]), **trial.pooled._asdict()}


def verdict_of(
    subject: Subject, edit: Edit, text_1T: Tensor, found: Mapping[float, sweep.Trial], own: sweep.Trial
) -> dict[str, Any]:
    """Which strength is the strongest fluent one, and whether a reader sees anything of it."""
    fluent = sweep.strongest_fluent(list(found), list(found.values()), own)
    scale = next(iter(found)) if fluent is None else fluent
    maxima = {f: float(subject.statistics.maximum_F[f]) for f in edit.coefficients}
    raised_NV = changes_of(subject.model, subject.loaded, maxima, text_1T).logits_NV
    shown = set(raised_NV.topk(RAISED, dim=1).indices.flatten().tolist())
    trial = found[scale]
    seen = Effect(
        next(iter(edit.coefficients)), scale, fluent is not None, trial.pooled, own.pooled,
        share_of(trial.texts, shown), share_of(own.texts, shown), list(found),
    )  # fmt: skip
    return {"strongest": fluent, "why": seen.why(), "visible": seen.is_visible}
