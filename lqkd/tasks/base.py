"""What a task is: all that a training has to know about what networks are trained for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.outputs import Asked, heads, main_tensor
from lqkd.regularizers.base import RowGroups
from lqkd.tasks.values import MODE, MONITOR, shown

TOLERANCE = 0.01
"""How far what two networks return may lie apart, by the root mean square, to count as the same answer."""

if TYPE_CHECKING:  # which takes a second to import, and a prediction does without
    from torchmetrics import MetricCollection

    from lqkd.quantization import Recipe
    from lqkd.tasks.metrics import SameAnswer


class Rows(NamedTuple):
    """What losses, regularizers and statistics see of a batch: samples, pixels or tokens, each a row."""

    logits: Tensor
    """(N, C) float, differentiable in the network."""
    labels: Tensor | None
    """(N,) int64 classes, negative where a row has none; None for a task without classes."""


class Task(nn.Module, ABC):
    """Everything that is true of one kind of task only, such as the classification of images.

    A batch is whatever the loaders yield, on the device. :meth:`inputs` says what networks are called with;
    :meth:`outputs` turns what they return into what :meth:`loss`, :meth:`rows` and :meth:`update` see. None of these
    may wait for the device: they run in every step.
    """

    monitor: str = MONITOR
    """The metric that chooses the best checkpoint: ``val/`` and a name of :meth:`metrics`."""
    mode: Literal["min", "max"] = MODE
    """Whether the least or the largest of it is the best."""
    one_row_a_sample: ClassVar[bool] = True
    """Whether row i is sample i, as a loss on features needs that looks at labels or logits as well."""
    several_rows_a_sample: ClassVar[bool] = False
    """Whether it can say of which sample each of many rows is: see :meth:`samples_of_rows`."""
    predicts_classes: ClassVar[bool] = False
    """Whether the softmax of a row is a prediction: only then several teachers can be combined."""
    softmax_rows: bool = False
    """Whether the softmax of a row is a prediction although no label says of which class, so that losses on the softmax
    compare rows; of tasks that predict classes it is in any case."""
    independent_logits: bool = False
    """Whether each logit of a row is a class that is there or not, of which a sigmoid is the probability."""
    class_axis: ClassVar[int] = 1
    """The axis of :meth:`outputs` (B, ...) that has a logit for each class; of a text it is the last."""
    confidences: ClassVar[bool] = False
    """Whether :meth:`predictions` are the confidence (B, C) of each class."""
    top1_agreement: ClassVar[bool] = False
    """Whether the validations of a training tell for how many rows student and teacher put the same class first."""
    answer: ClassVar[str] = "answer"
    """What :meth:`agreement` compares, in a word or two."""

    # ---- the path of a batch

    @abstractmethod
    def inputs(self, batch: Any) -> Any:
        """What the student is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or
        :class:`~lqkd.tasks.Inputs` with both."""

    def teacher_inputs(self, batch: Any, inputs: Any) -> Any:
        """What teachers are called with, where that is something else than the student's ``inputs``."""
        return inputs

    def outputs(self, returned: Any, asked: Asked) -> Any:
        """What losses see of what a network returns: its main tensor, in float32.

        Args:
            returned: what the network returned.
            asked: which network, for messages.

        Raises:
            UsageError: when it is nothing for this task.
        """
        return main_tensor(returned, asked).float()

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The task's own loss, 0-dim and differentiable in the outputs: a mean over this process's samples."""

    @abstractmethod
    def rows(self, outputs: Any, batch: Any) -> Rows:
        """The rows of a network's outputs; the same rows for teacher and student."""

    def samples_of_rows(self, rows: Rows, batch: Any) -> RowGroups | None:
        """Of which sample each row is, where there are :attr:`several_rows_a_sample`; None where row i is sample i."""
        return None

    def places(self, batch: Any) -> Tensor | None:
        """Which tokens of a batch's sequences features are compared at, (B, T) bool; None for all."""
        return None

    def positions(self, batch: Any) -> Tensor | None:
        """How many tokens are before each row of :meth:`rows`, (N,) int64, where rows are of sequences; or None."""
        return None

    def counted(self, rows: Rows, batch: Any) -> Tensor | int:
        """How many rows :meth:`loss` is a mean over, 0-dim."""
        return len(rows.logits) if rows.labels is None else (rows.labels >= 0).sum()

    def part(self, batch: Any, samples: slice) -> Any:
        """Some samples of a batch, as a batch for :meth:`loss`.

        Raises:
            UsageError: when batches of this task cannot be cut.
        """
        raise UsageError(f"player LookAhead(exact=True) cuts batches in halves, which task {_name(self)} cannot")

    def recipe(self, recipe: Recipe, network: nn.Module) -> Recipe:
        """How ``network``, still in floating point, is quantised, where ``recipe`` leaves it open; as it says here.

        Only a task knows which layers give its answers.
        """
        return recipe

    # ---- evaluation

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh metrics by the names under which they are logged, after ``val/`` and ``test/``."""

    def update(self, metrics: MetricCollection, outputs: Any, batch: Any) -> None:
        """Count a batch; by default ``metrics.update(logits, labels)`` of its rows."""
        metrics.update(*self.rows(outputs, batch))

    def predictions(self, outputs: Any, batch: Any) -> Any:
        """What ``predict`` gives."""
        return outputs

    def table(self, predictions: Any, batch: Any, names: Sequence[str]) -> list[dict[str, Any]] | None:
        """What a table of predictions says of each sample, by column; None where a sample's is a file beside the table.

        By default numbers (B,) and (B, K) are columns, with six digits, and everything else is a file.

        Args:
            predictions: what :meth:`predictions` gives.
            batch: what it was given for.
            names: of the classes; empty where the data tell none.
        """
        if not isinstance(predictions, Tensor) or predictions.ndim not in (1, 2):
            return None
        rows = predictions.reshape(len(predictions), -1).tolist()
        columns = ["output"] if predictions.ndim == 1 else [f"output_{number}" for number in range(len(rows[0]))]
        return [dict(zip(columns, map(_six_digits, row), strict=True)) for row in rows]

    def tally(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """What is worth saying of all rows of a table of predictions; nothing by default."""
        return ""

    def agreement(self, ours: Any, theirs: Any) -> Tensor:
        """To what share two networks, of which one is the export of the other, give the same answer to each sample.

        By default two answers are the same where no tensor of them differs by more than 1 % of the root mean square
        that it has over the batch in ``ours``, itself by the root mean square over the sample.

        Args:
            ours: what :meth:`outputs` gives of the network.
            theirs: likewise of the file.

        Returns:
            (B,) float, from 0 to 1.
        """
        pairs = zip(heads(ours, "").values(), heads(theirs, "").values(), strict=True)
        same = [_apart(a, b) <= TOLERANCE * a.float().square().mean().sqrt() for a, b in pairs]
        return torch.stack(same).all(dim=0).float()

    # ---- what a value of the metric means

    @property
    def metric(self) -> str:
        """The monitored metric's name in :meth:`metrics`."""
        return self.monitor.removeprefix("val/")

    def better(self, value: float, than: float) -> bool:
        """Whether one value of the metric is better than another; a NaN never is, nor is anything than it."""
        return value > than if self.mode == "max" else value < than

    def chance(self, data: Any) -> float:
        """What an untrained network may reach on the DataModule ``data`` (None for none); a teacher must beat it."""
        return -torch.inf if self.mode == "max" else torch.inf

    def constant(self) -> SameAnswer | None:
        """What always giving the same answer would reach, counted as :meth:`metrics` are; None for not known."""
        return None

    def shown(self, value: float) -> str:
        """A value of the metric for a message."""
        return shown(self.metric, value)

    def described(self, value: float) -> str:
        """What a network does that reaches this value on the validation split, as a predicate."""
        return f"reaches {self.monitor}={self.shown(value)}"

    # ---- before the first batch

    def example(self, data: Any, device: torch.device) -> Any:
        """A batch of one sample, all zeros, as the DataModule ``data`` (None for none) yields them; None for none."""
        return None

    def check(self, outputs: Mapping[str, Any], data: Any) -> None:
        """Refuse networks that do not fit the data or each other.

        Args:
            outputs: by name of the network, what it gives for :meth:`example`; nothing where there is none.
            data: the DataModule; None for none.

        Raises:
            UsageError: then.
        """

    def check_batch(self, outputs: Any, batch: Any) -> None:
        """Refuse a batch that does not fit the network; waits for the device.

        Raises:
            UsageError: then.
        """

    def unlabelled(self, batch: Any) -> bool:
        """Whether nothing of a batch has a label, so that it takes part in distillation alone."""
        return False


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """The root mean square (B,) of the difference of each sample."""
    return (a.float() - b.float()).flatten(1).square().mean(dim=1).sqrt()


def _six_digits(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _name(task: Task) -> str:
    return type(task).__name__


def example_input(data: Any, device: torch.device) -> Tensor | None:
    """One input of zeros as the DataModule ``data`` yields them; None when it tells no shape.

    Its shape is (1, *data.image_shape) and its dtype ``data.input_dtype``, float32 where there is no such attribute:
    tokens of a text are int64.
    """
    shape = getattr(data, "image_shape", None)
    return None if shape is None else torch.zeros(1, *shape, dtype=getattr(data, "input_dtype", None), device=device)
