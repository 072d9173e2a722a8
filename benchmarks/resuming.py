"""What it costs to go on: seconds until a stream that was stopped gives its next batch, at an early and a late step.

    python -m benchmarks.resuming

The text is the standard library's, over and over, as one file of each kind, tokenized by the stand-in's tokenizer; the
language model is played by one whose residual is the token, so that what is measured is text alone. Beside it stands
the time of reading from the beginning, which a run without a place would take.
"""

import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import datasets
import pyarrow
import pyarrow.parquet
import torch
import zstandard

from benchmarks.machine import save
from mistral_sae.data import documents as sources
from mistral_sae.data.activations import shuffled_batches
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Corpus, prefetch, shuffle
from mistral_sae.model.language_model import load_model

STEPS = (100, 100_000)
BATCH, T, WINDOW, BUFFER = 64, 256, 1024, 16_384  # residuals a step, tokens a row, rows a window, residuals a buffer
ECHO = SimpleNamespace(
    device=torch.device("cpu"),
    dtype=torch.float32,
    d_model=1,
    kept=lambda tokens_RT: torch.arange(tokens_RT.shape[1]).expand_as(tokens_RT) > 0,
    residuals_by_layer=lambda tokens_RT, layers: {layer: tokens_RT.unsqueeze(-1).float() for layer in layers},
)


def batches(path: str, tokenizer, start: Place):
    """train.py's chain from a place on."""
    rows = prefetch(Corpus(path, context_length=T).rows(tokenizer, held_out=False, start=start), WINDOW)
    options = {"batch_size": BATCH, "buffer_tokens": BUFFER, "rows_per_forward": 64, "seed": 0, "start": start}
    return shuffled_batches(shuffle(rows, WINDOW, 0, start), ECHO, 0, **options)


def seconds_of(path: str, tokenizer) -> dict[str, dict[str, float]]:
    """By step: seconds from the beginning to its batch, and from its place to the next one."""
    found, places, begin = {}, {}, time.perf_counter()
    stream = batches(path, tokenizer, BEGINNING)
    for step, (_, place) in enumerate(islice(stream, max(STEPS)), 1):
        if step in STEPS:
            places[step] = place
            found[f"step {step}"] = {"from the beginning": time.perf_counter() - begin}
    stream.close()
    for step, place in places.items():
        begin = time.perf_counter()
        stream = batches(path, tokenizer, Place.of(json.loads(json.dumps(place._asdict()))))
        next(stream)
        found[f"step {step}"]["from its place"] = time.perf_counter() - begin
        stream.close()
    return found


def main() -> None:
    """Measure every kind of source and save the seconds."""
    tokenizer, load = load_model(None, last_layer=0).tokenizer, datasets.load_dataset
    texts = [document.text for document in sources.documents("stdlib")]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    results = {}
    with tempfile.TemporaryDirectory() as name, patch.object(sources, "IN_MEMORY", 0):
        folder = Path(name)
        (folder / "a.jsonl").write_bytes(lines)
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=100)
        for kind in (".jsonl", ".jsonl.zst", ".parquet"):
            results[kind] = seconds_of(str(folder / f"a{kind}"), tokenizer)
            print(kind, results[kind], flush=True)
        local = {"data_files": str(folder / "a.parquet")}
        with patch.object(datasets, "load_dataset", lambda _, **options: load("parquet", **local, **options)):
            results["a dataset of the hub, played by a local one"] = seconds_of("owner/name", tokenizer)
    save("resuming", results)


if __name__ == "__main__":
    main()
