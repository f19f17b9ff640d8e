"""CIFAR-10 with forty classes: what is to be seen, and which way up.

For studies of how the number of classes matters while images and networks stay the same. A rotation as part of the
class is from Lee, Hwang and Shin, "Self-supervised Label Augmentation via Input Transformations", ICML 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.data import CIFAR10
from lqkd.data.base import ImageSet

_TURNS = 4


class RotatedCIFAR10(CIFAR10):
    """CIFAR-10 of which each image is turned by 0, 90, 180 or 270 degrees, always by the same; 40 classes.

    The turn is that of the image's position, so that no image is in two splits. Label ``4 c + t`` is class ``c`` turned
    ``t`` times to the left.

    Args:
        root: as for :class:`~lqkd.data.CIFAR10`.
        kwargs: its other settings; images are not mirrored, which would exchange two of the turns.
    """

    def __init__(self, *, root: str, **kwargs: Any) -> None:
        super().__init__(root=root, horizontal_flip=False, **kwargs)

    def load(self) -> ImageSet:
        images = super().load()
        train, train_labels = _turned(images.train_images, images.train_labels)
        test, test_labels = _turned(images.test_images, images.test_labels)
        names = tuple(f"{name} {90 * turn}" for name in images.class_names for turn in range(_TURNS))
        return ImageSet(train, train_labels, test, test_labels, names)


def _turned(images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    turns = torch.arange(len(labels)) % _TURNS
    turned = images.clone()
    for turn in range(1, _TURNS):
        turned[turns == turn] = torch.rot90(images[turns == turn], turn, (2, 3))
    return turned, _TURNS * labels + turns
