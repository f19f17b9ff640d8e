"""Texts out of files do nothing where they are shown."""

from __future__ import annotations

import pytest

from lqkd.utils.escaping import csv_cell, markdown, terminal


def test_a_terminal_shows_what_it_would_obey() -> None:
    assert terminal("\x1b[31mred\nnew\r\x9b\x7f\u202e") == r"\x1b[31mred\nnew\r\x9b\x7f\u202e"
    assert terminal("naïve 漢字 👩‍👧 نمی‌دانم") == "naïve 漢字 👩‍👧 نمی‌دانم"
    assert terminal("\udcff") == r"\udcff"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<img src=x onerror=alert(1)>&lt;", "&lt;img src=x onerror=alert(1)&gt;&amp;lt;"),
        ("![x](http://a) [y][z] [z]: b", r"![x\](http://a) [y\][z] [z\]: b"),
        ("a | b `c` *d* \\", r"a \| b \`c\` \*d\* \\"),
        ("one\n# two", r"one\\n# two"),
        ("task_only +3.00 [+3.00, +3.00]", "task_only +3.00 [+3.00, +3.00]"),
    ],
)
def test_markdown_reads_it_as_text(text: str, escaped: str) -> None:
    assert markdown(text) == escaped


@pytest.mark.parametrize("name", ['=HYPERLINK("http:x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "\r=1"])
def test_no_cell_of_a_csv_file_begins_a_formula_and_the_name_can_be_read_back(name: str) -> None:
    cell = csv_cell(name)
    assert cell[0] in "'\\"
    assert cell.removeprefix("'").encode().decode("unicode_escape") == name


def test_different_names_stay_different_cells_and_numbers_are_numbers() -> None:
    names = ["=1", "'=1", "''=1", "a\nb", "a\\nb", "a\\\\nb"]
    assert len({csv_cell(name) for name in names}) == len(names)
    assert [csv_cell(value) for value in (-1, -0.5, None)] == [-1, -0.5, None]
