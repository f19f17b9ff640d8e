"""Files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lqkd.files import atomic_path, write_json, write_text


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_final_name_appears_only_when_the_file_is_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("text")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "text"


def test_values_that_json_does_not_know_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
