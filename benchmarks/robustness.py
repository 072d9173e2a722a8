"""How far features, and their explanations, are the same again: with another seed, and from other examples.

    python -m benchmarks.robustness

Twins: of the features that fire, the share that has one in an autoencoder of another seed, which is a feature that
fires as well and whose decoder row is at a cosine above 0.7; autoencoders of 2,048 features that are trained on 200,000
tokens each, of the stand-in and of the same model without what it learned; and beside it the share that has one among
the features of the other model, and among as many random directions.

Explanations: of features of runs/standin by the offline explainer, each made twice, from either half of a feature's
passages. Two of them agree on the share of tokens on which both say that the feature fires, of those on which either
does, over the passages of both; beside it the same for two different features, over the passages of these.
"""

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import config
from benchmarks.machine import save
from mistral_sae.analysis.sample import randomise, train_briefly
from mistral_sae.data.activations import residuals_of
from mistral_sae.data.tokens import Corpus, batches
from mistral_sae.defaults import fill
from mistral_sae.explain import cache
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.offline import Found, Rule, find, parts_of, predict
from mistral_sae.explain.reading import Reading, read_corpus
from mistral_sae.explain.types import Example, Feature
from mistral_sae.model.language_model import LanguageModel, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import load_sae
from mistral_sae.sae.trainer import TrainConfig

SEEDS = (1, 2)
WIDTH, TOKENS, HELD_OUT_ROWS = 2048, 200_000, 64
TWIN = 0.7
FEATURES = 300  # whose explanations are made twice
SETTINGS = Settings(top=20, spread=6)  # twice as many passages as explain.py shows, half of them for each explanation
LEAST_PASSAGES = 6  # of each half


# ---- features ----


def share_with_twin(rows_FD: Tensor, others_GD: Tensor) -> float:
    """The share of directions that have one at a cosine above TWIN among others."""
    cosines_FG = normalize(rows_FD, dim=1) @ normalize(others_GD, dim=1).T
    return float((cosines_FG.amax(dim=1) > TWIN).float().mean())


@torch.no_grad()
def rows_that_fire(sae: SparseAutoencoder, x_ND: Tensor) -> Tensor:
    """The decoder rows of the features that fire on some residuals."""
    fires_F = torch.zeros(sae.n_features, dtype=torch.bool)
    for x in x_ND.split(4096):
        encoded = sae.encode(x)
        fires_F[encoded.indices[encoded.values > 0]] = True
    return sae.W_dec.detach()[fires_F]


def dictionaries(model: LanguageModel, layer: int) -> list[Tensor]:
    """Decoder rows of an autoencoder of each seed."""
    corpus, sizes = Corpus.of(config), replace(TrainConfig.of(config, model.d_model), d_hidden=WIDTH)
    held_out = batches(itertools.islice(corpus.rows(model.tokenizer, held_out=True), HELD_OUT_ROWS), 16)
    x_ND = torch.cat([residuals_of(model, rows, layer) for rows in held_out])
    found = []
    for seed in SEEDS:
        sae = train_briefly(model, layer, corpus, replace(sizes, seed=seed), TOKENS, config.SHUFFLE_ROWS)
        found.append(rows_that_fire(sae, x_ND))
    return found


def twins() -> dict[str, Any]:
    """The shares, over pairs of autoencoders."""
    model, layer = load_model(None), config.TARGET_LAYER
    trained = dictionaries(model, layer)
    randomise(model, 0)
    untrained = dictionaries(model, layer)
    chance = [torch.randn(rows.shape, generator=torch.Generator().manual_seed(i)) for i, rows in enumerate(trained)]
    pairs = {
        "another seed": itertools.permutations(trained, 2),
        "another seed, both of the model without what it learned": itertools.permutations(untrained, 2),
        "the model without what it learned": itertools.product(trained, untrained),
        "random directions": itertools.product(trained, chance),
    }
    return {name: summary(share_with_twin(*pair) for pair in some) for name, some in pairs.items()}


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, least and most."""
    found = list(values)
    return {"mean": statistics.mean(found), "least": min(found), "most": max(found)}


# ---- explanations ----


def agreement(first: Sequence[Rule], second: Sequence[Rule], passages: Iterable[Example]) -> float | None:
    """Of the tokens on which either explanation holds, the share on which both do; None where there are none."""
    either = both = 0
    for passage in passages:
        parts_T = parts_of(passage)
        for a, b in zip(predict(first, parts_T), predict(second, parts_T), strict=True):
            either, both = either + (a > 0 or b > 0), both + (a > 0 and b > 0)
    return both / either if either else None


def halves(feature: Feature) -> list[Feature]:
    """A feature with every other of its passages, and with the rest; one that is shown twice counts once."""
    passages = {(each.document, each.start): each for each in (*feature.top, *feature.spread)}
    return [feature._replace(top=tuple(passages.values())[i::2], spread=()) for i in (0, 1)]


def explained_twice(records: Iterable[Feature]) -> dict[str, Any]:
    """Agreement of a feature's two explanations, and of one of them with one of the next feature's."""
    found: list[tuple[Feature, Found, Found]] = []
    tried = 0
    for feature in records:
        pair = halves(feature)
        if min(len(half.top) for half in pair) < LEAST_PASSAGES:
            continue
        tried += 1
        first, second = map(find, pair)
        if first.rules and second.rules:
            found.append((feature, first, second))
    same, different = [], []
    for (feature, first, second), (other, of_other, _) in zip(found, found[1:] + found[:1], strict=True):
        passages = [*feature.top, *feature.spread]
        same.append(agreement(first.rules, second.rules, passages))
        different.append(agreement(first.rules, of_other.rules, [*passages, *other.top, *other.spread]))
    return {
        "features": tried,
        "explained both times": len(found),
        "the same feature": _spread(same),
        "two features": _spread(different),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float]:
    some = [value for value in values if value is not None]
    low, middle, high = statistics.quantiles(some, n=4)
    return {"mean": statistics.mean(some), "quarter below": low, "median": middle, "quarter above": high}


def explanations() -> dict[str, Any]:
    """Of features drawn at random among those that fire in the cache of runs/standin, or in one made now."""
    model, loaded = load_model(None), load_sae(Path(config.RUN_DIR or "", "sae"))
    activations = read_corpus(Path(config.RUN_DIR or "", cache.FOLDER), Reading.of(config), model, loaded)
    fired = activations.counts_F.nonzero().flatten().tolist()
    drawn = random.Random(0).sample(fired, FEATURES)
    records = FeatureRecords(activations, drawn, model, loaded.sae, SETTINGS)
    return explained_twice(map(records.brief, drawn))


def main() -> None:
    """Measure and save."""
    fill(config)
    torch.set_num_threads(1)
    result = {"explanations": explanations()}
    print(result)
    save("robustness", {"twins": twins()} | result)


if __name__ == "__main__":
    main()
