"""Documents of every kind of source, and what is said of those that cannot be read."""

import gzip
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hub_server import serve

from mistral_sae.data import documents as documents_module
from mistral_sae.data.documents import Skipped, check, documents, fingerprint
from mistral_sae.data.records import TextError


def lines(*texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def texts(data_path, **options):
    return [document.text for document in documents(str(data_path), **options)]


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
    assert [d[:2] for d in documents("stdlib")] == expected
    assert len(expected) > 500


def test_every_kind_of_file_gives_its_documents_with_ids_that_name_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("three")))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines("four")))
    write_parquet(tmp_path / "d.parquet", {"other": [1, 2], "text": ["five", "six"]})
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.txt").write_text("seven\neight")
    assert [d[:2] for d in documents(str(tmp_path))] == [
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
    with pytest.raises(TextError, match=f"a{suffix} cannot be read"):
        texts(path)


def test_a_zst_file_that_takes_gigabytes_to_unpack_is_one_line(tmp_path):
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(lines("one")) + packer.flush())
    with pytest.raises(TextError, match=r"a\.jsonl\.zst cannot be read: .*too much memory.* unpack it"):
        texts(tmp_path)


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
    with pytest.raises(TextError, match=r"no field 'text' in .*; found 'body', 'id', 'title': choose"):
        texts(tmp_path)


def test_a_wrong_field_is_noticed_before_a_large_corpus_is_read_through(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "GIVE_UP_AFTER", 50)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 100)
    skipped = Skipped()
    with pytest.raises(TextError, match=r"no field 'text' in .*; found 'body'"):
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
    (tmp_path / "a.pdf").write_text("%PDF-1.7\nx\n")
    for path in (tmp_path, tmp_path / "a.pdf"):
        with pytest.raises(TextError, match=r"\.jsonl, \.json, .*, \.arrow, also packed as \.gz, \.zst"):
            check(str(path), "text")


def test_a_plan_describes_its_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1500)
    assert check(str(tmp_path), "text") == "1 file, 1.5 kB of .txt"
    (tmp_path / "b.jsonl").write_bytes(lines("y"))
    assert check(str(tmp_path), "text") == "2 files, 1.5 kB of .jsonl and .txt"
    version = ".".join(map(str, sys.version_info[:3]))
    count = len(list(documents("stdlib")))
    assert f"{version}, {count:,} files" in check("stdlib", "text")
    assert check("owner/name", "text") == "owner/name, streamed from the hub"


