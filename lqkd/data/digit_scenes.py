"""Scenes of scikit-learn's handwritten digits on its photographs: boxes without a download."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.data.detection import DetectionDataModule
from lqkd.data.encoded import EncodedImages
from lqkd.data.split import stratified_split
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_SCENE, STREAM_TEST, uniform

_SEED = 0  # never the run's: every run has the same scenes
_TEST_DIGITS = 359  # a fifth of 1,797, those that Digits tests with
_TEST_SCENES = 200
_MOST = 5
_DRAWS = 8
"""Numbers for an object: digit, height, width, place (2), shade, and two that are left."""
_SMALLEST, _LARGEST = 0.25, 0.6
"""Heights of digits, in units of the scene's."""
_INK = 0.3
"""How opaque a pixel is from which on it belongs to a digit."""


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
        from sklearn.datasets import load_digits, load_sample_images

        digits = load_digits()
        labels = torch.from_numpy(digits.target).to(torch.int64)
        test, train = stratified_split(torch.arange(len(labels)), labels, _TEST_DIGITS, seed=_SEED, stream=STREAM_TEST)
        ink = torch.from_numpy(digits.images).float() / 16  # (1797, 8, 8), from 0 to 1
        photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
        sets = [
            DrawnScenes(ink[part], labels[part], photographs, self.image_size, count, which)
            for which, (part, count) in enumerate(((train, self.scenes), (test, _TEST_SCENES)))
        ]
        of_one_class = [torch.zeros(of.shape[0], dtype=torch.int64) for of in sets]
        names = tuple(str(name) for name in digits.target_names)
        return ImageSet(sets[0], of_one_class[0], sets[1], of_one_class[1], names)


class DrawnScenes(EncodedImages):
    """Scenes in memory.

    Args:
        ink: (N, 8, 8) float32 from 0 to 1, the digits.
        labels: (N,) int64, their classes.
        photographs: (3, H, W) uint8 each.
        size: height and width of a scene.
        count: how many there are.
        part: 0 for training, 1 for testing: other scenes.
    """

    def __init__(
        self, ink: Tensor, labels: Tensor, photographs: list[Tensor], size: tuple[int, int], count: int, part: int
    ) -> None:
        super().__init__(count, size)
        numbers = torch.arange(count)
        draws = [uniform(_SEED, part, numbers, STREAM_SCENE, draw) for draw in range(4 + _MOST * _DRAWS)]
        drawn = [_scene(of, ink, labels, photographs, size) for of in torch.stack(draws, dim=1).tolist()]
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
    draws: list[float], ink: Tensor, labels: Tensor, photographs: list[Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (3, H, W) uint8, boxes (N, 4) and labels (N,) of one scene; N is at least 1."""
    height, width = size
    photograph = photographs[int(draws[0] * len(photographs))]
    top, left = (
        int(draw * (whole - part + 1)) for draw, whole, part in zip(draws[1:3], photograph.shape[1:], size, strict=True)
    )
    pixels = photograph[:, top : top + height, left : left + width].float()
    boxes: list[list[float]] = []
    shown: list[int] = []
    for place in range(1 + int(draws[3] * _MOST)):
        which, tall, wide, down, right, shade, *_ = draws[4 + place * _DRAWS : 4 + (place + 1) * _DRAWS]
        digit = int(which * len(labels))
        shape = _ink(ink[digit], height * (_SMALLEST + tall**2 * (_LARGEST - _SMALLEST)), 0.8 + 0.4 * wide, size)
        y, x = int(down * (height - shape.shape[0] + 1)), int(right * (width - shape.shape[1] + 1))
        box = [float(side) for side in (x, y, x + shape.shape[1], y + shape.shape[0])]
        if any(_overlap(box, other) for other in boxes):
            continue
        window = pixels[:, y : y + shape.shape[0], x : x + shape.shape[1]]
        tone = 255.0 - 60 * shade if float(window.mean()) < 128 else 60 * shade
        window += shape * (tone - window)
        boxes.append(box)
        shown.append(int(labels[digit]))
    return pixels.round().to(torch.uint8), torch.tensor(boxes), torch.tensor(shown)


def _ink(digit: Tensor, height: float, aspect: float, size: tuple[int, int]) -> Tensor:
    """How opaque a digit is that fills its box, (H, W) from 0 to 1."""
    rows, columns = ((digit > _INK).any(dim=axis).nonzero().squeeze(1) for axis in (1, 0))
    tight = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ratio = aspect * tight.shape[1] / tight.shape[0]
    shape = [max(4, round(height)), min(size[1], max(4, round(height * ratio)))]
    return F.interpolate(tight[None, None], shape, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)


def _overlap(box: list[float], other: list[float]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
