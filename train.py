"""Train a TopK sparse autoencoder on the residuals of one layer of a Mistral: `python train.py [NAME=value ...]`.

Text becomes tokens, tokens become residuals, residuals a sparse autoencoder in RUN_DIR/sae, in SAE Lens's format. The
constants are in config.py. A run that was stopped continues where it was when it is started again.
"""

import config
from mistral_sae import cli

if __name__ == "__main__":
    cli.start("train", config)  # the first line, before the imports below take their seconds

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from mistral_sae.data.activations import Batch, sent_to, shuffled_batches
from mistral_sae.data.documents import Skipped
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Corpus, prefetch, shuffle
from mistral_sae.defaults import Filled, fill, shown
from mistral_sae.explain.figures import plot_training
from mistral_sae.files import append_line, locked, write_text
from mistral_sae.loading import sae_device_of
from mistral_sae.model.language_model import LanguageModel, device_and_dtype, load_model
from mistral_sae.sae import resume
from mistral_sae.sae.cfg import Metadata, hook_name
from mistral_sae.sae.checkpoint import save_sae
from mistral_sae.sae.evaluate import Evaluator, as_held_out, reconstruction, summary
from mistral_sae.sae.memory import free_memory, row_bytes, training_needs
from mistral_sae.sae.trainer import TrainConfig, Trainer

EXPLODED = 10.0  # normalized MSE: ten times that of predicting the mean


def main() -> None:
    """Plan, and run if no other train.py is at work in RUN_DIR."""
    if config.STATUS:
        for line in resume.status(Path(config.RUN_DIR or fill(config)[0].RUN_DIR)):
            print(line)
        return
    corpus = Corpus.of(config)
    filled, training, last_layer = make_plan(corpus)
    run, run_dir = new_run(corpus, training), Path(filled.RUN_DIR)
    with nullcontext("") if config.DRY_RUN else locked(run_dir, resume.LOCK) as note:
        if note:
            print(note)
        found = resume.find_checkpoints(run_dir, run, config.RESUME)
        if not config.DRY_RUN:
            train_and_evaluate(corpus, filled, training, last_layer, run, found)


