"""Contents in which a few things are changed: bytes, values of JSON, what a safetensors header says."""

import copy
import json
import struct
from random import Random
from typing import Any

# What stands where something else should
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4.5, 1e9, 10**12, 2**63, 10**30, 1e308, -1e-9, float("nan"), float("inf"), "", "4",
    "x", "layers", "ab\x00", "\x1b[2J", "\u202e", "\ud800", "é" * 50, "a" * 5000, [], {}, [None], ["ab"], [[]],
    {"": None}, {"a": {"b": []}}, [0] * 100, [1, "2", None, 3.5],
]  # fmt: skip


def mutated(content: bytes, random: Random) -> bytes:
    """Some content after one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice((_bytes_changed, _json_changed, _json_changed, _header_changed))(content, random)
    return content


def _bytes_changed(content: bytes, random: Random) -> bytes:
    at, end = sorted((random.randrange(len(content) + 1), random.randrange(len(content) + 1)))
    few = bytes(random.randrange(256) for _ in range(random.choice((1, 1, 2, 8))))
    return random.choice((
        lambda: content[:at],
        lambda: content[:at] + few + content[at:],
        lambda: content[:at] + few + content[at + len(few) :],
        lambda: content[:at] + content[end:],
        lambda: content[:end] + content[at:],
        lambda: content[:at] + b"[" * random.choice((10, 300, 100_000)) + content[at:],
        lambda: content[:at] + b"9" * random.choice((20, 5000)) + content[at:],
        lambda: bytes(len(content)),
    ))()  # fmt: skip


def _json_changed(content: bytes, random: Random) -> bytes:
    """One value of one line of JSON is another."""
    lines = content.splitlines(keepends=True) if content.count(b"\n{") else [content]
    number = random.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        return _bytes_changed(content, random)
    lines[number] = json.dumps(_changed(value, random)).encode() + b"\n"
    return b"".join(lines)


def _changed(value: Any, random: Random) -> Any:
    value, path = copy.deepcopy(value), []
    at = value
    while isinstance(at, dict | list) and at and (not path or random.random() < 0.8):
        key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
        path.append((at, key))
        at = at[key]
    if not path:
        return random.choice(STRANGE)
    holder, key = path[-1]
    how = random.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice(("more", "__class__", "", "\x1b[31m", "\ud800"))] = holder[key]
    elif how == 2:
        holder[key] = [holder[key]]
    elif how == 3 and isinstance(holder[key], int | float):
        holder[key] += random.choice((-1, 1, 1000, -0.5))
    else:
        holder[key] = random.choice(STRANGE)
    return value


def _header_changed(content: bytes, random: Random) -> bytes:
    """A safetensors header says something else, in a header of the right length."""
    try:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.dumps(_changed(json.loads(content[8 : 8 + size]), random)).encode()
    except (ValueError, struct.error, OverflowError, RecursionError):
        return _json_changed(content, random)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]
