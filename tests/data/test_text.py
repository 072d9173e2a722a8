import gzip
import itertools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

from mistral_sae.data import sources
from mistral_sae.data import tokens as text
from mistral_sae.data.tokens import (
    Corpus,
    Skipped,
    TextError,
    batches,
    check,
    documents,
    fingerprint,
    is_held_out,
    pack,
    pack_with_documents,
    prefetch,
)


class Letters:
    """A tokenizer of one token a character, with the BOS that a test can see: 0."""

    bos_id = 0

    def encode(self, text):
        return [ord(letter) for letter in text]


def lines(*texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def texts(data_path, **options):
    return [document.text for document in documents(str(data_path), **options)]


def as_documents(*contents):
    return [text.Document(str(i), t) for i, t in enumerate(contents)]


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# Sources


def test_the_library_is_the_same_in_the_same_order_as_its_sorted_paths():
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if "-packages/" not in p.relative_to(root).as_posix()]
    expected = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if content:
            expected.append((path.relative_to(root).as_posix(), content))
    assert [tuple(d) for d in documents("stdlib")] == expected
    assert len(expected) > 500


def test_every_kind_of_file_gives_its_documents_with_ids_that_name_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("three")))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines("four")))
    write_parquet(tmp_path / "d.parquet", {"other": [1, 2], "text": ["five", "six"]})
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.txt").write_text("seven\neight")
    assert [tuple(d) for d in documents(str(tmp_path))] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "two"),
        ("b.jsonl.gz:1", "three"),
        ("c.jsonl.zst:1", "four"),
        ("d.parquet:0", "five"),
        ("d.parquet:1", "six"),
        ("e/f.txt", "seven\neight"),
    ]
    assert [d.id for d in documents(str(tmp_path / "a.jsonl"))] == ["a.jsonl:1", "a.jsonl:2"]


def test_a_folder_is_read_in_the_order_of_its_paths_without_hidden_and_foreign_files(tmp_path):
    for name in ["b.txt", "a.txt", "c/a.txt", ".hidden.txt", ".git/x.txt", "notes.md", "d.TXT"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt", "c/a.txt", "d.TXT"]


def test_the_text_field_has_a_name_to_choose(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 3}\n')
    write_parquet(tmp_path / "b.parquet", {"content": ["y"], "text": ["no"]})
    assert texts(tmp_path, text_field="content") == ["x", "y"]


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path):
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"  # as pzstd puts between frames
    frames = [zstandard.compress(lines(f"document {i}")[: -1 if i else None]) for i in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(frames[0] + skippable + frames[1] + zstandard.compress(b"\n") + frames[2])
    assert texts(tmp_path) == ["document 0", "document 1", "document 2"]


@pytest.mark.parametrize("cut", [1, 2, 5, 400])
@pytest.mark.parametrize(("suffix", "compress"), [(".jsonl.zst", zstandard.compress), (".jsonl.gz", gzip.compress)])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, compress, cut):
    noise = [np.random.default_rng(i).bytes(300).hex() for i in range(20)]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(lines(*noise))[:-cut])
    with pytest.raises(TextError, match=f"a{suffix} is truncated"):
        texts(path)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"this is nothing of the kind" * 10)
    with pytest.raises(TextError, match=f"a{suffix} cannot be read") as raised:
        texts(path)
    assert "\n" not in str(raised.value)


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": ["x" * 100, "y"]})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TextError, match=r"a\.parquet cannot be read"):
        texts(path)


def test_byte_order_marks_and_crlf_are_no_part_of_the_text(tmp_path):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(bom + lines("one", "two").replace(b"\n", b"\r\n"))
    (tmp_path / "b.txt").write_bytes(bom + b"three\r\nfour")
    skipped = Skipped()
    assert texts(tmp_path, skipped=skipped) == ["one", "two", "three\nfour"]
    assert skipped.count == 0


def test_a_line_longer_than_what_is_read_at_once_is_one_document(tmp_path):
    long = "word " * 200_000
    (tmp_path / "a.jsonl").write_bytes(lines("short", long, "last").rstrip(b"\n"))
    assert texts(tmp_path) == ["short", long, "last"]


