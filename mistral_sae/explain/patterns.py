"""Rules of where a feature fires, in a form that can be counted, checked against a text and said in few words.

A rule is a target (what the token is) in a context (where it stands), each a pair of a kind and a value:

    targets    any, core "self" (a token without the spaces around it), token " self" (as it is), class "numbers"
    contexts   any, after "(" (the token before, or the two before), continuing "sel" (a word), line "import" (whose
               first word that is), starting (a line), in "comments", early (in a row of tokens), before "self"
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from mistral_sae.explain.types import Example

ANY = ("any", "")
EARLY = 8  # positions of a row, its BOS not counted
QUOTES = "\"'`"
OPENS_OR_CLOSES = re.compile(rf"[{QUOTES}#\n]")  # a string or a comment
SPACE = "\u2423"  # shown for a space in a token, so that the words of a phrase can be counted
WORD_END = re.compile(r"\w+\Z")
MAY_OPEN = re.compile(r"(?<!\w)(?:[bfru]|[bf]r|r[bf])?\Z", re.IGNORECASE)  # what stands before a string's first quote


class Rule(NamedTuple):
    """A feature fires on `target` in `context`."""

    target: tuple[str, str]
    context: tuple[str, str]
    strength: float  # mean activation there, as a share of the feature's maximum


class Place(NamedTuple):
    """All targets and contexts that hold for one token of a passage."""

    targets: list[tuple[str, str]]  # ANY first, then from the general to the particular
    contexts: list[tuple[str, str]]  # ANY first


def places(passage: Example) -> list[Place]:
    """What can be said of each token of a passage. All of it is said of the text up to the token, but for "before"."""
    tokens, found = passage.tokens, []
    cores = [core(token) for token in tokens]
    line, line_is_whole, quote = "", False, ""  # `quote` is what opened the string, or the comment, that we are in
    word = ""  # that the text ends with
    for i, token in enumerate(tokens):
        continues = bool(word) and (token[:1].isalnum() or token[:1] == "_")
        contexts = [ANY]
        if i > 0:
            contexts.append(("after", cores[i - 1]))
        if i > 1:
            contexts.append(("after", (tokens[i - 2] + tokens[i - 1]).strip(" ")))
        if continues:
            contexts.append(("continuing", word))
        if line_is_whole:
            contexts.append(("line", words[0]) if (words := line.split(None, 1)) else ("starting", ""))
        if quote:
            contexts.append(("in", "comments" if quote == "#" else "strings"))
        if passage.start + i <= EARLY:
            contexts.append(("early", ""))
        if i + 1 < len(tokens):
            contexts.append(("before", cores[i + 1]))
        found.append(
            Place([ANY, ("core", cores[i]), ("token", token), ("class", class_of(token, continues))], contexts)
        )
        if token:  # some have no text: a character of several tokens is part of the last
            if OPENS_OR_CLOSES.search(token):
                quote = _quote_after(token, quote, line)
            end = WORD_END.search(token)
            word = "" if end is None else word + token if end.start() == 0 else end[0]
        line += token
        if "\n" in token:
            line, line_is_whole = token[token.rindex("\n") + 1 :], True
    return found


def core(token: str) -> str:
    """A token without the spaces around it, unless it is nothing else."""
    return token.strip(" ") or token


@lru_cache(maxsize=2**16)
def class_of(token: str, continues: bool) -> str:
    """What kind of token it is, in plural; `continues` if it is part of a word that began before it."""
    if not token.strip():
        return "line breaks" if "\n" in token else "indentation"
    if token.strip().isdigit():
        return "numbers"
    if re.fullmatch(r" *\w+ *", token):
        return "word parts" if continues else "words"
    return "words with punctuation" if re.search(r"\w", token) else "punctuation"


def phrase(rules: Sequence[Rule], share: Callable[[Sequence[Rule]], float]) -> str:
    """Rules in words, with the share, in percent, of the feature's passages that those named together account for.

    Rules are named together if they have the context in common, or the target and the kind of context: the phrase says
    what the rules say and no more.
    """
    left, parts = list(rules), []
    while left:
        first = left[0]
        quoted = first.target[0] in ("core", "token")
        same_context = [r for r in left if r.context == first.context and r.target[0] in ("core", "token")]
        same_target = [r for r in left if r.target == first.target and r.context[0] == first.context[0]]
        together = same_context if quoted and len(same_context) >= len(same_target) else same_target
        left = [r for r in left if r not in together]
        what = ", ".join(dict.fromkeys(shown(r.target[1]) for r in together)) if quoted else first.target[1] or "tokens"
        where = _where(first.context[0], list(dict.fromkeys(r.context[1] for r in together)))
        parts.append(f"{what}{where} ({share(together):.0%})")
    return "; ".join(parts)


def shown(token: str) -> str:
    """A token in quotes as Python writes it, double ones where it can, but with SPACE for spaces."""
    written = repr(token)
    quote = written[0] if '"' in token else '"'
    return f"{quote}{written[1:-1].replace(' ', SPACE)}{quote}"


def _where(kind: str, values: list[str]) -> str:
    if kind == "any":
        return ""
    if kind == "in":
        return f" in {' or '.join(values)}"
    listed = " or ".join(map(shown, values))
    return {
        "after": f" after {listed}",
        "continuing": f" continuing {listed}",
        "line": f" on {listed} lines",
        "starting": " starting lines",
        "early": " early",
        "before": f" before {listed}",
    }[kind]


def _quote_after(token: str, quote: str, line: str) -> str:
    """What string or comment the text is in after a token, going by the line alone, as most languages would."""
    for i, character in enumerate(token):
        before = line + token[:i]
        if character == "\n" or (quote in QUOTES and character == quote and before[-1:] != "\\"):
            quote = ""
        elif not quote and (character == "#" or (character in QUOTES and MAY_OPEN.search(before))):
            quote = character
    return quote
