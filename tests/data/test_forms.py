"""Corpora as they lie about: every form is read by what it holds, whatever a file is called, and resumed exactly."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from mistral_sae.data import forms
from mistral_sae.data.documents import Skipped, check, documents, fits_in_memory
from mistral_sae.data.records import TextError

TEXTS = ["alpha beta gamma", "", 'a "brace" \\{ in } it', "zeta 😀 eta, \n twice"]
KEPT = [text for text in TEXTS if text]
LINES = "".join(json.dumps({"url": "u", "text": text}) + "\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text, "more": {"a": [1, {}]}} for text in TEXTS]).encode()


def read(path, **options):
    skipped = Skipped()
    return [d.text for d in documents(str(path), skipped=skipped, **options)], skipped


def csv_of(texts, separator):
    quoted = ('"' + text.replace('"', '""') + '"' for text in texts)
    return ("\ufeffid" + separator + "text\n" + "".join(f"7{separator}{text}\r\n" for text in quoted)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "c4-train.00000-of-01024.json.gz": gzip.compress(LINES),
        "x.jsonl.xz": lzma.compress(LINES),
        "x.jsonl.bz2": bz2.compress(LINES),
        "x.json.zst": zstandard.compress(LINES),
        "x.json": LINES,
        "x.ndjson": LINES,
        "X.JSONL": LINES,
        "plain.jsonl.gz": LINES,
        "packed.jsonl": gzip.compress(LINES),
        "members.jsonl.gz": gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
        "as pzstd begins.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.compress(LINES),
        "array.json": b"\xef\xbb\xbf\n" + ARRAY,
        "array.jsonl": ARRAY,
        "array over lines.json": json.dumps([{"text": text} for text in TEXTS], indent=2).encode(),
        "objects over lines.jsonl": "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS).encode(),
        "array.json.xz": lzma.compress(ARRAY),
        "x.csv": csv_of(TEXTS, ","),
        "x.tsv": csv_of(TEXTS, "\t"),
        "semicolons.csv.gz": gzip.compress(csv_of(TEXTS, ";")),
    }.items(),
)
def test_a_file_is_read_as_what_it_holds(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        texts, skipped = read(path)
        assert texts == KEPT
        assert skipped.count == 1
        assert "is empty" in skipped.first[0]


def test_a_file_of_any_name_is_read_where_it_is_given_itself(tmp_path):
    for content in (LINES, zstandard.compress(ARRAY)):
        (tmp_path / "3f2a9c").write_bytes(content)
        assert read(tmp_path / "3f2a9c")[0] == KEPT
    assert check(str(tmp_path / "3f2a9c")).endswith("of text")


def test_packed_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some\r\nwords"))
    assert [document[:2] for document in documents(str(tmp_path))] == [("a.txt.gz", "some\nwords")]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS, pyarrow.string_view()),
        pyarrow.array(TEXTS).dictionary_encode(),
        pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary()),
        pyarrow.array([text.encode() for text in TEXTS], pyarrow.large_binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_of_any_type_of_text_is_read(tmp_path, column):
    table = pyarrow.table({"n": range(len(TEXTS)), "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write(table)
    with pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write(table)
    texts, skipped = read(tmp_path)
    assert texts == 3 * KEPT
    assert skipped.first == [f"{name}:1: field 'text' is empty" for name in ("a.parquet", "b.arrow", "c.arrow")]


def test_bytes_that_are_not_utf8_are_counted(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"fine", b"caf\xe9"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_bytes(b"text\nfine\ncaf\xe9\n")
    texts, skipped = read(tmp_path)
    assert texts == ["fine", "fine"]
    assert skipped.first == ["a.parquet:1: not UTF-8", "b.csv:3: field 'text' is not valid Unicode"]


def test_what_datasets_saves_is_read_and_its_splits_are_named(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.select([3, 2, 0]).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert read(tmp_path / "saved")[0] == [TEXTS[3], TEXTS[2], TEXTS[0]]
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(TextError, match=r"splits test, train: DATA_PATH takes one, as in .*splits/test"):
        check(str(tmp_path / "splits"))
    assert read(tmp_path / "splits/train")[0] == KEPT


def test_linked_folders_are_followed_once_and_round_in_no_circle(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.jsonl").write_bytes(LINES)
    (tmp_path / "here").mkdir()
    for name, target in (("linked", tmp_path / "there"), ("again", tmp_path / "there"), ("up", tmp_path / "here")):
        os.symlink(target, tmp_path / "here" / name)
    os.symlink(tmp_path / "there", tmp_path / "top")
    assert [document.id for document in documents(str(tmp_path / "here"))] == [f"again/a.jsonl:{n}" for n in (1, 3, 4)]
    assert read(tmp_path / "top")[0] == KEPT
    assert read(tmp_path / "here/linked/a.jsonl")[0] == KEPT


# Bad records and bad files


def test_a_bad_row_of_csv_is_counted_with_its_line_and_the_next_is_read(tmp_path):
    rows = [
        "",
        "id,text",
        '1,"two\nlines"',
        "2,a, comma",
        "3",
        "",
        "4," + "z" * 400,
        "5,fine",
        '6,"not closed',
        "7,lost",
    ]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n" + "x" * 200 + "\n8,last\n")
    texts, skipped = read(tmp_path, max_bytes=100)
    assert texts == ["two\nlines", "fine", "last"]
    assert skipped.first == [
        "a.csv:5: 3 values, but 2 names in the first row",
        "a.csv:6: 1 values, but 2 names in the first row",
        "a.csv:8: not CSV (field larger than field limit (100))",
    ]
    assert skipped.count == 4
    with pytest.raises(TextError, match=r"no field 'body' in .*; found 'id', 'text'"):
        read(tmp_path, text_field="body")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_a_bad_or_endless_element_of_an_array_is_counted_in_any_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(forms, "CHUNK", chunk)
    elements = [
        '{"text": "a \\\\"}',
        '{"text": 3}',
        '{"text" "b"}',
        json.dumps({"text": "c" * 900}),
        '{"text": "}\\""}',
    ]
    (tmp_path / "a.json").write_text("[" + ",\n ".join([*elements, '{"text": "cut off']))
    texts, skipped = read(tmp_path, max_bytes=200)
    assert texts == ["a \\", '}"']
    assert [line.split(":")[1] for line in skipped.first] == ["2", "3", "4"]
    assert skipped.count == 4


def test_an_array_of_no_objects_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    with pytest.raises(TextError, match=r"no document in .*a\.json:1: not JSON"):
        read(tmp_path)


@pytest.mark.parametrize(("suffix", "compress"), [(".json.xz", lzma.compress), (".json.bz2", bz2.compress)])
def test_a_truncated_or_damaged_packed_file_is_an_error_that_names_it(tmp_path, suffix, compress):
    packed = compress(b"".join(json.dumps({"text": os.urandom(300).hex()}).encode() + b"\n" for _ in range(20)))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed[:-5])
    with pytest.raises(TextError, match=f"a{suffix} cannot be read"):
        read(path)
    path.write_bytes(packed[:60] + bytes(50) + packed[110:])
    with pytest.raises(TextError, match=f"a{suffix} cannot be read"):
        read(path)


def test_the_size_of_packed_files_is_reckoned_as_unpacked(tmp_path, monkeypatch):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(LINES))
    monkeypatch.setattr("mistral_sae.data.documents.IN_MEMORY", 2 * (tmp_path / "a.json.gz").stat().st_size)
    assert not fits_in_memory(str(tmp_path))


# Conversations and tokens


def test_a_column_of_token_ids_or_of_messages_becomes_documents(tmp_path):
    messages = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "there"}]
    columns = {"input_ids": [[5, 6], [], [7], [-1]], "messages": [messages, [], None, messages[:1]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"input_ids": [8, True], "messages": [{"role": "user"}]}) + "\n")
    skipped = Skipped()
    found = list(documents(str(tmp_path), text_field="input_ids", skipped=skipped))
    assert [(each.id, each.tokens.tolist(), each.tokens.dtype) for each in found] == [
        ("a.parquet:0", [5, 6], np.int32),
        ("a.parquet:2", [7], np.int32),
    ]
    assert skipped.first[1:] == [
        f"{where}: field 'input_ids' is a list, but neither of token ids nor of messages with a role and a content"
        for where in ("a.parquet:3", "b.jsonl:1")
    ]
    found = list(documents(str(tmp_path), text_field="messages"))
    assert [each.messages for each in found] == [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}],
        [{"role": "user", "content": "hi"}],
    ]
    assert found[0].text == "hi\n\nthere"
    assert next(documents(str(tmp_path), text_field="input_ids", max_bytes=7)).id == "a.parquet:2"
