"""The corpus and its parts, rows of tokens, and reading ahead."""

import itertools
import json
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mistral_sae.data import documents as documents_module
from mistral_sae.data import tokens
from mistral_sae.data.documents import Skipped, documents
from mistral_sae.data.records import Document, TextError
from mistral_sae.data.tokens import Corpus, Row, batches, is_held_out, pack, prefetch, shuffle
from mistral_sae.model.source import ModelError


class Letters:
    """A tokenizer of one token a character, with the BOS that a test can see: 0."""

    bos_id, vocab_size = 0, 128

    def encode(self, text):
        return [ord(letter) for letter in text]

    def chat(self, messages):
        if messages[0]["role"] != "user":
            raise ModelError("the first message is of no user")
        return [0, *self.encode("".join(f"<{each['content']}>" for each in messages))]


def lines(*texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def as_documents(*contents):
    return [Document(str(i), t) for i, t in enumerate(contents)]


# The corpus and its parts


def folder_of(tmp_path, count):
    (tmp_path / "a.jsonl").write_bytes(lines(*(f"document {i}" for i in range(count))))
    return str(tmp_path)


def test_the_two_parts_share_no_document_and_lose_none(tmp_path):
    path = folder_of(tmp_path, 200)
    part = {
        held_out: [d.id for d in Corpus(path, held_out_fraction=0.2).documents(held_out=held_out, epochs=False)]
        for held_out in (True, False)
    }
    assert not set(part[True]) & set(part[False])
    assert sorted(part[True] + part[False]) == sorted(d.id for d in documents(path))
    assert all(is_held_out(i, 0.2) for i in part[True])
    assert 20 <= len(part[True]) <= 60


def test_the_held_out_part_grows_with_its_fraction():
    ids = [f"a.jsonl:{i}" for i in range(1000)]
    small = {i for i in ids if is_held_out(i, 0.05)}
    assert small < {i for i in ids if is_held_out(i, 0.2)}
    assert not any(is_held_out(i, 0.0) for i in ids)
    assert all(is_held_out(i, 1.0) for i in ids)


def test_each_epoch_has_another_order_and_each_run_the_same_orders(tmp_path):
    path = folder_of(tmp_path, 50)

    def three_epochs(seed):
        read = Corpus(path, held_out_fraction=0.0, seed=seed).documents(held_out=False)
        return [[d.id for d in itertools.islice(read, 50)] for _ in range(3)]

    first, second, third = three_epochs(seed=1)
    assert sorted(first) == sorted(second) == sorted(third) == sorted(d.id for d in documents(path))
    assert first != second != third != first
    assert three_epochs(seed=1) == [first, second, third]
    assert three_epochs(seed=2)[0] != first


def test_a_large_corpus_goes_round_in_its_own_order(tmp_path, monkeypatch):
    path = folder_of(tmp_path, 20)
    monkeypatch.setattr(documents_module, "IN_MEMORY", 10)
    read = Corpus(path, held_out_fraction=0.0, seed=1).documents(held_out=False)
    assert [d.id for d in itertools.islice(read, 40)] == 2 * [f"a.jsonl:{i + 1}" for i in range(20)]


def test_the_held_out_part_comes_once_and_the_same_for_every_seed(tmp_path):
    path = folder_of(tmp_path, 100)
    by_seed = [[d.id for d in Corpus(path, held_out_fraction=0.5, seed=s).documents(held_out=True)] for s in (1, 2)]
    assert by_seed[0] == by_seed[1]
    assert len(set(by_seed[0])) == len(by_seed[0]) > 20


@pytest.mark.parametrize("in_memory", [10**9, 0])
def test_what_is_skipped_is_counted_once_however_many_epochs(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(documents_module, "IN_MEMORY", in_memory)
    (tmp_path / "a.jsonl").write_bytes(lines("x", "y") + b"broken\n")
    skipped = Skipped()
    read = Corpus(str(tmp_path), held_out_fraction=0.0).documents(held_out=False, skipped=skipped)
    assert len(list(itertools.islice(read, 9))) == 9
    assert skipped.count == 1


@pytest.mark.parametrize("in_memory", [10**9, 0])
def test_a_part_without_documents_is_an_error_and_no_endless_loop(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(documents_module, "IN_MEMORY", in_memory)
    path = folder_of(tmp_path, 3)
    with pytest.raises(TextError, match=r"is in the training part at a held-out fraction of 1\.0"):
        next(Corpus(path, held_out_fraction=1.0).documents(held_out=False))
    with pytest.raises(TextError, match="is in the held-out part"):
        next(Corpus(path, held_out_fraction=0.0).documents(held_out=True))


def test_a_corpus_is_made_of_the_constants_of_any_namespace(tmp_path):
    constants = SimpleNamespace(
        DATA_PATH=folder_of(tmp_path, 30),
        DATA_SPLIT="validation",
        TEXT_FIELD="body",
        HELD_OUT_FRACTION=0.3,
        SEED=4,
        CONTEXT_LENGTH=12,
        MAX_DOCUMENT_BYTES=99,
    )
    assert Corpus.of(constants) == Corpus(str(tmp_path), "validation", "body", 0.3, 4, 12, 99)


def test_held_out_rows_are_some_way_apart_and_full(tmp_path):
    corpus = Corpus(folder_of(tmp_path, 30), held_out_fraction=0.5, context_length=8)
    rows = np.stack([row.tokens for row in corpus.rows(Letters(), held_out=True)])
    found = corpus.held_out_rows(Letters(), 3, stride=4).numpy()
    assert np.array_equal(found, rows[[0, 4, 8]])
    with pytest.raises(TextError, match="less text than one row of 10000 tokens"):
        replace(corpus, context_length=10_000).held_out_rows(Letters(), 3)


def test_rows_of_the_training_part_hold_no_held_out_document(tmp_path):
    corpus = Corpus(folder_of(tmp_path, 30), held_out_fraction=0.5, context_length=8)
    rows = list(corpus.rows(Letters(), held_out=False, epochs=False))
    assert len({id for row in rows for id in row.documents}) > 5
    assert not any(is_held_out(id, 0.5) for row in rows for id in row.documents)


# Packing


def packed(contents, length):
    return ["".join(map(chr, row.tokens)).replace("\0", "^") for row in pack(contents, Letters(), length)]


def test_rows_begin_with_a_bos_and_documents_have_one_between_them():
    assert packed(as_documents("abc", "de", "fghijk"), 5) == ["^abc^", "^de^f", "^ghij"]


def test_a_bos_between_documents_is_not_doubled_at_the_start_of_a_row():
    assert packed(as_documents("abcd", "efgh"), 5) == ["^abcd", "^efgh"]


def test_a_document_without_tokens_leaves_no_bos_behind():
    assert packed(as_documents("ab", "", "cd"), 6) == ["^ab^cd"]


def test_no_token_of_any_document_is_dropped():
    random = np.random.default_rng(0)
    contents = ["".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(0, 40, 300)]
    for length in (2, 3, 7, 64):
        rows = [row.tokens for row in pack(as_documents(*contents), Letters(), length)]
        assert {row.shape for row in rows} == {(length,)}
        assert all(row[0] == 0 for row in rows)
        stream = [chr(t) for row in rows for t in row[1:] if t]
        whole = "".join(contents)
        assert whole.startswith("".join(stream))
        assert len(whole) - len(stream) < length


def test_rows_say_of_which_document_each_token_is():
    rows = list(pack(as_documents("abc", "", "de", "fghijk"), Letters(), 5))
    assert [row.tokens.tolist() for row in rows] == [[ord(c) for c in row] for row in ("\0abc\0", "\0de\0f", "\0ghij")]
    assert [row.document_of.tolist() for row in rows] == [[-1, 0, 0, 0, -1], [-1, 0, 0, -1, 1], [-1, 0, 0, 0, 0]]
    assert [row.documents for row in rows] == [["0"], ["2", "3"], ["3"]]


def test_every_token_of_a_row_is_of_the_document_it_came_from():
    random = np.random.default_rng(0)
    contents = ["".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(0, 40, 300)]
    for length in (2, 7, 64):
        rows = list(pack(as_documents(*contents), Letters(), length))
        found = {}
        for row in rows:
            assert ((row.tokens == 0) == (row.document_of == -1)).all()
            for token, place in zip(row.tokens, row.document_of, strict=True):
                if place >= 0:
                    found[row.documents[place]] = found.get(row.documents[place], "") + chr(token)
        last = max(found, key=int)
        assert contents[int(last)].startswith(found.pop(last))  # the corpus ends in a row that is not full
        assert found == {str(i): text for i, text in enumerate(contents[: int(last)]) if text}


def test_token_ids_and_conversations_are_packed_like_text_and_their_own_bos_is_not_doubled():
    def ids(*ids):
        return Document(f"ids {ids}", "", tokens=np.array(ids, np.int32))

    def messages(*roles):
        return Document(f"messages {roles}", "hi", messages=[{"role": role, "content": "hi"} for role in roles])

    documents = [
        ids(97, 98),
        ids(0, 99, 0, 100),
        ids(0),
        messages("user", "assistant"),
        messages("system"),
        *as_documents("x"),
    ]
    skipped = Skipped()
    (row,) = pack(documents, Letters(), 18, skipped=skipped)
    assert "".join(map(chr, row.tokens)).replace("\0", "^") == "^ab^c^d^<hi><hi>^x"
    assert row.document_of.tolist() == [-1, 0, 0, -1, 1, 1, 1, -1, *[2] * 8, -1, 3]
    assert skipped.first == ["messages ('system',): the first message is of no user"]
    with pytest.raises(TextError, match=r"token id 128 in ids \(1, 128\), expected at most 127: use tokens of this"):
        next(pack([ids(1, 128)], Letters(), 4))


def test_a_chat_format_that_takes_no_conversation_is_an_error_and_no_endless_loop():
    refused = Document("a.jsonl:1", "hi", messages=[{"role": "system", "content": "hi"}])
    with pytest.raises(ModelError, match="is of no user"):
        next(pack(itertools.repeat(refused), Letters(), 8))
    mostly = (document for _ in range(3) for document in [*[refused] * 900, *as_documents("a")])
    assert len(list(pack(mostly, Letters(), 2))) == 3


def test_a_row_is_not_changed_by_those_after_it():
    rows = pack(as_documents("abcdef"), Letters(), 3)
    first = next(rows)
    before = first.tokens.copy()
    list(rows)
    assert (first.tokens == before).all()


def test_a_row_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="no room for text"):
        next(pack(as_documents("a"), Letters(), 1))


def test_a_huge_document_costs_time_in_proportion_to_its_length():
    class Ready:
        bos_id = 0

        def encode(self, text):
            return np.ones(len(text), dtype=np.int64)

    start = time.perf_counter()
    assert sum(1 for _ in pack(as_documents("a" * 16_000_000), Ready(), 1024)) == 15_640
    # Well under a second; copying the rest of the document for each row would move 1 TB
    assert time.perf_counter() - start < 20


def test_batches_stack_rows_and_the_last_one_may_be_smaller():
    import torch

    rows = list(pack(as_documents("abcdefghij"), Letters(), 3))
    found = list(batches(iter(rows), 2))
    assert [tuple(batch.shape) for batch in found] == [(2, 3), (2, 3), (1, 3)]
    assert all(batch.dtype == torch.int64 for batch in found)
    assert torch.cat(found).tolist() == [row.tokens.tolist() for row in rows]


# Running ahead


def reader_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def wait_until(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_prefetch_gives_the_same_items_in_order_and_ends_its_thread():
    assert list(prefetch(iter(range(100)), 4)) == list(range(100))
    assert not reader_threads()


def test_prefetch_runs_ahead_by_its_depth_and_no_further():
    made = []

    def source():
        for i in range(100):
            made.append(i)
            yield i

    ahead = prefetch(source(), 3)
    assert next(ahead) == 0
    wait_until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert len(made) == 4
    ahead.close()


def test_an_error_of_the_reader_is_raised_after_the_items_before_it():
    def source():
        yield 1
        raise TextError("broken")

    ahead = prefetch(source(), 8)
    assert next(ahead) == 1
    with pytest.raises(TextError, match="broken"):
        next(ahead)
    assert not reader_threads()


@pytest.mark.parametrize("taken", [1, 50])
def test_closing_prefetch_ends_its_thread_and_closes_its_source(taken):
    closed = threading.Event()

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    kept = source()  # so that nothing but prefetch can close it
    ahead = prefetch(kept, 2)
    assert list(itertools.islice(ahead, taken)) == list(range(taken))
    assert reader_threads()
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 1
    assert closed.is_set()
    assert not reader_threads()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_waiting_for_an_item_leaves_no_thread():
    release = threading.Event()

    def source():
        yield 1
        # As Ctrl-C would, once the consumer waits; Python runs its handlers in the main thread
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)
        release.wait(0.3)
        yield 2

    ahead = prefetch(source(), 2)
    assert next(ahead) == 1
    with pytest.raises(KeyboardInterrupt):
        next(ahead)
    assert not reader_threads()


def test_a_reader_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(tokens, "JOIN", 0.05)
    release = threading.Event()

    def source():
        yield 1
        release.wait(5)

    ahead = prefetch(source(), 2)
    assert next(ahead) == 1
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 1
    assert all(thread.daemon for thread in reader_threads())
    release.set()
    wait_until(lambda: not reader_threads())


def test_a_depth_of_nothing_is_refused():
    with pytest.raises(ValueError, match="use 1 or more"):
        next(prefetch(iter([1]), 0))


def test_the_chain_from_a_folder_to_batches_is_the_same_in_every_run(tmp_path):
    path = folder_of(tmp_path, 30)

    def run(start_row):
        rows = Corpus(path, held_out_fraction=0.1, seed=3, context_length=16).rows(Letters(), held_out=False)
        stream = prefetch(batches(itertools.islice(rows, start_row, None), 2), 4)
        found = [batch.tolist() for batch in itertools.islice(stream, 30)]
        stream.close()
        return found

    assert run(0) == run(0)
    assert run(10)[:25] == run(0)[5:]


def test_shuffled_rows_are_the_same_rows_window_by_window_in_an_order_of_the_seed():
    rows = [Row(np.array([i]), np.array([0]), [str(i)]) for i in range(25)]

    def order(window, seed):
        return [int(row.tokens[0]) for row in shuffle(iter(rows), window, seed)]

    shuffled = order(10, 0)
    assert sorted(shuffled) == list(range(25))
    assert [sorted(shuffled[i : i + 10]) for i in (0, 10, 20)] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 25)),
    ]
    assert shuffled[:10] != list(range(10))
    assert [i + 10 for i in shuffled[:10]] != shuffled[10:20]  # each window has an order of its own
    assert shuffled == order(10, 0) != order(10, 1)
