"""A small detector without anchors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.cifar_resnet import BasicBlock

_PRIOR = 0.01
"""Probability of every class at the beginning; Lin et al., arXiv 1708.02002, section 3.3."""


class Pyramid(nn.Module):
    """Levels of the same number of channels out of a backbone's: Lin et al., "Feature Pyramid Networks" (1612.03144).

    A coarser level, doubled in height and width (nearest neighbour), is added to a 1x1 convolution of the finer one; a
    3x3 convolution of the sum, ``outputs.0`` for the finest, is the level.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        sums = [self.laterals[-1](features[-1])]
        for lateral, finer in zip(reversed(self.laterals[:-1]), reversed(features[:-1]), strict=True):
            sums.append(lateral(finer) + F.interpolate(sums[-1], scale_factor=2.0, mode="nearest"))
        return [output(level) for output, level in zip(self.outputs, reversed(sums), strict=True)]


class Tower(nn.Module):
    """3x3 convolutions that all levels share, each followed by the level's own batch norm and a ReLU.

    Levels differ in their statistics, which in training are a level's own: running averages over all levels would fit
    none of them in evaluation. Chen et al., "AQD" (arXiv 2007.06919), have batch norm by level in heads as well.
    """

    def __init__(self, width: int, depth: int, levels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(width) for _ in range(levels)) for _ in range(depth))
        for convolution in self.convolutions:
            nn.init.normal_(convolution.weight, std=0.01)  # type: ignore[arg-type]

    def forward(self, level: Tensor, number: int, start: int = 0) -> Tensor:
        for convolution, norms in list(zip(self.convolutions, self.norms, strict=True))[start:]:
            level = F.relu(norms[number](convolution(level)))  # type: ignore[index]
        return level


class FCOSHead(nn.Module):
    """What is said at every position of a level: FCOS (arXiv 1904.01355), section 3, with batch norm.

    It is called once for each level, with the same convolutions.
    """

    def __init__(self, width: int, num_classes: int, depth: int, levels: int) -> None:
        super().__init__()
        self.class_tower, self.box_tower = (Tower(width, depth, levels) for _ in range(2))
        self.classes = nn.Conv2d(width, num_classes, 3, padding=1)
        self.boxes = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        for last in (self.classes, self.boxes, self.centerness):
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]

    def forward(self, level: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        of_classes, of_boxes = self.class_tower(level, number), self.box_tower(level, number)
        return self.classes(of_classes), self.boxes(of_boxes), self.centerness(of_boxes)


class SmallFCOS(nn.Module):
    """A detector without anchors for small networks: residual blocks, a pyramid of three levels, one head.

    FCOS (Tian et al., arXiv 1904.01355) with batch norm in its head, by level, on strides 8, 16 and 32. Decoding and
    non-maximum suppression are apart from it, in :func:`lqkd.models.detections`; it returns maps, in training too:
    ``classes_S`` (B, num_classes, H / S, W / S) logits, ``boxes_S`` (B, 4, H / S, W / S) logarithms of the distances to
    left, top, right and bottom in strides, and ``centerness_S`` (B, 1, H / S, W / S) logits, for each stride S.

    With the defaults it has 0.75 million parameters. Input (B, in_channels, H, W) float, H and W multiples of 32.

    Attributes:
        last_layers: the layers whose results it returns, which keep 8 bits by default in a detection.

    Args:
        num_classes: number of classes, without one for the background.
        width: channels of the first stage; the levels of the pyramid have twice as many.
        depth: convolutions of each of the head's two towers.
        in_channels: channels of the images.

    Raises:
        UsageError: when a number is less than 1, or ``width`` is odd.

    Examples:
        >>> import torch
        >>> maps = SmallFCOS(num_classes=3, width=8)(torch.randn(2, 3, 64, 96))
        >>> list(maps)[:3], maps["classes_8"].shape, maps["boxes_32"].shape
        (['classes_8', 'boxes_8', 'centerness_8'], torch.Size([2, 3, 8, 12]), torch.Size([2, 4, 2, 3]))
    """

    strides = (8, 16, 32)
    last_layers = ("head.classes", "head.boxes", "head.centerness")

    def __init__(self, num_classes: int = 10, width: int = 32, depth: int = 2, in_channels: int = 3) -> None:
        super().__init__()
        given = {"num_classes": num_classes, "width": width, "depth": depth, "in_channels": in_channels}
        for name, value in given.items():
            if value < 1:
                raise UsageError(f"{name}={value} is not possible for SmallFCOS: it must be at least 1")
        if width % 2:
            raise UsageError(f"width={width} is not possible for SmallFCOS: it must be even")
        self.stem = nn.Conv2d(in_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width // 2)
        widths = [width // 2, width, 2 * width, 3 * width, 4 * width]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            BasicBlock(before, after, stride=2) for before, after in pairwise(widths)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.pyramid = Pyramid(widths[2:], 2 * width)
        self.head = FCOSHead(2 * width, num_classes, depth, len(self.strides))

    def class_logits_from(self, tap: str) -> Callable[[Tensor], Tensor]:
        """What follows behind a module on the way to the logits of a level: from (B, C, H, W) to (B, classes, H, W).

        Args:
            tap: ``pyramid.outputs.LEVEL``, or ``head.class_tower.norms.DEPTH.LEVEL``.

        Raises:
            UsageError: when it is none of these.
        """
        found = re.fullmatch(r"pyramid\.outputs\.(\d+)|head\.class_tower\.norms\.(\d+)\.(\d+)", tap)
        if found is None:
            raise UsageError(
                f"tap {tap!r} of SmallFCOS is not on the way to the classes of one level: pyramid.outputs.LEVEL or "
                "head.class_tower.norms.DEPTH.LEVEL is"
            )
        if found[1] is not None:
            return lambda features: self.head.classes(self.head.class_tower(features, int(found[1])))
        return lambda features: self.head.classes(
            self.head.class_tower(F.relu(features), int(found[3]), start=int(found[2]) + 1)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        finest = self.layer2(self.layer1(F.relu(self.norm(self.stem(images)))))
        finer = self.layer3(finest)
        maps: dict[str, Tensor] = {}
        levels = self.pyramid([finest, finer, self.layer4(finer)])
        for number, (stride, level) in enumerate(zip(self.strides, levels, strict=True)):
            of_level = zip(("classes", "boxes", "centerness"), self.head(level, number), strict=True)
            maps |= {f"{name}_{stride}": values for name, values in of_level}
        return maps
