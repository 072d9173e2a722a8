"""The five architectures, ours beside SAE Lens's trainer of the same name: quality, what each is for, and speed.

    python -m benchmarks.architectures               everything
    python -m benchmarks.architectures topk times    some of it: by architecture, and by part (see `PARTS`)

What is trained stays in runs/architectures, so that a run that was stopped goes on.

Both sides see the same standardised residuals of the stand-in in the same order, with the same sizes, batches, steps
and schedule. Each side has its own learning rate, found by halving and doubling it, and where the architecture has a
penalty and no K, its own coefficient, found so that K features are active on held-out tokens. What is off K then is
corrected for by how the error of that side changes with L0 (`at_k`).
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import config
from benchmarks import hierarchy
from benchmarks.machine import save
from benchmarks.peers import sae_lens_trainer
from mistral_sae.analysis.codes import Sparse
from mistral_sae.analysis.concepts import concepts_of_python, label_python
from mistral_sae.analysis.monosemantic import Halves, absorbed, probed, union_of
from mistral_sae.analysis.sample import read_texts
from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.documents import Skipped
from mistral_sae.data.tokens import Corpus, batches, shuffle
from mistral_sae.defaults import AIMED
from mistral_sae.model.language_model import LanguageModel, load_model
from mistral_sae.sae.architectures import ARCHITECTURES, PENALIZED
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import Metadata
from mistral_sae.sae.checkpoint import load_sae, save_sae
from mistral_sae.sae.evaluate import Evaluator, reconstruction
from mistral_sae.sae.trainer import TrainConfig, Trainer

LAYER, F, K, BATCH, STEPS = config.TARGET_LAYER, 2048, 32, 1024, 200
WARM_UP, DECAY = 20, 40  # steps
DEAD_AFTER = 50_000  # tokens; SAE Lens counts steps
OURS, THEIRS = "mistral-sae", "sae-lens"
SEEDS = (0, 1, 2)
SPARSITIES = (16, 32, 64)  # features a token along the frontier
SETTLING, TIMED = 20, 15  # steps before what is timed, so that no more is active than later on
FIRST_RATE = 8e-3
FIRST_COEFFICIENT = {"relu": 1.3, "jumprelu": 0.4}
NEAR, MOST_TRIES = 0.25, 3  # share of K by which L0 may be off it before the coefficient is changed, so many times
USUAL_SLOPE = -0.5  # of log(normalized MSE) along log(L0), until two trainings show it
HELD_OUT_ROWS, CROSS_ENTROPY_ROWS = 256, 32
CONCEPT_ROWS, ROWS_A_DOCUMENT = 200, 4
CORPUS = replace(Corpus.of(config), data_path="stdlib", seed=0)
FOLDER = Path("runs/architectures")
HOOK = f"blocks.{LAYER}.hook_resid_post"


class Cell(NamedTuple):
    """One training: by whom, of what, and with which numbers."""

    trainer: str
    architecture: str
    sparsity: float  # K, or the coefficient of the penalty
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """That of its folder."""
        return f"{self.trainer}-{self.architecture}-{self.sparsity:.4g}-{self.rate:g}-{self.seed}"


# ---- what all are trained and measured on ----


class Data(NamedTuple):
    """Residuals to train on and held-out ones."""

    train_ND: Tensor
    held_out_ND: Tensor

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Those of one training, shuffled by its seed."""
        order = torch.randperm(len(self.train_ND), generator=torch.Generator().manual_seed(seed))
        return (self.train_ND[part] for part in order.split(BATCH))


def read_data() -> Data:
    """Run the stand-in over text, once: the residuals are kept in FOLDER."""
    path = FOLDER / "residuals.safetensors"
    if not path.exists():
        model = load_model(None, last_layer=LAYER)
        rows = shuffle(CORPUS.rows(model.tokenizer, held_out=False), config.SHUFFLE_ROWS, 0)
        sizes = {"buffer_tokens": config.BUFFER_TOKENS, "rows_per_forward": config.ROWS_PER_FORWARD}
        stream = shuffled_batches(rows, model, LAYER, batch_size=BATCH, seed=0, **sizes)
        train_ND = torch.cat([x for x, _ in islice(stream, STEPS)])
        held_out_ND = torch.cat([residuals_of(model, rows, LAYER) for rows in held_out_rows(model)])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"train": train_ND, "held_out": held_out_ND}, path)
    stored = load_file(path)
    return Data(stored["train"], stored["held_out"])


