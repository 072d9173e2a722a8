"""explain.py TEXT=...: which features fire on a text of the user's."""

import base64
import gzip
import json
import keyword
import re
import shutil

from explain_runs import assert_refused, contents_of, labels_of, write_sae


def page_data(path):
    """The data in a page that explain.py wrote."""
    found = re.search(r'<script[^>]*id="text-data"[^>]*>([^<]+)<', path.read_text())
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_a_text_shows_its_tokens_and_the_features_that_fire_on_them(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert here(arguments(folder, SELECT="all")).code == 0
    before = contents_of(folder)
    ran = here(arguments(folder, TEXT="the value of an index, self"))
    assert ran.code == 0, ran.err
    assert f"page      {folder / 'text.html'}: " in ran.out
    data = page_data(folder / "text.html")
    assert "".join(token for token, _ in data["tokens"]) == "the value of an index, self"
    for _, features in data["tokens"]:
        values = [value for _, value in features]
        assert 1 <= len(values) <= 4
        assert values == sorted(values, reverse=True)
        assert values[-1] > 0
    explained = {str(label.feature): label.explanation for label in labels_of(folder) if label.explanation}
    fired = {str(feature) for _, features in data["tokens"] for feature, _ in features}
    assert data["explanations"] == {feature: explained[feature] for feature in explained.keys() & fired} != {}
    assert set(data["maxima"]) == fired
    assert ran.out.endswith("tokens\n")
    after = contents_of(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"text.html"}


def test_a_long_text_is_read_in_rows_of_the_corpus_s_length(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    text = " ".join(keyword.kwlist * 5)
    assert here(arguments(folder, TEXT=text, CONTEXT_LENGTH=32)).code == 0
    whole = page_data(folder / "text.html")
    assert "".join(token for token, _ in whole["tokens"]) == text
    assert len(whole["tokens"]) > 3 * 32
    first = "".join(token for token, _ in whole["tokens"][:31])
    assert here(arguments(folder, TEXT=first, CONTEXT_LENGTH=32)).code == 0
    assert page_data(folder / "text.html")["tokens"] == whole["tokens"][:31]


def test_a_text_is_not_explained_by_what_was_said_of_another_autoencoder(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    told = [label.explanation for label in labels_of(folder)]
    text = {"TEXT": " ".join(keyword.kwlist * 3), "SELECT": "all"}
    assert here(arguments(folder, **text)).code == 0
    shown = json.dumps(page_data(folder / "text.html"))
    assert any(json.dumps(explanation) in shown for explanation in told)
    write_sae(folder / "sae", seed=5)
    assert here(arguments(folder, **text)).code == 0
    shown = json.dumps(page_data(folder / "text.html"))
    assert not any(json.dumps(explanation) in shown for explanation in told)


def test_damaged_explanations_are_one_line(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "explanations.jsonl").write_text('{"a": 1}\n')
    path = folder / "explanations.jsonl"
    assert_refused(here(arguments(folder, TEXT="def f(x):")), f"found no feature in line 1 of {path}, expected one: ")


def test_a_text_is_shown_whatever_corpus_is_named_beside_it(here, arguments, finished, tmp_path):
    folder, pages = shutil.copytree(finished[0], tmp_path / "run"), []
    for other in {}, {"EXPLAIN_TOKENS": 900, "SEED": 3}, {"DATA_PATH": tmp_path / "missing"}:
        ran = here(arguments(folder, TEXT="the value of an index, self", **other))
        assert ran.code == 0, ran.err
        pages.append(page_data(folder / "text.html"))
    assert pages[0]["maxima"]
    assert pages[0] == pages[1] == pages[2]


def test_a_text_is_shown_without_passages_where_the_examples_are_damaged(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "activations/00000.safetensors").write_bytes(b"damaged")
    ran = here(arguments(folder, TEXT="the value"))
    assert ran.code == 0, ran.err
    assert ran.out.endswith("; run explain.py without TEXT for passages\n")


def test_a_text_without_explanations_says_how_to_get_them(here, arguments, tmp_path):
    write_sae(tmp_path / "run/sae")
    ran = here(arguments(tmp_path / "run", TEXT="the value"))
    assert ran.code == 0, ran.err
    assert ran.out.endswith("; run explain.py without TEXT for explanations and passages\n")
    assert "".join(token for token, _ in page_data(tmp_path / "run/text.html")["tokens"]) == "the value"
    assert not (tmp_path / "run/explanations.jsonl").exists()