def test_what_holds_no_text_is_skipped_counted_and_reported_with_file_and_line(tmp_path):
    bad = [
        (b'{"text": ', "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": 7}', "field 'text' is of type int"),
        (b'{"text": ""}', "field 'text' is empty"),
        (b'{"text": " \\n"}', "field 'text' is empty"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'["text"]', "type list"),
        (b"[" * 100_000, "not JSON"),
    ]
    for line, reason in bad:
        (tmp_path / "a.jsonl").write_bytes(lines("first") + b"\n" + line + b"\n" + lines("last"))
        skipped = Skipped()
        assert texts(tmp_path, skipped=skipped) == ["first", "last"]
        assert skipped.count == 1
        assert skipped.first[0].startswith("a.jsonl:3: ")
        assert reason in skipped.first[0]


def test_files_and_rows_without_text_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    write_parquet(tmp_path / "c.parquet", {"text": [None, "kept", ""]})
    write_parquet(tmp_path / "d.parquet", {"body": ["x"]})
    skipped = Skipped()
    assert texts(tmp_path, skipped=skipped) == ["kept"]
    assert skipped.count == 5
    assert skipped.first == ["a.txt: not UTF-8", "b.txt: is empty", "c.parquet:0: field 'text' is null"]


def test_a_parquet_row_that_is_not_utf8_is_skipped(tmp_path):
    import pyarrow

    raw = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    write_parquet(tmp_path / "a.parquet", {"text": raw})
    skipped = Skipped()
    assert texts(tmp_path, skipped=skipped) == ["fine"]
    assert skipped.first == ["a.parquet:1: not UTF-8"]


def test_the_summary_gives_the_first_few_and_counts_the_rest_in_one_line():
    skipped = Skipped()
    assert skipped.summary() == ""
    for line in range(1, 1235):
        skipped.add(f"a.jsonl:{line}", "not JSON")
    expected = "skipped 1,234 records: a.jsonl:1: not JSON; a.jsonl:2: not JSON; a.jsonl:3: not JSON; and 1,231 more"
    assert skipped.summary() == expected


def test_a_field_that_is_in_no_line_is_an_error_that_names_those_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\nnot json\n')
    write_parquet(tmp_path / "b.parquet", {"title": ["x"]})
    with pytest.raises(TextError, match=r"no record .* the field 'text'; found 'body', 'id', 'title': choose"):
        texts(tmp_path)


def test_a_wrong_field_is_noticed_before_a_large_corpus_is_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "GIVE_UP_AFTER", 50)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 100)
    skipped = Skipped()
    with pytest.raises(TextError, match=r"none of the first 50 records .* found 'body'"):
        texts(tmp_path, skipped=skipped)
    assert skipped.count == 50


@pytest.mark.parametrize("content", [b"", b"\n\n", b"not json\n"])
def test_a_corpus_without_documents_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(TextError, match=r"no document in .*(it is empty|a\.jsonl:1: not JSON)"):
        texts(tmp_path)


