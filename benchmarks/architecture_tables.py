"""The tables of benchmarks/architectures.py, for `benchmarks.tables`."""

import statistics
from typing import Any

from benchmarks.markdown import table


def by_trainer(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over seeds by trainer, and all errors at one L0."""
    found: dict[str, dict[str, Any]] = {}
    for trainer in dict.fromkeys(row["trainer"] for row in rows):
        some = [row for row in rows if row["trainer"] == trainer]
        numbers = [name for name, value in some[0].items() if not isinstance(value, str)]
        means = {name: statistics.mean(row[name] for row in some) for name in numbers}
        found[trainer] = means | {"errors": [row["at_k"] for row in some]}
    return found


def architectures(result: dict[str, Any]) -> str:
    """Quality and time of a step of each architecture, ours beside SAE Lens."""
    parts = result["results"]
    columns = ["rate", "L0", "normalized MSE at L0 = 32", "cross-entropy recovered", "silent features", "ms a step"]
    rows = [["", *columns]]
    for name, times in parts["times"].items():
        found = by_trainer(parts["quality"].get(name, []))
        for trainer, seconds in times["seconds"].items():
            figures = [""] * 5  # where one side's trainings are not there
            if each := found.get(trainer):
                error = (
                    f"{statistics.mean(each['errors']):.3f} ({min(each['errors']):.3f} to {max(each['errors']):.3f})"
                )
                figures = [f"{each['rate']:g}", f"{each['l0']:.1f}", error]
                figures += [f"{each['ce_loss_recovered']:.1%}", f"{each['silent_fraction']:.1%}"]
            slower = f" ({times['ratio']:.1f} times ours)" if trainer == "sae-lens" else ""
            rows.append([f"{name}, {trainer}", *figures, f"{1000 * seconds:.0f}{slower}"])
    return table(rows)


def frontier(result: dict[str, Any]) -> str:
    """What each architecture keeps with fewer and more active features."""
    rows = [["", "sparse", "", "dense"]]
    for name, points in result["results"]["frontier"].items():
        figures = "L0 {l0:.1f}: {normalized_mse:.3f}, {ce_loss_recovered:.1%}"
        rows.append([name, *(figures.format(**point) for point in points)])
    return table(rows)


def absorption(result: dict[str, Any]) -> str:
    """How often features of parents and of concepts are absorbed, over seeds."""
    columns = {
        "hierarchies": {"silent with a child": ".1%", "silent alone": ".1%", "f1 of parents": ".2f"},
        "concepts": {
            "absorbed": ".1%", "absorbed beside the best": ".1%", "f1 of the best feature": ".2f",
            "features a concept": ".1f",
        },
    }  # fmt: skip
    rows = [["", *(f"{part}: {name}" for part, names in columns.items() for name in names)]]
    for name in result["results"]["hierarchies"]:
        row = [name]
        for part, names in columns.items():
            some = result["results"][part].get(name, [])
            row += [format(statistics.mean(e[key] for e in some), form) if some else "" for key, form in names.items()]
        rows.append(row)
    return table(rows)
