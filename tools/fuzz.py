"""Mutated files and arguments for every reader: nothing but the project's own errors may come of them.

    python -m tools.fuzz [COUNT [READER ...]]

Each input is a valid one in which a few things are changed: bytes at random, values of its JSON, tensors of a header.
"""

import contextlib
import gzip
import io
import json
import lzma
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx2
import numpy as np
import pyarrow
import tokenizers
import torch
import zstandard
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import RESULTS, describe
from mistral_sae.cli import UserError, one_line
from mistral_sae.constants import override
from mistral_sae.data import stored
from mistral_sae.data.activations import Stream
from mistral_sae.data.documents import documents
from mistral_sae.data.place import Place
from mistral_sae.explain import cache, prompts
from mistral_sae.explain.answers import Answers, shown
from mistral_sae.explain.journal import Journal
from mistral_sae.explain.labels import parse_select, read_labels, to_json, write_labels
from mistral_sae.explain.replies import read_reply
from mistral_sae.explain.types import Completion, Concept, Judgement, Label, Request, Score
from mistral_sae.files import SAEError, header_of, load_state, save_state, write_text
from mistral_sae.model.engines import MistralInference, Transformers
from mistral_sae.model.folder import CONFIG, MISTRAL_INFERENCE, PARAMS, TRANSFORMERS, ModelFolder, read_folder
from mistral_sae.model.language_model import STANDIN, inspect
from mistral_sae.model.params import config_for_transformers, shapes_of_params
from mistral_sae.model.source import Source, convert
from mistral_sae.model.tokenizer import load_tokenizer
from mistral_sae.sae import resume
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.cfg import Metadata
from mistral_sae.sae.checkpoint import load_sae, save_sae
from mistral_sae.sae.features import Statistics
from mistral_sae.sae.resume import Point, read_points, write_points
from mistral_sae.sae.trainer import TrainConfig, Trainer
from mistral_sae.schema import read
from tools.mutate import mutated
from tools.weights import to_hf, write_gguf

