"""Raw text to a trained sparse autoencoder on the stand-in: train.py's chain beside SAE Lens's runner.

    python -m benchmarks.end_to_end

Same weights (exported to a Hugging Face folder for SAE Lens), tokenizer, documents in the same order, layer, context
length, positions (all but the first), features, K, batch, buffer, rows a forward, learning rate and schedule, on the
CPU in float32; where there is no counterpart, SAE Lens has its defaults. Each takes turns in a process of its own. The
clock starts with documents, language model and an untrained autoencoder in memory, and stops at the trained one;
neither evaluates, logs or saves in between. First it is checked that both see the same tokens and residuals.

SAE Lens standardises too (normalize_activations="layer_norm"), but its loss is the squared error of the residuals
themselves, and its loss for dead features refuses that setting: its window for them is longer than the run, which
spares it the cost of that loss. Both are measured on the same held-out residuals, in normalized MSE (of standardised
residuals, our loss) and in explained variance (of the residuals, theirs).
"""

import base64
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import config
from benchmarks.machine import peak_megabytes, save
from mistral_sae import constants
from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.records import Document
from mistral_sae.data.tokens import Corpus, batches, pack, prefetch
from mistral_sae.model.language_model import STANDIN, LanguageModel, inspect, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import load_sae
from mistral_sae.sae.evaluate import reconstruction
from mistral_sae.sae.trainer import TrainConfig, Trainer
from tools.weights import to_hf

STEPS = 400
SETTINGS = ["DEVICE=cpu", "DTYPE=float32", f"TRAIN_TOKENS={STEPS * config.BATCH_SIZE}"]
SMOKE = ["D_HIDDEN=512", "TRAIN_TOKENS=4096", "BUFFER_TOKENS=4096", "EVALUATION_ROWS=4"]
ROUNDS = 3
THREADS = 2
SAME = 1e-4  # largest relative difference between the residuals of the two


# ---- the stand-in for transformers ----


