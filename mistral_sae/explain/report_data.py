"""The data inside a page: features as compressed chunks of JSON, and an index of them to search, sort and filter in.

A chunk is base64 of gzip of JSON, which the browser unpacks when it is needed. The index, a list for each column, comes
first; the chunks follow, each of CHUNK features in the order of the index.
"""

import base64
import gzip
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from mistral_sae.explain.types import Example, Feature, Judgement, Label, Score

CHUNK = 32  # features: a third of a megabyte compressed, which a browser unpacks in some 20 ms
METHODS = ("detection", "fuzzing", "simulation")  # the first that a label has is "the score" of a feature
INPUT_SHARE = 0.5  # of a feature's passages that peak on one and the same token: an input feature
OUTPUT_SHARE = 0.25  # of its passages in which the token after the peak is one that it promotes: an output feature
NAMED_TOKENS = 5  # that a feature is found by: the most frequent among those it peaks on, the most promoted ones


# ---- scores ----


class ScoreSummary(NamedTuple):
    """One method's scores over the features that have one."""

    method: str
    features: int
    value: float  # means over those features
    other_feature: float | None
    top_token: float | None
    recall: tuple[float | None, ...]  # by interval of the activation, weakest first
    values: tuple[float, ...]


def main_score(label: Label | None) -> float | None:
    """The score that features are ranked by: that of the first of METHODS that gave one."""
    values = [label.scores[m].value for m in METHODS if label and m in label.scores]
    return next((value for value in values if value is not None), None)


