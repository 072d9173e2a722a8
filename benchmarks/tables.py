"""Write the tables of README.md and docs/ from benchmarks/results: `python -m benchmarks.tables`."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.architecture_tables import absorption, architectures, by_trainer, frontier
from benchmarks.markdown import table as _table

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SHOWN_VERSIONS = ("torch", "sae-lens", "eai-sparsify", "sae-bench")


def _source(*results: dict[str, Any]) -> str:
    """Where a table's results come from, in one line."""
    commands, dates, machines = {}, {}, {}
    for result in results:
        versions = [f"{name} {v}" for name, v in result["versions"].items() if name in SHOWN_VERSIONS]
        on = (
            result["gpu"]
            or f"{result['processor'].split(';')[0]}), {result['threads']} thread{'s' * (result['threads'] > 1)}"
        )
        commands[f"`{result['command']}`"] = dates[result["date"]] = machines[", ".join([on, *versions])] = None
    return f"*{', '.join(commands)}, {' and '.join(sorted(dates))}, {'; '.join(machines)}*"


def peers(step: dict[str, Any], end_to_end: dict[str, Any], beside: dict[str, Any]) -> str:
    """Speed, memory and quality beside the peers that were measured, a row each."""
    rows = [["two CPU cores", "mistral-sae", "SAE Lens", "sparsify"]]
    for kind, entries in step["results"].items():
        for entry in entries:
            if not (size := entry["size"])["dead"]:
                ms = {name: f"{1000 * seconds:,.0f} ms" for name, seconds in entry["seconds"].items()}
                name = f"a training step, D={size['D']}, F={size['F']:,}, K={size['K']}, B={size['B']:,}; {kind}"
                rows.append([name, ms["mistral-sae"], ms["sae-lens"], ms["sparsify"]])
    ours, theirs = (end_to_end["results"]["medians"][name] for name in ("mistral-sae", "sae-lens"))
    tokens = f"{end_to_end['results']['tokens']:,} tokens, from text to autoencoder"
    rows.append(
        [tokens, *(f"{each['seconds']:.0f} s, {each['peak_megabytes']:,.0f} MB" for each in (ours, theirs)), ""]
    )

    found = by_trainer(beside["results"]["quality"]["topk"])
    for name, figure, form in (
        ("normalized MSE after 204,800 tokens, held out", "normalized_mse", ".3f"),
        ("features that fire on no held-out token", "silent_fraction", ".1%"),
    ):
        rows.append([name, *(format(found[t][figure], form) for t in ("mistral-sae", "sae-lens")), ""])
    return _table(rows)


def control(result: dict[str, Any]) -> str:
    """Evaluation of the stand-in's autoencoder beside that of random weights."""
    figures = {
        "normalized MSE": ("normalized_mse", "{:.3f}"),
        "explained variance": ("explained_variance", "{:.3f}"),
        "L0": ("l0", "{:.1f}"),
        "cross-entropy, clean (nats a token)": ("ce_loss_clean", "{:.3f}"),
        "through the autoencoder": ("ce_loss_with_sae", "{:.3f}"),
        "layer mean-ablated": ("ce_loss_ablated", "{:.3f}"),
        "layer zero-ablated": ("ce_loss_zero_ablated", "{:.3f}"),
        "cross-entropy recovered": ("ce_loss_recovered", "{:.1%}"),
        "KL (nats a token)": ("kl", "{:.3f}"),
        "dead features": ("dead_fraction", "{:.2%}"),
        "features that fire on no held-out token": ("silent_fraction", "{:.1%}"),
    }
    models = result["results"]
    rows = [["", *models]]
    for label, (key, form) in figures.items():
        rows.append([label, *(form.format(model[key]) for model in models.values())])
    return _table(rows)


def step(result: dict[str, Any]) -> str:
    """Median time of a training step of each, with ratios and peak memory."""
    rows = [["", "ms a step", "tokens/s", "times ours", "times the float32 floor", "peak memory, MB"]]
    for kind, entry in ((kind, entry) for kind, entries in result["results"].items() for entry in entries):
        size, medians, memory = entry["size"], entry["seconds"], entry["peak_megabytes"]
        dead = f", {size['dead']:.0%} dead" if size["dead"] else ""
        rows.append([f"**D={size['D']}, F={size['F']}, K={size['K']}, B={size['B']}{dead}; {kind}**", *[""] * 5])
        for name, median in medians.items():
            ours = f"{median / medians['mistral-sae']:.1f}"
            floor = f"{median / medians['floor']:.2f}"
            speed = f"{size['B'] / median:,.0f}" if name in memory else ""
            peak = f"{memory[name]:,.0f}" if name in memory else ""
            rows.append([name, f"{1000 * median:.0f}", speed, ours, floor, peak])
    return _table(rows)


