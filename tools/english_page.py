"""Print the lists of docs/english.md from a run of `make english`: `python -m tools.english_page [NAME=value ...]`.

Twenty features, drawn by SEED among those that are explained, each with its label and where it is strongest. And ten
features, drawn by SEED among the explained ones of middle density, each steered as demo.py steers without COEFFICIENT,
at the strongest strength at which a few texts stay fluent, beside a random direction at its own.
"""

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

import config
from mistral_sae import cli, constants
from mistral_sae.defaults import fill
from mistral_sae.explain import cache
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.labels import read_labels
from mistral_sae.explain.reading import Reading
from mistral_sae.explain.types import Example
from mistral_sae.loading import load_pair
from mistral_sae.steer import search, sweep
from mistral_sae.steer.effect import Effect, effects_of
from mistral_sae.steer.steering import Edit, Explanation, Subject, statistics_of

LISTED, STEERED = 20, 10
PASSAGES, BEFORE, AFTER = 3, 8, 4  # of a feature, and tokens around the strongest
TEXTS, TOKENS = 4, 32  # of each feature at each strength, the first of which is shown


def main() -> None:
    """Load what `make english` left, and print."""
    constants.override(["MISTRAL_MODEL_PATH=smollm2", *sys.argv[1:]], config)
    filled, spec, _ = fill(config)
    loaded, model = load_pair(config, spec)
    run_dir = Path(filled.RUN_DIR)
    labels = {f: label for f, label in read_labels(run_dir / "explanations.jsonl").items() if label.explanation}
    statistics = statistics_of(model, loaded, filled)
    explanations = {f: Explanation(label.explanation, label.explainer) for f, label in labels.items()}
    subject = Subject(model, loaded, statistics, explanations)

    layer, corpus = loaded.metadata.residual_layer, Reading.of(config).described()
    activations, why = cache.open_cache(run_dir / cache.FOLDER, cache.made_from(model, loaded.sae, layer, corpus))
    if activations is None:
        raise cli.UserError(why)
    listed = random.Random(config.SEED).sample(sorted(labels), LISTED)
    print("| feature | label (offline) | detection | strongest on |\n| ---: | --- | ---: | --- |")
    for record in map(FeatureRecords(activations, listed, model, loaded.sae, Settings()).brief, listed):
        label = labels[record.feature]
        shown = "<br>".join(map(passage, record.top[:PASSAGES]))
        value = label.scores["detection"].value
        detection = "" if value is None else f"{value:.2f}"
        print(f"| {record.feature} | {escaped(label.explanation)} | {detection} | {shown} |")

    print()
    middle = sorted(set(statistics.mid_density()) & labels.keys())
    for feature in random.Random(config.SEED).sample(middle, STEERED):
        print_steered(subject, feature)


def passage(example: Example) -> str:
    """The strongest token of a passage, bold, and what stands around it."""
    tokens, peak = example.tokens, example.peak
    before, after = "".join(tokens[max(0, peak - BEFORE) : peak]), "".join(tokens[peak + 1 : peak + 1 + AFTER])
    token = tokens[peak]
    gap = " " * token.startswith(" ")
    return escaped(f"{before}{gap}") + f"**{escaped(token.strip())}**" + escaped(after)


def escaped(text: str) -> str:
    """Text in a cell of a table."""
    marks = {"\n": "⏎", "|": "\\|", "*": "\\*", "<": "&lt;", "[": "&#91;", "]": "&#93;"}
    return text.translate(str.maketrans(marks))


def print_steered(subject: Subject, feature: int) -> None:
    """A row for each of the model's own text, the steered one, and one along a random direction."""
    prompt_ids = subject.model.encode(config.PROMPT)
    trials = sweep.Trials(
        subject.model, subject.loaded, prompt_ids, range(config.SEED, config.SEED + TEXTS), TOKENS, config.TEMPERATURE
    )
    edit = Edit({}, config.METHOD)
    searched = search.Search(subject, trials, lambda n: torch.empty(0))
    (strengths,) = searched.strengths([Edit({feature: 1.0}, config.METHOD)])
    random_SD = sweep.random_directions(subject.loaded.sae.W_dec[[feature]], config.SEED)
    text, _ = subject.explanations[feature]
    print(f"**{feature}**, {text}\n")
    print("| | strength | fires on | nats more | repeated | text |\n| --- | ---: | ---: | ---: | ---: | --- |")
    own = trials.unsteered([feature])
    print(f"| own | | {own.pooled.rate:.0%} | | | {escaped(trials.text_of(own.texts[0]))} |")
    for name, directions in (("steered", None), ("random direction", {feature: random_SD[0]})):
        (found,) = effects_of(subject, edit, {feature: strengths}, {}, trials, directions)
        print(row(name, subject, trials, edit, found, None if directions is None else random_SD))
    print()


def row(name: str, subject: Subject, trials: sweep.Trials, edit: Edit, found: Effect, along_SD: Tensor | None) -> str:
    """A row of the table of one feature."""
    at = Edit({found.feature: found.strength}, edit.method)
    with at.context(subject, len(trials.prompt_ids), along_SD):
        ids = subject.model.sample(trials.prompt_ids, trials.seeds, TOKENS, trials.temperature)[0]
    nats = found.steered.cross_entropy - found.own.cross_entropy
    strength = f"{found.strength:g}" if found.is_fluent else f"{found.strength:g}, not fluent"
    figures = f"{found.steered.rate:.0%} | {nats:+.2f} | {found.repeated:+.0%}"
    return f"| {name} | {strength} | {figures} | {escaped(trials.text_of(ids))} |"


if __name__ == "__main__":
    main()
