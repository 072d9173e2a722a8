"""Two texts side by side on a terminal, their tokens marked by how strongly a feature fires on them.

On a terminal marks are colours and an underline, elsewhere a bar under the character.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.box import MINIMAL
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mistral_sae.steer.sweep import Measured

# By level: 0 is silent. Underlined too, for terminals without colour and readers who see none
STYLES = ("", "underline", "underline black on #ffe8a3", "underline black on #ffb84d", "underline black on #ff7a45")
BARS = " ▁▃▅▇"
TAB = 4  # columns
INDENT = 4
NAME = 19  # columns of a name before its value


class Mark(NamedTuple):
    """A piece of text and its level, an index into STYLES."""

    text: str
    level: int


def level_of(share: float) -> int:
    """The level of an activation, from its share of the feature's maximum; any activation above 0 shows."""
    return 0 if share <= 0 else min(len(STYLES) - 1, 1 + int(share * (len(STYLES) - 1)))


def visible(text: str) -> str:
    """The text with "·" for control characters and whatever else cannot be shown; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text.replace("\r\n", "\n"))


def lay_out(console: Console, marks: Iterable[Mark], width: int) -> list[Text]:
    """Lines of at most `width` columns, broken at spaces where a word fits on one, of `visible` text."""
    text = Text()
    for piece, level in marks:
        text.append(visible(piece), STYLES[level])
    lines = list(text.wrap(console, width, overflow="fold", tab_size=TAB))
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    return lines


def print_side_by_side(console: Console, titles: Sequence[str], texts: Sequence[Iterable[Mark]]) -> None:
    """Print columns of equal width, as wide as the terminal together."""
    table = Table(box=MINIMAL, show_edge=False, pad_edge=False, header_style="")
    width = (console.width - len(" │ ") * (len(texts) - 1)) // len(texts)
    for title in titles:
        table.add_column(title, width=width, no_wrap=True)
    columns = [lay_out(console, text, width) for text in texts]
    for i in range(max(map(len, columns))):
        row = [column[i] if i < len(column) else Text() for column in columns]
        table.add_row(*row)
        marks = [bars(line) for line in row]
        if console.color_system is None and any(marks):
            table.add_row(*marks)
    console.print(table)


def bars(line: Text) -> str:
    """The bars under a line's characters."""
    levels = [0] * len(line)
    for start, end, style in line.spans:
        levels[start:end] = [STYLES.index(str(style))] * (end - start)
    pairs = zip(line.plain, levels, strict=True)
    return "".join(BARS[level] * cell_len(character) for character, level in pairs).rstrip()


def print_sweep(console: Console, title: str, rows: Sequence[tuple[str, Measured, str]], marked: str | None) -> None:
    """Print a table of edits, their names and figures, one of which may be marked; then a text of each in full."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("", "coef.", "nats", "KL", "repeated", "fires", "mean"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, m, _ in rows:
        nats = (f"{m.cross_entropy:.2f}", f"{m.kl:.2f}")
        features = (f"{m.repetition:.0%}", f"{m.rate:.1%}", f"{m.activation:.2f}")
        arrow, style = ("→", "bold") if name == marked else ("", None)
        shown.add_row(arrow, name, *nats, *features, style=style)
    console.print(title)
    console.print(shown)
    for name, _, text in rows:
        console.print(Text(f"\n{'→' if name == marked else ' '} {name}", style="bold"))
        for line in lay_out(console, [Mark(text, 0)], console.width - INDENT):
            console.print(Text(" " * INDENT) + line)


def legend(console: Console) -> Text:
    """What the marks mean, in themselves."""
    pairs = zip(BARS[1:], STYLES[1:], ("up to ¼", "½", "¾", "more"), strict=True)
    marks = [Text(bound if console.color_system else f"{bar} {bound}", style) for bar, style, bound in pairs]
    return Text.assemble("read back unsteered, at ", Text("  ").join(marks), " of its maximum")


def print_line(name: str, value: str) -> None:
    """Print a name and as much of its value as the screen's width takes."""
    console = Console(highlight=False)
    console.print(Text(f"{name:<{NAME}} {value}"), no_wrap=True, overflow="ellipsis", width=max(console.width, 40))
