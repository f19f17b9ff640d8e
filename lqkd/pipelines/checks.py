"""What a call from Python may be given, checked before anything is made of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.utils.data import DataLoader

from lqkd.balances import Balance
from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss
from lqkd.modules import Constant, DistillModule
from lqkd.pipelines.loaders import Loaders
from lqkd.quantization import quantizers
from lqkd.regularizers import Regularizer
from lqkd.runs.folder import check_seed
from lqkd.utils.suggest import nearest

_OWN = ("self", "teacher", "student", "student_weights", "quantization", "task", "replace_head")
"""Arguments of the module that the call has under other names, or has no use for."""
_KINDS: dict[str, type] = {"balance": Balance, "distillation_loss": DistillationLoss, "regularizer": Regularizer}
TRAINED = (*_KINDS, "distillation")
"""Settings that a training changes, which the next call has to find as they were."""


def check_networks(student: Any, teacher: Any, settings: Mapping[str, Any]) -> None:
    """Refuse what is no network, a student that is quantised, and settings that do not exist or are of another kind.

    Raises:
        UsageError: then.
    """
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module) and not (network is None and name == "teacher"):
            raise UsageError(f"{name} is a {type(network).__name__}: a torch.nn.Module is needed")
    if quantizers(student):
        raise UsageError("the student is quantised already: give the network in floating point, and bits")
    known = [name for name in inspect.signature(DistillModule.__init__).parameters if name not in _OWN]
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"{name} is no setting of lqkd.distill or DistillModule{nearest(name, known)}")
        kind = _KINDS.get(name)
        if kind is not None and value is not None and not isinstance(value, kind):
            raise UsageError(f"{name}={value!r} is not possible: an object of lqkd.{kind.__module__.split('.')[1]}")
        if name.endswith("_optimizer") and not callable(value):
            raise UsageError(f"{name}={type(value).__name__} is not possible: a function of parameters is needed")
    if settings.get("teachers") is not None:
        if teacher is not None:
            raise UsageError("teacher is not possible beside teachers: name all of them there")
        if not all(isinstance(one, nn.Module) for one in settings["teachers"].values()):
            raise UsageError("teachers is not possible as it is: a torch.nn.Module for each name is needed")


def check_data(train: Any, val: Any, test: Any) -> None:
    """Refuse what cannot be read as often as a training needs.

    Raises:
        UsageError: then.
    """
    if train is None:
        raise UsageError("there is nothing to train on: give train, a DataLoader of batches or a LightningDataModule")
    if isinstance(train, LightningDataModule):
        if val is not None or test is not None:
            raise UsageError("val and test are not possible beside a LightningDataModule, which has all splits")
        return
    for name, split in (("train", train), ("val", val), ("test", test)):
        if split is None:
            continue
        if not hasattr(split, "__iter__") or isinstance(split, (str, Mapping)):
            raise UsageError(f"{name} is a {type(split).__name__}: a DataLoader or another iterable is needed")
        if hasattr(split, "__next__"):
            raise UsageError(f"{name} is an iterator, which can be read once: give a DataLoader or a list of batches")
        if isinstance(split, (list, tuple)) and any(isinstance(one, DataLoader) for one in split):
            raise UsageError(f"{name} is a {type(split).__name__} of DataLoaders: give one")


def check_numbers(epochs: Any, seed: Any) -> None:
    """Refuse what is no number of epochs, and no seed.

    Raises:
        UsageError: then.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise UsageError(f"epochs={epochs!r} is not possible: it must be a whole number of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed={seed!r} is not possible: it must be a whole number")
    check_seed("seed", seed)


def check_end(data: LightningDataModule, module: DistillModule, trainer: Mapping[str, Any]) -> None:
    """Refuse loaders without a length where a schedule has to know when the training ends.

    Raises:
        UsageError: then.
    """
    unknown = isinstance(data, Loaders) and sized_len(data.train_dataloader()) is None
    if unknown and (trainer.get("max_steps") or -1) < 0 and not isinstance(module.student_schedule, Constant):
        raise UsageError(
            "train has no length, so that nobody knows when the training ends: give trainer={'max_steps': N}, or "
            "student_schedule=lqkd.modules.Constant()"
        )


def check_processes(trainer: Trainer, data: LightningDataModule) -> None:
    """Refuse processes of which this one would not hear the end, and batches that nobody can deal out among them.

    Raises:
        UsageError: then.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UsageError(
            "several devices are not possible in a notebook, nor with a strategy that spawns or forks: what they learn "
            "does not come back; give trainer={'devices': 1}, or run a script with strategy 'ddp'"
        )
    if trainer.world_size > 1 and isinstance(data, Loaders) and not isinstance(data.train_dataloader(), DataLoader):
        raise UsageError(
            f"train is no DataLoader, and all {trainer.world_size} processes would train on the same batches: give one"
        )
