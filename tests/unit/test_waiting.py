"""What a person sees of work that takes seconds outside of a training."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from lqkd.waiting import telling, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def look_at(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return terminal


def test_work_of_more_than_two_seconds_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    clock = iter([0.0, 0.1, 1.9, 2.1, 2.2])
    monkeypatch.setattr("lqkd.waiting.time", SimpleNamespace(monotonic=lambda: next(clock)))
    seen = []
    for item in waiting("abcd", "checking images", 4):
        seen.append((item, "checking images" in terminal.getvalue()))
    assert seen == [("a", False), ("b", False), ("c", True), ("d", True)]
    assert "-:--:--" in terminal.getvalue() or "0:0" in terminal.getvalue()


def test_quick_work_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    assert list(waiting("abcd", "checking images", 4)) == list("abcd")
    assert terminal.getvalue() == ""


def test_there_is_none_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lqkd.waiting._PATIENCE", -1.0)
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    assert list(waiting("abcd", "checking images", 4)) == list("abcd")
    with telling("drawing"):
        pass
    assert file.getvalue() == ""


def test_work_without_steps_is_named_while_it_goes_on_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    with telling("drawing"):
        assert terminal.getvalue() == "drawing ..."
    assert terminal.getvalue() == "drawing ...\r\x1b[K"