@pytest.mark.parametrize("path", ["", "nowhere", "./a/b", "/no/such/folder", "data/train.jsonl", "data/train.json"])
def test_a_path_that_is_not_there_is_an_error_that_lists_what_is_taken(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for look in (lambda: check(path, "text"), lambda: next(documents(path))):
        with pytest.raises(TextError, match=r"no file or folder .*'stdlib'.*owner/name"):
            look()


def test_a_file_or_folder_of_an_unknown_kind_is_an_error_that_lists_the_known_ones(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    for path in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(TextError, match=r"\.jsonl, \.jsonl\.zst, \.jsonl\.gz, \.parquet, \.txt"):
            check(str(path), "text")


def test_a_plan_describes_its_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1500)
    assert check(str(tmp_path), "text") == "1 file, 1.5 kB of .txt"
    (tmp_path / "b.jsonl").write_bytes(lines("y"))
    assert check(str(tmp_path), "text") == "2 files, 1.5 kB of .jsonl and .txt"
    version = ".".join(map(str, sys.version_info[:3]))
    count = len(list(text.stdlib_documents()))
    assert f"{version}, {count:,} files" in check("stdlib", "text")
    assert check("owner/name", "text") == "owner/name, streamed from the hub"


def test_a_plan_finds_a_wrong_field_before_anything_is_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(TextError, match="found 'body'"):
        check(str(tmp_path), "text")
    assert check(str(tmp_path), "body") == "1 file, 14 bytes of .jsonl"


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Give a folder its name on the hub: everything but the download is the real library."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = datasets.load_dataset
    calls = []

    def load_local(name, **options):
        calls.append((name, options))
        return load(str(tmp_path / "hub"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub", calls


def test_a_dataset_of_the_hub_is_streamed(hub):
    folder, calls = hub
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    (folder / "test.jsonl").write_text('{"text": "held"}\n')
    skipped = Skipped()
    found = [tuple(d) for d in documents("owner/name", skipped=skipped)]
    assert found == [("owner/name:0", "one"), ("owner/name:2", "three")]
    assert skipped.first == ["owner/name:1: field 'text' is null"]
    assert texts("owner/name", split="test") == ["held"]
    assert calls[0] == ("owner/name", {"split": "train", "streaming": True})


def test_a_wrong_field_of_a_hub_dataset_is_an_error_that_names_its_columns(hub):
    folder, _ = hub
    write_parquet(folder / "train.parquet", {"body": ["x", "y"], "id": [1, 2]})
    skipped = Skipped()
    with pytest.raises(TextError, match="the field 'text'; found 'body', 'id'"):
        texts("owner/name", skipped=skipped)
    assert skipped.first == ["owner/name: no column 'text'"]  # seen without reading a record


def test_an_unknown_split_is_one_error(hub):
    folder, _ = hub
    (folder / "train.jsonl").write_bytes(lines("x"))
    with pytest.raises(TextError, match=r"'owner/name' \(split 'nope'\) cannot be opened") as raised:
        texts("owner/name", split="nope")
    assert "\n" not in str(raised.value)


def test_a_stream_that_breaks_off_is_one_error_after_what_came_before(monkeypatch):
    import datasets

    def broken():
        yield {"text": "one"}
        raise ConnectionError("reset\nby peer")

    stream = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    read = documents("owner/name")
    assert next(read).text == "one"
    with pytest.raises(TextError, match="broke off after 1 records: ConnectionError: reset by peer"):
        next(read)


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


def test_a_small_corpus_goes_round_in_another_order_each_epoch_and_the_same_in_each_run(tmp_path):
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
    monkeypatch.setattr(sources, "IN_MEMORY", 10)
    read = Corpus(path, held_out_fraction=0.0, seed=1).documents(held_out=False)
    assert [d.id for d in itertools.islice(read, 40)] == 2 * [f"a.jsonl:{i + 1}" for i in range(20)]


def test_the_held_out_part_comes_once_and_the_same_for_every_seed(tmp_path):
    path = folder_of(tmp_path, 100)
    by_seed = [[d.id for d in Corpus(path, held_out_fraction=0.5, seed=s).documents(held_out=True)] for s in (1, 2)]
    assert by_seed[0] == by_seed[1]
    assert len(set(by_seed[0])) == len(by_seed[0]) > 20


@pytest.mark.parametrize("in_memory", [10**9, 0])
def test_what_is_skipped_is_counted_once_however_many_epochs(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sources, "IN_MEMORY", in_memory)
    (tmp_path / "a.jsonl").write_bytes(lines("x", "y") + b"broken\n")
    skipped = Skipped()
    read = Corpus(str(tmp_path), held_out_fraction=0.0).documents(held_out=False, skipped=skipped)
    assert len(list(itertools.islice(read, 9))) == 9
    assert skipped.count == 1


@pytest.mark.parametrize("in_memory", [10**9, 0])
def test_a_part_without_documents_is_an_error_and_no_endless_loop(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sources, "IN_MEMORY", in_memory)
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
    )
    assert Corpus.of(constants) == Corpus(str(tmp_path), "validation", "body", 0.3, 4, 12)


def test_held_out_rows_are_some_way_apart_and_full(tmp_path):
    corpus = Corpus(folder_of(tmp_path, 30), held_out_fraction=0.5, context_length=8)
    rows = np.stack(list(corpus.rows(Letters(), held_out=True)))
    found = corpus.held_out_rows(Letters(), 3, stride=4).numpy()
    assert np.array_equal(found, rows[[0, 4, 8]])
    with pytest.raises(TextError, match="less text than one row of 10000 tokens"):
        replace(corpus, context_length=10_000).held_out_rows(Letters(), 3)


def test_rows_with_documents_are_the_rows_and_whose_tokens_they_hold(tmp_path):
    corpus = Corpus(folder_of(tmp_path, 30), held_out_fraction=0.5, context_length=8)
    whole = list(corpus.rows_with_documents(Letters(), held_out=False, epochs=False))
    rows = list(corpus.rows(Letters(), held_out=False, epochs=False))
    assert all(np.array_equal(row.tokens, tokens) for row, tokens in zip(whole, rows, strict=True))
    assert not any(is_held_out(id, 0.5) for row in whole for id in row.documents)


def test_the_fingerprint_changes_with_the_files_of_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "notes.md").write_text("no text")
    first = fingerprint(str(tmp_path))
    (tmp_path / "notes.md").write_text("other notes")
    assert fingerprint(str(tmp_path)) == first == fingerprint(str(tmp_path))
    (tmp_path / "a.txt").write_text("two, three")
    second = fingerprint(str(tmp_path))
    (tmp_path / "b.txt").write_text("four")
    third = fingerprint(str(tmp_path))
    os.utime(tmp_path / "b.txt", (0, 0))
    assert len({first, second, third, fingerprint(str(tmp_path))}) == 4
    assert fingerprint("stdlib") == fingerprint("stdlib") not in (first, second, third)
    assert fingerprint("owner/name") == "owner/name"
    with pytest.raises(TextError, match="there is no file or folder"):
        fingerprint("nowhere at all")


# Packing


def packed(contents, length, **options):
    return ["".join(map(chr, row)).replace("\0", "^") for row in pack(contents, Letters(), length, **options)]


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
        rows = list(pack(as_documents(*contents), Letters(), length))
        assert {row.shape for row in rows} == {(length,)}
        assert all(row[0] == 0 for row in rows)
        stream = [chr(t) for row in rows for t in row[1:] if t]
        whole = "".join(contents)
        assert whole.startswith("".join(stream))
        assert len(whole) - len(stream) < length


def test_rows_say_of_which_document_each_token_is():
    rows = list(pack_with_documents(as_documents("abc", "", "de", "fghijk"), Letters(), 5))
    assert [row.tokens.tolist() for row in rows] == [[ord(c) for c in row] for row in ("\0abc\0", "\0de\0f", "\0ghij")]
    assert [row.places.tolist() for row in rows] == [[-1, 0, 0, 0, -1], [-1, 0, 0, -1, 1], [-1, 0, 0, 0, 0]]
    assert [row.documents for row in rows] == [["0"], ["2", "3"], ["3"]]


def test_every_token_of_a_row_is_of_the_document_it_came_from():
    random = np.random.default_rng(0)
    contents = ["".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(0, 40, 300)]
    for length in (2, 7, 64):
        rows = list(pack_with_documents(as_documents(*contents), Letters(), length))
        plain = pack(as_documents(*contents), Letters(), length)
        assert all((row.tokens == other).all() for row, other in zip(rows, plain, strict=True))
        found = {}
        for row in rows:
            assert ((row.tokens == 0) == (row.places == -1)).all()
            for token, place in zip(row.tokens, row.places, strict=True):
                if place >= 0:
                    found[row.documents[place]] = found.get(row.documents[place], "") + chr(token)
        last = max(found, key=int)
        assert contents[int(last)].startswith(found.pop(last))  # the corpus ends in a row that is not full
        assert found == {str(i): text for i, text in enumerate(contents[: int(last)]) if text}


def test_a_run_goes_on_at_the_row_where_it_was_left():
    contents = as_documents("abc", "defghijklmnop", "q", "rstuvwxyz")
    rows = packed(contents, 4)
    for start in range(len(rows) + 1):
        assert packed(contents, 4, start_row=start) == rows[start:]


def test_a_row_is_not_changed_by_those_after_it():
    rows = pack(as_documents("abcdef"), Letters(), 3)
    first = next(rows)
    before = first.copy()
    list(rows)
    assert (first == before).all()


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
    assert torch.cat(found).tolist() == [row.tolist() for row in rows]


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
    monkeypatch.setattr(text, "JOIN", 0.05)
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
        docs = Corpus(path, held_out_fraction=0.1, seed=3).documents(held_out=False)
        stream = prefetch(batches(pack(docs, Letters(), 16, start_row=start_row), 2), 4)
        found = [batch.tolist() for batch in itertools.islice(stream, 30)]
        stream.close()
        return found

    assert run(0) == run(0)
    assert run(10)[:25] == run(0)[5:]


def test_shuffled_rows_are_the_same_rows_window_by_window_in_an_order_of_the_seed():
    rows = [np.array([i]) for i in range(25)]

    def order(window, seed):
        return [int(row[0]) for row in text.shuffle(iter(rows), window, seed)]

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
