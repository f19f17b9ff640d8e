"""When a run is finished: by the training that is done and that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lqkd.errors import UsageError
from lqkd.runs.resume import find

ASKED = {"max_epochs": 3, "max_steps": -1, "max_time": None}


def make(
    folder: Path, asked: dict[str, Any] | None = None, summary: dict[str, Any] | None = None, **state: Any
) -> Path:
    """A run folder as it is after three epochs, but for what ``asked``, ``summary`` and ``state`` replace."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": ASKED | (asked or {})}))
    (folder / "summary.json").write_text(json.dumps({"finished": True, "steps": 60} | (summary or {})))
    (folder / "student.safetensors").touch()
    reached = {"epoch": 3, "batches": 0, "steps": 60, "rows": 5, "finished": True} | state
    checkpoint = {"state_dict": {}, "global_step": 60, "resume": reached, "limits": ASKED}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.parametrize(
    ("run", "finished"),
    [
        ({}, True),
        ({"asked": {"max_epochs": 4}}, False),  # it was to go on, and was stopped before the first checkpoint of that
        ({"asked": {"max_steps": 100}}, False),
        ({"asked": {"max_time": "00:01:00:00"}}, False),
        ({"finished": False}, False),
        ({"summary": {"steps": 40}}, False),  # it is of an earlier end
        ({"summary": {"finished": False}}, False),  # the test is missing
        ({"summary": {"finished": None, "test_accuracy": 0.9}}, True),  # of a version that does not tell
        ({"summary": {"finished": None, "test_accuracy": None}}, False),
    ],
)
def test_a_run_is_finished_when_nothing_that_it_asks_for_is_left(
    run: dict[str, Any], finished: bool, tmp_path: Path
) -> None:
    assert (find(make(tmp_path / "run", **run)).finished() is not None) == finished


@pytest.mark.parametrize("name", ["summary.json", "student.safetensors"])
def test_a_run_without_one_of_its_results_is_not_finished(name: str, tmp_path: Path) -> None:
    (make(tmp_path / "run") / name).unlink()
    assert find(tmp_path / "run").finished() is None


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ({}, "--trainer.max_epochs 6"),
        ({"max_epochs": -1, "max_steps": 60}, "--trainer.max_steps 120"),
        ({"max_steps": 60}, "--trainer.max_epochs 6 --trainer.max_steps 120"),
        ({"max_epochs": 10}, "--trainer.max_epochs 20"),  # a callback stopped it
        ({"max_epochs": -1, "max_time": "00:01:00:00"}, "--trainer.max_time DD:HH:MM:SS"),
    ],
)
def test_a_finished_run_names_the_limits_that_ended_it(asked: dict[str, Any], more: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "my run", asked)
    resumption = find(folder)
    resumption.limits = ASKED | asked
    told = resumption.finished()
    assert told is not None
    assert told.endswith(f"to train longer give e.g. python -m lqkd resume '{folder}' {more}")


def test_a_damaged_last_checkpoint_is_one_sentence_that_names_another_start(tmp_path: Path) -> None:
    last = make(tmp_path / "run") / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"is not a checkpoint that can be read.*start a new run from another.*best"):
        find(tmp_path / "run")