def growth(result: dict[str, Any]) -> str:
    """Median time of our step over F and over K, beside the floor."""
    rows = [["", "ms a step", "float32 floor, ms", "times the floor"]]
    for entries in result["results"].values():
        for entry in entries:
            median, floor = entry["milliseconds"], entry["float32_floor_milliseconds"]
            rows.append([f"F={entry['F']}, K={entry['K']}", f"{median:.0f}", f"{floor:.0f}", f"{median / floor:.2f}"])
    return _table(rows)


def end_to_end(result: dict[str, Any]) -> str:
    """Raw text to a trained autoencoder, ours beside SAE Lens."""
    columns = ["seconds", "tokens/s", "share of the language model", "normalized MSE", "silent features"]
    rows = [["", *columns, "peak memory, MB"]]
    for name, found in result["results"]["medians"].items():
        rows.append([
            name, f"{found['seconds']:.1f}", f"{found['tokens_per_second']:,.0f}",
            f"{found['language_model_share']:.0%}", f"{found['normalized_mse']:.3f}",
            f"{found['silent_fraction']:.2%}", f"{found['peak_megabytes']:,.0f}",
        ])  # fmt: skip
    return _table(rows)


def moments(result: dict[str, Any]) -> str:
    """Normalized MSE along the run with moments of either kind."""
    curves = result["results"]
    points = list(zip(*curves.values(), strict=True))[3::4]
    rows = [["moments", *(f"{point[0]['tokens'] / 1000:,.0f}k tokens" for point in points)]]
    for i, name in enumerate(curves):
        rows.append([name, *(f"{point[i]['normalized_mse']:.4f}" for point in points)])
    return _table(rows)


def resuming(result: dict[str, Any]) -> str:
    """Seconds to the next batch, from the beginning of the text and from its place."""
    ways = ("from the beginning", "from its place")
    steps = list(next(iter(result["results"].values())))
    rows = [["source", *(f"{step}, {way}" for step in steps for way in ways)]]
    for source, found in result["results"].items():
        rows.append([source, *(f"{found[step][way]:.1f} s" for step in steps for way in ways)])
    return _table(rows)


def collect(result: dict[str, Any]) -> str:
    """Cost and memory of collecting examples along a pass."""
    found = result["results"]["bookkeeping"]
    rows = [["tokens so far", "µs a token since the line before", "resident memory, MB"]]
    for each in found["along_the_way"]:
        values = f"{each['microseconds_a_token']:.1f}", f"{each['resident_megabytes']:,.0f}"
        rows.append([f"{each['tokens'] / 1e6:.0f}M", *values])
    rows.append(["the encoder", f"{found['encoder_microseconds_a_token']:.0f}", ""])
    return _table(rows)


def steering(result: dict[str, Any]) -> str:
    """How often steering shows, how fluent the text stays, beside controls and before; then demo.py's own picks."""
    found = result["results"]
    names = [
        "method",
        "along",
        "shows in",
        "fires more in",
        "its tokens",
        "fires on",
        "nats more",
        "repeated",
        "fluent",
    ]
    rows = [names]
    for each in found["runs"]:
        counts = (f"{each[name]} of {found['features']}" for name in ("shows", "fires_more"))
        rows.append([each["method"], each["along"], *counts, *_shares(each)])
    if not found["picks"]:
        return _table(rows)
    picked = [["rule", "prompt", "feature", "its tokens", "fires on", "nats more", "repeated", "fluent"]]
    for rule, picks in found["picks"].items():
        for each in picks:
            prompt = repr(each["prompt"]).replace("|", "\\|")
            picked.append([rule, f"`{prompt}`", str(each["feature"]), *_shares(each)])
    title = "What demo.py takes without FEATURE_INDEX, where no feature tells a concept:"
    return f"{_table(rows)}\n\n{title}\n\n{_table(picked)}"


