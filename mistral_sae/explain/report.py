"""The report: one self-contained HTML file to browse the features of a run in, and a page for a text of the user's own.

Nothing is fetched: style, script and data are inside the file, and a Content-Security-Policy forbids everything else.
Everything that comes from a corpus or a model reaches the page through an autoescaped template or as text in the
browser, never as markup.

Features are in the page as chunks of CHUNK, which the browser unpacks when one is opened, and before them as an index
to search, sort and filter in. All data is base64 of gzip of JSON.

Shapes: F features, D model width.
"""

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mistral_sae.explain import figures, pages
from mistral_sae.explain.answers import Answers, read_answers, shown
from mistral_sae.explain.cache import Cache
from mistral_sae.explain.labels import as_dict
from mistral_sae.explain.pages import compressed
from mistral_sae.explain.scoring import METHODS, summarize_scores
from mistral_sae.explain.types import INTERVALS, STATUSES, Example, Feature, Label
from mistral_sae.files import write_text
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.sae.features import Geometry, decoder_geometry
from mistral_sae.sae.resume import read_evaluation, read_log

# The style and the scripts of the two pages, in `pages.TEMPLATES`
REPORT = ("report.css", "page.js", "features.js", "report.js")
TEXT = ("report.css", "page.js", "tokens.js", "text.js")
CHUNK = 32  # features: a third of a megabyte compressed, which a browser unpacks in some 20 ms
NAMED_TOKENS = 5  # that a feature is found by: the most frequent among those it peaks on, the first of its logit lens
VIEWED = ("feature", "histogram", "promoted", "suppressed", "nearest", "coactive")  # as they are, of a Feature
MARKS = "<!-- answers -->", "<!-- end of answers -->"  # around them in a report
SHARES = {
    "input_share": 0.5,
    "output_share": 0.25,
}  # TokenShares from which on a feature is an input, an output feature

Index = dict[str, list[Any]]  # a list for each column of the list of features


class Run(NamedTuple):
    """What the report says of the run as a whole. What is not known is None or empty, and said to be so."""

    model: str  # its name, for people
    layer: int  # whose output is read
    hook_name: str  # SAE Lens's name of it
    corpus: str  # what the features were looked for in
    tokens: int  # of that corpus
    sae_path: str  # folder or hub name of the autoencoder
    demo: str  # the command that steers with it, but for the feature
    analyse: str  # the command that answers both questions of it
    d_model: int  # D
    n_features: int  # F, of which the report may show only some
    evaluation: Mapping[str, float]  # evaluation.json
    metrics: Sequence[Mapping[str, float]]  # the records of metrics.jsonl
    density_F: Tensor  # share of the tokens on which each feature fires
    geometry: Geometry | None  # of the decoder rows
    answers: Answers | None


def run_of(constants: Any, model: str, loaded: LoadedSAE, corpus: str, activations: Cache) -> Run:
    """What the report says of a run with constants such as config.py's; `activations` are those of its corpus."""
    run_dir, is_own = Path(constants.RUN_DIR), constants.SAE_PATH is None
    evaluation, metrics = (read_evaluation(run_dir), read_log(run_dir)) if is_own else ({}, [])
    sae, counts_F = loaded.sae, activations.counts_F
    return Run(
        model=model,
        layer=loaded.metadata.residual_layer,
        hook_name=str(loaded.metadata.hook_name),  # without one there is no layer
        corpus=corpus,
        tokens=activations.tokens,
        sae_path=constants.SAE_PATH or str(Path(constants.RUN_DIR) / "sae"),
        demo=command("demo.py", constants),
        analyse=command("analyse.py", constants),
        d_model=sae.d_model,
        n_features=sae.n_features,
        evaluation=evaluation,
        metrics=metrics,
        density_F=counts_F.double() / activations.tokens,
        geometry=decoder_geometry(sae.W_dec, counts_F > 0),
        answers=read_answers(Path(constants.RUN_DIR) / "analysis.json", sae),
    )


