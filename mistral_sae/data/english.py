"""English prose from what is installed on this machine: text for a model of English where no data set can be fetched.

The sentences of docstrings, comments, manuals and licences: Python's help topics, its standard library, the packages
beside this one, /usr/share/doc and man pages. What is collected is kept in a file of the user's cache folder.
"""

import gzip
import hashlib
import json
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path

from mistral_sae.cli import Progress
from mistral_sae.files import cache_folder, files_below, write_text

RULES = 1  # counted up where the rules below change, so that the text is collected again
MOST = 1_000_000  # characters of one package, or of all man pages: no style is to outweigh the others
SHORTEST = 15  # words of a paragraph
# A paragraph is English prose if so large a share of its words are among these, and of its characters are plain
FUNCTION_WORDS = frozenset(
    """
    a all an and are as at be been but by can for from has have if in is it its may must not of on one or should
    so than that the their then there these they this to used was we were when which will with would you your
    """.split()  # noqa: SIM905  a list of them would fill a page
)
LEAST_FUNCTION_WORDS, LEAST_PLAIN = 0.3, 0.93

SYSTEM = [Path("/usr/share/doc"), Path("/usr/share/man"), Path("/usr/share/common-licenses")]
LEFT_OUT = ("-packages", "__pycache__")  # packages may lie inside the standard library's folder
SUFFIXES = (".md", ".rst", ".txt", "")
STRING = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
COMMENT = re.compile(r"(?:^[ \t]*# .*\n){2,}", re.MULTILINE)
# Of a man page: requests that begin a paragraph, those before a word of a sentence, all others, and changes of font
PARAGRAPH, WORD, REQUEST, FONT = (
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^[.'](?:PP?|LP|TP|IP|HP|SH|SS|Pp|Sh|Ss|It|sp)\b.*$",
        r"^\.(?:B|I|BR|IR|RB|BI|RI|IB|Nm|Fl|Ar|Pa|Xr) ",
        r"^[.'].*$",
        r"\\f(?:\[\w*\]|\(..|.)|\\[&|/^%]",
    )
)


def english_file() -> Path:
    """The file of the collected text, a JSON line a document: its id, a path, and its text. Made where it is missing.

    It is another one after packages were installed or removed.
    """
    found = {f"{each.name} {each.version}" for each in distributions()}
    changed = [root.stat().st_mtime_ns for root in SYSTEM if root.is_dir()]
    made_from = json.dumps([RULES, MOST, sorted(found), changed, sysconfig.get_python_version()])
    path = cache_folder("english") / f"{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        lines = (json.dumps({"id": id, "text": text}) + "\n" for id, text in collected())
        write_text(path, "".join(Progress(lines, f"collecting English text, once, into {path}", unit=" documents")))
    return path


def collected() -> Iterator[tuple[str, str]]:
    """The id and the prose of each file that has some; a paragraph that was in an earlier one is left out."""
    seen, written = set[str](), Counter[str]()
    for package, id, read, text_in in chain(_help_topics(), _python_files(), _system_files()):
        if written[package] > MOST:
            continue
        try:
            paragraphs = [text for text in paragraphs_of(text_in(read())) if text.lower() not in seen]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError):
            continue  # what cannot be read, or is no text
        seen.update(map(str.lower, paragraphs))
        written[package] += sum(map(len, paragraphs))
        if paragraphs:
            yield id, "\n\n".join(dict.fromkeys(paragraphs))


def paragraphs_of(text: str) -> Iterator[str]:
    """The paragraphs of a text that are English prose, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if is_prose(paragraph):
            yield paragraph


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph, on one line, is made of English sentences: no code, table, list or other language."""
    words = [word.strip(".,;:()\"'").lower() for word in paragraph.split()]
    if len(words) < SHORTEST or paragraph[-1] not in ".!?:" or "---" in paragraph or ">>>" in paragraph:
        return False
    plain = sum((c.isascii() and c.isalpha()) or c in " ,.'" for c in paragraph)
    known = sum(word in FUNCTION_WORDS for word in words)
    return known >= LEAST_FUNCTION_WORDS * len(words) and plain >= LEAST_PLAIN * len(paragraph)


# ---- where text is: (package, id, how it is read, which of it is text) ----

Source = tuple[str, str, Callable[[], str], Callable[[str], str]]


def _help_topics() -> Iterator[Source]:
    from pydoc_data.topics import topics

    for name in topics:
        yield "pydoc", f"pydoc/{name}", partial(topics.__getitem__, name), str


def _python_files() -> Iterator[Source]:
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root in (library, packages):
        for path in files_below(root, LEFT_OUT):
            id = path.relative_to(root).as_posix()
            package = "standard library" if root == library else id.split("/")[0]
            is_code = path.suffix == ".py"
            if is_code or path.suffix in SUFFIXES:
                yield package, id, partial(path.read_text, encoding="utf-8"), of_source if is_code else str


def _system_files() -> Iterator[Source]:
    for root in SYSTEM:
        is_manual = root.name == "man"
        for path in files_below(root, LEFT_OUT):
            name = path.name.removesuffix(".gz")
            id = path.relative_to(root.parent).as_posix()
            if is_manual and re.fullmatch(r"man/man\d/.*", id):
                yield "man", id, partial(_unpacked, path), of_man_page
            elif not is_manual and Path(name).suffix in SUFFIXES:
                yield f"doc {id.split('/')[1]}", id, partial(_unpacked, path), str


def _unpacked(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()


def of_source(code: str) -> str:
    """The docstrings and the longer comments of Python code."""
    comments = (re.sub(r"^[ \t]*# ?", "", each, flags=re.MULTILINE) for each in COMMENT.findall(code))
    return "\n\n".join([*(text for _, text in STRING.findall(code)), *comments])


def of_man_page(source: str) -> str:
    """The text of a man page without its requests and fonts."""
    text = REQUEST.sub("", WORD.sub("", PARAGRAPH.sub("\n", source)))
    return FONT.sub("", text).replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
