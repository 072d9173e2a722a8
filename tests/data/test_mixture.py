"""Several corpora as one: what a mixture is written as, the shares of its documents, and its parts."""

import json
from collections import Counter
from itertools import islice

import pytest

from mistral_sae.data.documents import Skipped
from mistral_sae.data.mixture import sources_of
from mistral_sae.data.records import TextError
from mistral_sae.data.tokens import Corpus, is_held_out


@pytest.fixture
def mixture(tmp_path):
    """A mixture of two folders, of which the second holds fewer documents and a bad line each."""
    for name, count in (("a", 300), ("b", 30)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(count)]
        (tmp_path / name / "x.jsonl").write_text("\n".join([*lines, "no json"]))
    return f"{tmp_path}/a*0.7 + {tmp_path}/b*0.3"


@pytest.mark.parametrize(
    ("data_path", "found"),
    {
        "a*0.7 + b*0.3": [("a", 0.7), ("b", 0.3)],
        "owner/name:en@v1 * 3 + stdlib": [("owner/name:en@v1", 0.75), ("stdlib", 0.25)],
        "/data/a b + ~/c + english * .5": [("/data/a b", 0.4), ("~/c", 0.4), ("english", 0.2)],
        "stdlib": [],
        "a*0.7": [],
        "c++": [],
    }.items(),
)
def test_a_mixture_is_sources_with_weights_that_are_shares(data_path, found):
    assert sources_of(data_path) == [(path, pytest.approx(share)) for path, share in found]


def test_a_path_that_exists_is_no_mixture_and_a_source_of_no_weight_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a + b").mkdir()
    assert sources_of("a + b") == []
    with pytest.raises(TextError, match=r"weight of 0 in 'a\*0 \+ b\*0.3'"):
        sources_of("a*0 + b*0.3")
    with pytest.raises(TextError, match=r"no file or folder 'a\*x'.*or a mixture as"):
        Corpus("a*x + stdlib").check()


def test_documents_come_by_their_shares_and_a_source_that_ends_begins_again(mixture):
    skipped = Skipped()
    read = Corpus(mixture, held_out_fraction=0.1).documents(held_out=False, skipped=skipped)
    found = list(islice(read, 2000))
    counts = Counter(document.text[0] for document in found)
    assert abs(counts["b"] / 2000 - 0.3) < 0.03
    of_b = [document.id for document in found if document.text[0] == "b"]
    assert len(set(of_b)) < 40 < len(of_b)
    assert skipped.count == 2
    assert sum(document.text[0] == "b" for document in found[:200]) > 40  # throughout, not source after source


def test_the_order_is_that_of_the_seed_and_ids_tell_the_sources_apart(mixture, tmp_path):
    def order(seed, **part):
        return [document.id for document in islice(Corpus(mixture, seed=seed).documents(**part), 100)]

    assert order(1, held_out=False) == order(1, held_out=False) != order(2, held_out=False)
    assert order(1, held_out=True) == order(2, held_out=True)
    assert {id.rpartition(":")[0] for id in order(1, held_out=False)} == {f"{tmp_path}/{s}/x.jsonl" for s in "ab"}


def test_each_source_has_its_own_held_out_part_and_one_pass_ends_with_the_first_that_does(mixture):
    corpus = Corpus(mixture, held_out_fraction=0.2)
    parts = {held_out: list(corpus.documents(held_out=held_out, epochs=False)) for held_out in (True, False)}
    for held_out, part in parts.items():
        assert all(is_held_out(document.id.rpartition("/")[2], 0.2) == held_out for document in part)
        assert len({document.id for document in part}) == len(part)
    assert 15 < sum(document.text[0] == "b" for document in parts[False]) <= 30


def test_a_mixture_is_described_and_known_again_by_its_sources_and_shares(mixture, tmp_path):
    assert Corpus(mixture).check() == "70% from 1 file, 5.3 kB of .jsonl; 30% from 1 file, 507 bytes of .jsonl"
    first = Corpus(mixture).fingerprint()
    assert Corpus(mixture.replace("0.7", "7").replace("0.3", "3")).fingerprint() == first
    other = Corpus(mixture.replace("0.7", "0.6")).fingerprint()
    (tmp_path / "b/x.jsonl").write_text("{}")
    assert len({first, other, Corpus(mixture).fingerprint()}) == 3
    assert Corpus(f"a/b@{'a' * 40} + c/d:en@{'b' * 40}").fingerprint() == f"a/b@{'a' * 40}*0.5 + c/d:en@{'b' * 40}*0.5"


def test_each_source_may_have_its_own_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "of a"}\n' * 9)
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "of b"}]}\n' * 9)
    mixture = f"{tmp_path}/a.jsonl + {tmp_path}/b.jsonl"
    corpus = Corpus(mixture, held_out_fraction=0.0, text_field="text + messages")
    assert {document.text for document in islice(corpus.documents(held_out=False), 40)} == {"of a", "of b"}
    with pytest.raises(TextError, match=r"no field 'text' in .*b.jsonl'; found 'messages'"):
        Corpus(mixture).check()
    with pytest.raises(TextError, match=r"found 'a \+ b \+ c' for 2 sources of text"):
        Corpus(mixture, split="a + b + c").check()


def test_a_source_without_documents_is_one_line(mixture, tmp_path):
    (tmp_path / "b/x.jsonl").write_text("{}")
    with pytest.raises(TextError, match=r"no document in '.*/b'"):
        next(Corpus(mixture).documents(held_out=False))
