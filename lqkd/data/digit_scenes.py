"""Scenes of scikit-learn's handwritten digits on its photographs: boxes without a download."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.data.detection import DetectionDataModule
from lqkd.data.digit_drawing import Material, load_material, shape_of, window
from lqkd.data.encoded import EncodedImages
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_SCENE, uniform

_SEED = 0  # never the run's: every run has the same scenes
_TEST_SCENES = 200
_MOST = 5
_DRAWS = 8
"""Numbers for an object: digit, height, width, place (2), shade, and two that are left."""
_SMALLEST, _LARGEST = 0.25, 0.6
"""Heights of digits, in units of the scene's."""


class DigitScenes(DetectionDataModule):
    """Up to 5 handwritten digits of different sizes on a part of a photograph, each with its box; 10 classes.

    Digits are the 1,797 of :class:`~lqkd.data.Digits`, photographs the two that scikit-learn ships. Which digits lie
    where is a function of the number of the scene alone, the same in every run. Test scenes, 200 of them, show digits
    that no other scene shows. What is behind them are windows of the same photographs, which may overlap with others'.

    Args:
        scenes: Those for training and validation together.
        image_size: Height and width of the scenes, in pixels, at most 427 and 640, those of the photographs.
        batch_size: Training scenes per process and step.
        crop_scale: Smallest and largest share of a scene's area that a random window of training takes.
        horizontal_flip: Whether half of the training scenes are mirrored; a mirrored digit is not a digit.
        settings: The other settings of :class:`~lqkd.data.DetectionDataModule`.

    Raises:
        UsageError: when a setting is out of range.
    """

    def __init__(
        self,
        *,
        scenes: int = 1000,
        image_size: tuple[int, int] = (96, 96),
        batch_size: int = 16,
        crop_scale: tuple[float, float] = (0.6, 1.0),
        horizontal_flip: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            crop_scale=crop_scale,
            horizontal_flip=horizontal_flip,
            **settings,
        )
        if scenes < 2:
            raise UsageError(f"scenes={scenes} is not accepted: it must be at least 2.")
        if not (32 <= self.image_size[0] <= 427 and 32 <= self.image_size[1] <= 640):
            raise UsageError(f"image_size={list(image_size)} is not accepted: from 32, 32 to 427, 640.")
        self.scenes = scenes

    def load(self) -> ImageSet:
        """Draw all scenes."""
        material = load_material()
        sets = [
            DrawnScenes(material, digits, self.image_size, count, which)
            for which, (digits, count) in enumerate(((material.train, self.scenes), (material.test, _TEST_SCENES)))
        ]
        of_one_class = [torch.zeros(of.shape[0], dtype=torch.int64) for of in sets]
        return ImageSet(sets[0], of_one_class[0], sets[1], of_one_class[1], material.names)


class DrawnScenes(EncodedImages):
    """Scenes in memory.

    Args:
        material: what they are drawn of.
        digits: (N,) int64, positions of the digits that they show.
        size: height and width of a scene.
        count: how many there are.
        part: 0 for training, 1 for testing: other scenes.
    """

    def __init__(self, material: Material, digits: Tensor, size: tuple[int, int], count: int, part: int) -> None:
        super().__init__(count, size)
        numbers = torch.arange(count)
        draws = [uniform(_SEED, part, numbers, STREAM_SCENE, draw) for draw in range(4 + _MOST * _DRAWS)]
        drawn = [_scene(of, material, digits, size) for of in torch.stack(draws, dim=1).tolist()]
        self._pixels = torch.stack([pixels for pixels, _, _ in drawn])
        self._objects = [(boxes, of) for _, boxes, of in drawn]

    def read(self, index: int) -> np.ndarray:
        """One scene: (H, W, 3) uint8."""
        return self._pixels[index].permute(1, 2, 0).numpy()

    def objects_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) float32 xyxy, in pixels, and labels (N,) int64, of one scene."""
        return self._objects[index]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any pixel or box."""
        digest = hashlib.sha256(self._pixels.numpy().data)
        for boxes, labels in self._objects:
            digest.update(boxes.numpy().tobytes() + labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def _scene(
    draws: list[float], material: Material, digits: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (3, H, W) uint8, boxes (N, 4) and labels (N,) of one scene; N is at least 1."""
    height, width = size
    pixels = window(material.photographs, draws[:3], size)
    boxes: list[list[float]] = []
    shown: list[int] = []
    for place in range(1 + int(draws[3] * _MOST)):
        which, tall, wide, down, right, shade, *_ = draws[4 + place * _DRAWS : 4 + (place + 1) * _DRAWS]
        digit = digits[int(which * len(digits))]
        tallness = _SMALLEST + tall**2 * (_LARGEST - _SMALLEST)
        shape = shape_of(material.ink[digit], height * tallness, 0.8 + 0.4 * wide, size)
        y, x = int(down * (height - shape.shape[0] + 1)), int(right * (width - shape.shape[1] + 1))
        box = [float(side) for side in (x, y, x + shape.shape[1], y + shape.shape[0])]
        if any(_overlap(box, other) for other in boxes):
            continue
        under = pixels[:, y : y + shape.shape[0], x : x + shape.shape[1]]
        tone = 255.0 - 60 * shade if float(under.mean()) < 128 else 60 * shade
        under += shape * (tone - under)
        boxes.append(box)
        shown.append(int(material.labels[digit]))
    return pixels.round().to(torch.uint8), torch.tensor(boxes), torch.tensor(shown)


def _overlap(box: list[float], other: list[float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
