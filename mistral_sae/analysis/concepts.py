"""Concepts with ground truth: where in a text each of them stands, as spans of characters, and so of tokens.

Of Python source they are found by its own tokenizer and parser; of other text a file of labelled spans has them.

Shapes: N tokens of a document, C concepts.
"""

import ast
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_sae.cli import UserError
from mistral_sae.data.documents import Document, Skipped
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.schema import Index, Schema, Words, lines, parse

Span = tuple[int, int]  # characters of a text, the last one not included
Spans = dict[str, list[Span]]  # by concept


class Labelled(NamedTuple):
    """A document and where its concepts stand."""

    document: Document
    spans: Spans


# ---- Python ----

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
ENDS_BLOCK = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def _itself(node: ast.AST) -> list[ast.AST]:
    return [node]


def _after_the_end(node: Any) -> list[ast.stmt]:
    """The statements of a block that no run reaches."""
    ends = next((i for i, each in enumerate(node.body) if isinstance(each, ENDS_BLOCK)), len(node.body))
    return node.body[ends + 1 :]


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _docstring(node: Any) -> list[ast.AST]:
    first = node.body[0] if node.body else None
    return [first] if isinstance(first, ast.Expr) and _is_text(first.value) else []


# What parsing tells: the kinds of node, and which parts of one are of the concept
SYNTAX: dict[str, tuple[Any, Callable[[Any], Iterable[ast.AST | None]]]] = {
    "import": ((ast.Import, ast.ImportFrom), _itself),
    "imported name": (ast.alias, _itself),
    "docstring": ((ast.Module, ast.ClassDef, *FUNCTION), _docstring),
    "f-string": (ast.JoinedStr, _itself),
    "decorator": ((*FUNCTION, ast.ClassDef), lambda node: node.decorator_list),
    "base class": (ast.ClassDef, lambda node: node.bases),
    "class body": (ast.ClassDef, lambda node: node.body),
    "function within a function": (FUNCTION, lambda node: (n for n in node.body if isinstance(n, FUNCTION))),
    "parameter": (ast.arg, _itself),
    "argument's default": (ast.arguments, lambda node: [*node.defaults, *node.kw_defaults]),
    "annotation": ((ast.arg, ast.AnnAssign), lambda node: [node.annotation]),
    "raise": (ast.Raise, _itself),
    "return": (ast.Return, _itself),
    "assert": (ast.Assert, _itself),
    "yield": ((ast.Yield, ast.YieldFrom), _itself),
    "except clause": (ast.Try, lambda node: node.handlers),
    "with's context": ((ast.With, ast.AsyncWith), lambda node: (item.context_expr for item in node.items)),
    "condition": ((ast.If, ast.While, ast.IfExp), lambda node: [node.test]),
    "loop's variable": ((ast.For, ast.AsyncFor, ast.comprehension), lambda node: [node.target]),
    "comprehension": ((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), _itself),
    "lambda": (ast.Lambda, _itself),
    "call's arguments": (ast.Call, lambda node: [*node.args, *(each.value for each in node.keywords)]),
    "function called": (ast.Call, lambda node: [node.func] if isinstance(node.func, ast.Name) else []),
    "subscript": (ast.Subscript, lambda node: [node.slice]),
    "dictionary's key": (ast.Dict, lambda node: node.keys),
    "assigned variable": ((ast.Assign, ast.AugAssign), lambda node: getattr(node, "targets", None) or [node.target]),
    "comparison": (ast.Compare, _itself),
    "negative number": (ast.UnaryOp, lambda node: [node] if isinstance(node.op, ast.USub) else []),
    "code that is never reached": ((*FUNCTION, ast.If, ast.For, ast.While, ast.With), _after_the_end),
}

# What a name and the word before it tell
NAMES: dict[str, Callable[[str, str], bool]] = {
    "keyword": lambda before, word: keyword.iskeyword(word) and word not in ("None", "True", "False"),
    "None, True, False": lambda before, word: word in ("None", "True", "False"),
    "self": lambda before, word: word == "self",
    "function's name, defined": lambda before, word: before == "def",
    "class's name, defined": lambda before, word: before == "class",
    "attribute": lambda before, word: before == ".",
    "exception's name": lambda before, word: word.endswith(("Error", "Exception", "Warning")),
    "dunder name": lambda before, word: word.startswith("__") and word.endswith("__"),
    "private name": lambda before, word: re.match(r"_[^_]", word) is not None,
    "constant's name": lambda before, word: re.fullmatch(r"_?[A-Z][A-Z0-9_]+", word) is not None,
    "class's name in use": lambda before, word: re.fullmatch(r"[A-Z]\w*[a-z]\w*", word) is not None,
}