def _shares(each: dict[str, float]) -> list[str]:
    pairs = (
        f"{each[own]:.1%} → {each[steered]:.1%}" for own, steered in (("own_share", "share"), ("own_rate", "rate"))
    )
    return [*pairs, f"{each['nats']:+.2f}", f"{each['repeated']:+.0%}", f"{each['fluent']:.0%}"]


def features_steered(result: dict[str, Any]) -> str:
    """The share of a text's tokens that are of each feature's class, at the strongest clamp that is fluent."""
    names = ["clamp, before: at its maximum", "clamp, feature", "clamp, difference of means", "clamp, random direction"]
    rows = [
        [
            "feature raises",
            "fires on",
            "own text",
            "at its maximum",
            "clamped",
            "set to",
            "difference of means",
            "random",
        ]
    ]
    for each in result["results"]["by_feature"]:
        raised = " ".join(f"`{token.strip()}`" for token in each["raised"] if token.strip(" \n`|")).replace("|", "\\|")
        before, clamped, means, at_random = (each[name] for name in names)
        shares = [f"{share:.1%}" for share in (clamped["own_share"], before["share"], clamped["share"])]
        controls = [f"{control['share']:.1%}" for control in (means, at_random)]
        rows.append([raised, f"{each['density']:.2%}", *shares, f"{clamped['strength']:.2g} x", *controls])
    return _table(rows)


def steering_speed(result: dict[str, Any]) -> str:
    """Time of a generated token with and without an edit."""
    rows = [["", "ms a token", "more"]]
    for size in result["results"]:
        seconds, rest = size["seconds"], ["", ""]
        rows.append([f"**{size['model']}: D={size['D']}, {size['layers']} layers, F={size['F']}**", *rest])
        for name, value in seconds.items():
            more = f"{value / seconds['without steering'] - 1:.1%}" if name != "without steering" else ""
            rows.append([name, f"{1000 * value:.2f}", more])
    return _table(rows)


def traffic(result: dict[str, Any]) -> str:
    """What a step of full size moves on a GPU and the time reckoned from it, by term."""
    found = result["results"]
    rows = [["", "GB", "TFLOP", "reckoned ms", "peak memory, GB"]]

    def row(name: str, cost: dict[str, float], peak: str = "") -> list[str]:
        flops = f"{cost['flops'] / 1e12:.1f}" if cost["flops"] > 1e10 else ""
        return [name, f"{cost['bytes'] / 1e9:.1f}", flops, f"{1000 * cost['seconds']:.1f}", peak]

    for name, step in found["steps"].items():
        rows.append(row(f"**{name}**", step["all"], f"{step['peak_bytes'] / 1e9:.1f}"))
        if name in ("mistral-sae", "sparsify"):
            rows += [row(term, cost) for term, cost in step["terms"].items() if cost["bytes"] > 5e7]
    rows.append(row("**the floor**: encoder product, parameters and moments read and written", found["floor"]))
    return _table(rows)


def english(result: dict[str, Any]) -> str:
    """What each layer, size, sparsity, batch and rate gives on SmolLM2, the first row being what is varied."""
    varied = ["layer", "D_HIDDEN", "K", "BATCH_SIZE", "LEARNING_RATE"]
    rows = [[*varied, "normalized MSE", "recovered", "dead", "tokens/s"]]
    for each in result["results"]["settings"]:
        sizes = (f"{each[name]:,}" for name in ("d_hidden", "k", "batch_size"))
        figures = f"{each['normalized_mse']:.3f}", f"{each['ce_loss_recovered']:.1%}", f"{each['dead_fraction']:.1%}"
        speed = f"{each['tokens_per_second']:.0f}"
        rows.append([str(each["layer"]), *sizes, f"{each['learning_rate']:g}", *figures, speed])
    return _table(rows)


CODES = {  # of analyse.py, as the tables call them
    "features": "features", "basis directions": "basis", "a random rotation": "rotation", "principal components": "PCA",
    "random directions": "random", "neurons of the MLP": "MLP neurons", "features of an untrained model": "untrained",
    "a probe on the whole residual": "probe",
}  # fmt: skip


def answers(result: dict[str, Any]) -> str:
    """F1 of the best single direction of each code by concept, those that a feature tells best first."""
    found = result["results"]["monosemantic"]
    rows = [["concept", "tokens", *CODES.values(), "split over"]]
    for each in sorted(found["concepts"], key=lambda each: -each["f1"]["features"]):
        figures = (f"{each['f1'][code]:.2f}" for code in CODES)
        rows.append([each["concept"], f"{each['tokens']:,}", *figures, str(each["features"])])
    rows.append(["**mean**", "", *(f"**{found['codes'][code]['mean f1']:.2f}**" for code in CODES), ""])
    return _table(rows)


