"""What a language model answered: replies to the requests of `prompts` -> values. Pure: no torch, no network.

Taken are the JSON that was asked for, JSON inside other text or code fences, and plain text of the same form. What
stands before the last </think> is left out, and the last of several JSON values counts, since models think first, and
quote what they were shown while they do.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from mistral_sae.explain.prompts import LEVELS, MAX_WORDS, NO_PATTERN

LONGEST_LINE = 600  # characters of an explanation; what is longer is an essay

NONE_FOUND = re.compile(
    r"none|n/?a|(there (is|are|was|seems to be|appears to be) )?no "
    r"((apparent|clear|coherent|common|consistent|detectable|discernible|distinct|evident|general|identifiable|"
    r"interpretable|linguistic|meaningful|obvious|overall|particular|real|recogni[sz]able|semantic|shared|significant|"
    r"simple|single|specific|strong|underlying|unifying|visible),? ((and|or) )?)*"
    r"patterns?( (was|is|are|can be))?( (found|visible|seen|identified|discernible))?"
    r"( (in|among|across|to) (all|any|the|these|this|those)\b[^.;:,]*)?"
    r"(([.;:,(]| [-\u2013\u2014] ).*)?",  # what was seen instead
    re.IGNORECASE,
)
THOUGHT = re.compile(r"</think>|\[/THINK\]")
PLAIN_EXPLANATION = re.compile(r"^[^\w{\n]*_*explanation[\W_]*?:[*_\s]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
PLAIN_VERDICT = re.compile(r"^\W*(\w+)\W+(true|false|yes|no)\b\W*$", re.IGNORECASE | re.MULTILINE)
OPENING = re.compile(r"[{\[]")
QUOTES = {('"', '"'), ("'", "'"), ("`", "`"), ("“", "”")}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Unreadable(ValueError):
    """A reply that has not the form that was asked for; the message completes "This cannot be used: ..."."""


class TooLong(Unreadable):
    """An explanation of more than MAX_WORDS words."""

    def __init__(self, explanation: str):
        super().__init__(f"the explanation has {len(explanation.split())} words, and at most {MAX_WORDS} are allowed")
        self.explanation = explanation


def read_explanation(reply: str) -> str:
    """The explanation in a reply, on one line; NO_PATTERN if it says that there is none.

    Raises Unreadable if there is none, and TooLong with what it found.
    """
    reply = _said(reply)
    values = [each for value in _json_values(reply) for each in (value if isinstance(value, list) else [value])]
    found = [value["explanation"] for value in values if isinstance(value, dict) and "explanation" in value]
    found = [text for text in found if isinstance(text, str)] or PLAIN_EXPLANATION.findall(reply)
    if not found:
        raise Unreadable('it has no JSON object with the keys "pattern" and "explanation"')
    text = _unquoted(" ".join(found[-1].split()))
    if not re.search(r"\w", text):
        raise Unreadable("the explanation is empty")
    if NONE_FOUND.fullmatch(text.rstrip(". ")):
        return NO_PATTERN
    if len(text) > LONGEST_LINE:
        text = text[:LONGEST_LINE].rsplit(" ", 1)[0]
        raise TooLong(text)
    if len(text.split()) > MAX_WORDS:
        raise TooLong(text)
    return text


def cut(explanation: str) -> str:
    """The first MAX_WORDS words of an explanation, up to the end of a clause if more than half of them are left."""
    words = explanation.split()[:MAX_WORDS]
    for end in range(len(words), MAX_WORDS // 2, -1):
        if words[end - 1][-1] in ".;,:":
            return " ".join(words[:end]).rstrip(".;,:")
    return " ".join(words)


def read_verdicts(reply: str, ids: Collection[str]) -> dict[str, bool]:
    """The verdicts on those of the `ids` that a reply answers for.

    Ids that were not asked for are passed over, and an id with two different verdicts has none. Raises Unreadable
    if the reply answers for no id.
    """
    reply = _said(reply)
    answers = [*map(_pairs, _json_values(reply)[::-1]), PLAIN_VERDICT.findall(reply)]
    verdicts = next((found for pairs in answers if (found := _verdicts(pairs, ids))), None)
    if verdicts is None:
        raise Unreadable("it answers for none of the ids")
    return {id: found.pop() for id, found in verdicts.items() if len(found) == 1}


def read_activations(reply: str, n_tokens: int) -> list[int]:
    """The activation of each of a passage's tokens, 0 to LEVELS; 0 for those that the reply leaves out.

    Raises Unreadable if it is no list of positions and activations, or if one of these is out of its range: a reply
    that lost count says nothing.
    """
    entries = next(
        (found for value in _json_values(_said(reply))[::-1] if (found := _entries(value)) is not None), None
    )
    if entries is None:
        raise Unreadable('it has no JSON object with the key "active"')
    activations: dict[int, int] = {}
    for entry in entries:
        position, activation = _integer(entry, "position"), _integer(entry, "activation")
        if position is None or activation is None:
            raise Unreadable('an entry of "active" is not a position and an activation, both integers')
        if not 0 <= position < n_tokens or not 0 <= activation <= LEVELS:
            raise Unreadable(
                f"positions go from 0 to {n_tokens - 1} and activations from 0 to {LEVELS}, and it has "
                f"{activation} at position {position}"
            )
        if activations.setdefault(position, activation) != activation:
            raise Unreadable(f"it has two activations at position {position}")
    return [activations.get(position, 0) for position in range(n_tokens)]


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    """Ids and verdicts in a JSON value: the form that was asked for, the list alone, or {id: verdict}."""
    if isinstance(value, dict):
        listed = value.get("answers", value)
        if isinstance(listed, dict):
            return [(id, verdict) for id, verdict in listed.items() if isinstance(verdict, bool | str | int)]
        value = listed
    if not isinstance(value, list):
        return []
    return [
        (entry["id"], entry["answer"]) for entry in value if isinstance(entry, dict) and {"id", "answer"} <= set(entry)
    ]


def _verdicts(pairs: list[tuple[Any, Any]], ids: Collection[str]) -> dict[str, set[bool]]:
    """Those of the pairs that answer for one of the ids: all that they say of it."""
    verdicts: dict[str, set[bool]] = {}
    for id, value in pairs:
        verdict = value if isinstance(value, bool) else WORDS.get(str(value).strip().lower())
        if str(id).strip().lower() in ids and verdict is not None:
            verdicts.setdefault(str(id).strip().lower(), set()).add(verdict)
    return verdicts


def _entries(value: Any) -> list[Any] | None:
    """The entries of a simulation: the form that was asked for, or the list alone."""
    if isinstance(value, dict):
        value = value.get("active")
        return value if isinstance(value, list) else None
    return value if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value) else None


def _integer(entry: Any, key: str) -> int | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _unquoted(text: str) -> str:
    """Without what models put around a phrase: emphasis, a JSON string's comma, one pair of quotes."""
    text = text.strip().strip("*_").rstrip(",").strip()
    if len(text) > 1 and (text[0], text[-1]) in QUOTES and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1].strip()
    return text


def _said(reply: str) -> str:
    """A reply without the thoughts before it: what follows the last </think> that is not inside a JSON value."""
    values = _decoded(reply)
    ends = [end for end in THOUGHT.finditer(reply) if not any(start < end.start() < stop for _, start, stop in values)]
    return reply[ends[-1].end() :] if ends else reply


def _json_values(text: str) -> list[Any]:
    """The outermost JSON objects and lists in a text, in their order."""
    return [value for value, _, _ in _decoded(text)]


def _decoded(text: str) -> list[tuple[Any, int, int]]:
    """The outermost JSON objects and lists in a text, each with its first place and the one after its last."""
    decoder = json.JSONDecoder(object_pairs_hook=_agreed, strict=False)  # models break lines within strings
    values, place = [], 0
    while opening := OPENING.search(text, place):
        try:
            value, place = decoder.raw_decode(text, opening.start())
            values.append((value, opening.start(), place))
        except ValueError:
            place = opening.end()
        except RecursionError:  # thousands of brackets: nothing that was asked for
            break
    return values


def _agreed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; None for a key that comes twice with different values, of which `dict` would keep the last."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        values[key] = value if values.get(key, value) == value else None
    return values
