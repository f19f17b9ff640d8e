"""The mean average precision of boxes, as numbers that are logged one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lqkd.errors import UsageError
from lqkd.tasks.scenes import Objects

NUMBERS = {
    "map": "map",
    "map_50": "map_50",
    "map_75": "map_75",
    "map_small": "map_small",
    "map_medium": "map_medium",
    "map_large": "map_large",
}
"""Name under which it is logged to that of torchmetrics; those of classes are added."""


class FoundObjects(Metric):
    """COCO's mean average precision of all images so far, by torchmetrics and faster-coco-eval.

    Images are numbered so that the result is that of one process, however processes have shared them: image j of
    process r out of W is the number ``j * W + r``, as the loaders of data modules share evaluation out.

    Args:
        classes: their number.
    """

    images: list[Tensor]
    found: list[Tensor]
    true: list[Tensor]
    full_state_update = False

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        for name in ("images", "found", "true"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, found: Sequence[Mapping[str, Tensor]], true: Sequence[Objects]) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size())
            if distributed and self.distributed_available_fn()  # type: ignore[misc]
            else (0, 1)
        )
        first = sum(map(len, self.images))
        numbers = [(first + place) * world + rank for place in range(len(true))]
        device = true[0].boxes.device
        self.images.append(torch.tensor(numbers, dtype=torch.float64, device=device))
        answers = [[one["labels"], one["scores"], *one["boxes"].unbind(1)] for one in found]
        truths = [[one.labels, *one.boxes.unbind(1)] for one in true]
        self.found.append(torch.cat([_table(n, columns) for n, columns in zip(numbers, answers, strict=True)]))
        self.true.append(torch.cat([_table(n, columns) for n, columns in zip(numbers, truths, strict=True)]))

    def compute(self) -> dict[str, Tensor]:
        """Every number by its name; NaN where nothing is to be measured: no object of that size, or no image."""
        names = [*NUMBERS, *(f"class_{label}" for label in range(self.classes))]
        if len(self.images) == 0:  # a tensor once processes have been joined
            return dict.fromkeys(names, torch.tensor(torch.nan))
        metric = mean_average_precision()
        metric.distributed_available_fn = lambda: False  # all is here already
        images, found, true = (dim_zero_cat(state).cpu() for state in (self.images, self.found, self.true))
        for number in images.sort().values:
            of_found, of_true = found[found[:, 0] == number], true[true[:, 0] == number]
            metric.update(
                [{"labels": of_found[:, 1].long(), "scores": of_found[:, 2].float(), "boxes": of_found[:, 3:].float()}],
                [{"labels": of_true[:, 1].long(), "boxes": of_true[:, 2:].float()}],
            )
        measured = metric.compute()
        by_class = dict(zip(measured["classes"].flatten().tolist(), measured["map_per_class"].flatten(), strict=True))
        missing = torch.tensor(-1.0)
        values = [measured[of_library] for of_library in NUMBERS.values()]
        values += [by_class.get(label, missing) for label in range(self.classes)]
        return {name: torch.where(of < 0, torch.nan, of.float()) for name, of in zip(names, values, strict=True)}


class OneNumber(Metric):
    """One of the numbers of a :class:`FoundObjects` that several of these share.

    Args:
        source: what measures.
        number: name of its number.
        leads: whether an update of this one is one of the source.
    """

    full_state_update = False

    def __init__(self, source: FoundObjects, number: str, leads: bool) -> None:
        super().__init__()
        self.source, self.number, self.leads = source, number, leads

    def update(self, found: Any, true: Any) -> None:
        self.source.distributed_available_fn = self.distributed_available_fn
        if self.leads:
            self.source.update(found, true)

    def compute(self) -> Tensor:
        return self.source.compute()[self.number]

    def reset(self) -> None:
        super().reset()
        self.source.reset()


def box_metrics(names: Sequence[str]) -> MetricCollection:
    """Every number of boxes: ``map``, at overlaps of 50 and 75 %, by COCO's sizes, and ``map_of_NAME`` of each class.

    Args:
        names: of the classes.
    """
    source = FoundObjects(len(names))
    numbers = {name: name for name in NUMBERS}
    numbers |= {logged_as(name): f"class_{label}" for label, name in enumerate(names)}
    metrics = {name: OneNumber(source, number, name == "map") for name, number in numbers.items()}
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]


def logged_as(name: str) -> str:
    """What the number of a class is called; a name with a dot would be that of a part of a collection."""
    return f"map_of_{name.replace('.', '_')}"


def mean_average_precision() -> Any:
    """COCO's metric of torchmetrics.

    Raises:
        UsageError: when the package that computes it is not installed.
    """
    from torchmetrics.detection import MeanAveragePrecision

    try:
        return MeanAveragePrecision(
            # COCO's own; the library's defaults are the nearest of float32, which miss a recall of exactly 0.3, say.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            backend="faster_coco_eval",
            class_metrics=True,
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            'detection needs faster-coco-eval, which measures it: pip install "lqkd[detection]"'
        ) from error


def _table(number: int, columns: Sequence[Tensor]) -> Tensor:
    """(N, 1 + columns) float64, of which the first is the image's number."""
    rows = torch.stack([column.double() for column in columns], dim=1)
    return torch.cat([torch.full_like(rows[:, :1], number), rows], dim=1)
