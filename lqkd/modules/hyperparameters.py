"""Hyper-parameters that a checkpoint can hold as plain values."""

from __future__ import annotations

import inspect

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters


def save_plain_hyperparameters(module: LightningModule) -> None:
    """Call ``module.save_hyperparameters()`` from its ``__init__`` without pickling a network.

    The command line hands over plain ``class_path`` / ``init_args`` dicts, from which ``load_from_checkpoint``
    rebuilds everything. Built in Python, the arguments are live objects: modules and callables are left out, so that
    the checkpoint loads with ``weights_only=True`` and holds no teacher; ``load_from_checkpoint`` then needs them
    as arguments.
    """
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    assert caller is not None
    ignore: list[str] = []
    if _given_hyperparameters.get() is None:
        ignore = [name for name, value in caller.f_locals.items() if not _plain(value)]
    module.save_hyperparameters(ignore=ignore, frame=caller)


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(item) for item in value.values())
    return isinstance(value, int | float | str | bool | type(None))
