"""The pictures: training.png, and those of the report as SVG in the page's own font and colours.

A Panel describes a picture; `plot_training` draws panels into a PNG, `svg` draws one for the page.

Shapes: F features.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from mistral_sae.cli import rank
from mistral_sae.explain.scoring import ScoreSummary
from mistral_sae.explain.types import BINS
from mistral_sae.files import write_atomically
from mistral_sae.sae.features import RARE, Geometry

# The page's colours in the light, by their names in report.css
COLOURS = {"ink": "#1d1b18", "muted": "#625d55", "rule": "#e2ddd4", "curve": "#4a7fb5", "mark": "#b3431e"}
INK, MUTED, RULE, CURVE, MARK = COLOURS.values()
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "svg.fonttype": "none",
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED)
# Of lines beside each other, which black and white print tells apart too
LOOKS: list[dict[str, Any]] = [
    {"color": CURVE, "linestyle": "-", "marker": "o"}, {"color": MARK, "linestyle": "--", "marker": "s"},
    {"color": "#4d7f52", "linestyle": ":", "marker": "^"}, {"color": INK, "linestyle": "-.", "marker": "D"},
    {"color": "#8a5f9e", "linestyle": "-", "marker": "v"}, {"color": "#a9892c", "linestyle": "--", "marker": "X"},
]  # fmt: skip
DEAD_WORTH_SHOWING = 0.01  # of the features

Records = Sequence[Mapping[str, Any]]  # of metrics.jsonl


class Panel(NamedTuple):
    """A picture: its title, what it says in a sentence, and what draws it into a pair of axes."""

    title: str
    meaning: str
    draw: Callable[[Axes], None]


# ---- what is drawn ----


def training_panels(history: Records, evaluation: Mapping[str, Any], density_F: Tensor) -> list[Panel]:
    """Return what tells how training went and what it came to, as far as that was recorded.

    Args:
        history: the records of metrics.jsonl.
        evaluation: evaluation.json, the last point of the held-out curves.
        density_F: share of the tokens on which each feature fires.
    """
    panels = []
    if any("normalized_mse" in record for record in history):
        end = {"tokens": history[-1].get("tokens", 0)} | {k: v for k, v in evaluation.items() if k.startswith("ce_")}
        if "normalized_mse" in evaluation:
            end["held_out_normalized_mse"] = evaluation["normalized_mse"]
        panels.append(_normalized_mse([*history, end]))
        if sum("ce_loss_with_sae" in record for record in (*history, end)) > 1:
            panels.append(_cross_entropy([*history, end], evaluation))
        dead = max(record.get("dead", 0) for record in history)
        if dead >= DEAD_WORTH_SHOWING * len(density_F):
            panels.append(_dead(history))
    if (density_F > 0).any():
        panels.append(_density(density_F))
    return panels


def _normalized_mse(history: Records) -> Panel:
    return _curves(
        "Normalized MSE",
        "The share of the residuals' variance that the features leave unexplained: 0 is perfect, 1 is predicting the "
        "mean.",
        history,
        normalized_mse={"color": CURVE, "label": "training"},
        held_out_normalized_mse={"color": MARK, "label": "held out", "marker": "o", "linestyle": ""},
        axes={"yscale": "log"},
    )


def _cross_entropy(history: Records, evaluation: Mapping[str, Any]) -> Panel:
    meaning = "The model's loss on held-out text, with the features in the place of the layer's output."
    if {"ce_loss_ablated", "ce_loss_recovered"} <= evaluation.keys():
        ablated, recovered = evaluation["ce_loss_ablated"], percent(evaluation["ce_loss_recovered"])
        meaning += f" Its mean there gives {ablated:.2f}; {recovered} of the difference is recovered."
    return _curves(
        "Cross-entropy",
        meaning,
        history,
        ce_loss_with_sae={"color": MARK, "label": "with the SAE", "marker": "o"},
        ce_loss_clean={"color": CURVE, "label": "the model alone", "linestyle": "--"},
        axes={"ylabel": "nats a token", "xlim": (0, None), "ymargin": 0.12},
    )


def _dead(history: Records) -> Panel:
    meaning = "Features that had not fired for a long while: each is capacity that the run paid for and did not use."
    return _curves(
        "Dead features", meaning, history, dead={"color": CURVE}, axes={"ylabel": "features", "ylim": (0, None)}
    )


def _density(density_F: Tensor) -> Panel:
    fired = density_F[density_F > 0].tolist()
    meaning = (
        "How often features fire, on a log scale. Left of the line they are rare: too little is seen of them. Far to "
        "the right they fire too often to stand for one thing."
    )
    if silent := len(density_F) - len(fired):
        meaning += f" {silent:,} of {len(density_F):,} never fired."
    return _histogram(
        "Density",
        meaning,
        fired,
        (min(fired), max(fired) * 1.01),
        [(RARE, "--", "one token in 10,000")],
        xscale="log",
        xlabel="share of tokens on which a feature fires",
    )


def score_panels(scores: Sequence[ScoreSummary]) -> list[Panel]:
    """Return the scores of the first method, and the share of passages it found by strength."""
    if not scores:
        return []
    first = scores[0]
    panels = [
        _histogram(
            "Scores",
            "How well explanations tell where features fire on passages they were not made from; the lines are the "
            "means of the same test with another feature's explanation, and with just the feature's top token.",
            first.values,
            (min(0.0, *first.values) if first.method == "simulation" else 0.0, 1.0),
            [(first.other_feature, ":", "another feature's"), (first.top_token, "--", "top token")],
            xlabel=f"{first.method} score",
        )
    ]
    if any(found is not None for found in first.recall):
        panels.append(_recall([math.nan if found is None else found for found in first.recall]))
    return panels


def _recall(found: Sequence[float]) -> Panel:
    """Bars by interval; no bar where the share is NaN, as no passage was judged."""

    def draw(axes: Axes) -> None:
        names = [f"{100 * i // len(found)}\N{EN DASH}{100 * (i + 1) // len(found)}%" for i in range(len(found))]
        axes.bar_label(axes.bar(names, found, color=CURVE, width=0.7), fmt="%.2f", padding=2)
        axes.set(xlabel="strength, as a share of the feature's maximum", xlim=(-0.6, len(found) - 0.4))
        axes.set(ylabel="found", ylim=(0, 1.15))

    meaning = (
        "The share of the passages in which a feature fires that its explanation finds, by how strongly it fires: "
        "bars that fall to the left are features whose weak activations mean something that the explanation leaves out."
    )
    return Panel("Found, by strength", meaning, draw)


def geometry_panels(geometry: Geometry | None) -> list[Panel]:
    """Return how near decoder rows come to each other, and how many features write to a dimension."""
    if geometry is None:
        return []
    return [
        _histogram(
            "Decoder cosines",
            "How close each feature's decoder row comes to its nearest neighbour's: at 0 features would not interfere, "
            "at the line they are packed as random directions are, near 1 two features say almost the same. No packing "
            f"of as many directions brings the largest below {geometry.welch:.2f} (Welch's bound).",
            geometry.nearest_N,
            (min(0.0, *geometry.nearest_N), 1.0),
            [(geometry.nearest_random, "--", "random directions")],
            xlabel="cosine with the nearest other feature",
        ),
        _histogram(
            "Feature dimensionality",
            "The share of a dimension that each feature has to itself: 1 over the sum of its squared cosines with all "
            f"features (Elhage et al. 2022). Without superposition it is 1; here they sum to "
            f"{sum(geometry.dimensionality_F):.0f}.",
            geometry.dimensionality_F,
            (0.0, max(geometry.dimensionality_F)),
            xlabel="dimensions a feature",
        ),
        _histogram(
            "Features a dimension",
            "How many features write to each dimension of the residual stream with more than an even share of their "
            "length: one each would mean no superposition in this basis.",
            geometry.writers_D,
            (0, max(geometry.writers_D)),
            xlabel="features that write to it",
            ylabel="dimensions",
        ),
    ]


def _curves(
    title: str, meaning: str, history: Records, *, axes: Mapping[str, Any], **curves: Mapping[str, Any]
) -> Panel:
    """Curves over the tokens: `curves` has the options of each by its key in the records; `axes` are properties."""

    def draw(into: Axes) -> None:
        for key, options in curves.items():
            points = [(record["tokens"] / 1e6, record[key]) for record in history if {"tokens", key} <= record.keys()]
            if points:
                into.plot(*zip(*points, strict=True), **{"linewidth": 1.4, "markersize": 4.5, **options})
        into.set(xlabel="million tokens", **axes)
        into.locator_params(axis="x", nbins=5)
        if axes.get("yscale") == "log":
            into.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            into.yaxis.set_major_formatter("{x:g}")

    return Panel(title, meaning, draw)


def _histogram(
    title: str,
    meaning: str,
    values: Sequence[float],
    limits: tuple[float, float],
    lines: Sequence[tuple[float | None, str, str]] = (),
    **properties: Any,
) -> Panel:
    """A histogram with vertical lines: where, in what style, called what. `properties` are the axes'."""

    def draw(axes: Axes) -> None:
        spaced = np.geomspace if properties.get("xscale") == "log" else np.linspace
        axes.hist(values, bins=spaced(*limits, BINS + 1).tolist(), color=CURVE)
        for where, style, name in lines:
            if where is not None:
                axes.axvline(where, color=MARK, linestyle=style, linewidth=1.5, label=name)
                axes.margins(y=0.25)  # for the legend
        axes.set(**{"ylabel": "features", **properties})
        axes.locator_params(axis="y", integer=True)
        if properties.get("xscale") == "log":
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_major_formatter(lambda value, _: percent(value))

    return Panel(title, meaning, draw)


