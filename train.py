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
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.tokens import Corpus, Skipped, prefetch, shuffle
from mistral_sae.explain.figures import plot_training
from mistral_sae.files import append_line, load_state, save_state, write_text
from mistral_sae.model import language_model as lm
from mistral_sae.sae import memory
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, save_sae
from mistral_sae.sae.evaluate import Ablated, ablated, cross_entropy, reconstruction
from mistral_sae.sae.trainer import Trainer

EXPLODED = 10.0  # normalized MSE: ten times that of predicting the mean
# What a continued run must share with its checkpoint
SHAPING = ["MISTRAL_MODEL_PATH", "ON_STANDIN", "TARGET_LAYER", "DTYPE", "DATA_PATH", "DATA_SPLIT", "TEXT_FIELD"]
SHAPING += ["CONTEXT_LENGTH", "HELD_OUT_FRACTION", "TRAIN_TOKENS", "D_HIDDEN", "K", "SEED", "BATCH_SIZE"]
SHAPING += ["WARM_UP_STEPS", "DECAY_FRACTION", "MAX_GRADIENT_NORM", "AUXK_COEFFICIENT", "K_AUX", "AUXK_FEATURES"]
SHAPING += ["DEAD_AFTER_TOKENS", "MOMENTS_DTYPE", "SHUFFLE_ROWS", "BUFFER_TOKENS", "ROWS_PER_FORWARD", "LOG_EVERY"]


