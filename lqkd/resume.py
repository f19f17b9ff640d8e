"""``python -m lqkd resume RUN``: a run that was stopped or killed goes on in its own folder."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lqkd.arguments import check_resumable
from lqkd.callbacks.resume_state import KEY
from lqkd.errors import UsageError, first_line
from lqkd.files import write_json
from lqkd.run_folder import CHECKPOINTS, CONFIG, LAST, SUMMARY

STARTS = "starts.json"


@dataclass
class Resumption:
    """What a run goes on from.

    Attributes:
        folder: its folder.
        state: what :mod:`lqkd.callbacks.resume_state` has put into its last checkpoint; None when there is none.
    """

    folder: Path
    state: dict[str, Any] | None

    @property
    def checkpoint(self) -> Path | None:
        return None if self.state is None else self.folder / CHECKPOINTS / LAST

    @property
    def rows(self) -> int:
        """Rows of the table of metrics to keep."""
        return 0 if self.state is None else int(self.state["rows"])

    def __str__(self) -> str:
        if self.state is None:
            return f"{self.folder} starts anew: it was stopped before its first checkpoint"
        return (
            f"resuming {self.folder} at epoch {self.state['epoch']}, batch {self.state['batches']}, "
            f"step {self.state['steps']}"
        )


def find(folder: Path) -> Resumption:
    """Read what the run in ``folder`` goes on from.

    Raises:
        UsageError: when it is no run folder, or its last checkpoint cannot be read or was saved without what exact
            resuming needs.
    """
    check_resumable(folder)
    path = folder / CHECKPOINTS / LAST
    if not path.is_file():
        return Resumption(folder, None)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True).get(KEY)
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(path)!r} is not a checkpoint that can be read ({first_line(error)})") from error
    if state is None:
        raise UsageError(f"{str(path)!r} cannot be resumed exactly: start a new run from it with fit --ckpt_path")
    return Resumption(folder, state)


def resumed(folder: Path, settings: Sequence[str]) -> tuple[Resumption, list[str]]:
    """What the run in ``folder`` goes on from, and the arguments for ``fit`` that do so; none when it is finished."""
    resumption = find(folder)
    if not settings and _is_finished(resumption):
        return resumption, []
    return resumption, ["fit", "--config", str(resumption.folder / CONFIG), *settings]


def check_place(folder: Path, run: Any) -> None:
    """Check that the settings ``run`` leave the run in ``folder`` where it is.

    Raises:
        UsageError: when its root, name or version is not the one that it was started with.
    """
    before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["run"]
    for key in ("root", "name", "version"):
        if run[key] != before[key]:
            raise UsageError(f"run.{key}={run[key]!r} is not possible with resume: the run goes on in its own folder")


def _is_finished(resumption: Resumption) -> bool:
    """Whether training and the test after it have ended."""
    summary = resumption.folder / SUMMARY
    if resumption.state is None or not resumption.state["finished"] or not summary.is_file():
        return False
    return json.loads(summary.read_text(encoding="utf-8"))["test_accuracy"] is not None


@rank_zero_only
def record_start(folder: Path, resumption: Resumption | None, config_text: str, loggers: Sequence[Any]) -> None:
    """Add to ``starts.json`` when and from what a process began, and which settings it changed.

    The first process gives a logger of W&B its id, with which later ones go on.
    """
    path = folder / STARTS
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    start: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "checkpoint": None}
    if resumption is not None:
        before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        start["changed"] = [line for _, line in differences(before, yaml.safe_load(config_text), "")]
        if resumption.state is not None:
            start["checkpoint"] = f"{CHECKPOINTS}/{LAST}"
            start |= {key: resumption.state[key] for key in ("epoch", "batches", "steps")}
    ids = [entry["wandb_id"] for entry in starts if "wandb_id" in entry]
    for logger in loggers:
        options = getattr(logger, "_wandb_init", None)
        if isinstance(options, dict):
            if options.get("id") is None:
                options["id"] = logger._id = ids[0] if ids else uuid.uuid4().hex[:8]
            start["wandb_id"] = options["id"]
        elif resumption is not None and resumption.state is not None and hasattr(logger, "_kwargs"):
            logger._kwargs["purge_step"] = resumption.state["logged"]  # TensorBoard hides what is about to come again
    write_json(path, [*starts, start])


def differences(saved: Any, current: Any, prefix: str = "model") -> Iterator[tuple[str, str]]:
    """Name of every setting that differs, and a line that says how."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            yield from differences(saved.get(key), current.get(key), f"{prefix}.{key}" if prefix else key)
    elif saved != current:
        yield prefix, f"{prefix} was {saved!r} and is now {current!r}"