# ---- how it is drawn ----


def plot_training(path: Path, history: Records, evaluation: Mapping[str, Any], density_F: Tensor) -> None:
    """Draw `training_panels` side by side into a PNG at `path`."""
    _save(path, training_panels(history, evaluation, density_F))


def plot_sweep(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw what the autoencoders of sweep.json cost and keep, over how many features are active, into a PNG at `path`.

    A line joins those that differ in nothing but their sparsity, rate or seed.
    """
    words: dict[str, Callable[[Any], str]] = {
        "architecture": str, "d_hidden": "{:,} features".format, "layer": "layer {}".format,
    }  # fmt: skip
    varying = [name for name in words if len({point[name] for point in points}) > 1]
    lines: dict[str, list[Mapping[str, float]]] = {}
    for point in sorted(points, key=lambda point: point["figures"]["l0"]):
        label = ", ".join(words[name](point[name]) for name in varying)
        lines.setdefault(label, []).append(point["figures"])

    def curves(key: str, into: Axes) -> None:
        for (label, figures), look in zip(sorted(lines.items()), cycle(LOOKS), strict=False):
            x, y = ([each[name] for each in figures] for name in ("l0", key))
            into.plot(x, y, **look, markersize=5, linewidth=1.4, label=label or None)
        into.set(xlabel="active features a token")
        into.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key == "ce_loss_recovered":
            into.yaxis.set_major_formatter(lambda value, _: percent(value))

    _save(
        path,
        [
            Panel(
                "Normalized MSE",
                "The share of the residuals' variance that the features leave unexplained, on held-out text: 0 is "
                "perfect, 1 is predicting the mean.",
                partial(curves, "normalized_mse"),
            ),
            Panel(
                "Cross-entropy recovered",
                "The share of what the model loses without the layer that comes back through the features.",
                partial(curves, "ce_loss_recovered"),
            ),
        ],
    )


def _save(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into a PNG; of several ranks the first one does."""
    if rank():
        return
    meanings = ["\n".join(textwrap.wrap(panel.meaning, 61)) for panel in panels]
    height = 12 * max(meaning.count("\n") + 1 for meaning in meanings)  # points; the same for all: they stand in a row
    above = {"xycoords": "axes fraction", "textcoords": "offset points"}
    with rc_context(STYLE):
        figure = Figure(figsize=(4.0 * len(panels), 3.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
        for panel, meaning, axes in zip(
            panels, meanings, figure.subplots(1, len(panels), squeeze=False)[0], strict=True
        ):
            _draw(panel, axes)
            axes.annotate(meaning, (0, 1), (0, 8 + height), va="top", fontsize=8, **above)
            axes.annotate(panel.title, (0, 1), (0, 13 + height), fontsize=11, fontweight="bold", color=INK, **above)
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def svg(panel: Panel) -> str:
    """Return a panel as SVG for use inside HTML: without inline styles, which the page forbids; its ids are its own."""
    with rc_context(STYLE | {"svg.hashsalt": panel.title}):
        figure, file = Figure(figsize=(3.5, 2.4), layout="constrained"), io.StringIO()
        _draw(panel, figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    markup = file.getvalue()[file.getvalue().index("<svg") :]
    markup = re.sub(r'<style.*?</style>|<!--.*?-->| id="[\w.]+_\d+"', "", markup, flags=re.DOTALL)
    markup = re.sub(r'style="(.*?)"', lambda style: re.sub(r"([\w-]+): ([^;]+);?", r'\1="\2"', style[1]), markup)
    markup = re.sub(r' ?font-family="[^"]*"', "", markup)  # the page's is taken
    for variable, colour in COLOURS.items():
        markup = markup.replace(colour, f"var(--{variable})")
    return markup


def _draw(panel: Panel, axes: Axes) -> None:
    panel.draw(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.minorticks_off()
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def percent(share: float) -> str:
    """Return a share in percent, to two significant digits below 10 % and one decimal above: 0.012%, 98.2%."""
    value = 100 * share
    text = f"{value:.1f}" if value >= 9.95 else f"{Decimal(f'{value:.2g}'):f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"
