"""Concepts that name features: where the token alone says less than the token and where it stands."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from mistral_sae.analysis.naming import Names
from mistral_sae.data.documents import Document
from mistral_sae.explain.cache import Passages
from mistral_sae.explain.offline import ANY, Found, Rule
from mistral_sae.explain.types import Example, Explanation, Feature

SOURCE = 'def f(x=1):\n    """Return 1 of x."""\n    return x + 1  # x\n\n\ndata = {1: "x", 2: "y"}\n'


class Characters:
    """A character a token."""

    def strings(self, ids):
        return [chr(id) for id in ids]

    def token_bytes(self, id):
        return chr(id).encode()


def made(texts, fires):
    """Names of a cache of some documents, a row each; feature 0 fires with 2.0 where `fires`, given text and place."""
    tokens = np.array([ord(c) for text in texts for c in text], dtype=np.int32)
    ends = np.cumsum([0, *map(len, texts)]).tolist()
    names = [f"{i}.py" for i in range(len(texts))]
    where = [start + i for start, text in zip(ends, texts, strict=False) for i in range(len(text)) if fires(text, i)]
    at, zeros = np.array(where), np.zeros(len(where), dtype=np.int64)
    cache = SimpleNamespace(
        names=names,
        shards=[SimpleNamespace(tokens=tokens, documents=np.repeat(np.arange(len(texts)), np.diff(ends)))],
        documents=[np.append(np.arange(len(texts)), -1)],
        for_scoring=np.zeros(len(texts) + 1, dtype=bool),
        stretches=lambda: {name: [(ends[i], ends[i + 1] - 1)] for i, name in enumerate(names)},
        ids=lambda first, last: tokens[first : last + 1].tolist(),
        activations=lambda feature: Passages(at, at, at, zeros, np.full(len(at), 2.0, dtype=np.float32)),
    )
    documents = [Document(name, text) for name, text in zip(names, texts, strict=True)]
    return Names(cache, documents, Characters())


def feature(names, texts, fires):
    passages, start = [], 0
    for i, text in enumerate(texts):
        values = tuple(2.0 if fires(text, at) else 0.0 for at in range(len(text)))
        passages.append(Example(f"{i}.py", 1, tuple(text), values, names.of(start, start + len(text) - 1)))
        start += len(text)
    return Feature(0, 0.1, 2.0, (), (), (), (), (), tuple(passages[:8]), (), (), (), ())


def named(fires, rules, texts=(SOURCE,) * 20):
    names = made(texts, fires)
    found = Found(Explanation(0, "ok", "before"), rules)
    return names, names.name(found, feature(names, texts, fires))


def test_tokens_of_python_get_the_concepts_of_their_documents_in_words():
    names = made([SOURCE], lambda text, i: i == 0)
    assert names.known == len(SOURCE)
    at = SOURCE.index("1 of x")
    assert names.of(at, at) == (("in docstrings",),)
    at = SOURCE.index("1):")
    assert set(names.of(at, at)[0]) == {
        "default values",
        "numbers",
        "inside round brackets",
        "on lines without indentation",
    }


def test_text_that_is_no_python_has_no_concepts_and_its_rules_stay():
    texts = ["No Python, but English: a cat."] * 30
    rules = [Rule(("core", "a"), ANY, 1.0)]
    names, found = named(lambda text, i: text[i] == "a", rules, texts)
    assert names.known == 0
    assert names.of(0, 3) == ()
    assert (found.rules, found.explanation.text) == (rules, "before")


def test_a_token_gets_the_place_that_the_feature_fires_in():
    start, end = SOURCE.index('"""'), SOURCE.rindex('"""')

    def fires(text, i):
        return text[i] == "1" and start < i < end

    _, found = named(fires, [Rule(("core", "1"), ANY, 0.5)])
    assert found.explanation.text == '"1" in docstrings'
    assert [rule[:2] for rule in found.rules] == [(("core", "1"), ("where", "in docstrings"))]


def test_a_token_on_which_it_fires_anywhere_stays_as_it_is():
    _, found = named(lambda text, i: text[i] == "x", [Rule(("core", "x"), ANY, 1.0)])
    assert found.explanation.text == '"x"'


def test_a_concept_takes_the_place_of_rules_that_tell_less():
    keys = {SOURCE.index("1: "), SOURCE.index("2: ")}
    _, found = named(lambda text, i: i in keys, [Rule(("core", "2"), ANY, 1.0)])
    assert found.explanation.text == "keys of dictionaries"
    assert found.rules[0].strength == pytest.approx(1.0)


def test_what_holds_on_one_half_of_the_documents_only_is_no_name():
    generator = random.Random(0)
    chosen = {(i, at) for i in range(0, 20, 2) for at, c in enumerate(SOURCE) if c == "1" and generator.random() < 0.5}
    texts = [f"{SOURCE}# {i}\n" for i in range(20)]
    fires_in = {text: {at for j, at in chosen if j == i} for i, text in enumerate(texts)}
    rules = [Rule(("core", "1"), ANY, 0.5)]
    _, found = named(lambda text, i: i in fires_in[text], rules, texts)
    assert found.rules == rules
