"""A low-bit student from two networks and loaders."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lqkd.balances import FixedBalance
from lqkd.data.reading import collation_problem
from lqkd.errors import UsageError, first_line
from lqkd.losses import BinaryKL, HintonKL, LogitResidual
from lqkd.modules import DistillModule
from lqkd.pipelines.distilled import Distilled
from lqkd.pipelines.loaders import Loaders, first_to_train_on, has
from lqkd.pipelines.task import guess_task
from lqkd.pipelines.trainer import check_trainer, trainer_for
from lqkd.quantization import Recipe, quantizers
from lqkd.quantization.computed import copy_of
from lqkd.runs import RunSummary
from lqkd.runs.folder import CONFIG, PYTHON, RunSettings, check_seed, claim, forget_claimed, release
from lqkd.runs.outcome import print_outcome
from lqkd.runs.quiet import quiet
from lqkd.runs.summary import best_checkpoint
from lqkd.tasks import MultiLabel, Task
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.utils.files import write_text
from lqkd.utils.suggest import nearest

_OWN = ("self", "teacher", "student", "student_weights", "quantization", "task", "replace_head")
"""Arguments of the module that the call has under other names, or has no use for."""


def distill(
    student: nn.Module,
    teacher: nn.Module | None = None,
    train: Any = None,
    val: Any = None,
    *,
    test: Any = None,
    bits: str | Recipe = "w4a4",
    task: Task | None = None,
    epochs: int = 10,
    folder: str | Path | None = None,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Distilled:
    """Quantise a trained network and train it, beside its labels, on what a teacher says.

    The student starts from the weights that it has; what it becomes is the best checkpoint on the validation split.
    Neither network is changed. Every choice that was made is printed.

    By default it learns from the labels and by Hinton's KL divergence from the teacher's logits, 0.5 : 0.5 (binary KL
    for :class:`~lqkd.tasks.MultiLabel`, squared residuals for a task without classes), by SGD, with fresh batch norm
    statistics for whatever is validated and saved: ``docs/choosing.md`` says on what evidence.

    Args:
        student: the network in floating point, trained.
        teacher: a network, a :class:`FrozenTeacher` or a :class:`TeacherEnsemble`; None for the student's own float
            network.
        train: batches to train on: a DataLoader or another iterable that can be read again; or a LightningDataModule,
            which then has all splits.
        val: likewise for validation; None for none, and then the last epoch is kept.
        test: likewise, to report and never to choose by; None for none.
        bits: such as ``w8a8``, ``w4a4``, ``w2a2``, ``w4a32``, ``w1a1``, ``ternary``, of all layers but the first and
            the last, which keep 8; or a :class:`Recipe`.
        task: what the networks are trained for; None to tell it from the first batch, see :func:`guess_task`.
        epochs: passes over the training data.
        folder: where the run is kept, new or empty; None for ``runs/distill/version_N``.
        seed: of all random numbers, of a shuffling DataLoader too.
        trainer: settings for Lightning's Trainer, such as ``{"devices": 2, "strategy": "ddp", "max_steps": 1000}``;
            its callbacks and loggers come beside those of a run.
        settings: what :class:`DistillModule` takes besides, as ``distillation_loss``, ``taps``, ``regularizer``,
            ``balance``, ``student_optimizer`` (``lambda p: torch.optim.AdamW(p, lr=1e-4)``), or ``teachers`` and
            ``distillation`` in place of ``teacher``.

    Returns:
        The student, what was measured, and how to take it away.

    Raises:
        UsageError: when a setting is not possible, or networks, data and task do not fit: before the first step.
        DivergenceError: when a loss or weight is no longer finite.
        KeyboardInterrupt: after Ctrl-C.

    Examples:
        >>> import lqkd
        >>> batches = [(torch.randn(16, 3, 8, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
        >>> student = lqkd.distill(network, train=batches, bits="w4a4", epochs=1)  # doctest: +SKIP
        >>> student.export("student.onnx")  # doctest: +SKIP
    """
    _check_networks(student, teacher, settings)
    _check_data(train, val, test)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise UsageError(f"epochs={epochs!r} is not possible: it must be a whole number of at least 1")
    check_trainer(trainer or {})
    check_seed("seed", seed)
    seed_everything(seed, verbose=False)
    data = train if isinstance(train, LightningDataModule) else Loaders(train, val, test)
    guessed = task is None
    task = guess_task(first_to_train_on(data), student) if task is None else task
    module = _module(student, teacher, bits, task, settings)
    said = _said(module, {"max_epochs": epochs, **(trainer or {})})
    place = _place(folder, {"seed_everything": seed, PYTHON: said})
    try:
        with quiet(), _plainly():
            made = trainer_for(place, task, guessed, has(data, "val"), epochs, trainer or {})
            made.fit(module, datamodule=data)
            if has(data, "test"):
                best = best_checkpoint(made)
                path = (best.best_model_path or None) if best is not None else None
                made.test(module, datamodule=data, ckpt_path=path, verbose=False)
    except UsageError:
        if _is_first():
            release(place)
        raise
    finally:
        if _is_first():
            forget_claimed()
    for callback in made.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunSummary):
            callback.finish(made)
    made.strategy.barrier()
    print_outcome(place)
    return Distilled.of(module, made, place)


def _said(module: DistillModule, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen, as far as words and numbers can tell it."""
    return {
        "task": type(module.task).__name__,
        "student": type(module.student).__name__,
        "teachers": {name: type(one.network).__name__ for name, one in module.named_teachers.items()},
        "quantization": asdict(module.quantization),
        "distillation": {name: type(term.losses[0]).__name__ for name, term in module.distillation.terms()},
        "balance": type(module.balance).__name__,
        "trainer": {key: value for key, value in trainer.items() if isinstance(value, int | float | str | bool)},
    }


def _check_networks(student: Any, teacher: Any, settings: Mapping[str, Any]) -> None:
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module) and not (network is None and name == "teacher"):
            raise UsageError(f"{name} is a {type(network).__name__}: a torch.nn.Module is needed")
    if quantizers(student):
        raise UsageError("the student is quantised already: give the network in floating point, and bits")
    known = [name for name in inspect.signature(DistillModule.__init__).parameters if name not in _OWN]
    for name in settings:
        if name not in known:
            raise UsageError(f"{name} is no setting of lqkd.distill or DistillModule{nearest(name, known)}")
    if teacher is not None and settings.get("teachers") is not None:
        raise UsageError("teacher is not possible beside teachers: name all of them there")


def _check_data(train: Any, val: Any, test: Any) -> None:
    if train is None:
        raise UsageError("there is nothing to train on: give train, a DataLoader of batches or a LightningDataModule")
    if isinstance(train, LightningDataModule):
        if val is not None or test is not None:
            raise UsageError("val and test are not possible beside a LightningDataModule, which has all splits")
        return
    for name, split in (("train", train), ("val", val), ("test", test)):
        if split is None:
            continue
        if not hasattr(split, "__iter__"):
            raise UsageError(f"{name} is a {type(split).__name__}: a DataLoader or another iterable is needed")
        if hasattr(split, "__next__"):
            raise UsageError(f"{name} is an iterator, which can be read once: give a DataLoader or a list of batches")
        if isinstance(split, (list, tuple)) and any(isinstance(one, DataLoader) for one in split):
            raise UsageError(f"{name} is a {type(split).__name__} of DataLoaders: give one")


def _module(
    student: nn.Module, teacher: nn.Module | None, bits: str | Recipe, task: Task, settings: Mapping[str, Any]
) -> DistillModule:
    given = dict(settings)
    if given.get("teachers") is None:
        if not isinstance(teacher, (FrozenTeacher, TeacherEnsemble)):
            teacher = FrozenTeacher(copy_of(student if teacher is None else teacher))
        given["teacher"] = teacher
    if given.get("distillation") is None and given.get("distillation_loss") is None:
        loss = HintonKL() if task.predicts_classes else BinaryKL() if isinstance(task, MultiLabel) else LogitResidual()
        given["distillation_loss"] = loss
        if given.get("balance") is None:
            given["balance"] = FixedBalance(task=0.5, distill=0.5)
    recipe = bits if isinstance(bits, Recipe) else Recipe(bits=bits)
    return DistillModule(student=copy_of(student), quantization=recipe, task=task, **given)


def _is_first() -> bool:
    """Whether this is the first process of the training."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _place(folder: str | Path | None, said: Mapping[str, Any]) -> Path:
    """The run's folder, with what can be said of the run in it."""
    text = "# Made by lqkd.distill from Python, out of networks and data that no configuration names.\n"
    text += yaml.safe_dump(dict(said), sort_keys=False)
    if folder is None:
        return claim(RunSettings(name="distill"), text)
    place = Path(folder)
    if _is_first():
        try:
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                raise UsageError(f"folder={str(folder)!r} is not empty: give another, or none for a new one in runs/")
            write_text(place / CONFIG, text)
        except OSError as error:
            raise UsageError(f"folder={str(folder)!r} cannot be written ({error.strerror}): give another") from error
    return place


@contextmanager
def _plainly() -> Iterator[None]:
    """What Lightning and torch raise inside the block for a user's mistake is told in one sentence."""
    try:
        yield
    except MisconfigurationException as error:
        raise UsageError(f"Lightning refuses these settings: {first_line(error)}") from error
    except (RuntimeError, TypeError, LookupError) as error:
        problem = collation_problem(error)
        if problem is None:
            raise
        raise UsageError(f"a DataLoader cannot make a batch: {problem}") from error
    except SystemExit as stop:  # Lightning's answer to Ctrl-C, which would end a notebook's cell without a word
        raise (stop.__context__ if isinstance(stop.__context__, KeyboardInterrupt) else stop) from None
