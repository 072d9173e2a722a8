"""Files that are hostile or damaged: memory stays small, and what is no document is counted or said in one line."""

import gzip
import json
import lzma
import tracemalloc
from contextlib import suppress

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mistral_sae.data.documents import Skipped, documents, fits_in_memory
from mistral_sae.data.records import TextError

MAX = 100_000  # bytes, of the bound on a document in these tests


def read(path, **options):
    """The texts of a corpus, and what was left out."""
    skipped = Skipped()
    return [d.text for d in documents(str(path), skipped=skipped, max_bytes=MAX, **options)], skipped


def in_pieces(kind, path, pieces):
    """Write a packed file without holding what it holds."""
    if kind == ".jsonl.gz":
        with gzip.open(path, "wb") as file:
            file.writelines(pieces)
    else:
        with open(path, "wb") as packed, zstandard.ZstdCompressor().stream_writer(packed) as file:
            for piece in pieces:
                file.write(piece)


def record(text):
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".jsonl"])
def test_an_endless_line_is_skipped_with_its_size_in_little_memory(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    pieces = [record("first"), b'{"text": "', *[b"a" * 1_000_000] * 150, b'"}\n', record("last")]
    if kind == ".jsonl":
        path.write_bytes(b"".join(pieces))
    else:
        in_pieces(kind, path, pieces)
        assert path.stat().st_size < 200_000
    del pieces
    tracemalloc.start()
    try:
        texts, skipped = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ["first", "last"]
    assert skipped.first == [f"a{kind}:2: 150.0 MB long, over MAX_DOCUMENT_BYTES=100000"]
    assert peak < 40_000_000


def test_a_document_of_just_the_bound_is_read_and_one_byte_more_is_not(tmp_path):
    short = "x" * (MAX - len(record("")))
    (tmp_path / "a.jsonl").write_bytes(record(short) + record(short + "x") + record("last"))
    (tmp_path / "b.txt").write_text("é" * (MAX // 2))
    (tmp_path / "c.txt").write_text("é" * (MAX // 2) + "x")
    texts, skipped = read(tmp_path)
    assert texts == [short, "last", "é" * (MAX // 2)]
    assert [line.split(":")[0] for line in skipped.first] == ["a.jsonl", "c.txt"]


def test_a_value_of_a_table_and_a_record_of_the_hub_have_the_same_bound(tmp_path, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = ["short", "abcdefghij" * (MAX // 10) + "x", "last"]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    for path in (tmp_path, "owner/name"):
        found, skipped = read(path)
        assert found == ["short", "last"]
        assert skipped.count == 1
        assert "100.0 kB long" in skipped.first[0]


def test_a_table_that_unpacks_to_far_more_than_text_does_is_refused_unread(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["fine", "a" * 50_000_000]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(TextError, match=r"a\.parquet cannot be read: 50\.0 MB would be unpacked from a file of .* kB"):
        read(tmp_path)
    table = pyarrow.table({"text": ["the same"] * 60_000, "number": [0] * 60_000})  # which is stored once
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert len(read(tmp_path)[0]) == 60_000


def test_packed_text_that_is_more_than_its_size_lets_expect_is_streamed(tmp_path, monkeypatch):
    from mistral_sae.data import documents as documents_module
    from mistral_sae.data.tokens import Corpus

    monkeypatch.setattr(documents_module, "IN_MEMORY", 1_000_000)
    path = tmp_path / "a.jsonl.zst"
    in_pieces(".jsonl.zst", path, (record("a" * 1000 + str(i)) for i in range(10_000)))
    assert fits_in_memory(str(path))  # by its size
    corpus, skipped = Corpus(str(path), held_out_fraction=0.0), Skipped()
    tracemalloc.start()
    try:
        ids = [document.id for document in corpus.documents(held_out=False, epochs=False, skipped=skipped)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids == [f"a.jsonl.zst:{i}" for i in range(1, 10_001)]
    assert peak < 9_000_000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a\\u0000b"}', None),
        (b'{"text": "a", "n": ' + b"9" * 50_000 + b"}", "not JSON"),
        (b'{"text": ' + b"[" * 90_000 + b"]" * 9_000 + b"}", "not JSON"),
        (b'{"a":' * 15_000 + b"1" + b"}" * 15_000, "not JSON"),
        (b'{"text": "\\udfff\\ud800"}', "not valid Unicode"),
        (b"\x00" * 500, "not JSON"),
        (b'{"text": NaN}', "of type float"),
        (b'{"\\ud800": "x"}', "no field 'text'"),
        (b'"text"', "of type str"),
    ],
)
def test_a_line_of_any_content_is_a_document_or_counted(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_bytes(record("first") + line + b"\n" + record("last"))
    texts, skipped = read(tmp_path)
    assert (texts[0], texts[-1], len(texts)) == ("first", "last", 2 if said else 3)
    assert skipped.count == (1 if said else 0)
    assert said is None or said in skipped.first[0]


def test_field_names_that_are_long_or_not_unicode_are_named_in_one_short_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"\\ud800\\u001b[31m": 1, "' + b"y" * 50_000 + b'": 2}\n')
    with pytest.raises(TextError, match="no field 'text'") as raised:
        read(tmp_path)
    assert len(str(raised.value)) < 700
    assert str(raised.value).isprintable()


def small_files():
    """A file of every kind, to damage."""
    import io

    import pyarrow
    import pyarrow.parquet

    lines = b"".join(record(f"document {i} of a few words") for i in range(30))
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some words"] * 30, "n": list(range(30))}), table)
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, schema := pyarrow.schema({"text": pyarrow.string()})) as writer:
        writer.write_table(pyarrow.table({"text": ["some words"] * 30}, schema), max_chunksize=9)
    packed = gzip.compress(lines[:500]) + gzip.compress(lines[500:])
    packed_files = {".jsonl.gz": packed, ".jsonl.zst": zstandard.compress(lines), ".json.xz": lzma.compress(lines)}
    array = json.dumps([{"text": "some words"}] * 30).encode()
    tables = {".parquet": table.getvalue(), ".arrow": stream.getvalue(), ".csv": b"text,n\nsome words,3\n" * 9}
    return {".jsonl": lines, ".json": array} | packed_files | tables


FILES = small_files()
COLUMN = FILES[".parquet"].rindex(b"text")
EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=0, max_size=4)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(FILES)), edits=EDITS, cut=st.integers(0, 2**16) | st.none())
@example(kind=".parquet", edits=[(COLUMN, b"\xff")], cut=None)  # a column's name that is not UTF-8
def test_a_damaged_file_gives_documents_faults_or_one_line(tmp_path, kind, edits, cut):
    content = bytearray(FILES[kind])
    for at, new in edits:
        at %= len(content)
        content[at : at + len(new)] = new
    (tmp_path / f"a{kind}").write_bytes(content if cut is None else content[: cut % len(content)])
    with suppress(TextError):
        read(tmp_path / f"a{kind}")