def train_and_evaluate(
    corpus: Corpus, filled: Filled, training: TrainConfig, last_layer: int | None, run: resume.Run, found: list[Path]
) -> None:
    """The run, from the model's loading to the figures of the finished autoencoder; goes on from a checkpoint found."""
    run_dir, layer, rows_at_once = Path(filled.RUN_DIR), filled.TARGET_LAYER, filled.ROWS_PER_FORWARD
    print(f"\nloading the model{'' if last_layer is None else f' up to layer {last_layer}'}, and held-out text")
    model = open_model(last_layer)
    held_out = corpus.held_out_rows(model.tokenizer, filled.EVALUATION_ROWS, config.EVALUATION_STRIDE)
    evaluate = Evaluator(model, held_out, layer, rows_at_once)
    with cli.room_for("the autoencoder", "lower D_HIDDEN, or MOMENTS_DTYPE to bfloat16"):
        trainer = Trainer(training, sae_device_of(config))
    hook, length, run.model = hook_name(layer), config.CONTEXT_LENGTH, model.fingerprint(layer)
    metadata = Metadata(model.name, hook, layer, True, length, config.DATA_PATH, run.model)
    save_run = partial(save, trainer, run, metadata, run_dir)
    start = start_or_resume(trainer, run, found, run_dir)
    if run.step == training.steps:  # nothing but its evaluation is left
        save_sae(run_dir / "sae", trainer.sae, metadata, trainer.counts.statistics())

    skipped = Skipped()
    rows = corpus.rows(model.tokenizer, held_out=False, start=start, skipped=skipped)
    batches = shuffled_batches(
        shuffle(prefetch(rows, depth=filled.SHUFFLE_ROWS), filled.SHUFFLE_ROWS, config.SEED, start),
        model,
        layer,
        batch_size=filled.BATCH_SIZE,
        buffer_tokens=filled.BUFFER_TOKENS,
        rows_per_forward=rows_at_once,
        seed=config.SEED,
        start=start,
    )
    batches = sent_to(batches, trainer.sae.W_dec.device)
    train(trainer, run, batches, evaluate, filled, save_run)
    if skipped.count:
        print(skipped.summary())

    sae, density_F = trainer.sae, trainer.counts.density_F()
    dead_fraction = len(trainer.find_dead()) / training.d_hidden
    if model.last_layer is not None:
        del trainer, save_run, batches, model, evaluate  # with the moments this makes room for the whole model
        gc.collect()
        evaluate = Evaluator(open_model(), held_out, layer, rows_at_once)
    print(f"evaluating on {len(held_out)} held-out rows of {config.CONTEXT_LENGTH} tokens")
    with room_for_evaluating():
        evaluation = evaluate(sae) | {"dead_fraction": dead_fraction}
    write_text(run_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    plot_training(run_dir / "training.png", run.history, evaluation, density_F)
    print(f"\n{summary(evaluation)}\n")
    print(f"autoencoder  {run_dir / 'sae'} (SAE Lens's format)")
    print(f"curves       {run_dir / 'training.png'}")
    print(f"figures      {run_dir / 'evaluation.json'} and {run_dir / 'metrics.jsonl'}")


def make_plan(corpus: Corpus) -> tuple[Filled, TrainConfig, int | None]:
    """Print what the run will do and need; raises UserError if it cannot.

    Returns the constants, none of which is left to compute, the sizes of the training, and the last layer to load:
    None, all of the model, where it has room.
    """
    filled, spec, computed = fill(config)
    layer, last = filled.TARGET_LAYER, spec.n_layers - 1
    cli.expect("TARGET_LAYER", layer, layer <= last, f"0 to {last}, of {spec.name}")
    device, dtype = device_and_dtype(config.DEVICE, config.DTYPE)
    sae_device = sae_device_of(config)
    training, last_layer = TrainConfig.of(config, spec.d_model), None
    needs = partial(training_needs, training, spec, dtype=dtype, on_cpu=sae_device.type == "cpu")
    where = str(device), str(sae_device), {str(each): free_memory(str(each)) for each in (device, sae_device)}
    plan = needs(last_layer=last_layer).plans(*where)
    if not plan.fits:
        last_layer = layer
        plan = needs(last_layer=last_layer).plans(*where)
    print(f"model     {spec.n_layers} layers, width {spec.d_model}, {spec.parameters() / 1e6:,.1f}M parameters")
    print(f"engine    {spec.run_by()}")
    print(f"layer     {layer} of 0 to {last} ({hook_name(layer)})")
    print(f"corpus    {corpus.check()}")
    print(f"tokens    {filled.TRAIN_TOKENS:,} in {training.steps:,} steps of {filled.BATCH_SIZE:,}")
    print(f"features  {filled.D_HIDDEN:,}, {training.active()}")
    if computed:
        print(f"computed  from the model and the device\n{shown(computed)}")
    rows, free = row_bytes(filled.SHUFFLE_ROWS, config.CONTEXT_LENGTH), free_memory("cpu")
    fitting = f"rows that fit in the {cli.size_of(free)} of main memory that are free: they take {cli.size_of(rows)}"
    cli.expect("SHUFFLE_ROWS", filled.SHUFFLE_ROWS, rows <= free, fitting)
    print(f"rows      {filled.SHUFFLE_ROWS:,} of tokens shuffled together, {cli.size_of(rows)} of main memory")
    print(plan)
    if not plan.fits:
        raise cli.UserError(
            "the run needs more memory than is free: lower D_HIDDEN, BUFFER_TOKENS or ROWS_PER_FORWARD, "
            "set MOMENTS_DTYPE=bfloat16, or use another DEVICE or SAE_DEVICE"
        )
    return filled, training, last_layer


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


def new_run(corpus: Corpus, training: TrainConfig) -> resume.Run:
    """A run before its first step: the constants that shape it, and those that may change when it goes on."""
    device, dtype = device_and_dtype(config.DEVICE, config.DTYPE)
    shaping = ["EXCLUDE_TOKENS", "TARGET_LAYER", "SHUFFLE_ROWS", "LOG_EVERY"]
    free = [
        "MISTRAL_MODEL_PATH",
        "ENGINE",
        "SAE_DEVICE",
        "CHECKPOINT_EVERY",
        "EVALUATIONS",
        "EVALUATION_ROWS",
        "EVALUATION_STRIDE",
    ]
    settings = asdict(corpus) | asdict(training) | {name.lower(): getattr(config, name) for name in shaping}
    settings |= {"corpus": corpus.fingerprint(), "dtype": str(dtype).removeprefix("torch.")}
    others = {name.lower(): getattr(config, name) for name in free} | {"device": str(device)}
    # A rate is what one lowers after a loss that exploded; the fingerprint tells a corpus wherever it lies
    others |= {name: settings.pop(name) for name in ("learning_rate", "data_path")}
    return resume.Run.new(settings, others)


def start_or_resume(trainer: Trainer, run: resume.Run, found: list[Path], run_dir: Path) -> Place:
    """Bring the trainer and the run to the newest whole checkpoint, or else set an earlier run aside.

    Returns where the text goes on.
    """
    if found:
        resume.load_checkpoint(found, trainer, run)
        print(f"continuing after step {run.step:,}")
    elif moved_to := resume.set_aside(run_dir):
        print(f"the earlier run is now in {moved_to}")
    write_text(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in run.history))
    return Place.of(run.stream) if found else BEGINNING


