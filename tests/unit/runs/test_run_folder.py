"""Who may train into a run folder, and when a run is known to have been started again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lqkd.errors import UsageError
from lqkd.runs.folder import RunSettings, claim, lock, remove_partial_files, restarted

CONFIG = "model: mine"


def test_a_folder_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        lock(tmp_path)
        os._exit(0)
    os.waitpid(child, 0)
    held = lock(tmp_path, patience=0.0)
    with pytest.raises(UsageError, match="is in use: another process is training in it"):
        lock(tmp_path, patience=0.0)
    os.close(held)
    os.close(lock(tmp_path, patience=0.0))


@pytest.mark.parametrize(
    ("version", "expected"), [("1", "version_1"), (7, "version_7"), ("mine", "mine"), (None, "version_0")]
)
def test_a_number_is_the_version_of_that_number(
    version: str | int | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LQKD_RUN_FOLDER", "")  # claim sets it for the processes of other devices
    settings = RunSettings(root=str(tmp_path), version=version)
    assert claim(settings, CONFIG) == tmp_path / "run" / expected
    if version is not None:
        with pytest.raises(UsageError, match=f"run/{expected} exists: choose another run.version"):
            claim(settings, CONFIG)


def test_a_folder_appears_with_the_configuration_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed at any moment can be resumed."""
    monkeypatch.setenv("LQKD_RUN_FOLDER", "")
    seen: list[bool] = []
    real = Path.rename

    def rename(source: Path, target: Path) -> Path:
        seen.append(target.exists())
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    folder = claim(RunSettings(root=str(tmp_path), version="mine"), CONFIG)
    assert seen == [False]
    assert (folder / "config.yaml").read_text() == CONFIG
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_an_empty_folder_is_taken_and_one_with_other_files_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LQKD_RUN_FOLDER", "")
    for name in ("empty", "full"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "full" / "notes.txt").touch()
    assert (claim(RunSettings(root=str(tmp_path), version="empty"), CONFIG) / "config.yaml").is_file()
    with pytest.raises(UsageError, match=r"full is there and has no config.yaml.*: choose another .* or move it away"):
        claim(RunSettings(root=str(tmp_path), version="full"), CONFIG)
    assert [path.name for path in (tmp_path / "run" / "full").iterdir()] == ["notes.txt"]


CONTROL = [("root", "a\0b"), ("name", "\0"), ("name", "a\x01"), ("version", "1\0")]


@pytest.mark.parametrize(("key", "value"), [*CONTROL, ("version", -1)])
def test_what_is_no_name_of_a_folder_is_refused_before_anything_is_made(key: str, value: Any, tmp_path: Path) -> None:
    settings = RunSettings(**{"root": str(tmp_path / "runs"), key: value})
    with pytest.raises(UsageError, match=f"run.{key}=.* is not possible"):
        claim(settings, "")
    assert not list(tmp_path.iterdir())


def test_only_half_written_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/.last.1a2b3c4d.ckpt.tmp", ".metrics.0f.csv.tmp", "mine.tmp", "checkpoints/last.ckpt"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"mine.tmp", "last.ckpt"}


@pytest.mark.parametrize(
    ("environment", "version", "expected"),
    [
        ({}, "mine", None),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, "mine", None),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, "mine", "mine"),
        ({"SLURM_RESTART_COUNT": "2"}, "never_begun", None),
        ({"SLURM_RESTART_COUNT": "2"}, None, None),
        ({"SLURM_RESTART_COUNT": "2", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None, "slurm_7"),
        (
            {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "9", "WORLD_SIZE": "2"},
            None,
            "torchrun_9",
        ),
    ],
)
def test_a_run_that_was_started_again_finds_its_folder(
    environment: dict[str, str],
    version: str | None,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("mine", "slurm_7", "torchrun_9"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.yaml").touch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = restarted(RunSettings(root=str(tmp_path), version=version))
    assert found == (None if expected is None else tmp_path / "run" / expected)
