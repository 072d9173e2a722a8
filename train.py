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
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_sae.data.activations import Batch, shuffled_batches
from mistral_sae.data.documents import Skipped
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Corpus, prefetch, shuffle
from mistral_sae.defaults import Filled, fill, shown
from mistral_sae.explain.figures import plot_training
from mistral_sae.files import append_line, locked, write_text
from mistral_sae.model.language_model import LanguageModel, device_and_dtype, load_model
from mistral_sae.sae.cfg import Metadata, hook_name
from mistral_sae.sae.checkpoint import save_sae
from mistral_sae.sae.evaluate import Evaluator, reconstruction, summary
from mistral_sae.sae.memory import free_memory, memory_plan, row_bytes
from mistral_sae.sae.trainer import Figures, TrainConfig, Trainer, load_checkpoint, save_checkpoint

EXPLODED = 10.0  # normalized MSE: ten times that of predicting the mean


def main() -> None:
    """Plan, and run if no other train.py is at work in RUN_DIR."""
    corpus = Corpus.of(config)
    filled, training, last_layer = make_plan(corpus)
    if config.DRY_RUN:
        return
    with locked(Path(filled.RUN_DIR), ".train.lock") as note:
        if note:
            print(note)
        train_and_evaluate(corpus, filled, training, last_layer)


