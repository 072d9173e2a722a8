"""A stream that goes on from a place: the same batches, bit by bit, at a price that does not grow with the step."""

import bz2
import csv
import gc
import gzip
import json
import lzma
import threading
import tracemalloc
from contextlib import contextmanager, suppress
from itertools import islice

import psutil
import pytest
import torch
import zstandard

from mistral_sae.cli import UserError
from mistral_sae.data import documents as documents_module
from mistral_sae.data import forms, tables
from mistral_sae.data.activations import shuffled_batches
from mistral_sae.data.documents import Skipped, documents
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.tokens import Corpus, prefetch, shuffle
from mistral_sae.model.source import ModelError

T, WINDOW, BUFFER_ROWS, BATCH = 9, 40, 10, 24
MIXED = ["mixture", "mixture in memory"]
KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", "memory", "hub jsonl", "hub parquet"]
KINDS += [".json", ".csv", ".arrow", ".jsonl.xz", "token ids", "messages", *MIXED]


class Letters:
    """A tokenizer of one token a character that counts the texts it was given."""

    bos_id, vocab_size = 0, 128

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return [ord(letter) for letter in text]

    def chat(self, messages):
        if "7" in messages[0]["content"]:
            raise ModelError("this chat format takes no seven")
        return [self.bos_id, *self.encode("".join(f"<{each['role']}>{each['content']}" for each in messages))]


class Echo:
    """A model whose residual is the token, and which counts the rows that go through it."""

    device, dtype, d_model = torch.device("cpu"), torch.float32, 1

    def __init__(self):
        self.rows = 0

    def kept(self, tokens_RT):
        return tokens_RT != 0

    def residuals_by_layer(self, tokens_RT, layers):
        self.rows += len(tokens_RT)
        return {layer: tokens_RT.unsqueeze(-1).float() for layer in layers}


class Run:
    """train.py's chain, with what it read, tokenized and ran the model over."""

    def __init__(self, path, start=BEGINNING, batch_size=BATCH):
        self.tokenizer, self.model, self.skipped = Letters(), Echo(), Skipped()
        corpus = Corpus(path, held_out_fraction=0.2, seed=5, context_length=T)
        rows = corpus.rows(self.tokenizer, held_out=False, start=start, skipped=self.skipped)
        self.batches = shuffled_batches(
            shuffle(prefetch(rows, WINDOW), WINDOW, 5, start),
            self.model,
            0,
            batch_size=batch_size,
            buffer_tokens=BUFFER_ROWS * (T - 1),
            rows_per_forward=4,
            seed=5,
            start=start,
        )

    def take(self, count):
        return list(islice(self.batches, count))

    def close(self):
        self.batches.close()


def through_json(place):
    return Place.of(json.loads(json.dumps(place._asdict())))


def text_of(file, number):
    return f"{file} {number} " + "abcdefgh"[number % 8] * (5 + number * 7 % 90)


def record_of(kind, text):
    if text and kind == "token ids":
        return [Letters.bos_id, *map(ord, text)]
    if text and kind == "messages":
        return [{"role": "user", "content": text[:4]}, {"role": "assistant", "content": text[4:]}]
    return text


PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def write_corpus(folder, kind, n_files=3, n_records=40):
    """Files whose records are documents, bad ones and, in JSON lines, empty lines."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    if kind in MIXED:
        return [write_corpus(folder / part, part, n_files, n_records) for part in (".jsonl", ".parquet")]
    for file in range(n_files):
        texts = [None if number % 11 == 3 else text_of(file, number) for number in range(n_records)]
        lines = [json.dumps({"text": record_of(kind, text)}) + "\n" for text in texts]
        if "hub" not in kind:
            lines[::9] = ["\n" for _ in lines[::9]]
            lines[5] = "no json\n"
        packed = "".join(lines).encode()
        if kind.endswith(".parquet") or kind == "hub parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{file}.parquet", row_group_size=7)
        elif kind == ".txt":
            for number, text in enumerate(texts):
                (folder / f"{file}-{number:03}.txt").write_text(text or "")
        elif kind == ".json":
            (folder / f"{file}.json").write_text(json.dumps([{"text": text} for text in texts], indent=file))
        elif kind == ".csv":
            with open(folder / f"{file}.csv", "w", newline="") as table:
                csv.writer(table).writerows([["text", "n"], *([f"{text}\n!", 1] for text in texts), ["bad"]])
        elif kind == ".arrow":
            table = pyarrow.table({"text": texts})
            with pyarrow.ipc.new_stream(str(folder / f"{file}.arrow"), table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        elif pack := PACK.get(kind.removeprefix(".jsonl")):
            (folder / f"{file}{kind}").write_bytes(pack(packed[:700]) + pack(packed[700:]))
        else:
            (folder / f"{file}.jsonl").write_bytes(packed)


@pytest.fixture
def corpus_of(tmp_path, monkeypatch):
    """The DATA_PATH of a corpus of a kind; the hub is played by `datasets` over local files."""
    import datasets

    load = datasets.load_dataset
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: load(str(tmp_path / "text"), **options))

    def of(kind, **sizes):
        monkeypatch.setattr(documents_module, "IN_MEMORY", 10**9 if kind.endswith("memory") else 0)
        write_corpus(tmp_path / "text", kind, **sizes)
        mixture = " + ".join(f"{tmp_path}/text/{part}" for part in (".jsonl*0.7", ".parquet*0.3"))
        return mixture if kind in MIXED else "owner/name" if "hub" in kind else str(tmp_path / "text")

    return of


@contextmanager
def closing(run):
    try:
        yield run
    finally:
        run.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_from_any_of_its_places_gets_the_same_batches(corpus_of, kind):
    path = corpus_of(kind, n_files=2 if kind in MIXED else 3)
    with closing(Run(path)) as run:
        whole = run.take(500)
    last = whole[-1].place
    assert (last.mixed or [last._asdict()])[0]["epoch"] >= 2
    for step in [1, 2, 3, 4, 7, 12, 40, 41, 99, 200, 333, 450]:
        place = through_json(whole[step - 1].place)
        for again in range(step, min(step + 40, len(whole)), 9):  # and stopped again, and again
            with closing(Run(path, place)) as run:
                found = run.take(9)
            assert [x.tolist() for x, _ in found] == [x.tolist() for x, _ in whole[again : again + 9]]
            place = through_json(found[-1].place)
            if "hub" not in kind:  # what `datasets` says of a place depends on where it began
                assert place == whole[again + 8].place


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".parquet", ".txt", "hub jsonl", "hub parquet"])
def test_a_corpus_goes_on_from_any_of_its_documents(corpus_of, kind):
    path = corpus_of(kind)
    whole = [document[:2] for document in documents(path)]
    for number, document in enumerate(documents(path)):
        if number % 7 == 0:
            assert [later[:2] for later in documents(path, start=through_json(document.place))] == whole[number:]


@pytest.mark.parametrize(
    ("kind", "last_step"),
    [(".jsonl", 100_000), ("memory", 2000), (".jsonl.gz", 2000), (".parquet", 2000), ("hub parquet", 2000)],
)
def test_going_on_costs_a_window_and_a_buffer_whatever_the_step(corpus_of, kind, last_step, monkeypatch):
    path, batch_size = corpus_of(kind, n_files=4, n_records=400), 2
    with closing(Run(path, batch_size=batch_size)) as run:
        places = [
            place for step, (_, place) in enumerate(islice(run.batches, last_step), 1) if step in (100, last_step)
        ]
    parsed = []
    for module in (forms, tables, documents_module):
        parse = module.document_of
        monkeypatch.setattr(module, "document_of", lambda *args, parse=parse: parsed.append(args[0]) or parse(*args))
    for place in places:
        parsed.clear()
        with closing(Run(path, through_json(place), batch_size)) as run:
            run.take(1)
        assert run.model.rows == BUFFER_ROWS
        assert run.tokenizer.calls <= 2 * WINDOW  # of which the half is read ahead
        assert len(parsed) <= 3 * WINDOW or kind == "memory"


def test_a_place_that_is_none_is_one_line():
    for fields in [None, 5, "x", {"epoch": -1}, {"epoch": 1.5}, {"epoch": 2**70}, {"hub": [1]}, [[]]]:
        with pytest.raises(UserError, match=r"in a checkpoint.s stream, expected .* RESUME=False") as raised:
            Place.of(fields)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["epoch", "file", "record", "offset", "tokens", "window", "rows", "residuals"])
def test_a_place_beyond_the_corpus_is_no_traceback(corpus_of, kind, field):
    path = corpus_of(kind, n_files=1)
    if "hub" in kind and field in ("file", "record", "offset"):
        return  # of a dataset on the hub its state says where it goes on
    with suppress(UserError), closing(Run(path, Place(**{field: 2**62}))) as run:
        run.take(2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_closed_half_way_leaves_no_file_and_no_thread(corpus_of, kind):
    path = corpus_of(kind)
    with closing(Run(path)) as run:
        run.take(1)  # what is opened once, such as a list of time zones, is open from here on
    gc.collect()
    files, threads = psutil.Process().num_fds(), threading.active_count()
    for _ in range(3):
        with closing(Run(path)) as run:
            run.take(20)
    gc.collect()
    assert psutil.Process().num_fds() <= files
    assert threading.active_count() <= threads


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".parquet", "memory"])
def test_memory_is_flat_over_many_windows(corpus_of, kind):
    with closing(Run(corpus_of(kind))) as run:
        tracemalloc.start()
        try:
            run.take(200)
            gc.collect()
            first = tracemalloc.get_traced_memory()[0]
            run.take(700)
            gc.collect()
            more = tracemalloc.get_traced_memory()[0] - first
        finally:
            tracemalloc.stop()
    assert more < 200_000  # the 2,100 rows that went by would take five times as much
