"""Sentences on a terminal."""

from __future__ import annotations

import io

import pytest

from lqkd.utils.screen import tell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_lines_that_break_between_words_and_a_file_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    text = f"student     a network of many layers at runs/{'long' * 12} and\x1b[2J more"
    tell(text, indent=12)
    assert capsys.readouterr().out == text.replace("\x1b", r"\x1b") + "\n"
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    tell(text, indent=12)
    lines = terminal.getvalue().splitlines()
    assert lines[0] == "student     a network of many layers at"
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert f"runs/{'long' * 12}" in "".join(lines)  # a path stays whole, to be copied
