"""A run of the stand-in with a small autoencoder, and the page of it at an address."""

import asyncio
import inspect
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from report_records import make_label

from mistral_sae.data.records import Document
from mistral_sae.data.tokens import pack
from mistral_sae.explain import cache
from mistral_sae.explain.labels import write_labels
from mistral_sae.live.app import hosts_of, listen, make_app, server_of
from mistral_sae.live.engine import Engine
from mistral_sae.live.known import known_of
from mistral_sae.loading import read_explanations
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, load_sae, save_sae
from mistral_sae.sae.features import measure_statistics
from mistral_sae.steer.steering import Subject

LAYER, F, K, ROW = 2, 512, 8, 64
EXPLAINED = range(0, F, 4)
HOSTILE = 8  # a feature whose label is
MARKUP = "</script><img src=x onerror=window.pwned=1>{{ 7 * 7 }}\u202e"


def write_run(folder: Path):
    """A run that train.py and explain.py might have left, in a second; the subject of demo.py."""
    model = load_model(None, device="cpu")
    lines = inspect.getsource(textwrap).splitlines(keepends=True)
    documents = [Document(f"d{i}.py", "".join(lines[i : i + 12])) for i in range(0, len(lines), 12)]
    rows = list(pack(documents, model.tokenizer, ROW))
    tokens_RT = torch.stack([torch.from_numpy(row.tokens).long() for row in rows])
    x_ND = model.residuals(tokens_RT, LAYER)[:, 1:].flatten(0, 1)
    sae = SparseAutoencoder(256, F, K)
    sae.initialize(sae.standardize(x_ND)[0], seed=0)
    metadata = Metadata("standin", f"blocks.{LAYER}.hook_resid_post", LAYER, True, ROW, "text")
    save_sae(folder / "sae", sae, metadata, measure_statistics(sae, [x_ND]))
    loaded = load_sae(folder / "sae")
    cache.write(folder / cache.FOLDER, cache.made_from(model, loaded.sae, LAYER, {}), rows, model, loaded.sae, LAYER)
    labels = {i: make_label(i) for i in EXPLAINED}
    labels[HOSTILE] = labels[HOSTILE]._replace(explanation=MARKUP, status="ok")
    write_labels(folder / "explanations.jsonl", labels.values())
    return model, loaded


def known_in(folder: Path, model, loaded):
    """What demo.py knows of a run."""
    constants = SimpleNamespace(
        RUN_DIR=str(folder), MISTRAL_MODEL_PATH=None, SAE_PATH=None, HOOK_NAME=None, ON_STANDIN=True,
        EXAMPLES_PER_INTERVAL=2, TOKENS_BEFORE=16, TOKENS_AFTER=8, SEED=0, CONTEXT_LENGTH=32, CHAT_CONTEXT=256,
        PROMPT="def load(path):\n", NEW_TOKENS=12, TEMPERATURE=0.7, METHOD="clamp", POSITIONS="all",
    )  # fmt: skip
    labels, explanations = read_explanations(loaded, folder)
    return known_of(constants, Subject(model, loaded, loaded.statistics, explanations), labels)


@contextmanager
def serving(known, token=None, port=0):
    """The page at an address, with its engine; where there is a token, for whoever brings it."""
    listening = listen("127.0.0.1", port)
    port, engine = listening.getsockname()[1], Engine()
    app = make_app(known, engine, None if token else hosts_of(port), token)
    server = server_of(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", engine=engine, known=known, port=port)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