def unexplained(result: dict[str, Any]) -> str:
    """What as many directions a token leave of the variance, by what they are."""
    found = result["results"]["superposed"]
    rows = [[f"{found['directions a token']} directions a token, of", "unexplained", "95 % interval"]]
    for name, fit in found["unexplained"].items():
        rows.append([name, f"{fit['share']:.1%}", f"{fit['low']:.1%} to {fit['high']:.1%}"])
    return _table(rows)


def edits(result: dict[str, Any]) -> str:
    """What edits along a concept's feature do, beside the same size of edit along other directions."""
    found = result["results"]["causal"]
    rows = [["written along", "nats where the feature fires", "elsewhere", "times in 1,000 characters", "nats more"]]
    for kind, each in found["ablated"].items():
        pushed = found["pushed"][kind]
        fires = f"{each['fires']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
        rate = f"{pushed['rate']:.1f} ({pushed['low']:.1f} to {pushed['high']:.1f})"
        rows.append([kind, fires, f"{each['elsewhere']:.4f}", rate, f"{pushed['nats more']:+.2f}"])
    rows.append(["nothing", "", "", f"{found['pushed']['own rate']:.1f}", ""])
    return _table(rows)


def edits_by_concept(result: dict[str, Any]) -> str:
    """The same by concept: nats where its feature fires, and times in 1,000 characters."""
    found = result["results"]["causal"]
    kinds = list(found["ablated"])
    rows = [["concept", *(f"nats, {kind}" for kind in kinds), "times, unpushed", *(f"times, {kind}" for kind in kinds)]]
    for each in found["concepts"]:
        nats, rates = ([each[figure][kind] for kind in kinds] for figure in ("kl", "rate"))
        nats = ("" if x is None else f"{x:.3f}" for x in nats)
        rows.append([each["concept"], *nats, *(f"{x:.1f}" for x in (each["own rate"], *rates))])
    return _table(rows)


def twins(result: dict[str, Any]) -> str:
    """The share of features with a twin, by where it is looked for."""
    rows = [["a twin in", "share of features", "least and most of the pairs"]]
    for name, each in result["results"]["twins"].items():
        rows.append([name, f"{each['mean']:.1%}", f"{each['least']:.1%} to {each['most']:.1%}"])
    return _table(rows)


def explained_twice(result: dict[str, Any]) -> str:
    """How far two explanations agree."""
    found = result["results"]["explanations"]
    rows = [["two explanations of", "agree on", "a quarter below", "median", "a quarter above"]]
    for name in ("the same feature", "two features"):
        rows.append([name, *(f"{value:.0%}" for value in found[name].values())])
    return _table(rows)


def saebench(result: dict[str, Any]) -> str:
    """Metrics of SAEBench by trainer and K, means over seeds."""
    names = {
        "cross-entropy recovered": ("ce_loss_recovered", ".1%"), "normalized MSE": ("normalized_mse", ".3f"),
        "probe on 1": ("top 1", ".1%"), "on 2": ("top 2", ".1%"), "on 5": ("top 5", ".1%"),
        "absorbed fully": ("absorbed fully", ".1%"), "in part": ("absorbed part", ".1%"),
        "features a concept": ("features a concept", ".1f"),
    }  # fmt: skip
    found = result["results"]["autoencoders"]
    rows = [["", "K", *names]]
    for trainer, k in dict.fromkeys((each["trainer"], each["sparsity"]) for each in found):
        some = [each for each in found if (each["trainer"], each["sparsity"]) == (trainer, k)]
        values = (format(statistics.mean(each[key] for each in some), form) for key, form in names.values())
        rows.append([trainer, f"{k:g}", *values])
    residual = result["results"]["residual"]
    probes = (f"{residual[f'top {k}']:.1%}" for k in (1, 2, 5))
    rows.append(["the residual's dimensions", "", "", "", *probes, "", "", ""])
    return _table([*rows, ["a probe on all of the residual", "", "", "", f"{residual['all']:.1%}", "", "", "", "", ""]])


