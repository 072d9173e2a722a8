"""Does steering show, and does the text stay fluent? Over features chosen by rule, for each method, beside controls.

    python -m benchmarks.steering [NAME=value ...]

The features: in a random order (SEED), the first FEATURES that fire on 0.01 % to 1 % of tokens and raise a clear class
of tokens when steered: clamped to its maximum on held-out text, a feature raises the logits of five tokens by CLEAR
standard deviations over the vocabulary or more, in the mean. A feature's class are these tokens, SHOWN of them, and
the SHOWN on which it fires most often in held-out text, of those on which it fires LEAST_PRECISION of the time. None of
this looks at steered text. What is counted then is the share of a text's tokens that are of the class.

Each feature is steered as demo.py does without COEFFICIENT, at the strongest strength at which a few texts of a prompt
stay fluent, and measured on texts of other seeds. Beside it, each at its own strongest strength: a random direction,
and the difference of means (the mean residual where the class's tokens stand less the mean elsewhere), both of the
decoder row's norm. Before are features clamped at their maximum, as demo.py did. Then demo.py's own pick of a feature,
by today's rule and by that of before: of those that fire on most more tokens at their maximum the first that is fluent.

The autoencoder is that of RUN_DIR, which train.py makes if there is none. With MISTRAL_MODEL_PATH in the environment
another model is steered, by clamping alone, in fewer texts and without demo.py's pick.
"""

import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import config
from benchmarks.machine import save
from mistral_sae import constants
from mistral_sae.data.tokens import Corpus
from mistral_sae.defaults import fill
from mistral_sae.loading import load_pair
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer import search, sweep
from mistral_sae.steer.effect import Effect, effects_of
from mistral_sae.steer.search import Search
from mistral_sae.steer.steering import Edit, Subject, activations_of, statistics_of

FEATURES = 24
CLEAR = 4.0  # standard deviations
CLASS_SAMPLE = (4, 64)  # rows and positions of held-out text on which what features raise is measured
AT_ONCE = 64  # candidates whose classes are measured together
SHOWN, LEAST_PRECISION = 10, 0.2
NAMED = 5  # raised tokens
SHOWS = 0.02  # of the tokens, by which a class must be more frequent than in the model's own texts
PROMPTS = (
    ("import os\nimport sys\n\ndef main(", 'class Parser:\n    """')
    if config.ON_STANDIN
    else ("The thing that I wanted to tell you is that",)
)
PROMPTS_OF_PICKS = (*PROMPTS, config.PROMPT, "# The")  # of the stand-in
MAX_TOKENS, TEMPERATURE = 32, 0.7
# Of each prompt's texts, and how they are steered; a larger model takes its time
SEEDS_TO_FIND, SEEDS_TO_MEASURE = (range(4), range(100, 108)) if config.ON_STANDIN else (range(2), range(100, 104))
METHODS = ("clamp", "add", "raw") if config.ON_STANDIN else ("clamp",)

Classes = dict[int, set[int]]


# ---- features and their classes, from held-out text ----


