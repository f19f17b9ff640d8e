"""``python -m lqkd resume RUN``: a run that was stopped or killed goes on in its own folder."""

from __future__ import annotations

import json
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lqkd.errors import UsageError
from lqkd.runs.checkpoint_io import read_checkpoint
from lqkd.runs.folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LAST,
    NETWORKS,
    STARTS,
    SUMMARY,
    check_resumable,
    has_ended,
    resume_command,
)
from lqkd.runs.resume_state import KEY, LIMITS
from lqkd.utils import renames
from lqkd.utils.files import write_json

_LIMITS = ("max_epochs", "max_steps", "max_time")
"""Settings of the trainer that say how much training is asked for."""


@dataclass
class Resumption:
    """What a run goes on from.

    Attributes:
        folder: its folder.
        state: what :mod:`lqkd.runs.resume_state` has put into its last checkpoint; None when there is none.
        limits: what :func:`limits` of the configuration were when that was saved; None when it does not tell.
    """

    folder: Path
    state: dict[str, Any] | None
    limits: dict[str, Any] | None = None

    @property
    def checkpoint(self) -> Path | None:
        return None if self.state is None else self.folder / CHECKPOINTS / LAST

    @property
    def rows(self) -> int:
        """Rows of the table of metrics to keep."""
        return 0 if self.state is None else int(self.state["rows"])

    def finished(self, trainer: Mapping[str, Any] | None = None) -> str | None:
        """A sentence when all is done: the training that a trainer's settings ask for, and the test after it.

        Args:
            trainer: the settings; None for those that the run has.
        """
        if self.state is None or not self.state["finished"] or not self._is_summarised(self.state["steps"]):
            return None
        if trainer is None:
            trainer = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))["trainer"]
        if self.limits not in (None, limits(trainer)):  # a training that was to go on longer has not come to its end
            return None
        more = _more(trainer, {"max_epochs": self.state["epoch"], "max_steps": self.state["steps"]})
        return f"{self.folder} is finished: to train longer give e.g. {resume_command(self.folder)} {more}"

    def _is_summarised(self, steps: int) -> bool:
        """Whether the summary is of the run after ``steps`` and complete, and the network beside it."""
        if not any((self.folder / name).is_file() for name in NETWORKS):
            return False
        try:
            summary = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged one is written anew
            return False
        return isinstance(summary, dict) and has_ended(summary) and summary.get("steps", steps) == steps

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
    new = f"python -m lqkd fit --config {shlex.quote(str(folder / CONFIG))} --run.version NEW --ckpt_path"
    try:
        checkpoint = read_checkpoint(path)
    except UsageError as error:
        raise UsageError(
            f"{error}: start a new run from another, e.g. {new} {shlex.quote(str(path.with_name(BEST)))}"
        ) from error
    state = checkpoint.get(KEY)
    if state is None:
        raise UsageError(
            f"{str(path)!r} cannot be resumed exactly: start a new run from it with {new} {shlex.quote(str(path))}"
        )
    return Resumption(folder, state, checkpoint.get(LIMITS))


def limits(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a trainer, those that say how much training is asked for."""
    return {key: trainer.get(key) for key in _LIMITS}


def _more(trainer: Mapping[str, Any], done: Mapping[str, int]) -> str:
    """Settings with which a training that has ended as those of ``trainer`` say would go on."""
    limit = {key: trainer.get(key) or 0 for key in done}
    reached = [key for key in done if 0 < limit[key] <= done[key]]
    if not reached and trainer.get("max_time") is not None:
        return "--trainer.max_time DD:HH:MM:SS"
    return " ".join(f"--trainer.{key} {2 * max(limit[key], done[key])}" for key in reached or ["max_epochs"])


def check_place(folder: Path, run: Any) -> None:
    """Check that the settings ``run`` leave the run in ``folder`` where it is.

    Raises:
        UsageError: when its root, name or version is not the one that it was started with.
    """
    before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["run"]
    for key in ("root", "name", "version"):
        if run[key] != before[key]:
            raise UsageError(f"run.{key}={run[key]!r} is not possible with resume: the run goes on in its own folder")


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
    """Name of every setting that differs, and a line that says how; an old name of a class is the class itself."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            yield from differences(saved.get(key), current.get(key), f"{prefix}.{key}" if prefix else key)
    elif renames.current(saved) != renames.current(current):
        yield prefix, f"{prefix} was {saved!r} and is now {current!r}"