OPERATORS: dict[str, Iterable[str]] = {
    "comparing operator": ("==", "!=", "<", ">", "<=", ">="),
    "arithmetic operator": ("+", "-", "*", "/", "//", "%", "**"),
    "equals sign": ("=",),
    "comma": (",",),
    "colon": (":",),
    "opening bracket": ("(", "[", "{"),
    "closing bracket": (")", "]", "}"),
}

F_STRING = re.compile("r?f", re.I)  # one token, on a Python before 3.12

BRACKETS = {"(": "inside round brackets", "[": "inside square brackets", "{": "inside curly brackets"}

# What characters tell, in each case the whole match
TEXT = {
    "indentation": re.compile(r"^[ \t]+(?=\S)", re.M),
    "line indented by 12 or more": re.compile(r"^[ ]{12,}\S.*$", re.M),
    "line not indented": re.compile(r"^\S.*$", re.M),
    "blank line": re.compile(r"^\s*\n", re.M),
    "web address": re.compile(r"https?://[^\s\"'>)]+"),
}


def python_spans(text: str) -> Spans | None:
    """Where the concepts stand in Python source; None where it does not parse, or not on this Python."""
    if "\r" in text or "\f" in text:  # lines that the parser and the text itself count in two ways
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree, tokens = ast.parse(text), list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
        return None
    place = _Places(text)
    found: Spans = {name: [match.span() for match in pattern.finditer(text)] for name, pattern in TEXT.items()}
    for node in ast.walk(tree):
        for name, (kinds, parts) in SYNTAX.items():
            if isinstance(node, kinds):
                found.setdefault(name, []).extend(place.of_node(part) for part in parts(node) if part is not None)
    for name, span in _of_tokens(tokens, place, found.get("docstring", [])):
        found.setdefault(name, []).append(span)
    return found


def token_spans(text: str) -> Spans:
    """Where the concepts stand that tokens and characters tell, in Python that need not parse, as models write it."""
    tokens: list[tokenize.TokenInfo] = []
    with suppress(SyntaxError, tokenize.TokenError):  # as where the text ends within brackets
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            tokens.append(token)
    found: Spans = {name: [match.span() for match in pattern.finditer(text)] for name, pattern in TEXT.items()}
    for name, span in _of_tokens(tokens, _Places(text), []):
        found.setdefault(name, []).append(span)
    return found


def told_by_tokens() -> set[str]:
    """The names of the concepts that `token_spans` finds wholly: docstrings look like strings to it."""
    return {*NAMES, *OPERATORS, *TEXT, "comment", "number"}


class _Places:
    """Places in a text of what the tokenizer and the parser give as lines from 1, and characters or bytes in them."""

    def __init__(self, text: str):
        self._lines = text.split("\n")
        self._starts = np.cumsum([0, *(len(line) + 1 for line in self._lines)]).tolist()

    def at(self, line: int, character: int) -> int:
        return self._starts[line - 1] + character

    def of_node(self, node: Any) -> Span:
        return self._at_byte(node.lineno, node.col_offset), self._at_byte(node.end_lineno, node.end_col_offset)

    def _at_byte(self, line: int, byte: int) -> int:
        words = self._lines[line - 1]
        return self.at(line, byte if words.isascii() else len(words.encode()[:byte].decode(errors="replace")))


