"""explanations.jsonl: the label of one feature a line, of this run and of those before it.

labels = beside_earlier(path, labels, answered)
write(path, labels.values())
"""

import json
from collections.abc import Collection, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

from mistral_sae.explain.types import Judgement, Label, Score
from mistral_sae.files import SAEError, write_text


class Explained(NamedTuple):
    """What a line says of a feature, at the least."""

    text: str
    explainer: str
    detection: float | None  # balanced accuracy with which the explanation tells where the feature fires


def write(path: Path, labels: Iterable[Label]) -> None:
    """Write the file, whole or not at all."""
    write_text(path, "".join(to_json(label) + "\n" for label in labels))


def read(path: Path) -> dict[int, Label]:
    """The labels by feature; none where there is no such file. Raises SAEError for a line that is no label."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return {label.feature: label for label in map(from_json, lines)}
    except ValueError as error:
        raise SAEError(f"{path}: {error}; run explain.py without TEXT to write it anew") from None


def read_explanations(path: Path) -> dict[int, Explained]:
    """The explanations by feature, of lines that hold but these; none where there is no such file.

    Of a feature with several lines the last counts. Raises SAEError for a line that is none, unless it is the last:
    that may be in the writing.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    explanations = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["status"] == "ok":
                detection = record["scores"].get("detection") or {}
                explained = Explained(record["explanation"], record["explainer"], detection.get("value"))
                explanations[record["feature"]] = explained
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines):
                raise SAEError(
                    f"found no label in line {number} of {path}, expected what explain.py writes: remove the line"
                ) from None
    return explanations


def beside_earlier(
    path: Path, labels: Mapping[int, Label], answered: Collection[int], *, of_other_examples: bool
) -> tuple[dict[int, Label], Path | None]:
    """This run's labels with those that earlier ones left in the file, and where the file as it was is set aside.

    A label that is "ok" stays where this run got no answer, and so do the scores of an explanation that is the same, by
    scorers that were not asked or not answered this time. Set aside are labels `of_other_examples`, of which none
    stays, and those that another explainer made, where some of them are replaced; None where nothing is.

    Args:
        answered: the features of which this run knows better, whatever their labels' status.
    """
    try:
        earlier = read(path)
    except SAEError:
        earlier, of_other_examples = {}, True
    ok = {feature: label for feature, label in earlier.items() if label.status == "ok"}
    others = [feature for feature in ok if feature in answered and ok[feature].explainer != labels[feature].explainer]
    aside = None
    if path.exists() and (of_other_examples or others):
        aside = next(p for i in count(1) if not (p := path.with_name(f"{path.stem}-{i}{path.suffix}")).exists())
        path.rename(aside)
    if of_other_examples:
        return dict(labels), aside
    stay = {feature: label for feature, label in ok.items() if feature not in answered}
    merged = {feature: _merged(label, ok.get(feature)) for feature, label in labels.items()}
    return dict(sorted({**earlier, **merged, **stay}.items())), aside


def _merged(label: Label, earlier: Label | None) -> Label:
    """A label with the scores that an earlier one of the same explanation has beyond it."""
    if earlier is None or (earlier.explanation, earlier.explainer) != (label.explanation, label.explainer):
        return label
    answered = {method for method, score in label.scores.items() if score.answered}
    kept = {method: score for method, score in earlier.scores.items() if score.answered and method not in answered}
    judgements = [each for each in label.judgements if each.method not in kept]
    judgements += [each for each in earlier.judgements if each.method in kept]
    return label._replace(scores=label.scores | kept, judgements=tuple(judgements))


def to_json(label: Label) -> str:
    """A line of explanations.jsonl, without the line break."""
    record = label._asdict() | {
        "scores": {method: score._asdict() for method, score in label.scores.items()},
        "judgements": [list(judgement) for judgement in label.judgements],
    }
    return json.dumps(record, allow_nan=False)


def from_json(line: str) -> Label:
    """The label in a line of explanations.jsonl. Raises ValueError if it is none."""
    try:
        record = json.loads(line)
        scores = {
            method: Score(
                **{
                    **fields,
                    "recall": tuple(fields["recall"]),
                    "requests": tuple((status, count) for status, count in fields["requests"]),
                }
            )
            for method, fields in record["scores"].items()
        }
        judgements = tuple(Judgement(*fields) for fields in record["judgements"])
        return Label(**{**record, "scores": scores, "judgements": judgements})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"found {line[:60]!r} ({error}), expected a label as explain.py writes them") from None