def export(folder: Path) -> None:
    """Write the stand-in as a Hugging Face folder."""
    from transformers import MistralConfig

    params = json.loads((STANDIN / "params.json").read_text())
    hf_config = MistralConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["hidden_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        head_dim=params["head_dim"],
        rms_norm_eps=params["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
        sliding_window=None,
        dtype="float32",
    )
    hf_config.architectures = ["MistralForCausalLM"]
    hf_config.save_pretrained(folder)
    weights = to_hf(load_file(STANDIN / "consolidated.safetensors"), params["head_dim"])
    weights = {name: weight.float().contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    export_tokenizer(folder)


def export_tokenizer(folder: Path) -> None:
    """Write the stand-in's tekken tokenizer the way transformers reads one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tekken = json.loads((STANDIN / "tekken.json").read_text())
    names = bytes_to_unicode()
    n_special = tekken["config"]["default_num_special_tokens"]
    n_words = tekken["config"]["default_vocab_size"] - n_special
    words = [base64.b64decode(word["token_bytes"]) for word in tekken["vocab"][:n_words]]
    words = ["".join(names[byte] for byte in word) for word in words]
    tokenizer = load_model(None, last_layer=0, device="cpu").tokenizer
    special = [tokenizer.token_bytes(id).decode() for id in range(n_special)]
    ids = {word: id for id, word in enumerate([*special, *words])}
    # tekken merges whichever neighbours make the word of the lowest rank, so every cut of a word is a merge
    cuts = ((word[:i], word[i:]) for word in words for i in range(1, len(word)))
    merges = [(left, right) for left, right in cuts if left in ids and right in ids]
    bpe = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tekken["config"]["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=special[tokenizer.bos_id],
        eos_token=special[tokenizer.eos_id],
        split_special_tokens=True,  # what looks like one in a text is text
    ).save_pretrained(folder)


# ---- the two ----


def corpus() -> list[Document]:
    """The training part of the standard library, in one order."""
    return list(Corpus.of(config).documents(held_out=False, epochs=False))


def standin(last_layer: int) -> LanguageModel:
    """The stand-in up to a layer."""
    return load_model(None, last_layer=last_layer, device=config.DEVICE)


def ours(folder: Path) -> dict[str, float]:
    """train.py's chain and loop."""
    model, documents = standin(config.TARGET_LAYER), corpus()
    training = TrainConfig.of(config, model.d_model)
    trainer = Trainer(training, model.device)
    language_model = timed(model, "residuals_by_layer")

    def run() -> None:
        batches = shuffled_batches(
            prefetch(pack(documents, model.tokenizer, config.CONTEXT_LENGTH), depth=4 * config.ROWS_PER_FORWARD),
            model,
            config.TARGET_LAYER,
            batch_size=config.BATCH_SIZE,
            buffer_tokens=config.BUFFER_TOKENS,
            rows_per_forward=config.ROWS_PER_FORWARD,
            seed=config.SEED,
        )
        for step, (x, _) in enumerate(islice(batches, training.steps)):
            if step == 0:
                trainer.initialize(x)
            trainer.step(x, training.learning_rate_at(step))
            if (step + 1) % config.LOG_EVERY == 0:
                trainer.find_dead()

    return measured(run, language_model) | quality(trainer.sae)


def theirs(folder: Path) -> dict[str, float]:
    """SAE Lens's LanguageModelSAETrainingRunner."""
    runner, _ = runner_of(folder, corpus())
    figures = measured(runner.run, timed(runner.model, "run_with_cache"))
    runner.sae.save_inference_model(str(folder / "sae-lens"))
    return figures | quality(load_sae(folder / "sae-lens").sae)


def runner_of(folder: Path, documents: list[Document]) -> tuple[Any, Any]:
    """SAE Lens's runner, and its data set."""
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens import TopKTrainingSAEConfig as SAEConfig

    logging.getLogger("sae_lens").setLevel(logging.ERROR)  # it warns that a data set is given
    runner_config = LanguageModelSAERunnerConfig(
        sae=SAEConfig(
            d_in=inspect(STANDIN).d_model, d_sae=config.D_HIDDEN, k=config.K, normalize_activations="layer_norm"
        ),
        model_name=str(folder / "hugging-face"),
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{config.TARGET_LAYER}",
        is_dataset_tokenized=False,
        context_size=config.CONTEXT_LENGTH,
        seqpos_slice=(1, None),
        training_tokens=config.TRAIN_TOKENS,
        train_batch_size_tokens=config.BATCH_SIZE,
        store_batch_size_prompts=config.ROWS_PER_FORWARD,
        n_batches_in_buffer=config.BUFFER_TOKENS // (config.CONTEXT_LENGTH - 1),  # it counts rows
        lr=config.LEARNING_RATE,
        lr_warm_up_steps=min(config.WARM_UP_STEPS, (config.TRAIN_TOKENS // config.BATCH_SIZE) // 2),
        lr_decay_steps=int(config.DECAY_FRACTION * (config.TRAIN_TOKENS // config.BATCH_SIZE)),
        lr_end=0.0,
        dead_feature_window=(config.TRAIN_TOKENS // config.BATCH_SIZE) + 1,
        seed=config.SEED,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    torch.manual_seed(config.SEED)
    dataset = Dataset.from_dict({"text": [document.text for document in documents]})
    return LanguageModelSAETrainingRunner(runner_config, override_dataset=dataset), dataset


def check_input(folder: Path) -> dict[str, float]:
    """How far the residuals differ that both see. Raises RuntimeError if that is far, or if the tokens do."""
    from sae_lens.training.activations_store import ActivationsStore

    documents = corpus()
    runner, dataset = runner_of(folder, documents)
    store = ActivationsStore.from_config(runner.model, runner.cfg, override_dataset=dataset)
    model = standin(config.TARGET_LAYER)
    rows = pack(documents, model.tokenizer, config.CONTEXT_LENGTH)
    tokens = next(batches(rows, config.ROWS_PER_FORWARD))
    if not torch.equal(store.get_batch_tokens(), tokens):
        raise RuntimeError("SAE Lens sees other tokens: the export of the tokenizer is wrong")
    expected = residuals_of(model, tokens, config.TARGET_LAYER)
    found = store.get_activations(tokens).reshape(expected.shape)
    difference = ((found - expected).norm() / expected.norm()).item()
    if not difference < SAME:
        raise RuntimeError(f"SAE Lens's residuals differ by {difference:.2g}: the export of the weights is wrong")
    return {"difference": difference}


SIDES = {"mistral-sae": ours, "sae-lens": theirs}


def timed(owner: Any, name: str) -> list[float]:
    """The seconds that each call of one object's method will take from now on."""
    function, seconds = getattr(owner, name), []

    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)
    return seconds


def measured(run: Callable[[], Any], language_model: list[float]) -> dict[str, float]:
    """Time and memory of a training."""
    before, start = peak_megabytes(), time.perf_counter()
    run()
    return {
        "seconds": time.perf_counter() - start,
        "language_model_seconds": sum(language_model),
        "peak_megabytes": peak_megabytes(),
        "of_which_training": peak_megabytes() - before,
    }


def quality(sae: SparseAutoencoder) -> dict[str, float]:
    """How well it reconstructs train.py's held-out residuals."""
    model = standin(config.TARGET_LAYER)
    parts = (
        Corpus.of(config)
        .held_out_rows(model.tokenizer, config.EVALUATION_ROWS, config.EVALUATION_STRIDE)
        .split(config.ROWS_PER_FORWARD)
    )
    found = reconstruction(sae, (residuals_of(model, part, config.TARGET_LAYER) for part in parts))._asdict()
    return {name: found[name] for name in ("normalized_mse", "explained_variance", "l0", "silent_fraction")}


# ---- side by side ----


def in_process(name: str, folder: Path) -> dict[str, float]:
    """Figures of one side, trained in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", *sys.argv[1:], "--side", name, str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {name} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Export, run in turns, print, save."""
    assert config.ON_STANDIN, "unset MISTRAL_MODEL_PATH: this is a comparison on the stand-in"
    smoke = "--smoke" in sys.argv
    constants.override(SMOKE + SETTINGS[:2] if smoke else SETTINGS, config)
    warnings.simplefilter("ignore")
    if not smoke:
        torch.set_num_threads(THREADS)
    if "--side" in sys.argv:
        print(json.dumps((SIDES | {"check": check_input})[sys.argv[-2]](Path(sys.argv[-1]))))
        return
    if find_spec("sae_lens") is None:
        sys.exit("error: sae-lens is not installed: pip install -r benchmarks/requirements.txt")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        export(Path(temporary, "hugging-face"))
        in_process("check", Path(temporary))  # in one of its own: it would count in the memory of the other
        for _ in range(1 if smoke else ROUNDS):
            for name in SIDES:
                rounds[name].append(in_process(name, Path(temporary)))
    medians = {
        name: {figure: statistics.median(one[figure] for one in found) for figure in found[0]}
        for name, found in rounds.items()
    }
    tokens = (config.TRAIN_TOKENS // config.BATCH_SIZE) * config.BATCH_SIZE
    print(f"{tokens:,} tokens, layer {config.TARGET_LAYER}, F={config.D_HIDDEN}, K={config.K}, B={config.BATCH_SIZE}")
    for name, found in medians.items():
        found["tokens_per_second"] = tokens / found["seconds"]
        found["language_model_share"] = found["language_model_seconds"] / found["seconds"]
        print(
            f"  {name:12} {found['seconds']:7.1f} s   {found['tokens_per_second']:8,.0f} tokens/s   "
            f"language model {found['language_model_share']:4.0%}   "
            f"peak {found['peak_megabytes']:6,.0f} MB, of which training {found['of_which_training']:6,.0f}   "
            f"normalized MSE {found['normalized_mse']:.4f}   explained variance {found['explained_variance']:.4f}"
        )
    mistral_sae, sae_lens = medians.values()
    print(f"  {sae_lens['seconds'] / mistral_sae['seconds']:.1f} times the tokens a second of SAE Lens")
    if not smoke:
        settings = asdict(TrainConfig.of(config, standin(0).d_model))
        save("end_to_end", {"settings": settings, "tokens": tokens, "medians": medians, "rounds": rounds})


if __name__ == "__main__":
    main()
