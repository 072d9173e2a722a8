"""How JSON is read in what a language model writes.

Replies may come from servers that cannot enforce a JSON schema. Read are the JSON objects in a reply, whatever stands
around them, and lines of the form "key: value". What stands before the last </think> is left out, and of several
answers the last counts: models think first, and quote what they were shown while they do.
"""

import itertools
import json
import re
from typing import Any

import json_repair

THOUGHT_END = re.compile(r"</think>|\[/THINK\]")
LINE = re.compile(r"^[^\w{\n]*(\w+)[^\w\n]*?:[*_\s]*(\S.*)$", re.MULTILINE)  # key: value, with or without emphasis
PYTHON = {"True": "true", "False": "false", "None": "null"}
BEGINNING = re.compile(r"\{\s*[\"']")
COMPLETE = re.compile(r"""([\]}"']|:\s*(true|false|null|True|False|None))$""")  # how JSON ends, if without its brackets
LONGEST_REPAIR = 5000  # characters; some replies take a time that grows with their square


def objects(reply: str) -> list[dict[str, Any]]:
    """What follows the thoughts of a reply: its lines of the form "key: value" as one object, then its JSON objects.

    Those inside others stand before them. Before all stand those of JSON that is not quite correct.
    """
    decoder = json.JSONDecoder(strict=False)  # models break lines within strings
    found, end, is_correct = [], 0, True
    while (start := reply.find("{", end)) >= 0:
        try:
            value, end = decoder.raw_decode(reply, start)
            found.append((value, start, end))
        except (ValueError, RecursionError):
            end, is_correct = start + 1, False
    thoughts = [match.end() for match in THOUGHT_END.finditer(reply)]  # but for those inside a JSON value
    said = max((at for at in thoughts if not any(start < at < end for _, start, end in found)), default=0)
    lines = {key.lower(): value for key, value in LINE.findall(reply[said:])}
    values = [] if is_correct else _repaired(reply[said:])
    values += [value for value, start, _ in found if start >= said]
    return [lines, *itertools.chain.from_iterable(map(_inside, values))]


def _inside(value: Any) -> list[dict[str, Any]]:
    """The objects in a JSON value, the outermost last."""
    values = [value]
    for each in values:
        parts = [*each.values()] if isinstance(each, dict) else each
        values += [part for part in reversed(parts) if isinstance(part, dict | list)]
    return [each for each in reversed(values) if isinstance(each, dict)]


def _repaired(text: str) -> list[Any]:
    """The value of JSON that is not quite correct, or nothing where it can be read in several ways.

    It may have Python's quotes, commas too many or brackets too few: what is not a letter or a digit. A string or a
    number that has no end may be cut off.
    """
    begin = BEGINNING.search(text)
    text = text[begin.start() :].rstrip("` \n") if begin else ""
    if len(text) > LONGEST_REPAIR:
        return []
    for part in dict.fromkeys([text, text[: text.rfind("}") + 1]]):
        try:
            value = json_repair.loads(part, skip_json_loads=True)
        except (ValueError, RecursionError):
            continue
        written = json.dumps(value, ensure_ascii=False)
        if COMPLETE.search(part) and isinstance(value, dict) and _words(written) == _words(part):
            return [value]
    return []


def _words(text: str) -> list[str]:
    """The words and numbers of JSON, or of Python."""
    return [PYTHON.get(word, word) for word in re.findall(r"\w+", re.sub(r"\\.", " ", text))]
