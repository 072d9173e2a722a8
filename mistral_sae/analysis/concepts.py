"""Concepts with ground truth: where in a text each of them stands, as spans of characters, and so of tokens.

Of Python source they are found by its own tokenizer and parser; of other text a file of labelled spans has them.

Shapes: N tokens of a document, C concepts.
"""

import ast
import keyword
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain
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
    "annotation": (
        (ast.arg, ast.AnnAssign, *FUNCTION),
        lambda node: [node.returns if isinstance(node, FUNCTION) else node.annotation],
    ),
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

BEFORE = ("def", "class", ".")  # what NAMES ask for

OPERATORS: dict[str, Iterable[str]] = {
    "comparing operator": ("==", "!=", "<", ">", "<=", ">="),
    "arithmetic operator": ("+", "-", "*", "/", "//", "%", "**"),
    "equals sign": ("=",),
    "comma": (",",),
    "colon": (":",),
    "opening bracket": ("(", "[", "{"),
    "closing bracket": (")", "]", "}"),
}

# Python's tokens but white space: labelling takes half as long as with the standard library's tokenizer (measured)
TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<f_string>(?:f|rf|fr)(?=["']))?(?P<string>(?:u|b|r|rb|br)?(?:
        \"{3}[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"{3} | \'{3}[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*\'{3}
        | "[^"\\\n]*(?:\\.[^"\\\n]*)*" | '[^'\\\n]*(?:\\.[^'\\\n]*)*'))
    |(?P<name>[^\W\d]\w*)
    |(?P<number>0[xob][\da-f_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[-+]?\d[\d_]*)?j?)
    |(?P<operator>\.{3}|->|:=|(?:\*\*|//|<<|>>|[-+*/%@&|^=!<>])=?|[~.,;:()\[\]{}])""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)

CONCEPT_OF = {word: name for name, words in OPERATORS.items() for word in words}

BRACKETS = {"(": "inside round brackets", "[": "inside square brackets", "{": "inside curly brackets"}

# What characters tell, in each case the whole match
TEXT = {
    "indentation": re.compile(r"^[ \t]+(?=\S)", re.M),
    "line indented by 12 or more": re.compile(r"^[ ]{12,}\S.*$", re.M),
    "line not indented": re.compile(r"^\S.*$", re.M),
    "blank line": re.compile(r"^\s*\n", re.M),
    "web address": re.compile(r"https?://[^\s\"'>)]+"),
}


# Concepts in words, as the tokens that are of them. What is much the same as another is left out
IN_WORDS = {
    "import": "tokens in import statements", "imported name": "imported names", "docstring": "tokens in docstrings",
    "f-string": "tokens in f-strings", "decorator": "tokens in decorators", "base class": "base classes",
    "class body": "tokens in class bodies", "function within a function": "tokens in functions inside functions",
    "parameter": "parameters", "argument's default": "default values", "annotation": "annotations",
    "raise": "tokens in raise statements", "return": "tokens in return statements",
    "assert": "tokens in assert statements", "yield": "tokens in yield expressions",
    "except clause": "tokens in except clauses", "with's context": "tokens in with statements",
    "condition": "tokens in conditions", "loop's variable": "loop variables", "lambda": "tokens in lambdas",
    "comprehension": "tokens in comprehensions", "call's arguments": "tokens in arguments of calls",
    "function called": "names of called functions", "subscript": "tokens in subscripts",
    "dictionary's key": "keys of dictionaries", "comparison": "tokens in comparisons",
    "assigned variable": "variables being assigned", "negative number": "negative numbers", "keyword": "keywords",
    "None, True, False": "None, True or False", "self": 'the name "self"',
    "function's name, defined": "names of functions being defined",
    "class's name, defined": "names of classes being defined", "attribute": "attributes",
    "exception's name": "names of exceptions", "dunder name": "names like __init__",
    "private name": "names with a leading underscore", "constant's name": "names of constants",
    "class's name in use": "names of classes", "comparing operator": "comparing operators",
    "arithmetic operator": "arithmetic operators", "equals sign": "equals signs", "comma": "commas", "colon": "colons",
    "opening bracket": "opening brackets", "closing bracket": "closing brackets", "comment": "tokens in comments",
    "number": "numbers", "string": "tokens in strings", "inside round brackets": "tokens inside round brackets",
    "inside square brackets": "tokens inside square brackets", "inside curly brackets": "tokens inside curly brackets",
    "inside two brackets or more": "tokens inside nested brackets", "web address": "tokens in web addresses",
    "indentation": "indentation", "line indented by 12 or more": "tokens on deeply indented lines",
    "line not indented": "tokens on lines without indentation",
}  # fmt: skip


def python_spans(text: str) -> Spans | None:
    """Where the concepts stand in Python source; None where it does not parse, or not on this Python."""
    if not text or "\r" in text or "\f" in text:  # lines that the parser and the text itself count in two ways
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    span_of = _node_spans(text)
    found: Spans = {name: [match.span() for match in pattern.finditer(text)] for name, pattern in TEXT.items()}
    for node in ast.walk(tree):
        for name, parts in _syntax_of(node.__class__.__name__):
            found.setdefault(name, []).extend(span_of(part) for part in parts(node) if part is not None)
    for name, span in _of_tokens(text, found.get("docstring", [])):
        found.setdefault(name, []).append(span)
    return found


def token_spans(text: str) -> Spans:
    """Where the concepts stand that tokens and characters tell, in Python that need not parse, as models write it."""
    found: Spans = {name: [match.span() for match in pattern.finditer(text)] for name, pattern in TEXT.items()}
    for name, span in _of_tokens(text, []):
        found.setdefault(name, []).append(span)
    return found


def told_by_tokens() -> set[str]:
    """The names of the concepts that `token_spans` finds wholly: docstrings look like strings to it."""
    return {*NAMES, *OPERATORS, *TEXT, "comment", "number"}


@cache
def _syntax_of(kind: str) -> list[tuple[str, Callable[[Any], Iterable[ast.AST | None]]]]:
    """What a kind of node has of concepts, by its name."""
    return [(name, parts) for name, (kinds, parts) in SYNTAX.items() if issubclass(getattr(ast, kind), kinds)]


def _node_spans(text: str) -> Callable[[Any], Span]:
    """What gives the span of a node, whose place the parser gives as lines from 1 and bytes in them."""
    lines = text.split("\n")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]

    def at(line: int, byte: int) -> int:
        words = lines[line - 1]
        return starts[line - 1] + (byte if words.isascii() else len(words.encode()[:byte].decode(errors="replace")))

    return lambda node: (at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset))


@lru_cache(maxsize=2**16)
def _names_of(before: str, word: str) -> list[str]:
    return [name for name, holds in NAMES.items() if holds(before, word)]


def _of_tokens(text: str, docstrings: list[Span]) -> Iterator[tuple[str, Span]]:
    """Concept and span of each token that is of one, and of what brackets enclose."""
    are_docstrings, before, open_at = {start for start, _ in docstrings}, "", list[tuple[str, int]]()
    for token in TOKEN.finditer(text):
        word, span, kind = token[0], token.span(), token.lastgroup
        if kind in ("comment", "number") or (
            kind == "string" and not token["f_string"] and span[0] not in are_docstrings
        ):
            yield kind, span
        elif kind == "name":
            yield from ((name, span) for name in _names_of(before if before in BEFORE else "", word))
        elif kind == "operator":
            if word in CONCEPT_OF:
                yield CONCEPT_OF[word], span
            if word in BRACKETS:
                open_at.append((word, span[1]))
            elif word in ")]}" and open_at:
                bracket, inside = open_at.pop()
                yield BRACKETS[bracket], (inside, span[0])
                if open_at:
                    yield "inside two brackets or more", (inside, span[0])
        before = "from" if word == "." and before == "from" else word  # the dots of a relative import


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
    """Which tokens of a document are of each concept, (N, C) bool; None where its tokens do not join to its text."""
    text, ids = labelled.document.text, tokenizer.encode(labelled.document.text)
    strings = tokenizer.strings(ids)
    joined = "".join(strings)
    added = len(joined) - len(text)  # 1 with a sentencepiece tokenizer, which puts a space before the text
    if added not in (0, 1) or joined[added:] != text:
        return None
    ends = np.maximum(np.cumsum([0, *map(len, strings)]) - added, 0)
    return tokens_inside(labelled.spans, concepts, text, ends)


def tokens_inside(spans: Spans, concepts: list[str], text: str, ends: np.ndarray) -> np.ndarray:
    """Which tokens are of each concept, (N, C) bool; token n is the characters ends[n] to ends[n + 1] of the text.

    A token is of a concept if more than half of its characters are, spaces not counted unless there are no others.
    """
    begin, length = int(ends[0]), int(ends[-1] - ends[0])
    ends = ends - begin
    steps_CL = np.zeros((len(concepts), length + 1), dtype=np.int32)
    for column, concept in enumerate(concepts):
        if spans.get(concept):
            bounds = np.clip(np.array(spans[concept]) - begin, 0, length)
            np.add.at(steps_CL[column], bounds[:, 0], 1)
            np.add.at(steps_CL[column], bounds[:, 1], -1)
    inside_CL = steps_CL[:, :-1].cumsum(axis=1) > 0
    visible_L = np.array([not character.isspace() for character in text[begin : begin + length]], dtype=bool)
    seen_N, among_all_CN, among_visible_CN = (
        np.diff(np.pad(some.cumsum(axis=-1), [(0, 0)] * (some.ndim - 1) + [(1, 0)])[..., ends])
        for some in (visible_L, inside_CL, inside_CL & visible_L)
    )
    return np.where(seen_N > 0, 2 * among_visible_CN > seen_N, 2 * among_all_CN > np.diff(ends)).T


def share_of(concept: str, tokenizer: Tokenizer, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of texts, each of which continues a prompt, that are of a concept of `told_by_tokens`."""
    inside = [np.zeros(0, dtype=bool)]
    for ids in texts:
        strings = tokenizer.strings([*prompt, *ids])
        text, ends = "".join(strings), np.cumsum([0, *map(len, strings)])
        spans = token_spans(text + '"""')  # which closes a docstring that the text leaves open
        inside.append(tokens_inside(spans, [concept], text, ends)[len(prompt) :, 0])
    return float(np.concatenate(inside).mean()) if any(texts) else 0.0


def names_in(labelled: Iterable[Labelled]) -> list[str]:
    """The concepts of some documents, sorted."""
    return sorted(set(chain.from_iterable(each.spans for each in labelled)))