def test_a_plan_finds_a_wrong_field_before_anything_is_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(TextError, match="found 'body'"):
        check(str(tmp_path), "text")
    assert check(str(tmp_path), "body") == "1 file, 14 bytes of .jsonl"


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
    assert fingerprint(str(shutil.copytree(tmp_path, tmp_path.with_name("moved")))) == third  # wherever it lies
    (tmp_path / "b.txt").write_text("five")
    assert len({first, second, third, fingerprint(str(tmp_path))}) == 4
    assert fingerprint("stdlib") == fingerprint("stdlib") not in (first, second, third)
    with pytest.raises(TextError, match="there is no file or folder"):
        fingerprint("nowhere at all")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Give a folder its name on the hub: everything but the download is the real library."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = datasets.load_dataset
    calls = []

    def load_local(path, **options):
        calls.append((path, options))
        return load(str(tmp_path / "hub"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub", calls


def test_a_dataset_of_the_hub_is_streamed(hub):
    folder, calls = hub
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    (folder / "test.jsonl").write_text('{"text": "held"}\n')
    skipped = Skipped()
    found = [d[:2] for d in documents("owner/name", skipped=skipped)]
    assert found == [("owner/name:0", "one"), ("owner/name:2", "three")]
    assert skipped.first == ["owner/name:1: field 'text' is null"]
    assert texts("owner/name", split="test") == ["held"]
    assert calls[0] == ("owner/name", {"name": None, "split": "train", "streaming": True, "revision": None})


@pytest.fixture
def hub_at(monkeypatch, tmp_path, hub):
    """Let the hub be asked within a with-block: owner/name is at a commit."""
    from huggingface_hub import constants, hf_api

    @contextmanager
    def at(commit):
        documents_module._on_hub.cache_clear()
        with serve(hub[0], "owner/name", commit=commit) as (address, _), monkeypatch.context() as reachable:
            reachable.setattr(constants, "HF_HUB_OFFLINE", False)
            reachable.setattr(hf_api.api, "endpoint", address)
            yield
        documents_module._on_hub.cache_clear()

    return at


def test_the_fingerprint_of_a_dataset_on_the_hub_is_its_commit(hub_at, no_hub):
    before, after = "a" * 40, "b" * 40
    assert fingerprint("owner/name") == "owner/name"  # as far as it is known
    assert fingerprint("owner/name@v1") == "owner/name@v1"
    assert fingerprint(f"owner/name@{before}") == f"owner/name@{before}"
    for commit in (before, after):
        with hub_at(commit):
            assert fingerprint("owner/name") == fingerprint("owner/name@main") == f"owner/name@{commit}"
            assert fingerprint("owner/another") == "owner/another"
    known = no_hub / "datasets--owner--name"  # as what was read from it leaves behind
    (known / "refs").mkdir(parents=True)
    (known / "refs/main").write_text(before)
    (known / f"snapshots/{before}").mkdir(parents=True)
    (known / f"snapshots/{before}/README.md").touch()
    documents_module._on_hub.cache_clear()
    assert fingerprint("owner/name") == f"owner/name@{before}"


def test_every_epoch_reads_the_commit_that_the_fingerprint_names(hub, hub_at, monkeypatch):
    folder, calls = hub
    (folder / "train.jsonl").write_text('{"text": "one"}\n')
    with hub_at("a" * 40):
        assert fingerprint("owner/name") == f"owner/name@{'a' * 40}"
        monkeypatch.setattr("huggingface_hub.dataset_info", None)  # it is asked once
        for _ in range(2):
            assert [document.id for document in documents("owner/name")] == ["owner/name:0"]
    assert [options["revision"] for _, options in calls] == ["a" * 40] * 2


def test_a_revision_that_is_named_is_streamed_and_ids_are_the_same_in_all(hub):
    folder, calls = hub
    (folder / "train.jsonl").write_text('{"text": "one"}\n')
    assert [document.id for document in documents("owner/name@v9")] == ["owner/name:0"]
    assert calls[0][1]["revision"] == "v9"


def test_a_configuration_of_a_dataset_is_named_after_a_colon(hub):
    folder, calls = hub
    card = ["---", "configs:"]
    for name in ("en", "realnewslike"):
        (folder / name).mkdir()
        (folder / name / "x.jsonl").write_bytes(lines(f"of {name}"))
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/*.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    assert [d[:2] for d in documents("owner/c4:en")] == [("owner/c4:en:0", "of en")]
    assert [d.id for d in documents("owner/c4:realnewslike@v2")] == ["owner/c4:realnewslike:0"]
    assert calls[1][1]["revision"] == "v2"
    assert check("owner/c4:en") == "owner/c4:en, streamed from the hub"
    assert fingerprint(f"owner/c4:en@{'a' * 40}") == f"owner/c4:en@{'a' * 40}"
    with pytest.raises(TextError, match=r"configs: \['en', 'realnewslike'\].*as in 'owner/name:configuration'"):
        texts("owner/c4")
    with pytest.raises(TextError, match=r"no file or folder 'owner/c4/en'.*'owner/name:configuration'"):
        texts("owner/c4/en")


def test_a_wrong_field_of_a_hub_dataset_is_an_error_that_names_its_columns(hub):
    folder, _ = hub
    write_parquet(folder / "train.parquet", {"body": ["x", "y"], "id": [1, 2]})
    skipped = Skipped()
    with pytest.raises(TextError, match="no field 'text' in 'owner/name'; found 'body', 'id'"):
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
