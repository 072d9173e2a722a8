"""Which features tell concepts of Python best, by a cache of what they fire on."""

import json

import numpy as np
import pytest

from mistral_sae.analysis.naming import PythonConcepts
from mistral_sae.data.documents import Document
from mistral_sae.explain.cache import Cache, Shard, is_for_scoring
from mistral_sae.explain.offline import ANY, Rule

SOURCE = 'def f(x=1):\n    """Return 1 of x."""\n    return x + 1  # x\n\n\ndata = {1: "x", 2: "y"}\n'
NUMBERS = [SOURCE.index(f"{at}") for at in ("1):", "1  #", "1: ", "2: ")]
DOCUMENTS = 20


class Characters:
    """A character a token."""

    def strings(self, ids):
        return [chr(id) for id in ids]


def made(*features, source=SOURCE):
    """The concepts of a cache in which a source is the text of all documents, and of features that fire with 2.0.

    Each is told by whether it fires, given whether the document is one to score on and the place in it.
    """
    length, names = len(source), [f"{i}.py" for i in range(DOCUMENTS)]
    starts = np.arange(0, DOCUMENTS * length, length)
    fires = [
        [start + i for name, start in zip(names, starts, strict=True) for i in range(length) if each(name, i)]
        for each in ((lambda name, i, of=of: of(is_for_scoring(name), i)) for of in features)
    ]
    shard = Shard(
        tokens=np.tile([ord(character) for character in source], DOCUMENTS).astype(np.int32),
        documents=np.repeat(np.arange(DOCUMENTS, dtype=np.int32), length),
        first=np.repeat(starts, length),
        last=np.repeat(starts + length - 1, length),
        positions=np.concatenate(fires).astype(np.int64),
        values=np.full(sum(map(len, fires)), 2.0, dtype=np.float16),
        offsets=np.cumsum([0, *map(len, fires)]),
        maxima=np.full(len(fires), 4.0, dtype=np.float16),
        names=np.frombuffer(json.dumps(names).encode(), dtype=np.uint8),
    )
    nothing = shard._replace(documents=np.full_like(shard.documents, -1), names=np.frombuffer(b"[]", dtype=np.uint8))
    cache = Cache([shard, nothing], length)
    return PythonConcepts(cache, [Document(name, source) for name in names], Characters())


def on_numbers(_, i):
    return i in NUMBERS


def test_tokens_of_python_get_the_concepts_of_their_documents_in_words():
    concepts = made(on_numbers)
    assert concepts.known == DOCUMENTS * len(SOURCE)
    at = SOURCE.index("1 of x")
    assert concepts.of(at, at) == (("tokens in docstrings",),)
    at = SOURCE.index("1):")
    assert set(concepts.of(at, at)[0]) == {
        "default values",
        "numbers",
        "tokens inside round brackets",
        "tokens on lines without indentation",
    }


def test_text_that_is_no_python_has_no_concepts_and_no_feature_that_tells_one():
    concepts = made(on_numbers, source="No Python, but English: a cat.")
    assert concepts.known == 0
    assert concepts.of(0, 3) == ()
    assert concepts.best() == {}


def test_a_concept_has_the_feature_that_tells_it_best_and_is_its_explanation():
    best = made(lambda _, i: i in NUMBERS[:3], on_numbers, lambda _, i: i in NUMBERS or i % 5 == 0).best()
    assert next(iter(best)) == 1
    assert len({each.concept.name for each in best.values()}) == len(best)
    concept, found = best[1]
    assert (concept.name, concept.precision, concept.recall, concept.f1) == ("number", 1.0, 1.0, 1.0)
    assert concept.lift == pytest.approx(len(SOURCE) / len(NUMBERS))
    assert (found.explanation.feature, found.explanation.status, found.explanation.text) == (1, "ok", "numbers")
    assert found.rules == [Rule(("concept", "numbers"), ANY, 0.5)]  # 2.0 of 4.0


def test_the_figures_are_those_of_documents_that_it_was_not_chosen_on():
    others = [i for i in range(len(SOURCE)) if i not in NUMBERS and SOURCE[i] == "x"][: len(NUMBERS)]
    concepts = made(lambda scored, i: i in NUMBERS or (scored and i in others))
    concept = concepts.best()[0].concept
    assert (concept.name, concept.precision, concept.recall) == ("number", 0.5, 1.0)


def test_what_holds_on_the_documents_it_was_chosen_on_alone_is_told_by_no_feature():
    assert made(lambda scored, i: not scored and i in NUMBERS).best() == {}


def test_a_concept_that_most_tokens_are_of_is_told_by_no_feature():
    body = range(SOURCE.index("def"), SOURCE.index("\n\n\n"))
    wide = "class A:\n    " + SOURCE[body.start : body.stop].replace("\n", "\n    ")
    assert made(lambda _, i: i > len("class A:\n"), source=wide).best() == {}