def main() -> None:
    """Plan, load, train, evaluate."""
    corpus = Corpus.of(config)
    run_dir, last_layer = Path(config.RUN_DIR), make_plan(corpus)
    if config.DRY_RUN:
        return
    print(f"\nloading the model{'' if last_layer is None else f' up to layer {last_layer}'}, and held-out text")
    model = load_model(last_layer)
    held_out = corpus.held_out_rows(model.tokenizer, config.EVALUATION_ROWS, config.EVALUATION_STRIDE)
    trainer, history = start_or_resume(model, run_dir)
    skipped = Skipped()
    rows = corpus.rows(model.tokenizer, held_out=False, skipped=skipped)
    batches = shuffled_batches(
        shuffle(prefetch(rows, depth=config.SHUFFLE_ROWS), config.SHUFFLE_ROWS, config.SEED),
        model,
        config.TARGET_LAYER,
        batch_size=config.BATCH_SIZE,
        buffer_tokens=config.BUFFER_TOKENS,
        rows_per_forward=config.ROWS_PER_FORWARD,
        seed=config.SEED,
        skip_batches=history[-1]["step"] if history else 0,
    )
    without_layer = None
    if model.last_layer is None:
        without_layer = ablated(model, held_out, config.TARGET_LAYER, config.ROWS_PER_FORWARD)
    train(trainer, history, batches, model, held_out, without_layer, run_dir)
    if skipped.count:
        print(skipped.summary())

    sae, dead = trainer.sae, len(trainer.find_dead())
    del trainer, batches
    if model.last_layer is not None:
        del model  # with the moments it makes room for the whole of it
    gc.collect()
    if without_layer is None:
        model = load_model()
    print(f"evaluating on {len(held_out)} held-out rows of {config.CONTEXT_LENGTH} tokens")
    evaluation, density_F = evaluate(sae, held_out, model, without_layer)
    evaluation["dead_fraction"] = dead / sae.n_features
    write_text(run_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    plot_training(run_dir / "training.png", history, evaluation, density_F)
    print_results(evaluation, run_dir)


def train(
    trainer: Trainer,
    history: list[dict],
    batches: Iterator[Tensor],
    model: lm.LanguageModel,
    held_out: Tensor,
    without_layer: Ablated | None,
    run_dir: Path,
) -> None:
    """The loop: a batch of residuals a step, and the log, the evaluations and the checkpoints at their intervals."""
    steps, step = n_steps(), history[-1]["step"] if history else 0
    evaluate_at = {steps * i // config.EVALUATIONS for i in range(1, config.EVALUATIONS)}
    figures, started = [], time.monotonic()
    progress = tqdm(total=steps * config.BATCH_SIZE, initial=step * config.BATCH_SIZE, unit=" tokens", unit_scale=True)
    with progress:
        for x in islice(batches, steps - step):
            if step == 0:
                trainer.initialize(x, config.SEED)
            if step == int((1 - config.DECAY_FRACTION) * steps):  # from here on features move little
                trainer.forget_maximum()
            learning_rate = config.LEARNING_RATE * schedule(step, steps)
            torch.manual_seed(config.SEED * steps + step)  # bfloat16 moments are rounded at random
            figures.append(torch.stack(trainer.step(x, learning_rate)))
            step += 1
            progress.update(len(x))

            save_now = step % config.CHECKPOINT_EVERY == 0 or step == steps
            if step % config.LOG_EVERY == 0 or step in evaluate_at or save_now:
                loss, normalized_mse, auxk, l0, gradient_norm = torch.stack(figures).mean(dim=0).tolist()
                # The mean hides a loss that exploded just now, and no loss has seen the weights that are to be saved
                latest = reconstruction(trainer.sae, [x]).normalized_mse if save_now else figures[-1][1].item()
                if not (normalized_mse <= EXPLODED and latest <= EXPLODED and math.isfinite(loss)):  # NaN fails, too
                    raise exploded(step, max(normalized_mse, latest), run_dir)
                if step % config.LOG_EVERY == 0:  # and at no other time: it shapes the result
                    trainer.find_dead()
                record = {
                    "step": step,
                    "tokens": step * config.BATCH_SIZE,
                    "loss": loss,
                    "normalized_mse": normalized_mse,
                    "auxk": auxk,
                    "l0": l0,
                    "dead": len(trainer.dead),
                    "learning_rate": learning_rate,
                    "gradient_norm": gradient_norm,
                    "tokens_per_second": len(figures) * config.BATCH_SIZE / (time.monotonic() - started),
                }
                if step in evaluate_at:
                    record |= as_held_out(evaluate(trainer.sae, held_out, model, without_layer)[0])
                history.append(record)
                append_line(run_dir / "metrics.jsonl", record)
                progress.set_postfix_str(f"normalized MSE {normalized_mse:.3f}, dead {len(trainer.dead)}")
                figures = []
            if save_now:
                save(trainer, history, model, run_dir)
            if not figures:  # neither the evaluation nor the checkpoint counts towards the next ones
                started = time.monotonic()


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, plateau, linear decay."""
    return min(1.0, (step + 1) / max(1, config.WARM_UP_STEPS), (steps - step) / (config.DECAY_FRACTION * steps))


def exploded(step: int, normalized_mse: float, run_dir: Path) -> cli.Failed:
    """The end of a run whose loss is no number, or far above that of predicting the mean."""
    last = run_dir / "checkpoint.safetensors"
    kept = f"the last good checkpoint is kept in {last}" if last.exists() else "there was no checkpoint yet"
    return cli.Failed(
        f"the normalized MSE is {normalized_mse:.3g} at step {step:,}, expected below {EXPLODED:g}; {kept}; "
        "start it again with a lower LEARNING_RATE, and it goes on from there"
    )


# ---- plan ----


def make_plan(corpus: Corpus) -> int | None:
    """Print what the run will do and need; raises UserError if it cannot.

    Returns the last layer to load: None, all of the model, where there is room for it beside the run.
    """
    spec = lm.inspect(config.MISTRAL_MODEL_PATH or lm.STANDIN)
    device, dtype = lm.device_and_dtype(config.DEVICE, config.DTYPE)
    last = spec.n_layers - 1
    cli.expect("TARGET_LAYER", config.TARGET_LAYER, config.TARGET_LAYER <= last, f"0 to {last}, of {spec.name}")
    print(f"model     {spec.n_layers} layers, width {spec.d_model}, {spec.parameters() / 1e6:,.1f}M parameters")
    for last_layer in (None, config.TARGET_LAYER):
        plan = memory.memory_plan(
            spec,
            last_layer=last_layer,
            model_dtype=str(dtype).removeprefix("torch."),
            n_features=config.D_HIDDEN,
            k=config.K,
            auxk_features=config.AUXK_FEATURES,
            batch_size=config.BATCH_SIZE,
            buffer_tokens=config.BUFFER_TOKENS,
            moments_dtype=config.MOMENTS_DTYPE,
            rows_per_forward=config.ROWS_PER_FORWARD,
            context_length=config.CONTEXT_LENGTH,
            device=str(device),
            free=memory.free_memory(str(device)),
        )
        if plan.fits:
            break
    print(f"layer     {config.TARGET_LAYER} of 0 to {spec.n_layers - 1} ({hook_name()})")
    print(f"corpus    {corpus.check()}")
    print(f"tokens    {config.TRAIN_TOKENS:,} in {n_steps():,} steps of {config.BATCH_SIZE:,}")
    print(f"features  {config.D_HIDDEN:,}, of which {config.K} are active on a token")
    print(f"memory    on {device}, by part\n{plan}")
    if not plan.fits:
        raise cli.UserError(
            "the run needs more memory than is free: lower D_HIDDEN, BUFFER_TOKENS or ROWS_PER_FORWARD, "
            "set MOMENTS_DTYPE=bfloat16, or use another DEVICE"
        )
    return last_layer


def n_steps() -> int:
    """Steps of the whole run."""
    return config.TRAIN_TOKENS // config.BATCH_SIZE


# ---- model ----


def load_model(last_layer: int | None = None) -> lm.LanguageModel:
    """The language model, or its embedding and layers 0 to `last_layer`."""
    return lm.load(config.MISTRAL_MODEL_PATH, last_layer=last_layer, device=config.DEVICE, dtype=config.DTYPE)


def hook_name() -> str:
    """SAE Lens's name of the layer's residual stream."""
    return f"blocks.{config.TARGET_LAYER}.hook_resid_post"


# ---- evaluation ----


def evaluate(
    sae: SparseAutoencoder, held_out: Tensor, model: lm.LanguageModel, without_layer: Ablated | None
) -> tuple[dict[str, float], Tensor]:
    """Figures on held-out rows (R, T), those of cross-entropy only if all of the model is loaded; density (F) there."""
    parts = held_out.split(config.ROWS_PER_FORWARD)
    figures = reconstruction(sae, (residuals_of(model, part, config.TARGET_LAYER) for part in parts))._asdict()
    density_F = figures.pop("density")
    if model.last_layer is None:
        sizes = config.TARGET_LAYER, config.ROWS_PER_FORWARD
        figures |= cross_entropy(model, sae, held_out, *sizes, without_layer)._asdict()
    return figures, density_F


def as_held_out(figures: dict[str, float]) -> dict[str, float]:
    """Held-out figures under names that a training record does not have."""
    return {key if key.startswith(("ce_", "kl")) else f"held_out_{key}": value for key, value in figures.items()}


def print_results(evaluation: dict[str, float], run_dir: Path) -> None:
    """The figures, in words."""
    clean, spliced, ablated = (evaluation[f"ce_loss_{name}"] for name in ("clean", "with_sae", "ablated"))
    print(f"\non {evaluation['tokens']:,} held-out tokens")
    print(f"  normalized MSE           {evaluation['normalized_mse']:.3f} (0 is perfect, 1 is predicting the mean)")
    print(f"  explained variance       {evaluation['explained_variance']:.3f}")
    print(f"  active features a token  {evaluation['l0']:.1f}")
    print(f"  cross-entropy            {clean:.3f} nats a token")
    print(f"    through the features   {spliced:.3f}")
    print(f"    without the layer      {ablated:.3f} (its mean instead)")
    print(f"  cross-entropy recovered  {evaluation['ce_loss_recovered']:.1%}")
    print(f"  dead features            {evaluation['dead_fraction']:.1%}")
    print(f"  rarely firing features   {evaluation['rare_fraction']:.1%} (on fewer than one of these tokens in 10,000)")
    print(f"\nautoencoder  {run_dir / 'sae'} (SAE Lens's format)")
    print(f"curves       {run_dir / 'training.png'}")
    print(f"figures      {run_dir / 'evaluation.json'} and {run_dir / 'metrics.jsonl'}")


# ---- checkpoints ----


def start_or_resume(model: lm.LanguageModel, run_dir: Path) -> tuple[Trainer, list[dict]]:
    """A new trainer and an empty log, or those of the checkpoint; UserError if that is of another run."""
    trainer = Trainer(
        model.d_model,
        config.D_HIDDEN,
        config.K,
        k_aux=config.K_AUX,
        auxk_features=config.AUXK_FEATURES,
        auxk_coefficient=config.AUXK_COEFFICIENT,
        dead_after_tokens=config.DEAD_AFTER_TOKENS,
        max_gradient_norm=config.MAX_GRADIENT_NORM,
        moments=getattr(torch, config.MOMENTS_DTYPE),
        device=model.device,
    )
    checkpoint, history = run_dir / "checkpoint.safetensors", []
    if config.RESUME and checkpoint.exists():
        tensors, metadata = load_state(checkpoint, "cpu")  # the trainer's own already fill the device
        there, here = metadata["settings"], shaping_settings()
        changed = [
            f"{name} ({there.get(name)} there, {value} here)"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if changed:
            raise cli.UserError(
                f"{run_dir} holds a run with another {', '.join(changed)}: choose another RUN_DIR, "
                "or RESUME=False to train anew in this one"
            )
        trainer.load(tensors)
        history = metadata["history"]
        print(f"continuing after step {history[-1]['step']:,}")
    else:
        for stale in (checkpoint, run_dir / "sae/cfg.json", run_dir / "evaluation.json", run_dir / "training.png"):
            stale.unlink(missing_ok=True)
    write_text(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    return trainer, history


def save(trainer: Trainer, history: list[dict], model: lm.LanguageModel, run_dir: Path) -> None:
    """The autoencoder in SAE Lens's format, and the checkpoint from which the run can continue."""
    metadata = Metadata(
        model_name=model.name,
        hook_name=hook_name(),
        layer=config.TARGET_LAYER,
        prepend_bos=True,
        context_size=config.CONTEXT_LENGTH,
        dataset_path=config.DATA_PATH,
    )
    density = trainer.firings.double() / history[-1]["tokens"]
    save_sae(run_dir / "sae", trainer.sae, metadata, density, trainer.maximum)
    state = {"settings": shaping_settings(), "history": history}
    save_state(run_dir / "checkpoint.safetensors", trainer.state(), state)


def shaping_settings() -> dict:
    """The constants that a continued run must share with its checkpoint."""
    return {name: getattr(config, name) for name in SHAPING}


if __name__ == "__main__":
    cli.run(
        main,
        out_of_memory="BATCH_SIZE, BUFFER_TOKENS, ROWS_PER_FORWARD or D_HIDDEN",
    )
