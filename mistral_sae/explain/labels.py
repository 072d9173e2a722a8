"""Which features get a label, and explanations.jsonl: the label of one feature a line, of this run and earlier ones.

labels, moved_to = merge_labels(path, labels, of_other_examples=False)
write_labels(path, labels.values())
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mistral_sae.cli import UserError, quoted
from mistral_sae.explain.types import STATUSES, Concept, Label, Score
from mistral_sae.files import SAEError, write_text
from mistral_sae.schema import Index, Total, Words, lines, parse, schema_of

# ---- which features ----


class Selection(NamedTuple):
    """What SELECT says, before it is known which features there are."""

    words: str
    how: str  # "all", "random", "densest" or "listed"
    numbers: Sequence[int] = ()  # those listed, ascending; how many of "random" and "densest"

    def check(self, n_features: int) -> None:
        """Raise UserError where features are listed that the autoencoder does not have."""
        if self.how == "listed" and self.numbers[-1] >= n_features:
            raise UserError(f"SELECT is {quoted(self.words)}: expected features from 0 to {n_features - 1}")

    def choose(self, counts_F: Tensor, seed: int) -> list[int]:
        """Return the features, ascending; `counts_F` (F) says on how many tokens each fires.

        Dead ones are chosen only if they are listed, or with all.
        """
        if self.how == "listed":
            return list(self.numbers)
        if self.how == "all":
            return list(range(len(counts_F)))
        living = counts_F.nonzero().squeeze(1).tolist()
        count = min(self.numbers[0], len(living))
        chosen = random.Random(seed).sample(living, count) if self.how == "random" else counts_F.topk(count)[1].tolist()
        return sorted(chosen)


def parse_select(select: str | int | list[Any]) -> Selection:
    """Return what SELECT says. Raises UserError for words that say nothing."""
    words = str(select)
    text = words.strip().lower()
    numbers = [int(number[:18]) for number in re.findall(r"\d+", text)]  # no autoencoder has so many
    if text == "all":
        return Selection(words, "all")
    if (match := re.fullmatch(r"(random|densest)\s+\d+", text)) and numbers[0]:
        return Selection(words, match[1], numbers)
    if re.fullmatch(r"\d+\s*-\s*\d+", text) and numbers[0] <= numbers[1]:
        return Selection(words, "listed", range(numbers[0], numbers[1] + 1))
    inside = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
    if re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*,?\s*", inside):
        return Selection(words, "listed", sorted(set(numbers)))
    raise UserError(
        f"SELECT is {quoted(words)}: expected all, random N, densest N, a range such as 0-99 or a list such as [3, 17]"
    )


# ---- explanations.jsonl ----

_SCORES: Any = dict[Words, schema_of(Score, answered=Total, unanswered=Total)]  # type: ignore[misc]
_CONCEPT: Any = schema_of(Concept, name=Words) | None
_LABEL = schema_of(
    Label, feature=Index, explanation=Words, explainer=Words, reason=Words, scores=_SCORES, concept=_CONCEPT
)


def write_labels(path: Path, labels: Iterable[Label]) -> None:
    """Write the file, whole or not at all."""
    write_text(path, "".join(to_json(label) + "\n" for label in labels))


def read_labels(path: Path) -> dict[int, Label]:
    """Return the labels by feature; none where there is no such file. Of a feature with several lines the last counts.

    A line needs feature, explanation, explainer, scores and status; what else a label has may be missing, and more may
    be there. Raises SAEError for a line that is no label.
    """
    advice = "remove it, or run explain.py again"
    every = lines(path, advice, SAEError) if path.exists() else []
    labels = [parse(_LABEL, line, where, advice, SAEError) for where, line in every]
    return {label.feature: label for label in labels}


def to_json(label: Label) -> str:
    """Return a line of explanations.jsonl, without the line break."""
    return json.dumps(as_dict(label), allow_nan=False)


def as_dict(label: Label) -> dict[str, Any]:
    """Return a label with its scores and its concept as dictionaries."""
    scores = {method: score._asdict() for method, score in label.scores.items()}
    return label._asdict() | {"scores": scores, "concept": label.concept and label.concept._asdict()}


def merge_labels(
    path: Path, labels: Mapping[int, Label], *, of_other_examples: bool
) -> tuple[dict[int, Label], Path | None]:
    """Return this run's labels with those that earlier ones left in the file, and where the old file was moved, if so.

    A label that is "ok" stays where this run got no answer, and so do the scores of an explanation that is the same, by
    scorers that were not asked or not answered this time. The old file is moved where its labels are
    `of_other_examples`, of which none stays, where some that another explainer made are replaced, and where it holds
    something else.
    """
    try:
        earlier = read_labels(path)
    except SAEError:
        earlier, of_other_examples = {}, True
    ok = {feature: label for feature, label in earlier.items() if label.status == "ok"}
    answered = {feature for feature, label in labels.items() if not STATUSES[label.status].ask_again}
    replaces_others = any(ok[feature].explainer != labels[feature].explainer for feature in ok.keys() & answered)
    moved_to = set_aside(path) if of_other_examples or replaces_others else None
    if of_other_examples:
        return dict(labels), moved_to
    kept = {feature: label for feature, label in ok.items() if feature not in answered}
    merged = {feature: _with_earlier_scores(label, ok.get(feature)) for feature, label in labels.items()}
    return dict(sorted({**earlier, **merged, **kept}.items())), moved_to


def set_aside(path: Path) -> Path | None:
    """Rename the file, by the first number that is free, and return its new path; None if there is no such file."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))
    return path.rename(next(free for free in numbered if not free.exists())) if path.exists() else None


def _with_earlier_scores(label: Label, earlier: Label | None) -> Label:
    """A label with the scores that an earlier one of the same explanation has beyond it."""
    if earlier is None or (earlier.explanation, earlier.explainer) != (label.explanation, label.explainer):
        return label
    answered = {method for method, score in label.scores.items() if score.answered}
    kept = {method: score for method, score in earlier.scores.items() if score.answered and method not in answered}
    judgements = [each for each in label.judgements if each.method not in kept]
    judgements += [each for each in earlier.judgements if each.method in kept]
    return label._replace(scores=label.scores | kept, judgements=tuple(judgements))