def _of_tokens(tokens: list[tokenize.TokenInfo], place: _Places, docstrings: list[Span]) -> Iterator[tuple[str, Span]]:
    """Concept and span of each token that is of one, and of what brackets enclose."""
    are_docstrings, before, open_at = {start for start, _ in docstrings}, "", list[tuple[str, int]]()
    for token in tokens:
        start, end = place.at(*token.start), place.at(*token.end)
        word, span = token.string, (start, end)
        if token.type == tokenize.COMMENT:
            yield "comment", span
        elif token.type == tokenize.NUMBER:
            yield "number", span
        elif token.type == tokenize.STRING and start not in are_docstrings and not F_STRING.match(word):
            yield "string", span
        elif token.type == tokenize.NAME:
            yield from ((name, span) for name, holds in NAMES.items() if holds(before, word))
        elif token.type == tokenize.OP:
            yield from ((name, span) for name, words in OPERATORS.items() if word in words)
            if word in BRACKETS:
                open_at.append((word, end))
            elif word in ")]}" and open_at:
                bracket, inside = open_at.pop()
                yield BRACKETS[bracket], (inside, start)
                if open_at:
                    yield "inside two brackets or more", (inside, start)
        before = word


# ---- other text ----


class _Line(Schema):
    text: str
    spans: list[tuple[Index, Index]]
    label: Words


def read_spans(path: Path) -> list[Labelled]:
    """The documents of a JSONL file of {"text", "spans": [[start, end], ...], "label"}; lines of one text make one.

    Start and end count characters from 0, the end not included. Raises UserError for a line that is something else.
    """
    advice, found = "mend the line", dict[str, Spans]()
    try:
        for where, content in lines(path, advice):
            line = parse(_Line, content, where, advice)
            if any(not start < end <= len(line.text) for start, end in line.spans):
                raise UserError(f"found a span outside of its text in {where}, expected start < end: {advice}")
            found.setdefault(line.text, {}).setdefault(line.label, []).extend(line.spans)
    except OSError as error:
        raise UserError(f"found no readable {path} ({error.strerror}): check CONCEPTS_PATH") from None
    return [Labelled(Document(f"{path.name}:{i}", text), spans) for i, (text, spans) in enumerate(found.items(), 1)]


def label_python(documents: Iterable[Document], skipped: Skipped) -> Iterator[Labelled]:
    """The documents that are Python with their concepts; those that do not parse are counted in `skipped`."""
    for document in documents:
        spans = python_spans(document.text)
        if spans is None:
            skipped.add(document.id, "does not parse as Python")
        else:
            yield Labelled(document, spans)


def concepts_of_python() -> list[str]:
    """The names of all concepts that `python_spans` may find."""
    made = ("comment", "number", "string", *BRACKETS.values(), "inside two brackets or more")
    return sorted({*SYNTAX, *NAMES, *OPERATORS, *TEXT, *made})


# ---- from characters to tokens ----


def token_labels(labelled: Labelled, concepts: list[str], tokenizer: Tokenizer) -> np.ndarray | None:
    """Which tokens of a document are of each concept, (N, C) bool; None where its tokens do not join to its text.

    A token is of a concept if more than half of its characters are, spaces not counted unless there are no others.
    """
    text, ids = labelled.document.text, tokenizer.encode(labelled.document.text)
    strings = tokenizer.strings(ids)
    joined = "".join(strings)
    added = len(joined) - len(text)  # 1 with a sentencepiece tokenizer, which puts a space before the text
    if added not in (0, 1) or joined[added:] != text:
        return None
    ends = np.cumsum([0, *map(len, strings)]) - added
    ends = np.maximum(ends, 0)
    visible = np.cumsum([0, *(not character.isspace() for character in text)])
    seen = np.diff(visible[ends])  # visible characters of each token
    found = np.zeros((len(ids), len(concepts)), dtype=bool)
    for column, concept in enumerate(concepts):
        inside = covered(labelled.spans.get(concept, ()), len(text))
        among_all = np.diff(np.concatenate(([0], np.cumsum(inside)))[ends])
        among_visible = np.diff(np.concatenate(([0], np.cumsum(inside & np.diff(visible).astype(bool))))[ends])
        found[:, column] = np.where(seen > 0, 2 * among_visible > seen, 2 * among_all > np.diff(ends))
    return found


def covered(spans: Iterable[Span], length: int) -> np.ndarray:
    """Which characters of a text of some length are in a span, (length) bool."""
    steps = np.zeros(length + 1, dtype=np.int32)
    for start, end in spans:
        steps[start] += 1
        steps[end] -= 1
    return np.cumsum(steps[:-1]) > 0


def names_in(labelled: Iterable[Labelled]) -> list[str]:
    """The concepts of some documents, sorted."""
    return sorted(set(chain.from_iterable(each.spans for each in labelled)))