def held_out_rows(model: LanguageModel) -> list[Tensor]:
    """Rows of held-out text, 16 at a time."""
    rows = islice(CORPUS.rows(model.tokenizer, held_out=True), 0, None, config.EVALUATION_STRIDE)
    return list(batches(islice(rows, HELD_OUT_ROWS), 16))


# ---- training ----


def our_trainer(cell: Cell, x: Tensor) -> Trainer:
    """Ours, that starts from some residuals."""
    has_penalty = cell.architecture in PENALIZED
    sizes = TrainConfig(
        x.shape[1], F, K if has_penalty else int(cell.sparsity), cell.architecture,
        sparsity_coefficient=cell.sparsity if has_penalty else None, bandwidth=config.BANDWIDTH,
        train_tokens=STEPS * BATCH, batch_size=BATCH, learning_rate=cell.rate, warm_up_steps=WARM_UP,
        decay_fraction=DECAY / STEPS, k_aux=x.shape[1] // 2, dead_after_tokens=DEAD_AFTER, seed=cell.seed,
    )  # fmt: skip
    trainer = Trainer(sizes)
    trainer.initialize(x)
    return trainer


def train_ours(cell: Cell, data: Data) -> None:
    """Train with this project's trainer."""
    batches = list(data.batches(cell.seed))
    trainer = our_trainer(cell, batches[0])
    for step, x in enumerate(batches):
        trainer.step(x, trainer.config.learning_rate_at(step))
        if step % 10 == 9:
            trainer.find_dead()
    save_sae(FOLDER / cell.name, trainer.sae, Metadata("stand-in", HOOK, LAYER, True, config.CONTEXT_LENGTH, "stdlib"))


def their_trainer(cell: Cell, z_batches: Iterator[Tensor], d_model: int) -> Any:
    """SAE Lens's, on z, the standardised residuals, since its loss for dead features refuses to standardise."""
    torch.manual_seed(cell.seed)
    return sae_lens_trainer(
        cell.architecture, d_model, F, cell.sparsity, z_batches,
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=cell.rate, lr_end=0.0,
        lr_warm_up_steps=WARM_UP, lr_decay_steps=DECAY, dead_feature_window=DEAD_AFTER // BATCH,
    )  # fmt: skip


def train_theirs(cell: Cell, data: Data) -> None:
    """Train with SAE Lens."""
    d_model = data.train_ND.shape[1]
    standardize = SparseAutoencoder(d_model, F, K).standardize
    z_batches = (standardize(x)[0] for x in data.batches(cell.seed))
    their_trainer(cell, z_batches, d_model).fit().save_inference_model(FOLDER / cell.name)


def trained(cell: Cell) -> SparseAutoencoder:
    """What a training left in its folder."""
    sae = load_sae(FOLDER / cell.name, hook_name=HOOK).sae.requires_grad_(False)
    sae.normalize = "layer_norm"
    return sae


def measured(cell: Cell, data: Data) -> dict[str, Any]:
    """Train, unless that was done before, and measure on held-out residuals."""
    path = FOLDER / cell.name / "figures.json"
    if not path.exists():
        (train_ours if cell.trainer == OURS else train_theirs)(cell, data)
        found = reconstruction(trained(cell), data.held_out_ND.split(BATCH))
        figures = {"l0": found.l0, "normalized_mse": found.normalized_mse, "silent_fraction": found.silent_fraction}
        path.write_text(json.dumps(figures))
        print(cell.name, {name: round(value, 4) for name, value in figures.items()}, flush=True)
    return json.loads(path.read_text())


# ---- tuning ----


class Tuned(NamedTuple):
    """The best numbers of one side for an architecture, and how log(normalized MSE) changes with log(L0) there."""

    cell: Cell
    slope: float

    def at_k(self, figures: dict[str, Any]) -> float:
        """The normalized MSE that figures near K features a token stand for at K; infinity for those far from it."""
        if not K / 2 <= figures["l0"] <= 2 * K:  # a rate at which no coefficient leaves about K
            return math.inf
        return figures["normalized_mse"] * (K / figures["l0"]) ** self.slope


