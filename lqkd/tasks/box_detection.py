"""What all detections of boxes have in common, whatever networks say at a position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lqkd.errors import UsageError
from lqkd.models.outputs import Asked
from lqkd.models.torchvision_detector import whole_detector
from lqkd.quantization import LSQ, Recipe, Rule
from lqkd.quantization.graph import survey
from lqkd.quantization.quantizable import layer_kind, quantizable_layers
from lqkd.quantization.recipe import exactly, find_quantizer, resolve
from lqkd.regularizers.base import RowGroups
from lqkd.tasks.average_precision import box_metrics, logged_as, mean_average_precision
from lqkd.tasks.base import Rows, Task, example_input
from lqkd.tasks.scenes import Scenes, are_images, scenes_of

_SURE, _SAME_PLACE = 0.3, 0.7
"""The score of an object, and the overlap of two, from which on a file's must have a partner in the network's."""
ANY_SIZE = (2**20, 2**20)
"""Height and width of images to which no box is cut."""


class BoxDetection(Task, ABC):
    """Boxes and classes of the objects in images: batches, metrics, predictions and what is quantised.

    A subclass says what networks return, what they are to return, and which objects are in it.

    Args:
        classes: their names, or their number.
        strides: of the network's levels, in pixels, the finest first.
        multiple: of which heights and widths of images become multiples.
        min_score: the least score of an object that counts, in [0, 1).
        overlap: of two objects of a class, from which on one of them does not count, in (0, 1).
        most_objects: of an image that count; the metric looks at 100.

    Raises:
        UsageError: when an argument is not possible, or faster-coco-eval is not installed.
    """

    monitor = "val/map"
    one_row_a_sample = False
    several_rows_a_sample = True
    independent_logits = True
    answer = "set of objects"

    def __init__(
        self,
        classes: int | list[str],
        strides: Sequence[int],
        multiple: int,
        min_score: float,
        overlap: float,
        most_objects: int,
    ) -> None:
        super().__init__()
        self.names = _names(classes)
        self._check(
            ("min_score", min_score, lambda: 0 <= min_score < 1, "a number from 0 to 1, 1 excluded"),
            ("overlap", overlap, lambda: 0 < overlap < 1, "a number between 0 and 1, both excluded"),
            ("most_objects", most_objects, lambda: type(most_objects) is int and most_objects >= 1, "a whole number"),
        )
        mean_average_precision()  # or the training would end at its first validation
        self.classes, self.strides, self.multiple = len(self.names), tuple(strides), multiple
        self.min_score, self.overlap, self.most_objects = min_score, overlap, most_objects

    def _check(self, *settings: tuple[str, Any, Callable[[], bool], str]) -> None:
        """Refuse numbers that are not possible: name, value, whether it is, and what is needed."""
        for name, value, valid, needed in settings:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not valid():
                raise UsageError(f"{name}={value!r} of task {type(self).__name__} is not possible: {needed} is needed")

    @abstractmethod
    def decoded(self, outputs: Tensor, size: tuple[int, int] | None) -> list[dict[str, Tensor]]:
        """The objects of every image, the surest first: ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,) int64.

        Args:
            outputs: (B, P, ...), of :meth:`outputs`.
            size: height and width of the images, to which boxes are cut; None for boxes as they are.
        """

    @abstractmethod
    def check_positions(self, outputs: Tensor, images: Tensor) -> None:
        """Refuse answers (B, P, ...) for other positions than images (B, C, H, W) have."""

    # ---- the path of a batch

    def inputs(self, batch: Any) -> Tensor:
        """The images (B, C, H, W), padded to heights and widths that networks take."""
        return self.scenes(batch).images

    def counted(self, rows: Rows, batch: Any) -> Tensor | int:
        return len(self.scenes(batch).images)

    def samples_of_rows(self, rows: Rows, batch: Any) -> RowGroups:
        count = len(self.scenes(batch).images)
        images = torch.arange(count, device=rows.logits.device)
        return RowGroups(images.repeat_interleave(len(rows.logits) // count), count)

    def part(self, batch: Any, samples: slice) -> Any:
        if are_images(batch):
            return batch[samples]
        return tuple(None if of is None else of[samples] for of in batch[:2])

    # ---- what a recipe leaves open

    def recipe(self, recipe: Recipe, network: nn.Module) -> Recipe:
        """The last layers' bits for all that the network names as such, and a step for each level where ``lsq`` is."""
        whole = whole_detector(network)
        if whole is not None:
            raise UsageError(whole)
        bits, named = recipe.last_layer_bits, getattr(network, "last_layers", ())
        if bits is not None and named:
            rules = [Rule(name, weight_bits=bits, activation_bits=bits) for name in named]
            recipe = replace(recipe, rules=[*rules, *recipe.rules])
        layers = {name: layer_kind(layer) for name, layer in quantizable_layers(network).items()}
        calls = survey(network).calls
        settings = {name: of for name, of in resolve(recipe, layers).items() if calls.get(name, 1) > 1}
        levelled = [
            Rule(exactly(name), per_level=True)
            for name, of in settings.items()
            if of.per_level is None and find_quantizer(of.activation_quantizer)[0] is LSQ
        ]
        return replace(recipe, rules=[*recipe.rules, *levelled]) if levelled else recipe

    # ---- evaluation

    def metrics(self) -> MetricCollection:
        return box_metrics(self.names)

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: Any) -> None:
        scenes = self.scenes(batch)
        if scenes.objects is not None:
            metrics.update(self._found(outputs, scenes), scenes.objects)

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor:
        """The objects (B, most_objects, 6): box xyxy, score, and class; of score 0 where there are no more."""
        found = self._found(outputs, self.scenes(batch))
        objects = outputs.new_zeros(len(found), self.most_objects, 6)
        for place, one in enumerate(found):
            rows = torch.cat([one["boxes"], one["scores"].unsqueeze(1), one["labels"].unsqueeze(1)], dim=1)
            objects[place, : len(rows)] = rows
        return objects

    def table(self, predictions: Tensor, batch: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """The objects of each image, the surest first: class, score, and box xyxy in pixels."""
        names = names or self.names
        rows = []
        for of_image in predictions.tolist():
            there = [row for row in of_image if row[4] > 0]
            told = [
                f"{names[int(row[5])]} {row[4]:.3f} [{' '.join(f'{side:.1f}' for side in row[:4])}]" for row in there
            ]
            rows.append({"objects": len(there), "found": "; ".join(told)})
        return rows

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The share of the objects (B,) of a score of 0.3 or more in one of both that the other has in the same place.

        That is an object of the same class and at least half of the score, with an overlap of 0.7; 1 without objects.
        """
        both = [self.decoded(of, None) for of in (ours, theirs)]
        return torch.stack([_in_common(a, b) for a, b in zip(*both, strict=True)])

    # ---- what a value of the metric means

    def chance(self, data: Any) -> float:
        """0: boxes by chance find nothing."""
        return 0.0

    # ---- before the first batch

    def example(self, data: Any, device: torch.device) -> Tensor | None:
        return example_input(data, device)

    def check(self, outputs: Mapping[str, Tensor], data: Any) -> None:
        """Refuse data with other classes than the task."""
        names = getattr(data, "class_names", None)
        if names is None:
            return
        if len(names) != self.classes:
            raise UsageError(f"numbers of classes differ (task {self.classes}, data {len(names)}): they must agree")
        numbers = tuple(map(str, range(self.classes)))
        if self.names not in (numbers, tuple(names)):
            raise UsageError(
                f"classes={list(self.names)} of the task are not those of the data, {', '.join(map(repr, names))}: "
                "give the same names in the same order"
            )

    def check_batch(self, outputs: Tensor, batch: Any) -> None:
        """Refuse labels that are no class, boxes without an area or outside, and answers for other positions."""
        scenes = self.scenes(batch)
        if scenes.objects is None:
            return
        if len(outputs) == len(scenes.images):  # not a part of the batch
            self.check_positions(outputs, scenes.images)
        for boxes, labels in scenes.objects:
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                wrong = int(labels.max()) if int(labels.max()) >= self.classes else int(labels.min())
                raise UsageError(
                    f"label {wrong} of a box is out of range: the task has {self.classes} classes, whose labels are 0 "
                    f"to {self.classes - 1}; there is none for the background"
                )
            area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
            if not bool(area.all()):
                raise UsageError(f"the box {boxes[~area][0].tolist()} has no area: boxes are x1, y1, x2, y2")
            height, width = scenes.images.shape[-2:]
            outside = (boxes[:, 2:] <= 0).any(dim=1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
            if bool(outside.any()):
                raise UsageError(
                    f"the box {boxes[outside][0].tolist()} lies outside of its image of {width}x{height} pixels: boxes "
                    "are x1, y1, x2, y2 in pixels"
                )

    def unlabelled(self, batch: Any) -> bool:
        return self.scenes(batch).objects is None

    # ---- parts

    def maps(self, returned: Any, stride: int, channels: Mapping[str, int], asked: Asked) -> list[Tensor]:
        """The maps (B, channels, H, W) of a level that a network returned, in the order of ``channels``.

        Args:
            returned: what the network returned.
            stride: of the level.
            channels: how many the map of each name has to have.
            asked: which network, for messages.

        Raises:
            UsageError: when there is no such map, or it is of another shape.
        """
        maps = [self._map(returned, f"{name}_{stride}", [*channels], asked) for name in channels]
        height, width = maps[0].shape[2:]
        if any(
            of.shape != (asked.samples, channels[name], height, width) for name, of in zip(channels, maps, strict=True)
        ):
            shapes = ", ".join("x".join(map(str, of.shape)) for of in maps)
            logits, *others = (f"(B, {count}, H, W)" for count in channels.values())
            raise UsageError(
                f"the {asked.network} returns maps of shapes {shapes} on stride {stride} for {asked.samples} "
                f"images: {logits} logits of the task's classes, {' and '.join(others)} are needed"
            )
        return maps

    def _map(self, returned: Any, name: str, names: Sequence[str], asked: Asked) -> Tensor:
        value = returned.get(name) if isinstance(returned, Mapping) else None
        if isinstance(value, Tensor) and value.ndim == 4:
            return value
        found = ", ".join(map(repr, returned)) if isinstance(returned, Mapping) else f"a {type(returned).__name__}"
        called = [f"'{one}_S'" for one in names]
        raise UsageError(
            f"the {asked.network} returns {found}: a dict with maps (B, C, H, W) called {', '.join(called[:-1])} and "
            f"{called[-1]} for each stride S of {list(self.strides)} is needed, and {name!r} is not there"
        )

    def check_count(self, outputs: Tensor, images: Tensor, count: int) -> None:
        """Refuse answers (B, P, ...) where P is not ``count``, that of the positions of the images."""
        if count != outputs.shape[1]:
            raise UsageError(
                f"the network answers for {outputs.shape[1]} positions of images of "
                f"{'x'.join(map(str, images.shape[-2:]))}, which have {count} on strides {list(self.strides)}: its "
                "maps must have a position for each stride"
            )

    def scenes(self, batch: Any) -> Scenes:
        """The batch as images and objects."""
        return scenes_of(batch, self.multiple)

    def _found(self, outputs: Tensor, scenes: Scenes) -> list[dict[str, Tensor]]:
        height, width = scenes.images.shape[-2:]
        return self.decoded(outputs, (height, width))


def _names(classes: int | list[str]) -> tuple[str, ...]:
    """Of the classes; UsageError where they cannot be."""
    numbered = type(classes) is int
    if not numbered and not (isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)):
        raise UsageError(f"classes={classes!r} is not possible: a whole number or a list of names is needed")
    names = tuple(map(str, range(classes)) if isinstance(classes, int) else classes)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"classes={classes!r} is not possible: at least 1, or names of which no two are the same")
    logged: dict[str, str] = {}
    for name in names:
        other = logged.setdefault(logged_as(name), name)
        if other != name:
            raise UsageError(
                f"classes {other!r} and {name!r} would both be logged as {logged_as(name)!r}: give one another name"
            )
    return names


def _in_common(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """The share of the sure objects of both that have a partner among the others'."""
    from torchvision.ops import box_iou

    same = (box_iou(ours["boxes"], theirs["boxes"]) >= _SAME_PLACE) & (
        ours["labels"].unsqueeze(1) == theirs["labels"].unsqueeze(0)
    )
    paired = 0.0
    total = 0
    for one, other, pairs in ((ours, theirs, same), (theirs, ours, same.t())):
        sure = one["scores"] >= _SURE
        total += int(sure.sum())
        paired += float((pairs & (other["scores"] >= _SURE / 2)).any(dim=1)[sure].sum())
    return torch.tensor(paired / total if total else 1.0)
