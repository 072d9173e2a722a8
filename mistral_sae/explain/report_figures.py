"""The pictures of the report, as SVG in the page's own colours.

Shapes: F features.
"""

import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mistral_sae.explain.report_data import ScoreSummary
from mistral_sae.sae.features import RARE, Geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.5, 2.6)  # inches of a picture; the page scales it
# Drawn in colours that nobody uses, which become the page's own, so that a picture follows light and dark
INK, CURVE, MARK, RULE = "#010203", "#010204", "#010205", "#010206"
COLOURS = {INK: "currentColor", CURVE: "var(--curve)", MARK: "var(--mark)", RULE: "var(--rule)"}
SVG = "http://www.w3.org/2000/svg"


class Figure(NamedTuple):
    """A picture and what it says."""

    title: str
    meaning: str  # one sentence
    svg: str


# ---- pictures ----


def run_figures(
    metrics: Sequence[Mapping[str, float]], evaluation: Mapping[str, float], density_F: Tensor | None
) -> list[Figure]:
    """Training curves, at whose end the evaluation stands, and density: those that can be drawn."""
    made = []
    if any("normalized_mse" in record for record in metrics):
        last = {"tokens": metrics[-1].get("tokens", 0), "held_out_normalized_mse": evaluation.get("normalized_mse")}
        last |= {"ce_loss_recovered": evaluation.get("ce_loss_recovered")}
        metrics = [*metrics, {key: value for key, value in last.items() if value is not None}]
        made += [_training(metrics), _dead(metrics)]
        if sum("ce_loss_recovered" in record for record in metrics) > 1:
            made.append(_recovered(metrics))
    if density_F is not None and (density_F > 0).any():
        made.append(_density(density_F))
    return made


def score_figures(scores: Sequence[ScoreSummary]) -> list[Figure]:
    """The scores of the first method, and what it found by strength."""
    made = [_scores(scores[0])] if scores else []
    if scores and any(value is not None for value in scores[0].recall):
        made.append(_recall(scores[0]))
    return made


def geometry_figures(geometry: Geometry | None) -> list[Figure]:
    """How near decoder rows come to each other, and how many features write to a dimension."""
    return [] if geometry is None else [_cosines(geometry), _writers(geometry)]


def _training(metrics: Sequence[Mapping[str, float]]) -> Figure:
    def draw(axes: "Axes") -> None:
        _curve(axes, metrics, "normalized_mse", color=CURVE, linewidth=1.4, label="training")
        _curve(axes, metrics, "held_out_normalized_mse", "o", color=MARK, markersize=4.5, label="held out")
        axes.set(yscale="log", xlabel="million tokens")
        values = [record["normalized_mse"] for record in metrics if "normalized_mse" in record]
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if min(values) * 0.7 < t < max(values) * 1.4]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False, labelcolor=INK)

    meaning = "The share of the residuals' variance that the features leave unexplained, as training went on."
    return Figure("Normalized MSE", meaning, _svg("training", draw))


def _dead(metrics: Sequence[Mapping[str, float]]) -> Figure:
    def draw(axes: "Axes") -> None:
        _curve(axes, metrics, "dead", color=CURVE, linewidth=1.4)
        axes.set(
            xlabel="million tokens",
            ylabel="features",
            ylim=(0, 1.3 * max(1, *(record.get("dead", 0) for record in metrics))),
        )

    meaning = "Features that had not fired for a long while: each is capacity that the run paid for and did not use."
    return Figure("Dead features", meaning, _svg("dead", draw))


def _recovered(metrics: Sequence[Mapping[str, float]]) -> Figure:
    def draw(axes: "Axes") -> None:
        _curve(axes, metrics, "ce_loss_recovered", "o-", color=CURVE, linewidth=1.4, markersize=4.5)
        shown = [record["ce_loss_recovered"] for record in metrics if "ce_loss_recovered" in record]
        axes.set(xlabel="million tokens", ylim=(min(0.9, *shown) - 0.02, 1.005), xlim=(0, None))
        axes.yaxis.set_major_formatter(lambda value, _: percent(round(value, 4)))

    meaning = "How much of what this layer does for the model's predictions the features keep, on held-out text."
    return Figure("Cross-entropy recovered", meaning, _svg("recovered", draw))