def tuned(trainer: str, architecture: str, measure: Callable[[Cell], dict[str, Any]]) -> Tuned:
    """Search along learning rates, halved and doubled, each with the coefficient that gives K features.

    What goes through TopK's step, with its loss or sums of such, takes the rate that was found for TopK.
    """
    if architecture in ("batchtopk", "matryoshka"):
        found = tuned(trainer, "topk", measure)
        return found._replace(cell=found.cell._replace(architecture=architecture))
    sparsity = FIRST_COEFFICIENT.get(architecture, K)
    slope = USUAL_SLOPE if architecture in PENALIZED else 0.0
    best = _at_rate(Tuned(Cell(trainer, architecture, sparsity, FIRST_RATE, SEEDS[0]), slope), FIRST_RATE, measure)
    tried = {FIRST_RATE: best}
    while wanted := [rate for rate in (best.cell.rate / 2, best.cell.rate * 2) if rate not in tried]:
        tried |= {rate: _at_rate(best, rate, measure) for rate in wanted}
        best = min(tried.values(), key=lambda each: each.at_k(measure(each.cell)))
    return best


def _at_rate(start: Tuned, rate: float, measure: Callable[[Cell], dict[str, Any]]) -> Tuned:
    """The cell at another learning rate, with a coefficient under which about K features are active.

    The coefficient goes by what L0 did between the last two; at first L0 is taken to fall as its inverse.
    """
    cell, slope = start.cell._replace(rate=rate), start.slope
    tried: list[tuple[float, float, float]] = []  # logarithms of coefficient, L0 and error
    while cell.architecture in PENALIZED:
        figures = measure(cell)
        tried.append((math.log(cell.sparsity), math.log(figures["l0"]), math.log(figures["normalized_mse"])))
        off, exponent = tried[-1][1] - math.log(K), -1.0
        if len(tried) > 1:
            coefficients, counts, errors = (after - before for before, after in zip(*tried[-2:], strict=True))
            exponent = min(-0.2, counts / coefficients)
            slope = errors / counts if abs(counts) > NEAR / 2 else slope
        if abs(off) < NEAR or len(tried) == MOST_TRIES:
            break
        change = max(-1.5, min(1.5, -off / exponent))
        cell = cell._replace(sparsity=float(f"{cell.sparsity * math.exp(change):.3g}"))
    return Tuned(cell, slope)


# ---- parts of the result, by architecture ----


class Bench:
    """What the parts share, each read when it is first asked for."""

    @cached_property
    def data(self) -> Data:
        """The residuals."""
        return read_data()

    @cached_property
    def model(self) -> LanguageModel:
        """All of the stand-in."""
        return load_model(None)

    @cached_property
    def evaluator(self) -> Evaluator:
        """For cross-entropy."""
        rows = torch.cat(held_out_rows(self.model))[:CROSS_ENTROPY_ROWS]
        return Evaluator(self.model, rows, LAYER, config.ROWS_PER_FORWARD)

    @cached_property
    def concepts(self) -> tuple[Halves, Tensor, tuple[Tensor, Tensor]]:
        """Where text is of which concept, z of it, and each concept's probe: its direction and what it calls."""
        labelled = label_python(CORPUS.documents(held_out=False, epochs=False), skipped := Skipped())
        sizes = config.CONTEXT_LENGTH, CONCEPT_ROWS, ROWS_A_DOCUMENT
        texts = read_texts(labelled, concepts_of_python(), self.model, *sizes, skipped)
        texts = texts._replace(labels_NC=texts.labels_NC[:, Halves.of(texts).has_enough()])
        x_ND = torch.cat([self.model.residuals(rows, LAYER) for rows in texts.tokens_RT.split(16)])[texts.kept_RT]
        z_ND, halves = SparseAutoencoder(x_ND.shape[1], F, K).standardize(x_ND)[0], Halves.of(texts)
        return halves, z_ND, probed(z_ND, halves)[1:]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """See `measured`."""
        return measured(cell, self.data)

    def best(self, trainer: str, architecture: str) -> Tuned:
        """See `tuned`."""
        return tuned(trainer, architecture, self.measure)

    def recovered(self, cell: Cell) -> dict[str, Any]:
        """Figures of a training, and the cross-entropy it recovers."""
        figures = self.measure(cell)
        recovered = self.evaluator.cross_entropy(trained(cell))["ce_loss_recovered"]
        return cell._asdict() | figures | {"ce_loss_recovered": recovered}


def quality(bench: Bench, architecture: str) -> list[dict[str, Any]]:
    """Each side's tuned trainings over seeds."""
    found = []
    for trainer in (OURS, THEIRS):
        best = bench.best(trainer, architecture)
        for seed in SEEDS:
            figures = bench.recovered(best.cell._replace(seed=seed))
            found.append(figures | {"at_k": best.at_k(figures), "slope": best.slope})
    return found