def summarize_scores(labels: Iterable[Label]) -> list[ScoreSummary]:
    """A summary for each method that scored at least one feature."""
    by_method: dict[str, list[Score]] = {method: [] for method in METHODS}
    for label in labels:
        for method, score in label.scores.items():
            if score.value is not None:
                by_method.setdefault(method, []).append(score)
    return [
        ScoreSummary(
            method,
            features=len(scores),
            value=statistics.fmean(score.value for score in scores),
            other_feature=_mean(score.other_feature for score in scores),
            top_token=_mean(score.top_token for score in scores),
            recall=_means([score.recall for score in scores]),
            values=tuple(score.value for score in scores),
        )
        for method, scores in by_method.items()
        if scores
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _means(rows: Sequence[Sequence[float | None]]) -> tuple[float | None, ...]:
    """Means by place over rows of which some may be shorter."""
    width = max(map(len, rows), default=0)
    return tuple(_mean(row[i] for row in rows if i < len(row)) for i in range(width))


# ---- features ----


class Kind(NamedTuple):
    """What a feature has to do with the token it fires on, and with the one that follows. Shares of its passages."""

    same_token: float  # peak on its most frequent token, whatever the case and the space before it
    promoted_next: float  # are followed, at the peak, by one of the promoted tokens

    @property
    def is_input(self) -> bool:
        """Whether it stands for a token."""
        return self.same_token >= INPUT_SHARE

    @property
    def is_output(self) -> bool:
        """Whether it foretells one."""
        return self.promoted_next >= OUTPUT_SHARE


def kind_of(feature: Feature) -> Kind:
    """The kind of a feature, by the passages it would be explained from; those that end at the peak have no next."""
    passages = [(passage, passage.peak) for passage in (*feature.top, *feature.spread)]
    peaks = Counter(_bare(passage.tokens[peak]) for passage, peak in passages)
    followers = [passage.tokens[peak + 1] for passage, peak in passages if peak + 1 < len(passage.tokens)]
    promoted = {token for token, _ in feature.promoted}
    return Kind(
        same_token=max(peaks.values()) / len(passages) if passages else 0.0,
        promoted_next=sum(token in promoted for token in followers) / len(followers) if followers else 0.0,
    )


def _bare(token: str) -> str:
    return token.strip().lower() or token


def fires_on(feature: Feature) -> list[str]:
    """The tokens that its passages peak on, the most frequent first."""
    peaks = Counter(passage.tokens[passage.peak] for passage in (*feature.top, *feature.spread))
    return [token for token, _ in peaks.most_common(NAMED_TOKENS)]


class IndexRow(NamedTuple):
    """What the list knows of a feature."""

    feature: int
    explanation: str
    status: str | None  # of the label; None without one
    density: float | None
    maximum: float | None
    score: float | None  # main_score
    is_input: bool
    is_output: bool
    fires_on: list[str]
    promotes: list[str]


def index_row(feature: Feature, label: Label | None) -> IndexRow:
    """A feature's line in the list."""
    kind = kind_of(feature)
    return IndexRow(
        feature=feature.feature,
        explanation=label.explanation if label else "",
        status=label.status if label else None,
        density=number(feature.density),
        maximum=number(feature.maximum),
        score=number(main_score(label)),
        is_input=kind.is_input,
        is_output=kind.is_output,
        fires_on=fires_on(feature),
        promotes=[token for token, _ in feature.promoted[:NAMED_TOKENS]],
    )


def feature_record(feature: Feature, label: Label | None) -> dict[str, Any]:
    """Everything that the view of a feature shows. Of the passages that no scorer judged, those to explain it from."""
    judgements = label.judgements if label else ()
    kind = kind_of(feature)
    return {
        "feature": feature.feature,
        "histogram": feature.histogram,
        "kind": [number(kind.same_token), number(kind.promoted_next)],
        "promoted": [[token, number(value)] for token, value in feature.promoted],
        "suppressed": [[token, number(value)] for token, value in feature.suppressed],
        "nearest": [[index, number(value)] for index, value in feature.nearest],
        "coactive": [[index, number(value)] for index, value in feature.coactive],
        "top": [passage(example) for example in feature.top],
        "spread": [[*passage(example), example.interval(feature.maximum)] for example in feature.spread],
        "label": None if label is None else label_record(label),
        "judged": [[j.method, f"{j.kind} {j.index}", j.truth, j.verdict] for j in judgements],
        "judged_passages": {f"{j.kind} {j.index}": _judged_passage(feature, j) for j in judgements},
    }


def label_record(label: Label) -> dict[str, Any]:
    """A label without its judgements."""
    scores = {}
    for method, score in label.scores.items():
        values = score._asdict() | {"recall": [number(value) for value in score.recall]}
        scores[method] = {key: number(value) if isinstance(value, float) else value for key, value in values.items()}
    return {**label._asdict(), "scores": scores, "judgements": None}


def passage(example: Example) -> list[Any]:
    """Document, start, tokens, and the tokens that are active with their activations: most are not."""
    active = [(i, number(value)) for i, value in enumerate(example.activations) if value > 0]
    return [example.document, example.start, example.tokens, [i for i, _ in active], [value for _, value in active]]


def _judged_passage(feature: Feature, judgement: Judgement) -> list[Any] | None:
    passages: tuple[Example, ...] = getattr(feature, judgement.kind)
    return passage(passages[judgement.index]) if 0 <= judgement.index < len(passages) else None


def number(value: float | None) -> float | None:
    """To the three significant digits that the page shows; None for what is not finite, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


def compressed(value: Any) -> bytes:
    """base64 of gzip of JSON: characters that need no escaping anywhere in HTML."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII, so that lone surrogates pass too
    return base64.b64encode(gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0))


def pack(features: Iterable[Feature], labels: Mapping[int, Label], chunks: BinaryIO) -> dict[str, Any]:
    """Write the chunks to a file, one a line, and return the index; one chunk of features is held at a time."""
    rows: list[IndexRow] = []
    pending: list[dict[str, Any]] = []
    for feature in features:
        label = labels.get(feature.feature)
        rows.append(index_row(feature, label))
        pending.append(feature_record(feature, label))
        if len(pending) == CHUNK:
            chunks.write(compressed(pending) + b"\n")
            pending = []
    if pending:
        chunks.write(compressed(pending) + b"\n")
    columns = {name: [getattr(row, name) for row in rows] for name in IndexRow._fields}
    return {"chunk": CHUNK, **columns}