PARAMS_JSON = {
    "dim": 8, "n_layers": 2, "head_dim": 4, "hidden_dim": 8, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5,
    "vocab_size": 300, "rope_theta": 10000.0, "sliding_window": None,
    "moe": {"num_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


class Reader(NamedTuple):
    """Something that reads."""

    write: Callable[[Path], object]  # a folder of valid files
    read: Callable[[Path], object]
    share: int  # inputs for each thousand of COUNT


# ---- readers ----


def _write_params(folder: Path) -> None:
    weights = {name: torch.zeros(shape) for name, shape in shapes_of_params(PARAMS_JSON, None).items()}
    (folder / PARAMS).write_text(json.dumps(PARAMS_JSON))
    save_file(weights, folder / "consolidated.safetensors")


def _read_params(folder: Path) -> None:
    found = read_folder(Source(folder), PARAMS, MISTRAL_INFERENCE)
    MistralInference.check(found, None)
    with contextlib.suppress(UserError):  # what transformers cannot run
        read_folder(Source(folder), PARAMS, TRANSFORMERS)


def _write_config(folder: Path) -> None:
    params: dict[str, Any] = PARAMS_JSON | {"moe": None}
    weights = {name: torch.zeros(shape) for name, shape in shapes_of_params(params, None).items()}
    config_for_transformers(params).save_pretrained(folder)
    hf = to_hf(weights, 4)
    save_file(hf, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(hf, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _run_config(folder: Path) -> None:
    Transformers.check(read_folder(Source(folder), CONFIG, TRANSFORMERS), None)


def _write_sae(folder: Path) -> None:
    sae = SparseAutoencoder(4, 8, 2)
    sae.initialize(torch.ones(8, 4).cumsum(0), seed=0)
    metadata = Metadata("m", "blocks.1.hook_resid_post", 1, True, 256, "text", "print")
    save_sae(folder, sae, metadata, Statistics(torch.ones(8), torch.full((8,), 0.1), None))


def _write_sparsify(folder: Path) -> None:
    weights = {"encoder.weight": torch.ones(8, 4), "encoder.bias": torch.ones(8), "W_dec": torch.ones(8, 4)}
    save_file(weights | {"b_dec": torch.ones(4)}, folder / "sae.safetensors")
    cfg = {"activation": "topk", "expansion_factor": 2, "num_latents": 0, "k": 2, "signed": False, "d_in": 4}
    (folder / "cfg.json").write_text(json.dumps(cfg))


def _write_dictionary(folder: Path) -> None:
    weights = {"W_enc": torch.ones(4, 8), "W_dec": torch.ones(8, 4), "b_dec": torch.ones(4)}
    scalars = {"threshold": torch.tensor(0.5), "k": torch.tensor(2)}
    save_file(weights | scalars | {"b_enc": torch.ones(8)}, folder / "ae.safetensors")
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": 4, "dict_size": 8, "k": 2, "layer": 1}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64, "io": "out"}}))


def _write_journal(folder: Path) -> None:
    journal = Journal(folder / "completions.jsonl")
    for number in range(3):
        journal.append(f"key {number}", Completion("ok", 'a "reply"', 10, 5), 0.25)


def _write_labels(folder: Path) -> None:
    score = Score(0.8, 0.7, 0.9, 0.5, None, 9, 1, (0.5, None), 0.1, (("ok", 3),))
    judgements, concept = (Judgement("detection", "hard", 2, False, None),), Concept("number", 0.7, 9.0, 0.4)
    write_labels(
        folder / "explanations.jsonl",
        [Label(number, "words", "m", "ok", {"detection": score}, judgements, concept=concept) for number in range(3)],
    )


def _read_labels(folder: Path) -> None:
    for label in read_labels(folder / "explanations.jsonl").values():
        to_json(label)


def _write_figures(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps({"tokens": 3264, "l0": 32.0, "ce_loss_clean": 2.3}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 0.5}\n' * 3)


def _read_figures(folder: Path) -> None:
    resume.read_evaluation(folder)
    resume.read_log(folder)


def _write_answers(folder: Path) -> None:
    concepts = [{"concept": "comma", "feature": 7}, {"concept": "self", "feature": 3}]
    told = {"sentence": "Partly.", "concepts": concepts, "matrix": [[0.5, 0.1], [0.0, 0.9]]}
    answers = {"autoencoder": "a", "limits": "One.", "monosemantic": told, "superposed": {"sentence": "Yes."}}
    (folder / "analysis.json").write_text(json.dumps(answers))


def _read_answers(folder: Path) -> None:
    shown(read(Answers, folder / "analysis.json", "run analyse.py again", SAEError))


def _write_sweep(folder: Path) -> None:
    point = {"layer": 1, "architecture": "topk", "d_hidden": 64, "learning_rate": 0.001, "seed": 0}
    write_points(folder, [Point(name=f"k{k}", k=k, **point, figures={"l0": 4.0}) for k in (4, 8)])


_MADE_FROM = {"format": cache.FORMAT, "autoencoder": "a", "model": "m", "corpus": {"files": "f"}}


def _write_cache(folder: Path) -> None:
    position = np.arange(8, dtype=np.uint8)
    arrays = {
        "tokens": np.arange(8, dtype=np.int32),
        "documents": np.array([-1, 0, 0, 0, -1, 1, 1, 1], dtype=np.int32),
        "first": np.repeat(position[[0, 4]], 4),
        "last": np.repeat(position[[3, 7]], 4),
        "positions": position[1:4],
        "values": np.ones(3, dtype=np.float16),
        "offsets": np.array([0, 2, 3, 3]),
        "maxima": np.ones(3, dtype=np.float16),
        "names": np.frombuffer(b'["a", "b"]', dtype=np.uint8),
    }
    save_arrays(arrays, folder / "00000.safetensors")
    manifest = {"made_from": _MADE_FROM, "tokens": 8, "row_tokens": 4, "explained_with": {"top": 10}}
    (folder / cache.MANIFEST).write_text(json.dumps(manifest))


def _read_cache(folder: Path) -> None:
    cache.noted(folder)
    cache.is_of(folder, "a")
    found, _ = cache.open_cache(folder, _MADE_FROM)
    if found:
        for feature in range(len(found.counts_F)):
            found.activations(feature)


def _residuals(folder: Path) -> stored.StoredResiduals:
    return stored.StoredResiduals(folder, 1, [2], stored.SHARD_TOKENS, 20, {"CONTEXT_LENGTH": 9})


def _write_residuals(folder: Path) -> None:
    found = stored.Manifest(format=stored.FORMAT, layers=[2], shuffle_rows=20, made_from=_residuals(folder).made_from)
    write_text(folder / stored.MANIFEST, found.model_dump_json())
    x_N1 = torch.arange(stored.SHARD_TOKENS)[:, None].bfloat16()
    stored.write_shard(folder / "00000.arrow", {2: x_N1}, Place(record=5))


def _read_residuals(folder: Path) -> None:
    residuals = _residuals(folder)
    residuals.place_after(0)
    next(residuals.batches([Stream(2, 0)], batch_size=stored.SHARD_TOKENS, buffer_tokens=stored.SHARD_TOKENS))


def _write_state(folder: Path) -> None:
    save_state(folder / "state.safetensors", {"a": torch.ones(4), "b": torch.ones(2, 2)}, {"history": [{"step": 1}]})


_RUN = {"settings": {"k": 2}, "others": {"device": "cpu"}, "model": "m", "figures": [[1.0]], "seconds": 0.5}
_RUN |= {"step": 3, "stream": {"epoch": 0, "record": 2}, "history": [{"step": 2, "tokens": 8, "loss": 0.5}]}


def _write_checkpoint(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps(_RUN))
    save_file({name: x.contiguous() for name, x in _trainer().state().items()}, folder / "tensors.safetensors")


def _trainer() -> Trainer:
    return Trainer(TrainConfig(4, 8, 2, train_tokens=64, batch_size=8))


def _read_checkpoint(folder: Path) -> None:
    """A run goes on from a checkpoint of these contents, whose checksums are right: else little else would be read."""
    with contextlib.suppress(SafetensorError):
        tensors, text = load_file(folder / "tensors.safetensors"), (folder / "metadata.json").read_bytes()
        run = resume.Run.new(_RUN["settings"], {})
        run.model = _RUN["model"]
        with tempfile.TemporaryDirectory(dir=folder) as run_dir:
            path, words = Path(run_dir) / "checkpoints/step-3.safetensors", text.decode("utf-8", "replace")
            path.parent.mkdir()
            save_file(tensors, path, metadata=header_of(words, tensors))
            list(resume.status(Path(run_dir)))
            resume.load_checkpoints([(resume.find_checkpoints(Path(run_dir), run, True), _trainer(), run)])
            Place.of(run.stream)


def _write_gguf(folder: Path) -> None:
    """In two files, so that the header is changed as often as the weights."""
    write_gguf(folder / "whole")
    whole = (folder / "whole").read_bytes()
    header = whole.index(b"blk.0.")  # of the first tensor that is described
    (folder / "header").write_bytes(whole[:header])
    (folder / "rest").write_bytes(whole[header:])
    (folder / "whole").unlink()


def _read_gguf(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / "model.gguf"
        path.write_bytes((folder / "header").read_bytes() + (folder / "rest").read_bytes())
        convert(path, Path(made))


def _write_tekken(folder: Path) -> None:
    shutil.copy(STANDIN / "tekken.json", folder)


def _write_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 280, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(["def f(x): return x + 1"], tokenizers.trainers.BpeTrainer(**options))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def _read_tokenizer(folder: Path, described_by: str) -> None:
    tokenizer = load_tokenizer(ModelFolder(Source(folder), inspect(STANDIN), described_by, None, {}))
    tokenizer.strings(tokenizer.encode("words"))
    tokenizer.special_ids()


def _write_documents(folder: Path) -> None:
    lines = b'{"text": "some words"}\n' * 4
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "d.txt").write_bytes(b"some words")
    (folder / "f.json.xz").write_bytes(lzma.compress(b"[" + lines.strip().replace(b"\n", b",") + b"]"))
    (folder / "g.csv").write_bytes(b"n,text\n" + b'1,"some words"\n' * 4)
    parquet.write_table(pyarrow.table({"text": ["some words"] * 4}), folder / "e.parquet")


def _read_arguments(folder: Path) -> None:
    import config

    with open(folder / "arguments.txt", "rb") as file:
        arguments = file.read().decode("utf-8", "surrogateescape").replace("\0", "").splitlines()
    try:
        override(arguments, config)
        parse_select(config.SELECT)
    finally:
        override([], config)


def _write_arguments(folder: Path) -> None:
    arguments = ["K=12", "SEED=1", "LEARNING_RATE=0.5", "RUN_DIR=run", "SELECT=[3, 4]", "SAMPLING={'top_p': 0.5}"]
    arguments += ["FEATURE_INDEX={12: 2}", "RESUME=false", "TEMPERATURE=0.5", "EXCLUDE_TOKENS=['x', 3]", "TEXT=words"]
    (folder / "arguments.txt").write_text("\n".join(arguments))


def _write_reply(folder: Path) -> None:
    message = {"content": '{"explanation": "words", "verdicts": [{"id": "a", "fires": true}]}', "refusal": None}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    (folder / "reply.json").write_text(json.dumps(body))


def _read_reply(folder: Path) -> None:
    response = httpx2.Response(200, content=(folder / "reply.json").read_bytes())
    reply = read_reply(response, Request([{"role": "user", "content": "?"}], None, 10))
    with contextlib.suppress(prompts.Unreadable):
        prompts.read_explanation(reply.text)
    with contextlib.suppress(prompts.Unreadable):
        prompts.read_verdicts(reply.text, ["a"])
    with contextlib.suppress(prompts.Unreadable):
        prompts.read_activations(reply.text, 3)


READERS = {
    "params.json and weights": Reader(_write_params, _read_params, 20),
    "config.json, index and weights": Reader(
        _write_config, lambda folder: read_folder(Source(folder), CONFIG, TRANSFORMERS), 10
    ),
    "config.json, run": Reader(_write_config, _run_config, 1),
    "autoencoder": Reader(_write_sae, load_sae, 40),
    "autoencoder of sparsify": Reader(_write_sparsify, load_sae, 10),
    "autoencoder of dictionary_learning": Reader(_write_dictionary, load_sae, 10),
    "completions.jsonl": Reader(_write_journal, lambda folder: Journal(folder / "completions.jsonl"), 270),
    "explanations.jsonl": Reader(_write_labels, _read_labels, 220),
    "evaluation.json and metrics.jsonl": Reader(_write_figures, _read_figures, 180),
    "analysis.json": Reader(_write_answers, _read_answers, 180),
    "sweep.json": Reader(_write_sweep, read_points, 10),
    "activations": Reader(_write_cache, _read_cache, 28),
    "residuals": Reader(_write_residuals, _read_residuals, 10),
    "state": Reader(_write_state, lambda folder: load_state(folder / "state.safetensors"), 140),
    "checkpoint": Reader(_write_checkpoint, _read_checkpoint, 10),
    "GGUF": Reader(_write_gguf, _read_gguf, 1),
    "tekken.json": Reader(_write_tekken, lambda folder: _read_tokenizer(folder, PARAMS), 1),
    "tokenizer.json": Reader(_write_tokenizer, lambda folder: _read_tokenizer(folder, CONFIG), 1),
    "documents": Reader(_write_documents, lambda folder: list(documents(str(folder))), 28),
    "arguments": Reader(_write_arguments, _read_arguments, 1),
    "replies": Reader(_write_reply, _read_reply, 30),
}


# ---- the run ----


def tried(reader: Reader, folder: Path, valid: dict[str, bytes], random: Random) -> str:
    """What came of one input: "read", "error" for one of the project's own, or where something else was raised."""
    for path in folder.iterdir():
        path.unlink()
    chosen = random.choice(sorted(valid))
    for name, content in valid.items():
        (folder / name).write_bytes(mutated(content, random) if name == chosen else content)
    try:
        reader.read(folder)
    except UserError as error:
        return "error" if "\n" not in str(error) and str(error) else f"an error of two lines: {error!r}"
    except BaseException as error:  # a panic in a library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "mistral_sae" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the tool"
        return f"{type(error).__name__} at {where}: {one_line(str(error))[:80]}"
    return "read"


def valid_files(reader: Reader, folder: Path) -> dict[str, bytes]:
    """The files that a reader's mutations begin with."""
    reader.write(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fuzz(name: str, count: int) -> dict[str, Any]:
    """The outcomes of so many inputs for a reader; a bug is kept with the seed of its input."""
    reader, outcomes, seeds, started = READERS[name], Counter[str](), dict[str, int](), time.monotonic()
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        valid = valid_files(reader, Path(whole))
        for seed in range(count):
            with contextlib.redirect_stdout(io.StringIO()):
                outcome = tried(reader, Path(folder), valid, Random(f"{name} {seed}"))
            outcomes[outcome] += 1
            seeds.setdefault(outcome, seed)
    others = {f"{what} (seed {seeds[what]})": n for what, n in outcomes.items() if what not in ("read", "error")}
    found = {"inputs": count, "read": outcomes["read"], "errors of the project's own": outcomes["error"]}
    return found | {"others": others, "seconds": round(time.monotonic() - started)}


def main() -> None:
    """Fuzz the readers, or some of them; benchmarks/results/fuzz.json has what came of each that was done last."""
    total, path = int(float(sys.argv[1])) if sys.argv[1:] else 1_000_000, RESULTS / "fuzz.json"
    about = describe() | {"command": f"python -m tools.fuzz {total}"}
    about["versions"] |= {name: version(name) for name in ("pydantic", "safetensors", "tokenizers", "datasets")}
    if sys.argv[2:] and path.exists():
        about = json.loads(path.read_text())
    results = about.pop("results", {})
    for name in sys.argv[2:] or READERS:
        results[name] = fuzz(name, total * READERS[name].share // 1000)
        print(name, json.dumps(results[name]), flush=True)
        inputs = sum(result["inputs"] for result in results.values())
        report = about | {"inputs": inputs, "results": results}
        write_text(path, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