def command(script: str, constants: Any) -> str:
    """The command of a script for the model and the autoencoder that constants such as config.py's name.

    By this Python as it is called from here: `.venv/bin/python`, where no environment is active.
    """
    folder, name = os.path.split(sys.executable)
    is_active, here = folder == os.path.dirname(shutil.which(name) or ""), os.path.join(os.getcwd(), "")
    python = name if is_active else sys.executable.removeprefix(here)
    named = ((name, getattr(constants, name)) for name in ("MISTRAL_MODEL_PATH", "SAE_PATH", "HOOK_NAME", "RUN_DIR"))
    return shlex.join([python, script, *(f"{name}={value}" for name, value in named if value is not None)])


# ---- the two pages ----


def write_report(
    path: Path, run: Run, features: Iterable[Feature], labels: Mapping[int, Label], others: Index | None = None
) -> None:
    """Write the report of some features: the run, a list to search, and a view of each feature.

    `features` is read once, one at a time, in any order; those without a label are shown as not explained. Of `others`
    there is only what the list says. A feature is addressed as report.html#feature=1234.
    """
    scores = summarize_scores(label.scores for label in labels.values() if not label.is_beside)
    index, chunks = pack(features, labels)
    n_shown, explained = len(index["feature"]), sum(map(bool, index["explanation"]))
    if others is not None:
        index = {name: column + others[name] for name, column in index.items()}
    context = {
        "run": run,
        "answers": shown(run.answers),
        "scores": scores,
        "training_panels": figures.training_panels(run.metrics, run.evaluation, run.density_F),
        "score_panels": figures.score_panels(scores),
        "geometry_panels": figures.geometry_panels(run.geometry),
        "shown": n_shown,
        "explained": explained,
        "beside": sum(label.is_beside for label in labels.values()),
        "trained_tokens": next((r["tokens"] for r in reversed(run.metrics) if "tokens" in r), None),
        **SHARES,
        "index": compressed(
            {**index, **SHARES, "records": n_shown, "chunk": CHUNK, "intervals": INTERVALS, "demo": run.demo}
        ),
        "chunks": chunks,
    }
    write_text(path, pages.render("report", REPORT, context))


def write_text_page(
    path: Path,
    model: str,
    layer: int,
    tokens: Sequence[tuple[str, Sequence[tuple[int, float]]]],
    labels: Mapping[int, Label],
    features: Iterable[Feature],
) -> None:
    """Write the page of one text: its tokens, and the strongest features of each, which link into report.html.

    `model` is its name, for people. A token is its text and each (feature, activation) on it, strongest first.
    `features` are the records of those that there are: they give the maximum that an activation is a share of, and the
    tokens that name a feature without an explanation.
    """
    fired = {feature for _, active in tokens for feature, _ in active}
    known = {feature.feature: feature for feature in features if feature.feature in fired}
    data = {
        "tokens": tokens,
        "explanations": {f: labels[f].explanation for f in sorted(fired) if f in labels and labels[f].explanation},
        "maxima": {f: feature.maximum for f, feature in known.items()},
        "fires_on": {f: fires_on(feature) for f, feature in known.items()},
    }
    context = {
        "model": model, "layer": layer, "n_tokens": len(tokens), "n_features": len(fired), "data": compressed(data)
    }  # fmt: skip
    write_text(path, pages.render("text", TEXT, context))


def put_answers(report: Path, answers: Answers) -> bool:
    """Put answers in a report in place of those that it has; False if there is no report."""
    if not report.is_file():
        return False
    before, _, rest = report.read_text(encoding="utf-8").partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:  # of an older version
        return False
    page = pages.render("answers", (), {"answers": shown(answers)})
    write_text(report, before + page[page.index(MARKS[0]) : page.index(MARKS[1])] + found + after)
    return True


# ---- features as data ----


