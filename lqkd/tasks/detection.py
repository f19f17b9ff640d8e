"""Object detection: boxes and classes of what an image shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.detection import Assigned, assign, fcos_losses
from lqkd.models.decoding import detections
from lqkd.models.outputs import Asked
from lqkd.models.position_grid import Positions, boxes_at, positions
from lqkd.tasks.base import Rows
from lqkd.tasks.box_detection import ANY_SIZE, BoxDetection


class Detection(BoxDetection):
    """Boxes and classes of the objects in images, by a detector without anchors such as :class:`lqkd.models.SmallFCOS`.

    Batches are ``(images, targets, ...)``, or images alone: a tensor (B, C, H, W) or a list of images (C, H, W), and
    for each a dict with ``boxes`` (N, 4) xyxy in pixels and ``labels`` (N,) from 0, as torchvision's but without a
    background; N may be 0. Networks return, for each stride S, ``classes_S``, ``boxes_S`` and ``centerness_S``, see
    there. An answer is a tensor (B, P, C + 5) over all P positions: logits, box xyxy in pixels, centerness.

    The loss is FCOS' (:func:`lqkd.losses.detection.fcos_losses`). The rows of distillation are the logits of all
    positions, each a class that is there or not, without labels: ``BinaryKL`` compares them. Losses on features compare
    levels of the pyramid. Layers that a network names as its ``last_layers`` get the bits of
    ``quantization.last_layer_bits``, 8 by default, and inputs of those that are called once a level a step for each
    level, where ``lsq`` quantises them and ``quantization.per_level`` says nothing else. Decoding and non-maximum
    suppression are never quantised.

    Logs COCO's mean average precision, exact over all ranks, in pixels of the images that networks see: ``map``,
    ``map_50``, ``map_75``, ``map_small``, ``map_medium``, ``map_large``, and ``map_of_NAME`` of each class.

    Args:
        classes: their names, or their number.
        strides: of the network's levels, in pixels, the finest first.
        reach: the largest distance from a position to a side of the box that it looks for, in strides of its level, so
            that boxes are up to twice as long; see :func:`lqkd.losses.detection.assign`.
        min_score: the least score of an object that counts, in [0, 1).
        overlap: of two objects of a class, from which on one of them does not count, in (0, 1).
        most_objects: of an image that count; the metric looks at 100.

    Raises:
        UsageError: when an argument is not possible, or faster-coco-eval is not installed.
    """

    def __init__(
        self,
        classes: int | list[str],
        strides: Sequence[int] = (8, 16, 32),
        reach: float = 8.0,
        min_score: float = 0.05,
        overlap: float = 0.6,
        most_objects: int = 100,
    ) -> None:
        whole = isinstance(strides, (list, tuple)) and all(type(stride) is int for stride in strides)
        if not whole or not strides or list(strides) != sorted(set(strides)) or strides[0] < 1:
            raise UsageError(f"strides={strides!r} is not possible: whole numbers that rise, such as [8, 16, 32]")
        super().__init__(classes, strides, strides[-1], min_score, overlap, most_objects)
        self._check(("reach", reach, lambda: 0 < reach < math.inf, "a number above 0"))
        self.reach = reach

    # ---- the path of a batch

    def outputs(self, returned: Any, asked: Asked) -> Tensor:
        """An answer for every position (B, P, C + 5), float32: logits, box xyxy in pixels, centerness.

        Raises:
            UsageError: when the network returns anything else.
        """
        levels = []
        for stride in self.strides:
            maps = self.maps(returned, stride, {"classes": self.classes, "boxes": 4, "centerness": 1}, asked)
            classes, distances, centerness = (of.float().flatten(2).transpose(1, 2) for of in maps)
            height, width = maps[0].shape[2:]
            at = positions(height * stride, width * stride, [stride], maps[0].device)
            levels.append(torch.cat([classes, boxes_at(distances, at), centerness], dim=2))
        return torch.cat(levels, dim=1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """FCOS' loss, 0-dim: the mean over the images; 0 for images alone."""
        scenes = self.scenes(batch)
        if scenes.objects is None:
            return 0.0 * outputs.sum()
        at = self._positions(outputs, scenes.images)
        each = [assign(*objects, at, reach=self.reach) for objects in scenes.objects]
        return fcos_losses(*self._parts(outputs), Assigned(*map(torch.stack, zip(*each, strict=True)))).mean()

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        """Every position of every image: logits (B * P, C), no labels."""
        return Rows(outputs[..., : self.classes].flatten(0, 1), None)

    # ---- parts

    def check_positions(self, outputs: Tensor, images: Tensor) -> None:
        self._positions(outputs, images)

    def _positions(self, outputs: Tensor, images: Tensor) -> Positions:
        height, width = images.shape[-2:]
        at = positions(height, width, self.strides, outputs.device)
        self.check_count(outputs, images, len(at.points))
        return at

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, boxes and centerness (B, P)."""
        classes, boxes, centerness = outputs.split([self.classes, 4, 1], dim=-1)
        return classes, boxes, centerness.squeeze(-1)

    def decoded(self, outputs: Tensor, size: tuple[int, int] | None) -> list[dict[str, Tensor]]:
        return detections(*self._parts(outputs), size or ANY_SIZE, self.min_score, self.overlap, self.most_objects)