def frontier(bench: Bench, architecture: str) -> list[dict[str, Any]]:
    """Ours with fewer and with more active features, at the learning rate of `quality`, one seed."""
    best = bench.best(OURS, architecture).cell
    power = AIMED[architecture][1] if architecture in AIMED else -1.0
    scaled = (best.sparsity * (K / k) ** power for k in SPARSITIES)
    return [bench.recovered(best._replace(sparsity=float(f"{sparsity:.3g}"))) for sparsity in scaled]


def concepts(bench: Bench, architecture: str) -> list[dict[str, Any]]:
    """On the concepts of Python: F1 of the best feature, how many a concept takes, and how much of it is absorbed."""
    halves, z_ND, (directions_CD, called_NC) = bench.concepts
    best, found = bench.best(OURS, architecture).cell, []
    for seed in SEEDS:
        bench.measure(cell := best._replace(seed=seed))
        sae = trained(cell)
        encoded = sae.encode(z_ND)
        features, rows = Sparse(encoded.values, encoded.indices, F), []
        for c, probe in enumerate(zip(directions_CD, called_NC.T, strict=True)):
            union = union_of(features, halves, c)
            of_all = absorbed(features, sae.W_dec, halves, c, union.features[: union.needed], probe)
            of_best = absorbed(features, sae.W_dec, halves, c, union.features[:1], probe)
            rows.append((union.f1[0] if union.f1 else 0.0, union.needed, of_all or 0.0, of_best or 0.0))
        names = "f1 of the best feature", "features a concept", "absorbed", "absorbed beside the best"
        means = (statistics.mean(column) for column in zip(*rows, strict=True))
        found.append({"architecture": architecture, "seed": seed} | dict(zip(names, means, strict=True)))
    return found


def hierarchies(bench: Bench, architecture: str) -> list[dict[str, Any]]:
    """Of planted hierarchies: how often parents are absorbed."""
    return [hierarchy.figures(architecture, seed) for seed in SEEDS]


def times(bench: Bench, architecture: str) -> dict[str, Any]:
    """Median seconds of a step of each side, in turns, on autoencoders that were trained for some steps before."""
    sparsity = FIRST_COEFFICIENT.get(architecture, K)
    ours, theirs = (Cell(trainer, architecture, sparsity, FIRST_RATE, SEEDS[0]) for trainer in (OURS, THEIRS))
    standardize = SparseAutoencoder(bench.data.train_ND.shape[1], F, K).standardize
    batches = [standardize(x)[0] for x in bench.data.train_ND.split(BATCH)]
    trainer = our_trainer(ours, batches[0])
    steps = {
        OURS: partial(trainer.step, learning_rate=ours.rate),
        THEIRS: their_trainer(theirs, iter(()), batches[0].shape[1]).step,
    }
    seconds: dict[str, list[float]] = {trainer: [] for trainer in steps}
    for x in batches[: SETTLING + TIMED]:
        for name, step in steps.items():
            begin = time.perf_counter()
            step(x)
            seconds[name].append(time.perf_counter() - begin)
    timed = [each[SETTLING:] for each in seconds.values()]
    ratio = statistics.median(t / o for o, t in zip(*timed, strict=True))
    return {"seconds": dict(zip(seconds, map(statistics.median, timed), strict=True)), "ratio": ratio}


PARTS = {part.__name__: part for part in (quality, frontier, times, concepts, hierarchies)}


def main() -> None:
    """Make the parts and architectures that are named, or all; save them with those made before."""
    torch.set_num_threads(1)
    bench, path = Bench(), FOLDER / "results.json"
    asked = [name for name in PARTS if name in sys.argv] or list(PARTS)
    chosen = [name for name in ARCHITECTURES if name in sys.argv] or ARCHITECTURES
    del sys.argv[1:]  # the result is of all parts, and says so
    for architecture in chosen:
        for name in asked:
            if name in ("concepts", "hierarchies") and architecture in PENALIZED:
                continue
            rows = PARTS[name](bench, architecture)
            print(name, architecture, rows, flush=True)
            results = json.loads(path.read_text()) if path.exists() else {name: {} for name in PARTS}
            results[name][architecture] = rows
            path.write_text(json.dumps(results))
            save("architectures", results)


if __name__ == "__main__":
    main()
