"""Does clamping a feature do what its activations say? Over features chosen by rule, beside a random direction.

    python -m benchmarks.steering [NAME=value ...]

The features: in a random order (SEED), the first FEATURES that fire on 0.01 % to 1 % of tokens and raise a clear class
of tokens when steered. Clear is measured: clamped to its maximum on held-out text, the feature raises the logits of
five tokens by CLEAR standard deviations over the vocabulary or more, in the mean. Neither looks at what the feature
does to generated text, which is what is measured then.

For each feature, texts from several prompts are sampled at growing strengths, and the strongest at which they are
still fluent is marked, by demo.py's own rule (`sweep.is_fluent`) with a margin. At that strength, on texts of other
seeds: how often the feature fires when the model without the edit reads them, beside its rate on the model's own texts
and on texts made under an edit of the same size at every token along a random direction; and what the texts cost in
cross-entropy.

The autoencoder is that of RUN_DIR, which train.py makes if there is none.
"""

import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import config
from benchmarks.machine import save
from mistral_sae import cli
from mistral_sae.data.tokens import Corpus
from mistral_sae.defaults import fill
from mistral_sae.loading import load_pair
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer import search, sweep
from mistral_sae.steer.steering import steer

FEATURES = 24
CLEAR = 4.0  # standard deviations
CLASS_SAMPLE = (12, 128)  # rows and positions of held-out text on which the classes are measured
MARGIN = 0.2  # nats by which a marked strength stays below what is allowed: what is measured then are other texts
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # times the maximum
PROMPTS = ("import os\nimport sys\n\ndef main(", 'class Parser:\n    """', "    def test_", "    # The")
STRENGTHS_AT_ONCE = 4  # before it is seen whether stronger ones are needed
SEEDS_TO_MARK, SEEDS_TO_MEASURE = range(16), range(100, 116)  # of each prompt's texts
MAX_TOKENS, TEMPERATURE = 40, 0.7
SHOWN = 5  # raised tokens
AT_ONCE = 64  # candidates whose classes are measured together


def candidates(loaded: LoadedSAE) -> list[int]:
    """The features in the range of frequencies, in a random order."""
    found = loaded.statistics
    order = torch.randperm(len(found.density_F), generator=torch.Generator().manual_seed(config.SEED))
    of_mid_density = set(found.mid_density())
    return [feature for feature in order.tolist() if feature in of_mid_density]


