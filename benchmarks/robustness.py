"""How far features, and their explanations, are the same again: with another seed, and from other examples.

    python -m benchmarks.robustness

Twins: of the features that fire, the share that has one in an autoencoder of another seed, which is a feature that
fires as well and whose decoder row is at a cosine above 0.7. The autoencoders are the tuned TopK ones of
benchmarks.architectures, which trains them where that was not done (204,800 tokens each): this project's and SAE
Lens's, and this project's of the same model without what it learned. Beside it the share that has one among the
features of that model, and among as many random directions.

Explanations: of features of runs/standin by the offline explainer, each made twice, from either half of a feature's
passages. Two of them agree on the share of tokens on which both say that the feature fires, of those on which either
does, over the passages of both; beside it the same for two different features, over the passages of these.
"""

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import config
from benchmarks.architectures import (
    BATCH,
    CORPUS,
    FOLDER,
    LAYER,
    OURS,
    SEEDS,
    STEPS,
    THEIRS,
    Bench,
    Cell,
    Data,
    held_out_rows,
    train_ours,
    trained,
)
from benchmarks.machine import save
from mistral_sae.analysis.sample import randomise
from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.tokens import shuffle
from mistral_sae.defaults import fill
from mistral_sae.explain import cache
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.offline import Found, Rule, find, parts_of, predict
from mistral_sae.explain.reading import Reading, read_corpus
from mistral_sae.explain.types import Example, Feature
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import load_sae

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


def untrained_rows(bench: Bench, cell: Cell) -> list[Tensor]:
    """Rows of autoencoders of the same model without what it learned, of each seed."""
    model = load_model(None, last_layer=LAYER)
    randomise(model, 0)
    rows = shuffle(CORPUS.rows(model.tokenizer, held_out=False), config.SHUFFLE_ROWS, 0)
    sizes = {"buffer_tokens": config.BUFFER_TOKENS, "rows_per_forward": config.ROWS_PER_FORWARD}
    stream = shuffled_batches(rows, model, LAYER, batch_size=BATCH, seed=0, **sizes)
    train_ND = torch.cat([x for x, _ in itertools.islice(stream, STEPS)])
    held_out_ND = torch.cat([residuals_of(model, some, LAYER) for some in held_out_rows(model)])
    cells = [cell._replace(trainer="untrained", seed=seed) for seed in SEEDS]
    for each in cells:
        if not (FOLDER / each.name).exists():
            train_ours(each, Data(train_ND, held_out_ND))
    return [rows_that_fire(trained(each), held_out_ND) for each in cells]


def twins() -> dict[str, Any]:
    """The shares, over pairs of autoencoders of different seeds."""
    bench, rows = Bench(), {}
    for trainer in (OURS, THEIRS):
        cells = [bench.best(trainer, "topk").cell._replace(seed=seed) for seed in SEEDS]
        for each in cells:
            bench.measure(each)
        rows[trainer] = [rows_that_fire(trained(each), bench.data.held_out_ND) for each in cells]
    untrained = untrained_rows(bench, cells[0]._replace(rate=bench.best(OURS, "topk").cell.rate))
    chance = [
        torch.randn(each.shape, generator=torch.Generator().manual_seed(100 + i)) for i, each in enumerate(untrained)
    ]
    pairs = {
        "another seed": (rows[OURS], rows[OURS]),
        "another seed, trained by SAE Lens": (rows[THEIRS], rows[THEIRS]),
        "another seed, both of the model without what it learned": (untrained, untrained),
        "the model without what it learned": (rows[OURS], untrained),
        "random directions": (rows[OURS], chance),
    }
    return {name: summary(_shares(*some)) for name, some in pairs.items()}


def _shares(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Of pairs of different seeds: those of one seed start from the same random directions."""
    return [share_with_twin(a, b) for i, a in enumerate(some) for j, b in enumerate(others) if i != j]


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
    save("robustness", {"twins": twins(), "explanations": explanations()})


if __name__ == "__main__":
    main()