def with_a_clear_class(subject: Subject, rows_RT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The features that raise a clear class of tokens when steered, in a random order, and what they raise (V)."""
    model, loaded, found, _ = subject
    order = torch.randperm(len(found.density_F), generator=torch.Generator().manual_seed(config.SEED))
    of_mid_density, (R, T) = set(found.mid_density()), CLASS_SAMPLE
    every = [feature for feature in order.tolist() if feature in of_mid_density]
    for start in range(0, len(every), AT_ONCE):
        activations = {f: float(found.maximum_F[f]) for f in every[start : start + AT_ONCE]}
        change_NV = search.changes_of(model, loaded, activations, rows_RT[:R, :T]).logits_NV
        for feature, clear, change_V in zip(activations, search.clearness(change_NV).tolist(), change_NV, strict=True):
            if clear >= CLEAR:
                yield feature, change_V


@torch.no_grad()
def fired_on(model: LanguageModel, loaded: LoadedSAE, features: Sequence[int], rows_RT: Tensor) -> Classes:
    """The tokens on which each feature fires most often, of those on which it mostly does."""
    fired_SV, there_V = torch.zeros(len(features), model.vocab_size), torch.zeros(model.vocab_size)
    for tokens_RT in rows_RT.split(config.ROWS_PER_FORWARD or 8):
        kept_RT = model.kept(tokens_RT)
        x_ND = model.residuals(tokens_RT, loaded.metadata.residual_layer)[kept_RT].float()
        active_NS = activations_of(loaded.sae, x_ND, torch.tensor(features))[0].cpu() > 0
        fired_SV.index_add_(1, tokens_RT[kept_RT], active_NS.T.float())
        there_V += torch.bincount(tokens_RT[kept_RT], minlength=model.vocab_size)
    often_SV = torch.where(fired_SV >= LEAST_PRECISION * there_V.clamp_min(1), fired_SV, 0.0)
    best = often_SV.topk(SHOWN, dim=1)
    pairs = zip(features, best.indices.tolist(), best.values.tolist(), strict=True)
    return {feature: {id for id, n in zip(ids, counts, strict=True) if n > 0} for feature, ids, counts in pairs}


@torch.no_grad()
def differences_of_means(subject: Subject, classes: Classes, rows_RT: Tensor) -> dict[int, Tensor]:
    """Mean residual where the tokens of each class stand less the mean elsewhere, of the decoder row's norm."""
    model, loaded = subject.model, subject.loaded
    sums_CD, counts_C = torch.zeros(len(classes), model.d_model), torch.zeros(len(classes), 1)
    total_D, n = torch.zeros(model.d_model), 0
    for tokens_RT in rows_RT.split(config.ROWS_PER_FORWARD or 8):
        kept_RT = model.kept(tokens_RT)
        x_ND = model.residuals(tokens_RT, loaded.metadata.residual_layer)[kept_RT].float().cpu()
        total_D, n = total_D + x_ND.sum(dim=0), n + len(x_ND)
        for i, ids in enumerate(classes.values()):
            is_it = torch.isin(tokens_RT[kept_RT], torch.tensor(sorted(ids)))
            sums_CD[i] += x_ND[is_it].sum(dim=0)
            counts_C[i] += is_it.sum()
    means_CD = sums_CD / counts_C.clamp_min(1) - (total_D - sums_CD) / (n - counts_C)
    norms_C1 = loaded.sae.W_dec[list(classes)].detach().float().cpu().norm(dim=1, keepdim=True)
    scaled_CD = torch.nn.functional.normalize(means_CD, dim=1) * norms_C1
    return dict(zip(classes, scaled_CD, strict=True))


# ---- steered texts ----


def trials_of(subject: Subject, prompt: str, seeds: range) -> sweep.Trials:
    """Texts of a prompt."""
    return sweep.Trials(subject.model, subject.loaded, subject.model.encode(prompt), seeds, MAX_TOKENS, TEMPERATURE)


def measured(
    subject: Subject,
    edit: Edit,
    classes: Classes,
    directions: Mapping[int, Tensor] | None,
    given: float | None = None,
) -> dict[int, list[Effect]]:
    """What each feature does to the texts of each prompt, at a given strength or at the strongest that is fluent."""
    found: dict[int, list[Effect]] = {feature: [] for feature in classes}
    units = [replace(edit, coefficients={feature: 1.0}) for feature in classes]
    for prompt in PROMPTS:
        trials = trials_of(subject, prompt, SEEDS_TO_FIND)
        strengths = {feature: [given or 0.0] for feature in classes}
        if given is None:
            grids = dict(zip(classes, Search(subject, trials, lambda n: torch.empty(0)).strengths(units), strict=True))
            marked = effects_of(subject, edit, grids, classes, trials, directions)
            strengths = {each.feature: [each.strength] for each in marked}
        fresh = trials._replace(seeds=SEEDS_TO_MEASURE)
        for each in effects_of(subject, edit, strengths, classes, fresh, directions):
            found[each.feature].append(each)
    return found


def figures(effects: Sequence[Effect]) -> dict[str, float]:
    """One feature's, over all prompts."""
    of_steered, of_own = (sweep.pooled([getattr(each, name) for each in effects]) for name in ("steered", "own"))
    return {
        "strength": statistics.mean(each.strength for each in effects),
        "own_share": statistics.mean(each.own_shown for each in effects),
        "share": statistics.mean(each.shown for each in effects),
        "own_rate": of_own.rate,
        "rate": of_steered.rate,
        "nats": of_steered.cross_entropy - of_own.cross_entropy,
        "repeated": of_steered.repetition - of_own.repetition,
        "fluent": statistics.mean(sweep.is_fluent(each.steered, each.own) for each in effects),
    }


def summary(of_features: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all features: how many show, and the medians."""
    shows = sum(each["share"] - each["own_share"] >= SHOWS for each in of_features)
    fires = sum(each["rate"] > each["own_rate"] for each in of_features)
    medians = {name: statistics.median(each[name] for each in of_features) for name in of_features[0]}
    return (
        {"shows": shows, "fires_more": fires}
        | medians
        | {"fluent": statistics.mean(each["fluent"] for each in of_features)}
    )


# ---- demo.py's own pick ----


def picks(subject: Subject) -> dict[str, list[dict[str, Any]]]:
    """For each prompt the feature that demo.py takes by today's rule and by that of before, on texts of other seeds."""
    found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for prompt in PROMPTS_OF_PICKS:
        trials, edit = trials_of(subject, prompt, range(4))._replace(max_tokens=64), Edit({})
        searched = Search(subject, trials, lambda n: torch.empty(0))
        after = search.choose(searched, edit, None, None)
        chosen = {"after": after.coefficients, "before": before(searched, edit)}
        for name, coefficients in chosen.items():
            ((feature, strength),) = coefficients.items()
            classes = search.most_promising(searched, [feature])
            fresh = trials._replace(seeds=SEEDS_TO_MEASURE)
            (effect,) = effects_of(subject, edit, {feature: [float(strength or 0)]}, classes, fresh)
            found[name].append({"prompt": prompt, "feature": feature} | figures([effect]))
    return found


def before(searched: Search, edit: Edit) -> dict[int, float]:
    """The feature that fires on most more tokens when clamped at its maximum, and that."""
    _, among = search.pools_of(searched.subject)[0]
    looked_at = random.Random(0).sample(among, min(search.LOOKED_AT, len(among)))
    classes = dict(islice(search.most_promising(searched, looked_at).items(), 24))
    short = searched.trials._replace(seeds=range(3))
    effects = effects_of(searched.subject, edit, {feature: [1.0] for feature in classes}, classes, short)
    best = max(effects, key=lambda each: (each.is_fluent, each.steered.rate - each.own.rate))
    return {best.feature: 1.0}


def main() -> None:
    """Choose features and classes, steer, count."""
    warnings.simplefilter("ignore")
    constants.override(sys.argv[1:], config)
    filled, spec, _ = fill(config)
    if not Path(filled.RUN_DIR, "sae").exists():
        subprocess.run([sys.executable, "train.py", *sys.argv[1:]], check=True)
    loaded, model = load_pair(config, spec)
    known = statistics_of(model, loaded, filled)
    subject = Subject(model, loaded, known, {})
    rows_RT = Corpus.of(config).held_out_rows(model.tokenizer, config.EVALUATION_ROWS, config.EVALUATION_STRIDE)
    chosen = dict(islice(with_a_clear_class(subject, rows_RT), FEATURES))
    on = fired_on(model, loaded, list(chosen), rows_RT)
    classes = {f: on[f] | set(change_V.topk(SHOWN).indices.tolist()) for f, change_V in chosen.items()}
    random_FD = sweep.random_directions(loaded.sae.W_dec[list(chosen)], seed=config.SEED)
    along = {
        "feature": None,
        "difference of means": differences_of_means(subject, classes, rows_RT),
        "random direction": dict(zip(chosen, random_FD, strict=True)),
    }
    runs = [("clamp", "before: at its maximum", None, 1.0)]
    runs += [(method, name, directions, None) for method in METHODS for name, directions in along.items()]
    by_feature: dict[int, dict[str, Any]] = {
        f: {"raised": search.extremes(model, change_V, NAMED)[0], "density": float(known.density_F[f])}
        for f, change_V in chosen.items()
    }
    table = []
    for method, name, directions, given in tqdm(runs, unit=" runs"):
        effects = measured(subject, Edit({}, method), classes, directions, given)
        found = {feature: figures(each) for feature, each in effects.items()}
        table.append({"method": method, "along": name} | summary(list(found.values())))
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in table[-1].items()
            )
        )
        for feature, each in found.items():
            by_feature[feature][f"{method}, {name}"] = each
    features = [{"feature": feature} | each for feature, each in by_feature.items()]
    picked = picks(subject) if config.ON_STANDIN else {}
    name = "steering" if config.ON_STANDIN else f"steering_{spec.name.split('-')[0].lower()}"
    save(name, {"features": FEATURES, "runs": table, "picks": picked, "by_feature": features})


if __name__ == "__main__":
    main()
