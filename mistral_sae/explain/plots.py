"""Pictures of a training run."""

from pathlib import Path
from typing import Any

from mistral_sae.files import write_atomically


def plot_training(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the curves of metrics.jsonl's records, held-out figures as dots, into a PNG at `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(record["tokens"], record[key]) for record in history if key in record]
        return [tokens / 1e6 for tokens, _ in points], [value for _, value in points]

    panels = [
        ("normalized MSE", "normalized_mse", "held_out_normalized_mse", "log"),
        ("cross-entropy recovered", None, "ce_loss_recovered", "linear"),
        ("dead features", "dead", None, "linear"),
        ("L0: active features a token", "l0", "held_out_l0", "linear"),
        ("gradient norm, before clipping", "gradient_norm", None, "log"),
        ("learning rate", "learning_rate", None, "linear"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, curve, dots, scale) in zip(axes.flat, panels, strict=True):
        if curve:
            axis.plot(*series(curve), color="#4c72b0", linewidth=1.2, label="training")
        if dots and series(dots)[0]:
            axis.plot(*series(dots), "o", color="#c44e52", markersize=5, label="held out")
            axis.legend(frameon=False)
        axis.set(title=title, yscale=scale)
        if curve in ("dead", "l0"):  # counts: so that a flat line looks flat
            axis.set_ylim(0, 1.3 * max([1, *series(curve)[1]]))
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
    plt.close(figure)
