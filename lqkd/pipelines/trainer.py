"""The Trainer of a call from Python, with all that a run has."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as Bar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lqkd.callbacks import BatchNormReestimation, ProgressBar, RegularizerMonitor
from lqkd.callbacks.box_pictures import BoxPictures
from lqkd.errors import UsageError, first_line
from lqkd.modules.devices import check_devices
from lqkd.modules.trainer_checks import check_trainer_settings
from lqkd.runs import BestAndLast, RunLogger, RunSummary
from lqkd.runs.description import Description
from lqkd.runs.folder import CHECKPOINTS
from lqkd.runs.logger import LogEveryEpoch
from lqkd.tasks import BoxDetection, Task
from lqkd.utils.suggest import nearest

_TAKEN = {
    "max_epochs": "epochs",
    "default_root_dir": "folder",
    "enable_checkpointing": "nothing: the best checkpoint is what is returned",
    "fast_dev_run": "max_steps=1",
}
"""Settings of the Trainer that are not taken, and what to give in their place."""


def check_trainer(given: Mapping[str, Any]) -> None:
    """Refuse settings of the Trainer that a distillation cannot have.

    Raises:
        UsageError: naming the setting and what to do instead.
    """
    known = {name: one.default for name, one in inspect.signature(Trainer).parameters.items()}
    for name in given:
        if name not in known:
            raise UsageError(f"trainer[{name!r}] is no setting of Lightning's Trainer{nearest(name, known)}")
        if name in _TAKEN:
            raise UsageError(f"trainer[{name!r}] is not possible: give {_TAKEN[name]}")
    if given.get("max_steps") == 0:
        raise UsageError("trainer['max_steps']=0 is not possible: give at least 1, or -1 for no limit")
    callbacks = given.get("callbacks") or []
    for one in callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]:
        if not isinstance(one, Callback):
            raise UsageError(f"trainer['callbacks'] has a {type(one).__name__}: Lightning's Callbacks are needed")
    settings = SimpleNamespace(**known | dict(given))
    check_trainer_settings(settings)
    check_devices(settings)


def trainer_for(
    folder: Path, task: Task, guessed: bool, validates: bool, epochs: int, given: Mapping[str, Any]
) -> Trainer:
    """A Trainer that keeps a run, and has what the user adds.

    Args:
        folder: of the run.
        task: whose metric chooses the best checkpoint.
        guessed: whether the task was told from the first batch.
        validates: whether there are validation data.
        epochs: their number.
        given: settings of the Trainer, which win over those that it would get.

    Raises:
        UsageError: when the Trainer refuses them.
    """
    callbacks = given.get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, Callback) else [*callbacks]
    ours: list[Callback] = [RegularizerMonitor(), BatchNormReestimation(), RunSummary(), Description(guessed)]
    if isinstance(task, BoxDetection):
        ours.append(BoxPictures())
    if given.get("enable_progress_bar") is not False and not any(isinstance(one, Bar) for one in callbacks):
        ours.append(ProgressBar())
    if given.get("log_every_n_steps") is None:
        ours.append(LogEveryEpoch())
        warnings.filterwarnings("ignore", message=r".*is smaller than the logging interval")
    validates = validates and given.get("limit_val_batches") != 0
    ours.append(BestAndLast(folder / CHECKPOINTS, validates, None, task.monitor, task.mode))
    callbacks += [one for one in ours if not any(isinstance(other, type(one)) for other in callbacks)]
    loggers = given.get("logger")
    if isinstance(loggers, bool) or loggers is None:
        loggers = []
    elif isinstance(loggers, Logger):
        loggers = [loggers]
    settings = {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": epochs, **given}
    try:
        return Trainer(**{**settings, "callbacks": callbacks, "logger": [RunLogger(folder), *loggers]})
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from error
