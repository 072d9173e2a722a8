"""Train a sparse autoencoder on the residuals of a layer of a Mistral: `python train.py [NAME=value ...]`.

Text becomes tokens, tokens become residuals, residuals a sparse autoencoder in RUN_DIR/sae, in SAE Lens's format. The
constants are in config.py; where some are lists, `K="[16, 32]"`, all combinations are trained on the same pass of the
model. A run that was stopped continues where it was when it is started again.
"""

import config
from mistral_sae import cli, constants

if __name__ == "__main__":
    constants.start("train", config)  # the first line, before the imports below take their seconds

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mistral_sae.data.activations import Batch, Stream, sent_to, shuffled_streams
from mistral_sae.data.documents import Skipped
from mistral_sae.data.place import Place
from mistral_sae.data.stored import StoredResiduals
from mistral_sae.data.tokens import Corpus, prefetch, shuffle
from mistral_sae.defaults import Filled, fill, fill_grid, shown
from mistral_sae.distributed import Mesh, joined
from mistral_sae.explain.figures import plot_sweep, plot_training
from mistral_sae.files import locked, write_text
from mistral_sae.loading import sae_device_of
from mistral_sae.model.language_model import LanguageModel, device_and_dtype, load_model
from mistral_sae.sae import resume, trackers
from mistral_sae.sae.cfg import Metadata, hook_name
from mistral_sae.sae.evaluate import Evaluator, as_held_out, summary, table
from mistral_sae.sae.grid import Grid, Member
from mistral_sae.sae.memory import free_memory, row_bytes, training_needs, wire_plan
from mistral_sae.sae.trainer import Trainer

ORDER = 0  # by which text is shuffled whatever the SEED, so that autoencoders of other seeds go through the same


def main() -> None:
    """Plan, and run if no other train.py is at work in RUN_DIR."""
    if config.STATUS:
        for line in resume.status(Path(config.RUN_DIR or fill(config)[0].RUN_DIR)):
            print(line)
        return
    corpus = replace(Corpus.of(config), seed=ORDER)
    with joined(config.MESH, device_and_dtype(config.DEVICE, config.DTYPE)[0].type, config.DRY_RUN) as mesh:
        config.DEVICE = mesh.device or config.DEVICE
        is_placed = config.SAE_DEVICE is None or mesh.sizes == (1, 1)
        cli.expect("SAE_DEVICE", config.SAE_DEVICE, is_placed, "None on a mesh, whose processes have a DEVICE each")
        with mesh.ranks.first_alone():
            grid, filled, last_layer, store = make_plan(corpus, mesh)
        text = asdict(corpus) | {"corpus": corpus.fingerprint()}
        for each in grid:
            each.run = new_run(text, filled, each)
        with nullcontext("") if config.DRY_RUN or cli.rank() else locked(grid.run_dir, resume.LOCK) as note:
            if note:
                print(note)
            grid.find_checkpoints(config.RESUME)
            if not config.DRY_RUN:
                train_and_evaluate(corpus, filled, grid, last_layer, store, mesh)


