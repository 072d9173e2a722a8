"""The report: one self-contained HTML file to browse the features of a run in, and a page for a text of the user's own.

Nothing is fetched: style, script and data are inside the file, and a Content-Security-Policy forbids everything else.
Everything that comes from a corpus or a model reaches the page through an autoescaped template or as text in the
browser, never as markup.

Shapes: F features, D model width.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mistral_sae.cli import one_line
from mistral_sae.explain import report_figures
from mistral_sae.explain.report_data import (
    INPUT_SHARE,
    OUTPUT_SHARE,
    compressed,
    fires_on,
    number,
    pack,
    summarize_scores,
)
from mistral_sae.explain.report_figures import percent
from mistral_sae.explain.types import INTERVALS, Feature, Label
from mistral_sae.files import SAEError, write_atomically
from mistral_sae.sae.features import Geometry

TEMPLATES = resources("mistral_sae.explain") / "templates"
COEFFICIENT = 1.0  # of the lines of demo.py to copy: times the feature's maximum, the unit of its clamp


class Run(NamedTuple):
    """What the report says of the run as a whole. What is not known is None or empty, and said to be so."""

    model: str  # its name, for people
    layer: int | None  # whose output is read
    hook_name: str | None  # SAE Lens's name of it
    corpus: str  # what the features were looked for in
    tokens: int  # of that corpus
    sae_path: str  # demo.py's SAE_PATH
    d_model: int  # D
    n_features: int  # F, of which the report may show only some
    evaluation: Mapping[str, float]  # evaluation.json
    metrics: Sequence[Mapping[str, float]]  # the records of metrics.jsonl
    density_F: Tensor | None  # share of the tokens on which each feature fires
    geometry: Geometry | None  # of the decoder rows: features.decoder_geometry


def read_figures(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What train.py left of evaluation.json and metrics.jsonl in a folder: {} and [] where there is nothing.

    Raises SAEError, one line, if one of them is damaged; a last line that is still being written is none.
    """
    evaluation, metrics = Path(run_dir) / "evaluation.json", Path(run_dir) / "metrics.jsonl"
    path = evaluation
    try:
        figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path = metrics
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return figures, [json.loads(line) for line in lines]
    except ValueError as error:
        raise SAEError(
            f"found a damaged {path} ({one_line(error)}), expected what train.py writes: delete it or train again"
        ) from None


def write_report(path: Path, run: Run, features: Iterable[Feature], labels: Mapping[int, Label]) -> None:
    """Write the report of some features: the run, a list to search, and a view of each feature.

    `features` is read once, one at a time, in any order; those without a label are shown as not explained. A feature is
    addressed as report.html#feature=1234.
    """
    scores = summarize_scores(labels.values())
    with tempfile.TemporaryFile() as chunks:
        index = pack(features, labels, chunks)
        chunks.seek(0)
        context = {
            "run": run,
            "scores": scores,
            "run_figures": report_figures.run_figures(run.metrics, run.evaluation, run.density_F),
            "score_figures": report_figures.score_figures(scores),
            "geometry_figures": report_figures.geometry_figures(run.geometry),
            "shown": len(index["feature"]),
            "explained": sum(map(bool, index["explanation"])),
            "trained_tokens": next((r["tokens"] for r in reversed(run.metrics) if "tokens" in r), None),
            "input_share": INPUT_SHARE,
            "output_share": OUTPUT_SHARE,
            "index": compressed(index | {"coefficient": COEFFICIENT, "intervals": INTERVALS}).decode(),
            "chunks": (line.decode().rstrip() for line in chunks),
        }
        _write(Path(path), "report", context)


class TextToken(NamedTuple):
    """A token of the user's own text, and the features that fire on it."""

    text: str
    features: Sequence[tuple[int, float]]  # index and activation


def write_text_page(
    path: Path,
    run: Run,
    tokens: Sequence[TextToken],
    labels: Mapping[int, Label],
    features: Iterable[Feature],
    report: str = "report.html",
) -> None:
    """Write the page of one text: its tokens, and the strongest features of each.

    `features` are those of its features whose records there are: they give the maximum that an activation is a share
    of, and the tokens that name a feature without an explanation. `report` is the address of the report from the page,
    which features link into.
    """
    fired = {feature for token in tokens for feature, _ in token.features}
    known = {feature.feature: feature for feature in features if feature.feature in fired}
    data = {
        "report": report,
        "tokens": [[token.text, _strongest_first(token.features)] for token in tokens],
        "explanations": {f: labels[f].explanation for f in sorted(fired) if f in labels and labels[f].explanation},
        "maxima": {f: number(feature.maximum) for f, feature in known.items()},
        "fires_on": {f: fires_on(feature) for f, feature in known.items()},
    }
    context = {"run": run, "n_tokens": len(tokens), "n_features": len(fired), "data": compressed(data).decode()}
    _write(Path(path), "text", context | {"report": report})


def _strongest_first(features: Sequence[tuple[int, float]]) -> list[tuple[int, float | None]]:
    return [(feature, number(value)) for feature, value in sorted(features, key=lambda pair: (-pair[1], pair[0]))]


def _write(path: Path, page: str, context: dict[str, Any]) -> None:
    """Render a template with its style and script, and the policy that lets the page run these two and nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mistral_sae.explain"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "fixed": _fixed}
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.js", f"{page}.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template(f"{page}.html")
    parts = template.generate(context, page=page, style=style, script=script, policy=policy)
    write_atomically(path, lambda partial: _write_parts(partial, parts))


def _write_parts(path: Path, parts: Iterator[str]) -> None:
    with open(path, "wb") as file:
        for part in parts:
            file.write(part.encode("utf-8", errors="replace"))  # a path may hold bytes that are not UTF-8


def _fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals and with thousands separated."""
    return "none" if value is None else f"{value:,.{digits}f}"


def _hash(content: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
