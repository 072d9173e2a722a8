"""Make the stand-in: a tiny Mistral and its tokenizer, trained on the source of Python's standard library.

    python -m tools.make_standin [WORK_FOLDER]

Writes `mistral_sae/standin/` (params.json, consolidated.safetensors in bf16, tekken.json, training.json). Everything
that takes long is kept in WORK_FOLDER (default runs/make-standin) and continued from there when the command is run
again.
"""

import base64
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from mistral_sae.data.documents import documents
from mistral_sae.data.tokens import is_held_out
from mistral_sae.files import write_atomically
from tools.weights import from_hf

FOLDER = Path(__file__).parent.parent / "mistral_sae" / "standin"

VOCABULARY = 4096  # tokens, the special ones included
SPECIAL_TOKENS = 32  # the first ids; mistral-common names 20 of them and fills up the rest
# The way Mistral's own tekken cuts text into words before it merges bytes
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PARAMS = {  # params.json, as mistral-inference reads it
    "dim": 256,
    "n_layers": 6,
    "head_dim": 64,
    "hidden_dim": 704,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
}

HELD_OUT_FRACTION = 0.05  # of the files, by hash of their path
CONTEXT = 256  # tokens a row, the BOS at its start included
ROWS = 16  # rows a step: 4,096 tokens
STEPS = 5_000  # 20M tokens, twice and a third through the 8.8M tokens of CPython 3.11.7's library
WARM_UP = 200  # steps
DECAY = 0.4  # the last share of the steps, over which the learning rates fall to zero
LEARNING_RATE_MUON = 4e-3  # matrices of the layers; scaled to Adam's update size (Moonshot's rule)
LEARNING_RATE_ADAM = 3e-3  # embedding, output and norms
WEIGHT_DECAY = 0.1  # matrices of the layers only
SEED = 0
EVALUATE_EVERY = 500  # steps
CHECKPOINT_EVERY = 250  # steps


def train_tokenizer(path: Path, texts: list[str]) -> None:
    """Byte-level BPE with merges in rank order, written in tekken's form."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - SPECIAL_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    # One byte a token first, in the order of the bytes, then merges in the order they were learned
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    merged = [_token_bytes(token) for token, _ in learned if len(token) > 1]
    vocabulary = [bytes([b]) for b in range(256)] + merged
    assert len(set(vocabulary)) == VOCABULARY - SPECIAL_TOKENS
    tekken = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(vocabulary),
            "default_vocab_size": VOCABULARY,
            "default_num_special_tokens": SPECIAL_TOKENS,
            "version": "v3",
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": token.decode("utf-8", errors="ignore") or None,
            }
            for rank, token in enumerate(vocabulary)
        ],
    }
    write_atomically(path, lambda partial: partial.write_text(json.dumps(tekken, indent=0)))


def _token_bytes(token: str) -> bytes:
    """The bytes behind a token of GPT-2's byte-level alphabet, in which 188 bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    return bytes(table[c] for c in token)


def encode(tokenizer: Tekkenizer, texts: list[str]) -> list[np.ndarray]:
    """Each text as token ids after a BOS."""
    return [np.array(tokenizer.encode(text, bos=True, eos=False), dtype=np.int64) for text in texts]


def rows_of_epoch(documents: list[np.ndarray], epoch: int) -> np.ndarray:
    """All documents in an order and at an offset of this epoch's own, as rows (N, CONTEXT + 1) that begin with BOS."""
    rng = np.random.default_rng((SEED, epoch))
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
    stream = stream[rng.integers(CONTEXT) :]
    rows = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return np.concatenate([np.full((len(rows), 1), documents[0][0]), rows], axis=1)


def new_model() -> MistralForCausalLM:
    """The stand-in's architecture with random weights."""
    torch.manual_seed(SEED)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=PARAMS["dim"],
            intermediate_size=PARAMS["hidden_dim"],
            num_hidden_layers=PARAMS["n_layers"],
            num_attention_heads=PARAMS["n_heads"],
            num_key_value_heads=PARAMS["n_kv_heads"],
            head_dim=PARAMS["head_dim"],
            rms_norm_eps=PARAMS["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": PARAMS["rope_theta"]},
            sliding_window=None,
        )
    )


def losses(model: MistralForCausalLM, body, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of rows (B, CONTEXT + 1); the logits exist for an eighth at a time."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = body(input_ids=rows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        targets = rows[:, 1:].flatten()
        parts = zip(hidden.chunk(8), targets.chunk(8), strict=True)
        total = sum(F.cross_entropy(model.lm_head(h).float(), y, reduction="sum") for h, y in parts)
    return total / targets.numel()


def schedule(step: int) -> float:
    """Share of the full learning rate at a step: warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / WARM_UP, (STEPS - step) / (DECAY * STEPS))


def save_state(path: Path, step: int, model: torch.nn.Module, optimizers: list) -> None:
    """Weights, moments and the step in one safetensors file."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{k}": v for k, v in state.items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, {"step": str(step)}))