def with_a_clear_class(model: LanguageModel, loaded: LoadedSAE, rows_RT: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The candidates that raise a clear class of tokens when steered, in their order, and what they raise."""
    (R, T), every = CLASS_SAMPLE, candidates(loaded)
    for looked_at in range(0, len(every), AT_ONCE):
        activations = {f: float(loaded.maximum_F[f]) for f in every[looked_at : looked_at + AT_ONCE]}
        change_NV = search.logit_changes(model, loaded, activations, rows_RT[:R, :T])
        clearness = search.clearness(change_NV).tolist()
        for i, (feature, clear, change_V) in enumerate(zip(activations, clearness, change_NV, strict=True)):
            if clear >= CLEAR:
                yield {
                    "feature": feature,
                    "density": float(loaded.density_F[feature]),
                    "maximum": activations[feature],
                    "clearness": clear,
                    "raised": search.extremes(model, change_V, SHOWN)[0],
                    "candidates_before": looked_at + i,
                }


class Texts:
    """Samples from all prompts under one edit or another, and what is found in them."""

    def __init__(self, model: LanguageModel, loaded: LoadedSAE, seeds: range):
        prompts = [[model.tokenizer.bos_id, *model.tokenizer.encode(prompt)] for prompt in PROMPTS]
        self._trials = [
            sweep.Trials(model, loaded, ids, [1000 * number + seed for seed in seeds], MAX_TOKENS, TEMPERATURE)
            for number, ids in enumerate(prompts)
        ]
        self._own = [trials.unsteered([0]).texts for trials in self._trials]

    def own(self, feature: int) -> sweep.Measured:
        """Of the unsteered model."""
        found = [
            sweep.measure(trials.model, trials.loaded, [feature], trials.prompt_ids, texts)
            for trials, texts in zip(self._trials, self._own, strict=True)
        ]
        return sweep.pooled([each for texts in found for each in texts])

    def steered(
        self, feature: int, strengths: Sequence[float], directions_SD: torch.Tensor | None = None
    ) -> list[sweep.Measured]:
        """With the feature clamped to so many times its maximum, or the same along other directions, by strength."""
        by_strength: list[list[sweep.Measured]] = [[] for _ in strengths]
        for trials in self._trials:
            maximum = float(trials.loaded.maximum_F[feature])

            def edit(
                strengths_B: list[float], trials: sweep.Trials = trials, maximum: float = maximum
            ) -> AbstractContextManager:
                coefficients = {feature: maximum * torch.tensor(strengths_B)}
                return steer(trials.model, trials.loaded, coefficients, directions_SD=directions_SD)

            for found, trial in zip(by_strength, trials.steered(strengths, edit, lambda _: [feature]), strict=True):
                found += trial.measured
        return [sweep.pooled(each) for each in by_strength]


def marked_strength(texts: Texts, feature: int) -> float | None:
    """The strongest at which the texts are still fluent; None if they are not even at the weakest."""
    own, best = texts.own(feature), None
    for i in range(0, len(STRENGTHS), STRENGTHS_AT_ONCE):
        some = STRENGTHS[i : i + STRENGTHS_AT_ONCE]
        for strength, found in zip(some, texts.steered(feature, some), strict=True):
            cost = found.cross_entropy - own.cross_entropy
            if not sweep.is_fluent(found, own) or cost > sweep.MOST_NATS - MARGIN:
                return best
            best = strength
    return best


def effect(to_mark: Texts, to_measure: Texts, loaded: LoadedSAE, feature: int) -> dict[str, Any]:
    """One feature's figures at its marked strength."""
    strength = marked_strength(to_mark, feature)
    if strength is None:
        return {"strength": None}
    direction_SD = sweep.random_directions(loaded.sae.W_dec[[feature]], seed=feature)
    found = {
        "own": to_measure.own(feature),
        "steered": to_measure.steered(feature, [strength])[0],
        "random_direction": to_measure.steered(feature, [strength], direction_SD)[0],
    }
    return {"strength": strength} | {name: measured._asdict() for name, measured in found.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all features; one without a fluent strength counts as one that did nothing."""
    marked = [each for each in found if each["strength"] is not None]
    rates = {name: [each[name]["rate"] for each in marked] for name in ("own", "steered", "random_direction")}
    costs = [each["steered"]["cross_entropy"] - each["own"]["cross_entropy"] for each in marked]
    control_costs = [each["random_direction"]["cross_entropy"] - each["own"]["cross_entropy"] for each in marked]
    return {
        "features": len(found),
        "candidates": found[-1]["candidates_before"] + 1,
        "raised": sum(s > o for s, o in zip(rates["steered"], rates["own"], strict=True)) / len(found),
        "beat_random_direction": sum(s > r for s, r in zip(rates["steered"], rates["random_direction"], strict=True))
        / len(found),
        "median_rates": {name: statistics.median(values) for name, values in rates.items()},
        "mean_rates": {name: statistics.mean(values) for name, values in rates.items()},
        "median_strength": statistics.median(each["strength"] for each in marked),
        "cost": {"median": statistics.median(costs), "mean": statistics.mean(costs), "highest": max(costs)},
        "within_a_nat": sum(cost <= sweep.MOST_NATS for cost in costs) / len(found),
        "control_cost": {"median": statistics.median(control_costs)},
    }


def main() -> None:
    """Choose, mark, measure."""
    warnings.simplefilter("ignore")
    cli.override(sys.argv[1:], config)
    filled, spec, _ = fill(config)
    if not Path(filled.RUN_DIR, "sae").exists():
        subprocess.run([sys.executable, "train.py", *sys.argv[1:]], check=True)
    loaded, model = load_pair(config, spec)
    rows_RT = Corpus.of(config).held_out_rows(model.tokenizer, config.EVALUATION_ROWS, config.EVALUATION_STRIDE)
    to_mark, to_measure = (Texts(model, loaded, seeds) for seeds in (SEEDS_TO_MARK, SEEDS_TO_MEASURE))
    found = []
    chosen = islice(with_a_clear_class(model, loaded, rows_RT), FEATURES)
    for known in tqdm(chosen, total=FEATURES, unit=" features"):
        found.append(known | effect(to_mark, to_measure, loaded, known["feature"]))
        print(line(found[-1]), flush=True)
    results = {"summary": summary(found), "features": found}
    for name, value in results["summary"].items():
        print(f"{name:24}{value}")
    save("steering", results)


def line(each: dict[str, Any]) -> str:
    """One feature's figures."""
    text = f"{each['feature']:6}  {each['density']:.2%} of tokens  x{each['strength']}"
    if each["strength"] is not None:
        rates = "  ".join(f"{name} {each[name]['rate']:.2%}" for name in ("own", "random_direction", "steered"))
        text += f"  {rates}  +{each['steered']['cross_entropy'] - each['own']['cross_entropy']:.2f} nats"
    return text + f"  {'  '.join(map(repr, each['raised']))}"


if __name__ == "__main__":
    main()