def train(
    trainer: Trainer, run: resume.Run, batches: Iterator[Batch], evaluate: Evaluator, filled: Filled,
    save: Callable[[], Path],
) -> None:  # fmt: skip
    """The loop: a batch of residuals a step, and the log, the evaluations and the checkpoints at their intervals."""
    training, step, run_dir = trainer.config, run.step, Path(filled.RUN_DIR)
    evaluate_at = {training.steps * i // filled.EVALUATIONS for i in range(1, filled.EVALUATIONS)}
    figures, started = list(torch.tensor(run.figures, device=trainer.dead.device)), time.monotonic() - run.seconds
    seen, total = step * training.batch_size, training.steps * training.batch_size
    bar = cli.Progress(desc="training", total=total, initial=seen, unit=" tokens", unit_scale=True)
    with cli.stoppable() as stop, bar as progress:
        for x, place in islice(batches, training.steps - step):
            if step == 0:
                trainer.initialize(x)
            if step == training.decay_step:  # from here on features move little
                trainer.forget_counts()
            torch.manual_seed(config.SEED * training.steps + step)  # bfloat16 moments are rounded at random
            with cli.room_for("a step", "lower BATCH_SIZE, AUXK_FEATURES or D_HIDDEN"):
                figures.append(torch.stack(trainer.step(x, training.learning_rate_at(step))))
            step += 1
            progress.update(len(x))

            last = step == training.steps
            log_now = step % config.LOG_EVERY == 0 or step in evaluate_at or last
            stopping = stop()
            save_now = step % filled.CHECKPOINT_EVERY == 0 or last or stopping
            if log_now or save_now:
                # The mean hides a loss that exploded just now, and no loss has seen the weights that are to be saved
                latest = reconstruction(trainer.sae, [x]).normalized_mse if save_now else figures[-1][1].item()
                record = trainer.record(step, figures, time.monotonic() - started)
                if record.pop("finite") < 1:
                    evaluate.model.check_finite(torch.tensor(math.nan), f"residuals of layer {filled.TARGET_LAYER}")
                check_loss(record["normalized_mse"], latest, record["loss"], step, run_dir)
            if log_now:
                if step % config.LOG_EVERY == 0:  # and at no other time: it shapes the result
                    record["dead"] = len(trainer.find_dead())
                if step in evaluate_at:
                    with room_for_evaluating():
                        record |= as_held_out(evaluate(trainer.sae))
                run.history.append(record)
                append_line(run_dir / "metrics.jsonl", record)
                progress.set_postfix_str(f"normalized MSE {record['normalized_mse']:.3f}, dead {record['dead']}")
                figures = []
            if save_now:
                run.step, run.stream, run.figures = step, place._asdict(), [each.tolist() for each in figures]
                run.seconds = time.monotonic() - started if figures else 0.0
                path = save()
                if stopping:
                    raise stopping(f"after step {step:,}: started again, it goes on from {path}")
            if not figures:  # neither the evaluation nor the checkpoint counts towards the next ones
                started = time.monotonic()


def check_loss(normalized_mse: float, latest: float, loss: float, step: int, run_dir: Path) -> None:
    """Raise Failed if a normalized MSE is far above that of predicting the mean, or the loss no number."""
    worst = latest if not latest <= EXPLODED else normalized_mse  # a NaN is not smaller, either
    if not (worst <= EXPLODED and math.isfinite(loss)):
        good, do = resume.checkpoints(run_dir), "start it again with a lower LEARNING_RATE"
        kept = f"; it goes on from the last good checkpoint, {good[0]}" if good else ": there is no checkpoint yet"
        raise cli.Failed(
            f"the normalized MSE is {worst:.3g}, the loss {loss:.3g} at step {step:,}, expected below {EXPLODED:g}; "
            f"{do}{kept}"
        )


def save(trainer: Trainer, run: resume.Run, metadata: Metadata, run_dir: Path) -> Path:
    """Write the checkpoint from which the run can continue, and the autoencoder in SAE Lens's format; returns where."""
    path = resume.save_checkpoint(run_dir, trainer, run, config.KEEP_CHECKPOINTS)
    save_sae(run_dir / "sae", trainer.sae, metadata, trainer.counts.statistics())
    return path


if __name__ == "__main__":
    cli.run(
        main,
        out_of_memory="BATCH_SIZE, BUFFER_TOKENS, ROWS_PER_FORWARD or D_HIDDEN",
        stopped="early: started again, it goes on from what is saved",
    )
