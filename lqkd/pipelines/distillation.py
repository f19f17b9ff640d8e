"""A low-bit student from two networks and loaders."""

from __future__ import annotations

import copy
import signal
import threading
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

from lqkd.balances import FixedBalance
from lqkd.data.reading import collation_problem
from lqkd.errors import UsageError, first_line
from lqkd.losses import BinaryKL, HintonKL, LogitResidual
from lqkd.modules import DistillModule
from lqkd.pipelines.checks import TRAINED, check_data, check_end, check_networks, check_numbers, check_processes
from lqkd.pipelines.distilled import Distilled
from lqkd.pipelines.loaders import Loaders, first_to_train_on, has
from lqkd.pipelines.task import guess_task
from lqkd.pipelines.trainer import check_trainer, trainer_for
from lqkd.quantization import Recipe
from lqkd.quantization.computed import copy_of
from lqkd.runs import RunSummary
from lqkd.runs.folder import CONFIG, PYTHON, RunSettings, claim, forget_claimed, release
from lqkd.runs.outcome import print_outcome
from lqkd.runs.quiet import quiet
from lqkd.runs.summary import best_checkpoint
from lqkd.tasks import BoxDetection, Classification, Task
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.utils.files import write_text


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
    for :class:`~lqkd.tasks.MultiLabel`, and 1 : 50 for :class:`~lqkd.tasks.Detection`; squared residuals for another
    task without classes), by SGD, with fresh batch norm statistics for whatever is validated and saved:
    ``docs/from_python.md`` says on what evidence, and when not.

    Args:
        student: the network in floating point, trained.
        teacher: a network, a :class:`FrozenTeacher` or a :class:`TeacherEnsemble`; None for the student's own float
            network.
        train: batches to train on: a DataLoader or another iterable that can be read again; or a LightningDataModule,
            which then has all splits.
        val: likewise for validation; None for none, and then the last epoch is kept.
        test: likewise, to report and never to choose by; None for none.
        bits: such as ``w8a8``, ``w4a4``, ``w2a2``, ``w4a32``, ``w1a1``, ``ternary``, ``q4_0``, of all layers but the
            first and the last, which keep 8; or a :class:`Recipe`.
        task: what the networks are trained for; None to tell it from the first batch, see :func:`guess_task`.
        epochs: passes over the training data.
        folder: where the run is kept, new or empty; None for ``runs/distill/version_N``.
        seed: of all random numbers, which are the whole process's; of a shuffling DataLoader too, but for one with a
            generator of its own.
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
    check_networks(student, teacher, settings)
    check_data(train, val, test)
    check_numbers(epochs, seed)
    check_trainer(trainer or {})
    if task is not None and not isinstance(task, Task):
        raise UsageError(f"task is {task!r}: an object such as lqkd.tasks.Classification() is needed")
    seed_everything(seed, verbose=False)
    data = train if isinstance(train, LightningDataModule) else Loaders(train, val, test)
    guessed = task is None
    task = guess_task(first_to_train_on(data), student) if task is None else task
    module = _module(student, teacher, bits, task, guessed, settings)
    check_end(data, module, trainer or {})
    said = _said(module, {"max_epochs": epochs, **(trainer or {})})
    place, new = _place(folder, {"seed_everything": seed, PYTHON: said})
    try:
        with quiet(), _plainly():
            made = trainer_for(place, task, guessed, has(data, "val"), epochs, trainer or {})
            check_processes(made, data)
            made.fit(module, datamodule=data)
            if has(data, "test"):
                best = best_checkpoint(made)
                path = (best.best_model_path or None) if best is not None else None
                made.test(module, datamodule=data, ckpt_path=path, verbose=False)
    except BaseException:
        if _is_first():
            release(place)
            if not new and not place.exists():
                place.mkdir()
        raise
    finally:
        if _is_first():
            forget_claimed()
    for callback in made.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunSummary):
            callback.finish(made)
    place = Path(made.strategy.broadcast(str(place)))  # of a script's second call only the first process knows it
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
        "trainer": {key: value for key, value in trainer.items() if type(value) in (int, float, str, bool)},
    }


def _module(
    student: nn.Module,
    teacher: nn.Module | None,
    bits: str | Recipe,
    task: Task,
    guessed: bool,
    settings: Mapping[str, Any],
) -> DistillModule:
    given = {key: copy.deepcopy(value) if key in TRAINED else value for key, value in settings.items()}
    smoothing = given.pop("label_smoothing", None)
    if smoothing:
        if not guessed or type(task) is not Classification:  # whose other settings would be lost
            raise UsageError(f"label_smoothing={smoothing!r} is a setting of task {type(task).__name__}: give it there")
        task = Classification(label_smoothing=smoothing)
    if given.get("teachers") is None:
        given["teacher"] = _frozen(student if teacher is None else teacher)
    else:
        given["teachers"] = {name: _frozen(one) for name, one in given["teachers"].items()}
    if given.get("distillation") is None and given.get("distillation_loss") is None:
        one_class, each_class = task.predicts_classes or task.softmax_rows, task.independent_logits
        given["distillation_loss"] = HintonKL() if one_class else BinaryKL() if each_class else LogitResidual()
        if given.get("balance") is None:
            weights = (1.0, 50.0) if isinstance(task, BoxDetection) else (0.5, 0.5)  # most positions show nothing
            given["balance"] = FixedBalance(task=weights[0], distill=weights[1])
    recipe = bits if isinstance(bits, Recipe) else Recipe(bits=bits)
    return DistillModule(student=copy_of(student), quantization=recipe, task=copy.deepcopy(task), **given)


def _frozen(network: nn.Module) -> FrozenTeacher | TeacherEnsemble:
    return network if isinstance(network, (FrozenTeacher, TeacherEnsemble)) else FrozenTeacher(copy_of(network))


def _is_first() -> bool:
    """Whether this is the first process of the training."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _place(folder: str | Path | None, said: Mapping[str, Any]) -> tuple[Path, bool]:
    """The run's folder, with what can be said of the run in it, and whether it is new."""
    text = "# Made by lqkd.distill from Python, out of networks and data that no configuration names.\n"
    text += yaml.safe_dump(dict(said), sort_keys=False)
    if folder is None:
        return claim(RunSettings(name="distill"), text).resolve(), True
    if not isinstance(folder, str | Path) or not str(folder).isprintable():
        raise UsageError(f"folder={folder!r} is not possible: a path is needed")
    place = Path(folder).expanduser().resolve()
    new = not place.exists()
    if _is_first():
        try:
            if not new and (not place.is_dir() or any(place.iterdir())):
                raise UsageError(f"folder={str(folder)!r} is not empty: give another, or none for a new one in runs/")
            write_text(place / CONFIG, text)
        except OSError as error:
            raise UsageError(f"folder={str(folder)!r} cannot be written ({error.strerror}): give another") from error
    return place, new


@contextmanager
def _plainly() -> Iterator[None]:
    """What Lightning and torch raise inside the block for a user's mistake is told in one sentence.

    After Ctrl-C before the first step Lightning would leave the signal ignored for good.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
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
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