def train_and_evaluate(
    corpus: Corpus, filled: Filled, grid: Grid, last_layer: int | None, store: StoredResiduals | None, mesh: Mesh
) -> None:
    """The run, from the model's loading to the figures of the finished autoencoders; goes on from checkpoints found."""
    print(f"\nloading the model{'' if last_layer is None else f' up to layer {last_layer}'}, and held-out text")
    with mesh.ranks.first_alone():
        model = open_model(last_layer)
    held_out = corpus.held_out_rows(model.tokenizer, filled.EVALUATION_ROWS, config.EVALUATION_STRIDE)
    evaluators = evaluators_of(grid, model, held_out, filled)
    for each in grid:
        with cli.room_for("the autoencoder", "lower D_HIDDEN, or MOMENTS_DTYPE to bfloat16"):
            each.trainer = Trainer(each.config, sae_device_of(config), mesh=mesh)
        hook, length, each.run.model = hook_name(each.layer), config.CONTEXT_LENGTH, model.fingerprint(each.layer)
        each.metadata = Metadata(model.name, hook, each.layer, True, length, config.DATA_PATH, each.run.model)
    if grid.start():
        print(f"continuing after step {grid.step:,}")
    start = Place.of(grid.members[0].run.stream)  # where the text goes on

    skipped = Skipped()
    streams = [Stream(each.layer, each.config.seed) for each in grid]
    different = list(dict.fromkeys(streams))
    sizes: dict = {"batch_size": filled.BATCH_SIZE, "buffer_tokens": filled.BUFFER_TOKENS, "start": start}
    if store:
        if grid.step < grid.steps:
            with mesh.ranks.first_alone():
                store.fill(corpus, model, filled.ROWS_PER_FORWARD)
        batches = store.batches(different, **sizes)
    else:
        rows = corpus.rows(model.tokenizer, held_out=False, start=start, skipped=skipped)
        rows = shuffle(prefetch(rows, depth=filled.SHUFFLE_ROWS), filled.SHUFFLE_ROWS, ORDER, start)
        sizes |= {"rows_per_forward": filled.ROWS_PER_FORWARD, "ranks": mesh.ranks}
        batches = shuffled_streams(rows, model, different, **sizes)
    batches = sent_to(batches, sae_device_of(config))
    for each, stream in zip(grid, streams, strict=True):
        each.stream = different.index(stream)
    train(grid, batches, evaluators, filled, mesh)
    if skipped.count:
        print(skipped.summary())

    finished = {each.name: each.finish() for each in grid}
    if model.last_layer is not None:
        del batches, model, evaluators  # with the moments this makes room for the whole model
        gc.collect()
        evaluators = evaluators_of(grid, open_model(), held_out, filled)
    print(f"evaluating on {len(held_out)} held-out rows of {config.CONTEXT_LENGTH} tokens")
    for each in grid:
        sae, density_F, dead_fraction = finished[each.name]
        with room_for_evaluating():
            evaluation = evaluators[each.layer](sae) | {"dead_fraction": dead_fraction}
        each.point.figures = evaluation
        if not cli.rank():
            write_text(each.folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        plot_training(each.folder / "training.png", each.run.history, evaluation, density_F)
    print_results(grid)


def print_results(grid: Grid) -> None:
    """The figures of the finished autoencoder, or of all of a grid, and where they are; Failed if some were stopped."""
    run_dir, points = grid.run_dir, grid.points
    if grid.is_single:
        print(f"\n{summary(points[0].figures)}\n")
        print(f"autoencoder  {run_dir / 'sae'} (SAE Lens's format)")
        print(f"curves       {run_dir / 'training.png'}")
        print(f"figures      {run_dir / 'evaluation.json'} and {run_dir / 'metrics.jsonl'}")
        return
    resume.write_points(run_dir, points)
    plot_sweep(run_dir / "sweep.png", [point.model_dump() for point in points if point.figures])
    print(f"\n{table({point.name: point.figures for point in points if point.figures})}\n")
    print(f"autoencoders {run_dir / points[0].name / 'sae'} and so on (SAE Lens's format)")
    print(f"curves       {run_dir / 'sweep.png'}, and training.png of each")
    print(f"figures      {run_dir / 'sweep.json'}, and evaluation.json and metrics.jsonl of each")
    if stopped := [point.name for point in points if point.stopped]:
        raise cli.Failed(f"{', '.join(stopped)} exploded and was stopped: {run_dir / 'sweep.json'} says when")


def make_plan(corpus: Corpus, mesh: Mesh) -> tuple[Grid, Filled, int | None, StoredResiduals | None]:
    """Print what the run will do and need; raises UserError if it cannot.

    Returns the autoencoders before their first step; the constants that all have in common, none of which is left to
    compute; the last layer to load (None, all of the model, where it has room); and the residuals on disk, if it is to
    make use of some.
    """
    constants, spec, computed = fill_grid(config)
    filled, last = next(iter(constants.values())), spec.n_layers - 1
    for each in constants.values():
        cli.expect("TARGET_LAYER", each.TARGET_LAYER, each.TARGET_LAYER <= last, f"0 to {last}, of {spec.name}")
    grid = Grid.of(constants, spec.d_model)
    device, dtype = device_and_dtype(config.DEVICE, config.DTYPE)
    sae_device, last_layer = sae_device_of(config), None
    layers, streams = {each.layer for each in grid}, {(each.layer, each.config.seed) for each in grid}
    sizes: dict = {"layers": len(layers), "streams": len(streams), "dtype": dtype, "on_cpu": sae_device.type == "cpu"}
    needs = partial(training_needs, [each.config for each in grid], spec, mesh=mesh.sizes, **sizes)
    where = str(device), str(sae_device), {str(each): free_memory(str(each)) for each in (device, sae_device)}
    plan = needs(last_layer=last_layer).plans(*where)
    if not plan.fits:
        last_layer = max(layers)
        plan = needs(last_layer=last_layer).plans(*where)
    print(f"model     {spec.n_layers} layers, width {spec.d_model}, {spec.parameters() / 1e6:,.1f}M parameters")
    print(f"engine    {spec.run_by()}")
    hooks = ", ".join(map(hook_name, sorted(layers)))
    print(f"layer     {', '.join(map(str, sorted(layers)))} of 0 to {last} ({hooks})")
    print(f"corpus    {corpus.check()}")
    print(f"tokens    {filled.TRAIN_TOKENS:,} in {grid.steps:,} steps of {filled.BATCH_SIZE:,}")
    if grid.is_single:
        print(f"features  {filled.D_HIDDEN:,}, {grid.members[0].config.active()}")
    else:
        print(f"grid      {len(constants)} autoencoders, on one pass of the model\n{grid}")
    if computed:
        print(f"computed  from the model and the device\n{shown(computed)}")
    rows, free = row_bytes(filled.SHUFFLE_ROWS, config.CONTEXT_LENGTH), free_memory("cpu")
    fitting = f"rows that fit in the {cli.size_of(free)} of main memory that are free: they take {cli.size_of(rows)}"
    cli.expect("SHUFFLE_ROWS", filled.SHUFFLE_ROWS, rows <= free, fitting)
    print(f"rows      {filled.SHUFFLE_ROWS:,} of tokens shuffled together, {cli.size_of(rows)} of main memory")
    print(plan)
    for line in wire_plan([each.config for each in grid], mesh.sizes, dtype):
        print(line)
    if not plan.fits:
        placed = "another DEVICE or SAE_DEVICE" if mesh.sizes == (1, 1) else "more shards in MESH"
        raise cli.UserError(
            "the run needs more memory than is free: lower D_HIDDEN, BUFFER_TOKENS or ROWS_PER_FORWARD, "
            f"set MOMENTS_DTYPE=bfloat16, or use {placed}"
        )
    if store := StoredResiduals.of(filled, corpus, layers, spec.d_model, dtype):
        print(f"stored    {store.plan()}")
    trackers.check(config.LOG_TO)
    return grid, filled, last_layer, store


def open_model(last_layer: int | None = None) -> LanguageModel:
    """The language model, or its embedding and layers 0 to `last_layer`."""
    with cli.room_for("the language model", "lower TARGET_LAYER, or DTYPE to bfloat16"):
        return load_model(
            config.MISTRAL_MODEL_PATH,
            last_layer=last_layer,
            device=config.DEVICE,
            dtype=config.DTYPE,
            engine=config.ENGINE,
            exclude_tokens=config.EXCLUDE_TOKENS,
        )


def room_for_evaluating() -> AbstractContextManager:
    """Where memory does not suffice for it, say what to lower."""
    return cli.room_for("evaluating", "lower ROWS_PER_FORWARD")


def evaluators_of(grid: Grid, model: LanguageModel, held_out: torch.Tensor, filled: Filled) -> dict[int, Evaluator]:
    """What measures the autoencoders of each layer."""
    return {each.layer: Evaluator(model, held_out, each.layer, filled.ROWS_PER_FORWARD) for each in grid}


def new_run(text: dict[str, Any], filled: Filled, member: Member) -> resume.Run:
    """A run before its first step: the constants that shape it, and those that may change when it goes on."""
    device, dtype = device_and_dtype(config.DEVICE, config.DTYPE)
    shaping = ["EXCLUDE_TOKENS", "SHUFFLE_ROWS", "LOG_EVERY", "ACTIVATIONS_TOKENS"]
    free = [
        "MISTRAL_MODEL_PATH", "ENGINE", "ACTIVATIONS_PATH", "SAE_DEVICE", "CHECKPOINT_EVERY", "EVALUATIONS",
        "EVALUATION_ROWS", "EVALUATION_STRIDE",
    ]  # fmt: skip
    settings = text | asdict(member.config) | {name.lower(): getattr(filled, name) for name in shaping}
    settings |= {"target_layer": member.layer, "dtype": str(dtype).removeprefix("torch.")}
    others = {name.lower(): getattr(filled, name) for name in free} | {"device": str(device)}
    # A rate is what one lowers after a loss that exploded, and rows where the device is out of memory; the fingerprint
    # tells a corpus wherever it lies
    others |= {name: settings.pop(name) for name in ("learning_rate", "rows_per_forward", "data_path")}
    return resume.Run.new(settings, others)


def train(grid: Grid, batches: Iterator[Batch], evaluators: dict[int, Evaluator], filled: Filled, mesh: Mesh) -> None:
    """The loop: a batch of residuals a step, and the log, the evaluations and the checkpoints at their intervals."""
    step, steps, size, model = grid.step, grid.steps, filled.BATCH_SIZE, next(iter(evaluators.values())).model
    evaluate_at = {steps * i // filled.EVALUATIONS for i in range(1, filled.EVALUATIONS)}
    started = time.monotonic() - grid.members[0].run.seconds
    tracked = trackers.tracked(config.LOG_TO, grid.run_dir, {each.name: each.run for each in grid})
    bar = cli.Progress(desc="training", total=steps * size, initial=step * size, unit=" tokens", unit_scale=True)
    with tracked as track, cli.stoppable() as stop, bar as progress:
        for x_SBD, place in islice(batches, steps - step):
            with cli.room_for("a step", "lower BATCH_SIZE, AUXK_FEATURES or D_HIDDEN"):
                grid.train(x_SBD, step)
            step += 1
            progress.update(size)

            last = step == steps
            log_now = step % config.LOG_EVERY == 0 or step in evaluate_at or last
            stopping = mesh.agree(stop(), step, x_SBD)
            save_now = step % filled.CHECKPOINT_EVERY == 0 or last or stopping
            if log_now or save_now:
                grid.measure(x_SBD, step, time.monotonic() - started, bool(save_now), model.check_finite)
            if log_now:
                log(grid, step, evaluators if step in evaluate_at else {}, track)
                progress.set_postfix_str(grid.progress())
            if save_now:
                seconds = 0.0 if log_now else time.monotonic() - started
                grid.save(step, place._asdict(), seconds, config.KEEP_CHECKPOINTS)
                if stopping:
                    path = resume.path_of_step(grid.members[0].folder, step)
                    raise stopping(f"after step {step:,}: started again, it goes on from {path}")
            if log_now:  # neither the evaluation nor the checkpoint counts towards the next ones
                started = time.monotonic()


def log(grid: Grid, step: int, evaluators: dict[int, Evaluator], track: Callable[[str, dict[str, Any]], None]) -> None:
    """Write each one's record, with held-out figures where there are evaluators."""
    for each in grid:
        if step % config.LOG_EVERY == 0:  # and at no other time: it shapes the result
            each.trainer.find_dead()
            each.record["dead"] = each.trainer.n_dead
        if evaluators:
            with room_for_evaluating():
                each.record |= as_held_out(evaluators[each.layer](each.trainer.sae))
        each.log()
        track(each.name, each.record)


if __name__ == "__main__":
    cli.run(
        main,
        out_of_memory="BATCH_SIZE, BUFFER_TOKENS, ROWS_PER_FORWARD or D_HIDDEN",
        stopped="early: started again, it goes on from what is saved",
    )