class TokenShares(NamedTuple):
    """Which tokens a feature has to do with, as shares of the passages it is explained from."""

    same_token: float  # peak on its most frequent token, whatever the case and the space before it
    predicted_next: float  # have a token after the peak that the feature raises in the logit lens


def token_shares(feature: Feature) -> TokenShares:
    """Return the shares by which a feature is an input feature, an output feature, both or neither."""
    passages = [(passage.tokens, passage.peak) for passage in (*feature.top, *feature.spread)]
    peaks = Counter(tokens[peak].strip().lower() or tokens[peak] for tokens, peak in passages)
    followers = [tokens[peak + 1] for tokens, peak in passages if peak + 1 < len(tokens)]
    raised = {token for token, _ in feature.promoted}
    return TokenShares(
        same_token=max(peaks.values()) / len(passages) if passages else 0.0,
        predicted_next=sum(token in raised for token in followers) / len(followers) if followers else 0.0,
    )


def fires_on(feature: Feature) -> list[str]:
    """Return the tokens that a feature's passages peak on, the most frequent first."""
    peaks = Counter(passage.tokens[passage.peak] for passage in (*feature.top, *feature.spread))
    return [token for token, _ in peaks.most_common(NAMED_TOKENS)]


def main_score(label: Label | None) -> float | None:
    """Return the score that features are ranked by: that of the first of METHODS that gave one."""
    values = [label.scores[m].value for m in METHODS if label and m in label.scores]
    return next((value for value in values if value is not None), None)


def columns_of(feature: Feature, label: Label | None) -> dict[str, Any]:
    """Return what a feature is found by in the list."""
    return {
        "feature": feature.feature,
        "explanation": label.explanation if label else "",
        "density": feature.density,
        "maximum": feature.maximum,
        "score": main_score(label),
        "concept": label and label.concept and label.concept.f1,
        **token_shares(feature)._asdict(),
        "fires_on": fires_on(feature),
        "logit_lens": [token for token, _ in feature.promoted[:NAMED_TOKENS]],
    }


INDEXED = tuple(columns_of(Feature(0, 0.0, 0.0, ()), None))  # the columns' names


def feature_record(feature: Feature, label: Label | None) -> dict[str, Any]:
    """Return what the view of a feature shows besides; of the passages to score it on, those that a scorer judged."""
    judged = [(j, getattr(feature, j.kind)) for j in label.judgements] if label else []
    return {
        **{name: getattr(feature, name) for name in VIEWED},
        "top": [passage(example) for example in feature.top],
        "spread": [[*passage(example), example.interval(feature.maximum)] for example in feature.spread],
        "label": label and label_record(label),
        "judged": [[j.method, f"{j.kind} {j.index}", j.truth, j.verdict] for j, _ in judged],
        "judged_passages": {f"{j.kind} {j.index}": passage(of[j.index]) for j, of in judged if j.index < len(of)},
    }


def label_record(label: Label) -> dict[str, Any]:
    """Return a label without its judgements, and what its status means."""
    return as_dict(label) | {"judgements": None, "meaning": STATUSES[label.status].meaning}


def passage(example: Example) -> list[Any]:
    """Return document, start, tokens, and the tokens that are active with their activations: most are not."""
    active = [i for i, value in enumerate(example.activations) if value > 0]
    return [example.document, example.start, example.tokens, active, [example.activations[i] for i in active]]


def pack(features: Iterable[Feature], labels: Mapping[int, Label]) -> tuple[Index, list[str]]:
    """Return the index, a list for each column, and the chunks, compressed; `features` are held a chunk at a time."""
    index: Index = {name: [] for name in INDEXED}
    chunks: list[str] = []
    labelled = ((feature, labels.get(feature.feature)) for feature in features)
    while chunk := list(islice(labelled, CHUNK)):
        rows = [columns_of(feature, label) for feature, label in chunk]
        for name, column in index.items():
            column += [row[name] for row in rows]
        chunks.append(compressed([feature_record(feature, label) for feature, label in chunk]))
    return index, chunks
