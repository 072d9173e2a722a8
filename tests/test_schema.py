"""What reading JSON by a schema says of what is wrong, and how much it reads."""

from typing import Annotated, NamedTuple

import pytest
from pydantic import Field

from mistral_sae import schema
from mistral_sae.cli import UserError, printable
from mistral_sae.schema import Schema, Words, lines, parse, read, schema_of


class Inner(Schema):
    size: Annotated[int, Field(ge=1, le=9)]


class Outer(Schema):
    name: Words
    inner: Inner | None = None
    numbers: tuple[float, ...] = ()


class Mine(UserError):
    """An error of a reader's own."""


def said(content, kind=Outer):
    with pytest.raises(Mine) as error:
        parse(kind, content, "x.json", "do this", Mine)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "found no name in x.json, expected one: do this"),
        ('{"name": 3}', "found name = 3 in x.json, expected a valid string: do this"),
        (
            '{"name": "a", "inner": {"size": 10}}',
            "found inner.size = 10 in x.json, expected less than or equal to 9",
        ),
        (
            '{"name": "a", "inner": {"size": "4"}}',
            "found inner.size = '4' in x.json, expected a valid integer",
        ),
        ('{"name": "a", "numbers": [1, NaN]}', "found numbers.1 = nan in x.json, expected a finite number: do this"),
        ("[]", "found [] in x.json, expected an object: do this"),
        ("{", "found no JSON (EOF while parsing an object at line 1 column 1) in x.json, expected JSON: do this"),
    ],
)
def test_an_error_says_what_was_found_and_where_what_was_expected_and_what_to_do(content, line):
    assert said(content).startswith(line)
    assert said(content).endswith(": do this")


@pytest.mark.parametrize("content", ["[" * 10**6, b"\xff", '{"name": %s}' % ("9" * 10**5), '{"name": "a' * 10**5])
def test_an_error_is_short_whatever_the_content(content):
    assert len(said(content)) < 300


def test_numbers_are_not_taken_for_others():
    for content in ('{"name": "a", "inner": {"size": true}}', '{"name": "a", "inner": {"size": 4.0}}'):
        assert "expected a valid integer" in said(content)
    assert parse(Outer, '{"name": "a", "numbers": [1, 2.5], "more": 1}', "x", "").numbers == (1.0, 2.5)


class Record(NamedTuple):
    a: int
    pair: tuple[str, float | None]
    b: str = "default"


def test_a_named_tuple_is_read_from_an_object_that_may_hold_more():
    kind = schema_of(Record, b=Words)
    assert parse(kind, '{"a": 1, "pair": ["x", null], "more": 3}', "x", "") == Record(1, ("x", None))
    assert parse(kind, '{"a": 1, "pair": ["x", 2], "b": "\\u001b"}', "x", "") == Record(1, ("x", 2.0), "\\x1b")
    assert said('{"a": 1, "pair": ["x"]}', kind) == "found no pair.1 in x.json, expected one: do this"


def test_halves_of_characters_are_characters_that_are_not_known():
    text = r"\ud83d \\ud83d \ud83d\ude00 \ude00\ud83d \\\ud83d"
    assert parse(list[str], f'["{text}"]', "x", "") == ["\ufffd \\ud83d \U0001f600 \ufffd\ufffd \\\ufffd"]


def test_no_more_is_read_than_a_file_or_a_line_may_hold(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"name": "a"}   ')
    monkeypatch.setattr(schema, "MOST", 16)
    assert read(Outer, path, "do this", Mine).name == "a"
    monkeypatch.setattr(schema, "MOST", 15)
    with pytest.raises(Mine, match=r"found more than 15 bytes in .*x\.json, expected less: do this"):
        read(Outer, path, "do this", Mine)
    path.write_bytes(b"one\nthree\nlong one\n")
    assert [line for _, line in lines(path, "")] == [b"one\n", b"three\n", b"long one\n"]
    monkeypatch.setattr(schema, "MOST", 6)
    with pytest.raises(Mine, match=r"found more than 6 bytes in line 3 of .*x\.json, expected a record: do this"):
        list(lines(path, "do this", Mine))


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(Mine, match=r"found no readable .*, expected a file of JSON: do this"):
            read(Outer, path, "do this", Mine)


@pytest.mark.parametrize(
    "obeyed", ["\x1b[2J", "\r", "\n", "\x07", "\x9b", "\u202e", "\u2066", "\u200f", "\u2028", "\ud800"]
)
def test_what_a_terminal_obeys_is_shown_by_its_number(obeyed):
    shown = printable(f"a{obeyed}b")
    assert shown.isprintable()
    assert (shown[0], shown[1], shown[-1]) == ("a", "\\", "b")
    assert str(Mine(f"a{obeyed}b")) == shown


def test_words_of_any_language_stay_as_they_are():
    words = "naïve 日本語 עברית العربية \U0001f468\u200d\U0001f469 \u00a0"
    assert printable(words) == words
