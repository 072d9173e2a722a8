"""Where concepts stand in a text, and which tokens are of them."""

import pytest

from mistral_sae.analysis.concepts import (
    Labelled,
    concepts_of_python,
    python_spans,
    read_spans,
    share_of,
    token_labels,
    token_spans,
    told_by_tokens,
)
from mistral_sae.cli import UserError
from mistral_sae.data.documents import Document

SOURCE = '''\
"""A module."""
import os.path as p
from . import q
from ..r import s

@cached
def twice(x: int, y=-2) -> list:
    # a comment
    if x["é"] == y:
        raise KeyError(f"no {x}")
        x = None
    return [self.a for self in x]
'''


def words(concept: str) -> list[str]:
    return [SOURCE[start:end] for start, end in python_spans(SOURCE)[concept]]


@pytest.mark.parametrize(
    ("concept", "expected"),
    [
        ("docstring", ['"""A module."""']),
        ("imported name", ["os.path as p", "q", "s"]),
        ("decorator", ["cached"]),
        ("function's name, defined", ["twice"]),
        ("argument's default", ["-2"]),
        ("annotation", ["list", "int"]),
        ("negative number", ["-2"]),
        ("comment", ["# a comment"]),
        ("comparison", ['x["é"] == y']),
        ("string", ['"é"']),
        ("inside square brackets", ['"é"', "self.a for self in x"]),
        ("exception's name", ["KeyError"]),
        ("f-string", ['f"no {x}"']),
        ("code that is never reached", ["x = None"]),
        ("None, True, False", ["None"]),
        ("comprehension", ["[self.a for self in x]"]),
        ("attribute", ["path", "a"]),
        ("self", ["self", "self"]),
        ("equals sign", ["=", "="]),
    ],
)
def test_a_concept_stands_where_the_parser_finds_it(concept, expected):
    assert words(concept) == expected


def test_at_least_forty_concepts_are_known_and_nothing_else_is_found():
    assert len(concepts_of_python()) >= 40
    assert set(python_spans(SOURCE)) <= set(concepts_of_python())


@pytest.mark.parametrize("source", ["def f(:\n", "x = '\n", "a\r\nb\r\n", "(" * 500, "\0"])
def test_what_does_not_parse_has_no_concepts(source):
    assert python_spans(source) is None


class Pairs:
    """Two characters a token."""

    def encode(self, text):
        return [ord(text[i]) * 256 + ord(text[i + 1 : i + 2] or "\0") for i in range(0, len(text), 2)]

    def strings(self, ids):
        return [chr(id // 256) + chr(id % 256).rstrip("\0") for id in ids]


def test_a_token_is_of_a_concept_if_more_than_half_of_what_is_seen_of_it_is():
    labelled = Labelled(Document("a", "ab cd e"), {"begins": [(0, 1)], "word": [(3, 5)], "space": [(2, 3)]})
    found = token_labels(labelled, ["begins", "word", "space"], Pairs())  # ab, " c", "d ", "e"
    assert found.T.tolist() == [[False] * 4, [False, True, True, False], [False] * 4]
    assert token_labels(Labelled(Document("a", "ab"), {"all": [(0, 2)]}), ["all"], Pairs()).tolist() == [[True]]


def test_labelled_spans_of_any_text_are_read_and_a_span_outside_is_refused(tmp_path):
    path = tmp_path / "spans.jsonl"
    animal = '{"text": "a cat", "spans": [[2, 5]], "label": "animal"}\n'
    path.write_text(animal + '{"text": "a cat", "spans": [[0, 1]], "label": "article"}\n')
    (labelled,) = read_spans(path)
    assert labelled.spans == {"animal": [(2, 5)], "article": [(0, 1)]}
    path.write_text(animal.replace("5", "9"))
    with pytest.raises(UserError, match="outside of its text"):
        read_spans(path)


def test_tokens_are_told_in_text_that_does_not_parse():
    text = 'def f(x:\n  return None  # why\n if "ab'
    found = {name: [text[start:end] for start, end in spans] for name, spans in token_spans(text).items()}
    assert found["keyword"][:2] == ["def", "return"]
    assert found["None, True, False"] == ["None"]
    assert found["comment"] == ["# why"]
    assert set(found) - {"string"} <= set(concepts_of_python())
    assert told_by_tokens() <= set(concepts_of_python())


def test_the_share_of_a_concept_is_of_the_tokens_after_the_prompt_read_along_with_it():
    class Characters:
        def strings(self, ids):
            return [chr(id) for id in ids]

    texts = [list(b'2"""+3'), list(b"456")]
    assert share_of("number", Characters(), list(b'x = """1'), texts) == 1 / 9  # the second never leaves the string
    assert share_of("number", Characters(), list(b"x = 1"), texts) == 4 / 9
    assert share_of("number", Characters(), list(b"x = 1"), []) == 0
