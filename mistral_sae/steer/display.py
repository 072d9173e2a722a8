"""Two texts side by side on a terminal, their tokens marked by how strongly a feature fires on them.

On a terminal marks are colours and an underline, elsewhere a bar under the character.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mistral_sae.steer.sweep import Measured

# By level: 0 is silent. Underlined too, for terminals without colour and readers who see none
STYLES = ("", "underline", "underline black on #ffe8a3", "underline black on #ffb84d", "underline black on #ff7a45")
BARS = " ▁▃▅▇"
TAB = 4  # columns
SEPARATOR = " │ "
NAME = 19  # columns of a name before its value


class Mark(NamedTuple):
    """A piece of text and its level, an index into STYLES."""

    text: str
    level: int


def level_of(share: float) -> int:
    """The level of an activation, from its share of the feature's maximum; any activation above 0 shows."""
    return 0 if share <= 0 else min(len(STYLES) - 1, 1 + int(share * (len(STYLES) - 1)))


def lay_out(marks: Iterable[Mark], width: int) -> list[list[Mark]]:
    """Lines of at most `width` columns, of one mark a character, broken at spaces where that leaves no line half empty.

    Tabs become spaces, other characters that cannot be shown "·".
    """
    lines: list[list[Mark]] = [[]]
    used = 0
    for mark in marks:
        for character in mark.text.replace("\r\n", "\n"):
            if character == "\n":
                lines.append([])
                used = 0
                continue
            shown = " " * (TAB - used % TAB) if character == "\t" else character
            for one in shown if shown.isprintable() else "·":
                if used + cell_len(one) > width:
                    lines.append(_tail(lines[-1], width))
                    used = sum(cell_len(kept.text) for kept in lines[-1])
                lines[-1].append(Mark(one, mark.level))
                used += cell_len(one)
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def _tail(line: list[Mark], width: int) -> list[Mark]:
    """Take from a full line the word at its end, for the next line; nothing if that word is half the line or more."""
    spaces = [i for i, mark in enumerate(line) if mark.text == " "]
    if not spaces or spaces[-1] < width // 2:
        return []
    tail = line[spaces[-1] + 1 :]
    del line[spaces[-1] + 1 :]
    return tail


def print_side_by_side(console: Console, titles: Sequence[str], texts: Sequence[Iterable[Mark]]) -> None:
    """Print columns of equal width, as wide as the terminal together."""
    width = (console.width - len(SEPARATOR) * (len(texts) - 1)) // len(texts)
    columns = [lay_out(text, width) for text in texts]
    has_styles = console.color_system is not None
    _print_row(console, [[Mark(title[:width], 0)] for title in titles], width, has_styles)
    _print_row(console, [[Mark("─" * width, 0)] for _ in titles], width, has_styles)
    for i in range(max(map(len, columns))):
        row = [column[i] if i < len(column) else [] for column in columns]
        _print_row(console, row, width, has_styles)
        if not has_styles and any(mark.level for line in row for mark in line):
            bars = [[Mark(BARS[mark.level] * cell_len(mark.text), 0) for mark in line] for line in row]
            _print_row(console, bars, width, has_styles)


def _print_row(console: Console, row: Sequence[Sequence[Mark]], width: int, has_styles: bool) -> None:
    """One line of each column."""
    line = Text()
    for i, marks in enumerate(row):
        for text, level in marks:
            line.append(text, style=STYLES[level] if has_styles else None)
        if i < len(row) - 1:
            line.append(" " * (width - sum(cell_len(text) for text, _ in marks)) + SEPARATOR)
    line.rstrip()
    console.print(line, no_wrap=True, overflow="ignore", crop=False)


def sweep_table(title: str, rows: Sequence[tuple[str, Measured, str]], marked: str | None) -> Table:
    """A table of edits: their names, figures, and a text as far as the screen's width goes; one may be marked."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=True)
    for heading in ("", "coef.", "nats", "KL", "repeated", "fires", "mean"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for name, m, text in rows:
        nats = (f"{m.cross_entropy:.2f}", f"{m.kl:.2f}")
        features = (f"{m.repetition:.0%}", f"{m.rate:.1%}", f"{m.activation:.2f}")
        is_marked = name == marked
        arrow, style = ("→", "bold") if is_marked else ("", None)
        shown.add_row(arrow, name, *nats, *features, Text(repr(text)[1:-1]), style=style)
    return shown


def legend(console: Console) -> Text:
    """What the marks mean, in themselves."""
    has_styles = console.color_system is not None
    line = Text("read back unsteered, at ")
    for level, bound in enumerate(("up to ¼", "½", "¾", "more"), start=1):
        line.append(bound if has_styles else f"{BARS[level]} {bound}", style=STYLES[level] if has_styles else None)
        line.append(" " if bound == "more" else "  ")
    return line.append("of its maximum")


def print_line(console: Console, name: str, value: str) -> None:
    """A name and as much of its value as the screen's width takes."""
    line = Text(f"{name:<{NAME}} {value}")
    line.truncate(max(console.width, 40), overflow="ellipsis")
    console.print(line, no_wrap=True, crop=False)
