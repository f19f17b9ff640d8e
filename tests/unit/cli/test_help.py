"""Help of Lightning's verbs is made once, and made again when what it depends on has changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lqkd.cli import help as kept_help


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path))
    return []


def ask(made: list[str]) -> str:
    def make() -> None:
        made.append("once more")
        print("usage: fit")
        sys.exit(0)

    return kept_help.help_of("fit", make)


def test_the_second_time_the_text_is_read(made: list[str]) -> None:
    assert ask(made) == ask(made) == "usage: fit\n"
    assert made == ["once more"]


def test_another_version_or_width_makes_it_anew(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ask(made)
    monkeypatch.setenv("COLUMNS", "77")
    ask(made)
    monkeypatch.setattr(kept_help.metadata, "version", lambda name: "9.9")
    ask(made)
    assert len(made) == 3


def test_where_nothing_can_be_kept_it_is_made_each_time(
    made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path / "file"))
    assert ask(made) == ask(made) == "usage: fit\n"
    assert len(made) == 2