def saebench_core(result: dict[str, Any]) -> str:
    """Figures that SAEBench and we have both, side by side."""
    theirs, ours = result["results"]["SAEBench"], result["results"]["mistral-sae"]
    losses, kinds = theirs["model_performance_preservation"], theirs["model_behavior_preservation"]
    rows = [
        ["active features a token", theirs["sparsity"]["l0"], ours["l0"]],
        ["explained variance", theirs["reconstruction_quality"]["explained_variance"], ours["explained_variance"]],
        ["cross-entropy", losses["ce_loss_without_sae"], ours["ce_loss_clean"]],
        ["cross-entropy through the features", losses["ce_loss_with_sae"], ours["ce_loss_with_sae"]],
        ["KL divergence", kinds["kl_div_with_sae"], ours["kl"]],
    ]
    return _table([["", "SAEBench", "mistral-sae"], *([name, *(f"{x:.3f}" for x in both)] for name, *both in rows)])


def toy_model(result: dict[str, Any]) -> str:
    """The share of planted features that each method finds, over seeds."""
    settings = result["results"]["settings"]
    methods = [name for name, found in settings[0].items() if isinstance(found, dict)]
    rows = [["features a dimension", "each present with", *methods]]
    for n, present in dict.fromkeys((each["features"], each["present"]) for each in settings):
        some = [each for each in settings if (each["features"], each["present"]) == (n, present)]
        shares = [statistics.mean(each[method]["recovered"] or 0.0 for each in some) for method in methods]
        rows.append([f"{n / 32:g}", f"{present:g}", *(f"{share:.0%}" for share in shares)])
    return _table(rows)


def pipeline(result: dict[str, Any]) -> str:
    """Seconds of a run of train.py by stage, longest first."""
    seconds = sorted(result["results"]["seconds"].items(), key=lambda stage: -stage[1])
    total = sum(value for _, value in seconds)
    rows = [["stage", "seconds", "share"]]
    rows += [[name, f"{value:.1f}", f"{value / total:.0%}"] for name, value in seconds if value >= 0.005 * total]
    return _table([*rows, ["**all**", f"{total:.1f}", ""]])


def grid(result: dict[str, Any]) -> str:
    """What four autoencoders on one pass of the model cost beside one."""
    found = result["results"]
    one, four = (statistics.median(found[f"{name}_seconds"]) for name in ("one", "four"))
    rows = [[f"{found['steps']} steps of {found['batch']:,} tokens", "seconds", "beside one"]]
    rows += [["one autoencoder", f"{one:.1f}", ""], ["four on the same pass", f"{four:.1f}", f"{found['ratio']:.2f}"]]
    return _table(rows)


def stored(result: dict[str, Any]) -> str:
    """Rates of training through the model and from disk, and their errors on held-out text."""
    found = result["results"]
    rows = [["batches", "tokens/s", "normalized MSE, seeds 0, 1, 2"]]
    for name, rate in found["tokens/s"].items():
        rows.append([name, f"{rate:,.0f}", ", ".join(f"{error:.4f}" for error in found["normalized MSE"][name])])
    return _table(rows)


# What makes each table, and the results that it is made from
TABLES = {
    make.__name__: (make, [make.__name__])
    for make in (
        control,
        architectures,
        step,
        growth,
        end_to_end,
        moments,
        resuming,
        collect,
        pipeline,
        grid,
        stored,
        steering,
        steering_speed,
        traffic,
        english,
        answers,
        toy_model,
    )
} | {
    "steering_smollm2": (steering, ["steering_smollm2"]),
    "unexplained": (unexplained, ["answers"]),
    "edits": (edits, ["answers"]),
    "edits_by_concept": (edits_by_concept, ["answers"]),
    "twins": (twins, ["robustness"]),
    "explained_twice": (explained_twice, ["robustness"]),
    "saebench": (saebench, ["saebench"]),
    "saebench_core": (saebench_core, ["saebench_core"]),
    "features_steered": (features_steered, ["steering"]),
    "peers": (peers, ["step", "end_to_end", "architectures"]),
    "frontier": (frontier, ["architectures"]),
    "absorption": (absorption, ["architectures"]),
}


def filled(page: str) -> str:
    """The text of a page with each table between its marks."""

    def table(mark: re.Match[str]) -> str:
        make, names = TABLES[mark[2]]
        results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
        return f"{mark[1]}{make(*results)}\n\n{_source(*results)}\n{mark[3]}"

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
