"""The task of a module, from its settings, and what goes with it."""

from __future__ import annotations

from lqkd.errors import UsageError
from lqkd.modules.terms import Term
from lqkd.regularizers import HeldOutInterpolation
from lqkd.tasks import Classification, Task
from lqkd.teachers import FrozenTeacher, TeacherEnsemble


def task_of(task: Task | None, label_smoothing: float) -> Task:
    """``task``, or the classification of images with ``label_smoothing``, the short form of its setting.

    Raises:
        UsageError: when both are given, or the smoothing is out of range.
    """
    if task is None:
        return Classification(label_smoothing)
    if label_smoothing:
        raise UsageError(
            f"label_smoothing={label_smoothing!r} is not possible beside a task: it is a setting of Classification, "
            "in task.init_args"
        )
    return task


def check_teacher(task: Task, teacher: FrozenTeacher | TeacherEnsemble | None) -> None:
    """Refuse a smallest value of the metric where the least is the best.

    Raises:
        UsageError: then.
    """
    if teacher is not None and teacher.minimum_accuracy is not None and task.mode == "min":
        raise UsageError(
            f"teacher.minimum_accuracy={teacher.minimum_accuracy} is not possible: the least {task.monitor} is the "
            f"best of task {type(task).__name__}"
        )


def check_term(task: Task, term: Term) -> None:
    """Refuse several teachers, a loss or a regularizer that need more of a task than this one has.

    Raises:
        UsageError: naming what does not go together.
    """
    name, loss, regularizer = type(task).__name__, term.loss, term.regularizer
    if len(term.teachers) > 1 and not task.predicts_classes:
        raise UsageError(f"several teachers cannot be combined for task {name}, whose rows are no classes: give one")
    if term.trusted and not task.predicts_classes:
        raise UsageError(f"combination={term.combination!r} needs labels, which task {name} has not: leave it out")
    if isinstance(regularizer, HeldOutInterpolation) and not task.one_row_a_sample:
        raise UsageError(
            f"regularizer HeldOutInterpolation asks the student about single held-out rows, of which task {name} has "
            "several a sample: leave it out"
        )
    if loss.needs_labels and not task.predicts_classes:
        raise UsageError(f"distillation_loss {type(loss).__name__} needs labels, which task {name} has not")
    if loss.compares_predictions and not (task.predicts_classes or task.softmax_rows):
        of_logits = "LogitResidual, or BinaryKL where each logit is a class that is there or not"
        raise UsageError(
            f"distillation_loss {type(loss).__name__} compares the softmax of logits, which is no prediction of task "
            f"{name}: take {of_logits if loss.compares == 'logits' else 'Hints'}"
        )
    if regularizer is None or task.one_row_a_sample:
        return
    if regularizer.player.needs_alignment:
        raise UsageError(
            f"player {type(regularizer.player).__name__} of regularizer {type(regularizer).__name__} looks ahead from "
            f"samples: task {name} has other rows"
        )
    if regularizer.sees_logits and loss.compares != "logits":
        if not task.several_rows_a_sample:
            raise UsageError(
                f"regularizer {type(regularizer).__name__} looks at the logits of samples beside their features: task "
                f"{name} has other rows"
            )
        if not regularizer.sees_several_rows:
            raise UsageError(
                f"regularizer {type(regularizer).__name__} looks at one row of logits a sample beside its features, "
                f"and task {name} has many: take SampleWeight"
            )
