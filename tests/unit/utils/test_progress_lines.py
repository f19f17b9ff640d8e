"""What a person sees of work that takes seconds outside of a training."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from lqkd.utils.progress import Stages, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def look_at(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return terminal


def test_work_of_more_than_two_seconds_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    now = 0.0
    monkeypatch.setattr("lqkd.utils.progress.time", SimpleNamespace(monotonic=lambda: now))
    seen = []
    items = track("abcd", "checking images", 4)
    for now in (0.0, 1.9, 2.1, 2.2):  # noqa: B007
        seen.append((next(items), "checking images" in terminal.getvalue()))
    items.close()
    assert seen == [("a", False), ("b", False), ("c", True), ("d", True)]
    assert "-:--:--" in terminal.getvalue() or "0:0" in terminal.getvalue()


def test_quick_work_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    assert list(track("abcd", "checking images", 4)) == list("abcd")
    assert terminal.getvalue() == ""


def test_there_is_none_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lqkd.utils.progress.Progress._patience", -1.0)
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    assert list(track("abcd", "checking images", 4)) == list("abcd")
    with Stages(1) as stage:
        stage("drawing")
    assert file.getvalue() == ""


def test_of_several_processes_only_the_first_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Stages(1) as stage:
        stage("loading")
    assert terminal.getvalue() == ""


def test_stages_are_named_from_the_beginning_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    with Stages(2) as stage:
        stage("reading")
        assert "reading" in terminal.getvalue()
        assert "0/2" in terminal.getvalue()
        monkeypatch.setattr("lqkd.utils.progress._BETWEEN", -1.0)
        stage("drawing")
        assert "drawing" in terminal.getvalue()
        assert "1/2" in terminal.getvalue()
    assert "\x1b[2K" in terminal.getvalue().rpartition("drawing")[2]  # the line is taken away


def test_work_within_work_has_a_bar_below_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    monkeypatch.setattr("lqkd.utils.progress._BETWEEN", -1.0)
    monkeypatch.setattr("lqkd.utils.progress.Progress._patience", -1.0)
    with Stages(1) as stage:
        stage("comparing")
        for image in track("abc", "images", 3):
            last = terminal.getvalue().rpartition("comparing")[2]
            assert "images" in last
            assert f"{'abc'.index(image)}/3" in last
        drawn = len(terminal.getvalue())
        stage("comparing more")
        assert "images" not in terminal.getvalue()[drawn:]


def test_what_is_printed_meanwhile_goes_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    monkeypatch.setattr("lqkd.utils.progress.Progress._patience", -1.0)
    monkeypatch.setattr("sys.stdout", file := io.StringIO())
    for item in track("ab", "reading images", 2):
        print(item)
    assert file.getvalue() == "a\nb\n"
    assert "reading images" in terminal.getvalue()
