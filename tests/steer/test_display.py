"""Two texts side by side, with marks."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mistral_sae.steer import display
from mistral_sae.steer.display import Mark, lay_out, level_of, print_side_by_side


def lines_of(marks) -> list[Text]:
    return lay_out(Console(width=40), marks, 10)


def printed(titles, texts, **options) -> str:
    file = io.StringIO()
    print_side_by_side(Console(file=file, **options), titles, texts)
    return file.getvalue()


def test_an_activation_shows_however_small_it_is_and_silence_does_not():
    assert [level_of(share) for share in (-1.0, 0.0, 1e-6, 0.3, 0.6, 0.8, 1.0, 3.0)] == [0, 0, 1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("a\n\nb\n", ["a", "", "b"]),
        ("abcdefghijklm", ["abcdefghij", "klm"]),
        ("one two three four", ["one two ", "three four"]),
        ("a bcdefghijklm", ["a ", "bcdefghijk", "lm"]),
        ("\tx", ["    x"]),
        ("ab\tx\r\ny", ["ab  x", "y"]),
        ("a\x00b\x1b[31m", ["a·b·[31m"]),
        ("日本語日本語", ["日本語日本", "語"]),
    ],
)
def test_text_is_laid_out_in_columns(text, lines):
    assert [line.plain for line in lines_of([Mark(text, 0)])] == lines


def test_a_mark_stays_with_its_characters_across_lines():
    lines = lines_of([Mark("abcdefgh", 0), Mark("ijkl\nhi", 2), Mark("j", 0)])
    assert [display.bars(line) for line in lines] == ["        ▃▃", "▃▃", "▃▃"]


def test_columns_keep_their_place_and_fit_the_width():
    out = printed(
        ["left", "right"], [[Mark("def f():\n    日本", 0)], [Mark("x" * 50 + "\n", 0), Mark("y", 0)]], width=43
    )
    lines = out.splitlines()
    assert all(cell_len(line) <= 43 for line in lines)
    assert {cell_len(line.replace("┼", "│").split("│")[0]) for line in lines} == {21}
    assert lines[0].split("│")[1].strip() == "right"
    assert "".join(line.split("│")[1].strip() for line in lines[2:]) == "x" * 50 + "y"


def test_without_colour_bars_stand_under_the_marked_characters():
    out = printed(["a", "b"], [[Mark("plain", 0)], [Mark("the ", 0), Mark("exc", 4), Mark("eption", 1)]], width=43)
    text, bars = out.splitlines()[2:]
    assert "\x1b" not in out
    assert text.index("exc") == bars.index("▇▇▇")
    assert bars.split("│")[1].strip() == "▇▇▇▁▁▁▁▁▁"
    assert len(out.splitlines()) == 4


def test_on_a_terminal_marks_are_colours_and_underlines_in_the_line():
    texts = [[Mark("plain", 0)], [Mark("the ", 0), Mark("exc", 4)]]
    out = printed(["a", "b"], texts, width=43, force_terminal=True, color_system="truecolor")
    assert "\x1b[4;" in out
    assert "▇" not in out
    assert len(out.splitlines()) == 3
    plain = printed(["a", "b"], texts, width=43, force_terminal=True, color_system="truecolor", no_color=True)
    assert "\x1b[4m" in plain  # an underline still tells
    assert "255;" not in plain


def test_the_legend_shows_the_marks_that_are_used():
    file = io.StringIO()
    console = Console(file=file, width=200)
    console.print(display.legend(console))
    assert all(bar in file.getvalue() for bar in display.BARS[1:])