def load_state(path: Path, model: torch.nn.Module, optimizers: list) -> int:
    """Restore what `save_state` wrote; returns the step."""
    from safetensors import safe_open

    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                _, _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def read_corpus() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The library's files as token ids, to train on and held out; makes the tokenizer if there is none."""
    corpus = list(documents("stdlib"))
    train = [d.text for d in corpus if not is_held_out(d.id, HELD_OUT_FRACTION)]
    held_out = [d.text for d in corpus if is_held_out(d.id, HELD_OUT_FRACTION)]
    if not (FOLDER / "tekken.json").exists():
        train_tokenizer(FOLDER / "tekken.json", train)
    tokenizer = Tekkenizer.from_file(FOLDER / "tekken.json")
    train_tokens = encode(tokenizer, train)
    count = sum(map(len, train_tokens))
    characters = sum(map(len, train)) / count
    print(f"{len(train)} files, {count:,} tokens ({characters:.2f} characters a token); {len(held_out)} files held out")
    return train_tokens, encode(tokenizer, held_out)


def new_optimizers(model: MistralForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE_MUON, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=LEARNING_RATE_ADAM, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def batches(train_tokens: list[np.ndarray], step: int) -> Iterator[torch.Tensor]:
    """The rows (ROWS, CONTEXT + 1) of each step from `step` on, every epoch in an order of its own."""
    steps_an_epoch = sum(map(len, train_tokens)) // CONTEXT // ROWS - 1
    for epoch in itertools.count(step // steps_an_epoch):
        rows = rows_of_epoch(train_tokens, epoch)
        rows = rows[np.random.default_rng((SEED, epoch, 1)).permutation(len(rows))]
        for number in range(step % steps_an_epoch, steps_an_epoch):
            yield torch.from_numpy(rows[number * ROWS : (number + 1) * ROWS])
        step = 0


@torch.no_grad()
def held_out_loss(model: MistralForCausalLM, rows: torch.Tensor) -> float:
    """Mean cross-entropy (nats a token) of held-out rows."""
    parts = [losses(model, model.model, part) * len(part) for part in rows.split(ROWS)]
    return (sum(parts) / len(rows)).item()


def main() -> None:
    """Tokenizer, tokens, training, export."""
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/make-standin")
    work.mkdir(parents=True, exist_ok=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    train_tokens, held_out_tokens = read_corpus()
    count, held_out_rows = sum(map(len, train_tokens)), torch.from_numpy(rows_of_epoch(held_out_tokens, 0))

    model = new_model()
    optimizers, rates = new_optimizers(model), [LEARNING_RATE_MUON, LEARNING_RATE_ADAM]
    state, curve_file = work / "state.safetensors", work / "curve.jsonl"
    step = load_state(state, model, optimizers) if state.exists() else 0
    curve = [json.loads(line) for line in curve_file.read_text().splitlines()] if curve_file.exists() else []
    curve = [point for point in curve if point["step"] <= step]
    body = torch.compile(model.model)

    recent, started = [], time.monotonic()
    for rows in itertools.islice(batches(train_tokens, step), STEPS - step):
        loss = losses(model, body, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        recent.append(loss.item())
        if step % 50 == 0:
            speed = 50 * ROWS * CONTEXT / (time.monotonic() - started)
            started = time.monotonic()
            print(f"step {step}  loss {np.mean(recent[-50:]):.3f}  {speed:,.0f} tokens/s", flush=True)
        if step % EVALUATE_EVERY == 0 or step == STEPS:
            rows_to_score = held_out_rows if step == STEPS else held_out_rows[:: len(held_out_rows) // 256]
            point = {
                "step": step,
                "tokens": step * ROWS * CONTEXT,
                "train_loss": round(float(np.mean(recent[-200:])), 4),
                "held_out_loss": round(held_out_loss(model, rows_to_score), 4),
            }
            curve.append(point)
            write_atomically(curve_file, lambda p: p.write_text("".join(json.dumps(c) + "\n" for c in curve)))
            print(point, flush=True)
            export(model, curve, count, len(held_out_rows))
        if step % CHECKPOINT_EVERY == 0 or step == STEPS:
            save_state(state, step, model, optimizers)


def write_weights(model: MistralForCausalLM, folder: Path) -> None:
    """Write a mistral-inference folder, but for the tokenizer: weights in bf16 with params.json."""
    weights = from_hf(model.state_dict(), PARAMS["head_dim"])
    weights = {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}
    write_atomically(folder / "params.json", lambda p: p.write_text(json.dumps(PARAMS, indent=2) + "\n"))
    write_atomically(folder / "consolidated.safetensors", lambda p: save_file(weights, p))


def export(model: MistralForCausalLM, curve: list[dict], train_tokens: int, held_out_rows: int) -> None:
    """Write the stand-in and its learning curve."""
    write_weights(model, FOLDER)
    record = {
        "corpus": f"source of the standard library of CPython {platform.python_version()}",
        "train_tokens_in_corpus": train_tokens,
        "held_out": f"{HELD_OUT_FRACTION:.0%} of the files, {held_out_rows * CONTEXT} tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss_nats_per_token": curve[-1]["held_out_loss"],
        "curve": curve,
    }
    write_atomically(FOLDER / "training.json", lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))


if __name__ == "__main__":
    main()