def _density(density_F: Tensor) -> Figure:
    logs = density_F[density_F > 0].double().log10()

    def draw(axes: "Axes") -> None:
        axes.hist(logs.tolist(), bins=60, color=CURVE)
        axes.axvline(math.log10(RARE), color=MARK, linestyle="--", linewidth=1.2)
        axes.set(xlabel="share of tokens on which a feature fires", ylabel="features")
        low, high = math.floor(logs.min().item()), math.ceil(logs.max().item() + 1e-9)
        ticks = [t for t in range(low, high + 1, max(1, (high - low) // 5)) if t >= logs.min().item() - 0.1]
        axes.set_xticks(ticks, [percent(10.0**t) for t in ticks])

    meaning = (
        "How often features fire, on a log scale: those left of the line are rare, on fewer than one token in 10,000, "
        "those far to the right on so many that they rarely stand for one thing."
    )
    return Figure("Density", meaning, _svg("density", draw))


def _scores(summary: ScoreSummary) -> Figure:
    def draw(axes: "Axes") -> None:
        low = min(0.0, *summary.values) if summary.method == "simulation" else 0.0
        axes.hist(summary.values, bins=40, range=(low, 1.0), color=CURVE)
        for value, style, name in [
            (summary.other_feature, ":", "another feature's"),
            (summary.top_token, "--", "top token"),
        ]:
            if value is not None:
                axes.axvline(value, color=MARK, linestyle=style, linewidth=1.6, label=name)
        axes.set(xlabel=f"{summary.method} score", ylabel="features")
        if summary.other_feature is not None or summary.top_token is not None:
            axes.legend(frameon=False, labelcolor=INK, loc="upper left")

    meaning = (
        "How well explanations tell where features fire on passages they were not made from; the lines are the means "
        "of the same test with another feature's explanation, and with just the feature's top token, in its place."
    )
    return Figure("Scores", meaning, _svg("scores", draw))


def _recall(summary: ScoreSummary) -> Figure:
    def draw(axes: "Axes") -> None:
        heights = [value or 0.0 for value in summary.recall]
        names = [f"{100 * i // len(heights)} to {100 * (i + 1) // len(heights)}%" for i in range(len(heights))]
        axes.bar_label(axes.bar(names, heights, color=CURVE, width=0.7), fmt="%.2f", color=INK, padding=2)
        axes.set(xlabel="strength, as a share of the feature's maximum", ylabel="found", ylim=(0, 1.15))

    meaning = (
        "The share of firing passages that explanations find, by how strongly the feature fires in them: bars that "
        "fall to the left are features whose weak firings mean something else, or nothing that the explanation says."
    )
    return Figure("Found, by strength", meaning, _svg("recall", draw))


def _cosines(geometry: Geometry) -> Figure:
    def draw(axes: "Axes") -> None:
        low = min(0.0, *geometry.nearest_N)
        axes.hist(geometry.nearest_N, bins=60, range=(low, 1.0), color=CURVE)
        axes.axvline(geometry.nearest_random, color=MARK, linestyle="--", linewidth=1.6, label="random directions")
        axes.set(xlabel="cosine with the nearest other feature", ylabel="features")
        axes.legend(frameon=False, labelcolor=INK)

    meaning = (
        "How close each feature's decoder row comes to its nearest neighbour's: at 0 features would not interfere, at "
        "the line they are packed as random directions are, near 1 two features say almost the same."
    )
    return Figure("Decoder cosines", meaning, _svg("cosines", draw))


def _writers(geometry: Geometry) -> Figure:
    def draw(axes: "Axes") -> None:
        axes.hist(geometry.writers_D, bins=40, color=CURVE)
        axes.set(xlabel="features that write to it", ylabel="dimensions", xlim=(0, None))

    meaning = (
        "How many features write to each dimension of the residual stream with more than an even share of their "
        "length: one each would mean no superposition in this basis."
    )
    return Figure("Features a dimension", meaning, _svg("writers", draw))


def percent(share: float) -> str:
    """A share in percent, to two significant digits below 1 % and one decimal above: 0.012%, 98.2%."""
    value = 100 * share
    if value == 0 or value >= 9.95:
        return f"{value:.1f}".removesuffix(".0") + "%"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def _curve(axes: "Axes", metrics: Sequence[Mapping[str, float]], key: str, *style: str, **options: object) -> None:
    points = [(record["tokens"] / 1e6, record[key]) for record in metrics if key in record and "tokens" in record]
    if points:
        axes.plot(*zip(*points, strict=True), *style, **options)


def _svg(name: str, draw: Callable[["Axes"], None]) -> str:
    """One pair of axes as SVG for use inside HTML: in the page's own font and colours, without ids or inline styles."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    rc = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": INK, "text.color": INK}
    rc |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.fontsize": 8.5}
    with rc_context(rc):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        if axes.get_ylabel() in ("features", "dimensions"):
            axes.yaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(buffer.getvalue(), name)


def _for_the_page(svg: bytes, name: str) -> str:
    """matplotlib's SVG, its inline styles (which the page's policy forbids) as attributes, its colours the page's."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style") or child.get("id") == "patch_1":
                parent.remove(child)
    for element in root.iter():
        for declaration in filter(None, element.attrib.pop("style", "").split(";")):
            key, value = (part.strip() for part in declaration.split(":", 1))
            if key not in ("font-family", "font"):
                element.set(key, COLOURS.get(value, value))
            if key == "font":  # "9px 'DejaVu Sans', ...": the size, in the page's font
                element.set("font-size", value.split()[0])
        if link := element.attrib.pop("{http://www.w3.org/1999/xlink}href", None):
            element.set("href", f"#{name}-{link[1:]}")
        if clip := element.get("clip-path"):
            element.set("clip-path", clip.replace("#", f"#{name}-"))
        if identity := element.get("id"):
            element.set("id", f"{name}-{identity}")
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    return ElementTree.tostring(root, encoding="unicode")