def train_and_evaluate(corpus: Corpus, filled: Filled, training: TrainConfig, last_layer: int | None) -> None:
    """The run, from the model's loading to the figures of the finished autoencoder."""
    run_dir, layer, rows_at_once = Path(filled.RUN_DIR), filled.TARGET_LAYER, filled.ROWS_PER_FORWARD
    print(f"\nloading the model{'' if last_layer is None else f' up to layer {last_layer}'}, and held-out text")
    model = open_model(last_layer)
    held_out = corpus.held_out_rows(model.tokenizer, filled.EVALUATION_ROWS, config.EVALUATION_STRIDE)
    evaluate = Evaluator(model, held_out, layer, rows_at_once)
    with cli.room_for("the autoencoder", "lower D_HIDDEN, or MOMENTS_DTYPE to bfloat16"):
        trainer = Trainer(training, model.device)
    history, start = start_or_resume(trainer, corpus, run_dir)

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
    hook, length, fingerprint = hook_name(layer), config.CONTEXT_LENGTH, model.fingerprint(layer)
    metadata = Metadata(model.name, hook, layer, True, length, config.DATA_PATH, fingerprint)
    train(trainer, history, batches, evaluate, filled, partial(save, trainer, metadata, corpus, run_dir))
    if skipped.count:
        print(skipped.summary())

    sae, density_F = trainer.sae, trainer.counts.density_F()
    dead_fraction = len(trainer.find_dead()) / training.d_hidden
    if model.last_layer is not None:
        del trainer, batches, model, evaluate  # with the moments this makes room for the whole model
        gc.collect()
        evaluate = Evaluator(open_model(), held_out, layer, rows_at_once)
    print(f"evaluating on {len(held_out)} held-out rows of {config.CONTEXT_LENGTH} tokens")
    with room_for_evaluating():
        evaluation = evaluate(sae) | {"dead_fraction": dead_fraction}
    write_text(run_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    plot_training(run_dir / "training.png", history, evaluation, density_F)
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
    training, last_layer = TrainConfig.of(config, spec.d_model), None
    plan_for = partial(memory_plan, training, spec, dtype=dtype, device=str(device), free=free_memory(str(device)))
    plan = plan_for(last_layer=last_layer)
    if not plan.fits:
        last_layer = layer
        plan = plan_for(last_layer=last_layer)
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
    print(f"memory    on {device}, by part\n{plan}")
    if not plan.fits:
        raise cli.UserError(
            "the run needs more memory than is free: lower D_HIDDEN, BUFFER_TOKENS or ROWS_PER_FORWARD, "
            "set MOMENTS_DTYPE=bfloat16, or use another DEVICE"
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


def start_or_resume(trainer: Trainer, corpus: Corpus, run_dir: Path) -> tuple[list[dict[str, Any]], Place]:
    """Bring the trainer to the checkpoint in `run_dir`, if there is one; returns the log and where the text goes on."""
    checkpoint, start = run_dir / "checkpoint.safetensors", BEGINNING
    history: list[dict[str, Any]] = []
    if config.RESUME and checkpoint.exists():
        history, stream = load_checkpoint(checkpoint, trainer, shaping(corpus))
        start = Place.of(stream)
        print(f"continuing after step {history[-1]['step']:,}")
    else:
        for stale in (checkpoint, run_dir / "sae/cfg.json", run_dir / "evaluation.json", run_dir / "training.png"):
            stale.unlink(missing_ok=True)
    write_text(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    return history, start


def shaping(corpus: Corpus) -> dict[str, Any]:
    """What a continued run must share with its checkpoint, beside the sizes of the training."""
    names = ["MISTRAL_MODEL_PATH", "EXCLUDE_TOKENS", "TARGET_LAYER", "DTYPE", "SHUFFLE_ROWS", "LOG_EVERY"]
    return asdict(corpus) | {name.lower(): getattr(config, name) for name in names}


def train(
    trainer: Trainer,
    history: list[dict[str, Any]],
    batches: Iterator[Batch],
    evaluate: Evaluator,
    filled: Filled,
    save: Callable[[list[dict[str, Any]], Place], None],
) -> None:
    """The loop: a batch of residuals a step, and the log, the evaluations and the checkpoints at their intervals."""
    training, step, run_dir = trainer.config, history[-1]["step"] if history else 0, Path(filled.RUN_DIR)
    evaluate_at = {training.steps * i // filled.EVALUATIONS for i in range(1, filled.EVALUATIONS)}
    figures, started = [], time.monotonic()
    seen, total = step * training.batch_size, training.steps * training.batch_size
    with cli.Progress(desc="training", total=total, initial=seen, unit=" tokens", unit_scale=True) as progress:
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

            save_now = step % filled.CHECKPOINT_EVERY == 0 or step == training.steps
            if step % config.LOG_EVERY == 0 or step in evaluate_at or save_now:
                # The mean hides a loss that exploded just now, and no loss has seen the weights that are to be saved
                latest = reconstruction(trainer.sae, [x]).normalized_mse if save_now else figures[-1][1].item()
                record = record_of(trainer, step, figures, time.monotonic() - started)
                if record.pop("finite") < 1:
                    evaluate.model.check_finite(torch.tensor(math.nan), f"residuals of layer {filled.TARGET_LAYER}")
                check_loss(record["normalized_mse"], latest, record["loss"], step, run_dir)
                if step % config.LOG_EVERY == 0:  # and at no other time: it shapes the result
                    record["dead"] = len(trainer.find_dead())
                if step in evaluate_at:
                    with room_for_evaluating():
                        record |= as_held_out(evaluate(trainer.sae))
                history.append(record)
                append_line(run_dir / "metrics.jsonl", record)
                progress.set_postfix_str(f"normalized MSE {record['normalized_mse']:.3f}, dead {record['dead']}")
                figures = []
            if save_now:
                save(history, place)
            if not figures:  # neither the evaluation nor the checkpoint counts towards the next ones
                started = time.monotonic()


def record_of(trainer: Trainer, step: int, figures: list[Tensor], seconds: float) -> dict[str, Any]:
    """A line of the log: the means of the steps since the last one."""
    return {
        "step": step,
        "tokens": step * trainer.config.batch_size,
        **dict(zip(Figures._fields, torch.stack(figures).mean(dim=0).tolist(), strict=True)),
        "dead": len(trainer.dead),
        "learning_rate": trainer.config.learning_rate_at(step - 1),
        "tokens_per_second": len(figures) * trainer.config.batch_size / seconds,
    }


def as_held_out(figures: dict[str, float]) -> dict[str, float]:
    """Held-out figures under names that a training record does not have."""
    return {key if key.startswith(("ce_", "kl")) else f"held_out_{key}": value for key, value in figures.items()}


def check_loss(normalized_mse: float, latest: float, loss: float, step: int, run_dir: Path) -> None:
    """Raise Failed if a normalized MSE is far above that of predicting the mean, or the loss no number."""
    worst = latest if not latest <= EXPLODED else normalized_mse  # a NaN is not smaller, either
    if not (worst <= EXPLODED and math.isfinite(loss)):
        last, do = run_dir / "checkpoint.safetensors", "start it again with a lower LEARNING_RATE"
        kept = (
            f"; it goes on from the last good checkpoint, {last}" if last.exists() else ": there is no checkpoint yet"
        )
        raise cli.Failed(
            f"the normalized MSE is {worst:.3g}, the loss {loss:.3g} at step {step:,}, expected below {EXPLODED:g}; "
            f"{do}{kept}"
        )


def save(
    trainer: Trainer,
    metadata: Metadata,
    corpus: Corpus,
    run_dir: Path,
    history: list[dict[str, Any]],
    place: Place,
) -> None:
    """Write the autoencoder in SAE Lens's format, and the checkpoint from which the run can continue."""
    save_sae(run_dir / "sae", trainer.sae, metadata, trainer.counts.statistics())
    save_checkpoint(run_dir / "checkpoint.safetensors", trainer, shaping(corpus), history, place._asdict())


if __name__ == "__main__":
    cli.run(main, out_of_memory="BATCH_SIZE, BUFFER_TOKENS, ROWS_PER_FORWARD or D_HIDDEN")
