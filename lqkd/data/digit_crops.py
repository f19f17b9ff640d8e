"""Small colour images without a download: scikit-learn's handwritten digits on parts of its photographs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.data.base import ImageDataModule, ImageSet
from lqkd.data.digit_drawing import Material, load_material, shape_of, window
from lqkd.utils.counter_rng import STREAM_SCENE, uniform

_SEED = 1  # never the run's, and not that of DigitScenes: every run has the same images, and other windows than scenes
_SIZE = (20, 20)
_TRAIN_IMAGES = 4000
_TEST_IMAGES = 1795  # each test digit five times
_DRAWS = 8
"""Numbers for an image: photograph, window (2), height, width, place (2), contrast."""
_SMALLEST, _LARGEST = 0.5, 0.95
"""Heights of digits, in units of the image's."""
_FAINTEST, _STRONGEST = 60.0, 160.0
"""How much brighter or darker than what is behind it a digit is, in steps of 255."""


class DigitCrops(ImageDataModule):
    """20x20 colour images of one handwritten digit each on a part of a photograph, faint or strong; 10 classes.

    Digits are the 1,797 of :class:`~lqkd.data.Digits`, photographs the two that scikit-learn ships. Which digit lies
    where is a function of the number of the image alone, the same in every run: 4,000 images for training and
    validation, and 1,795 for testing, of the 359 digits that no other image shows, each five times. A validation image
    shows a digit that training images may show too, elsewhere, and what is behind digits overlaps between all of them.

    Args:
        batch_size: Training images per process and step.
        crop_padding: Pixels of black added on every side before a random crop of the original size; 0 means no crop.
        horizontal_flip: Whether half of the training images are mirrored; a mirrored digit is not a digit.
        settings: The other settings of :class:`~lqkd.data.ImageDataModule`.
    """

    # Measured on the 4,000 images.
    default_mean = (0.4175, 0.4441, 0.4081)
    default_std = (0.3350, 0.2681, 0.2910)

    def __init__(
        self, *, batch_size: int = 64, crop_padding: int = 2, horizontal_flip: bool = False, **settings: Any
    ) -> None:
        super().__init__(batch_size=batch_size, crop_padding=crop_padding, horizontal_flip=horizontal_flip, **settings)

    def load(self) -> ImageSet:
        """Draw all images."""
        material = load_material()
        train = _drawn(material, material.train, _TRAIN_IMAGES, part=0)
        test = _drawn(material, material.test, _TEST_IMAGES, part=1)
        return ImageSet(*train, *test, material.names)


def _drawn(material: Material, digits: Tensor, count: int, part: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, H, W) uint8 and labels (count,) int64, one of ``digits`` after the other, again and again."""
    numbers = torch.arange(count)
    draws = torch.stack([uniform(_SEED, part, numbers, STREAM_SCENE, draw) for draw in range(_DRAWS)], dim=1)
    shown = digits[numbers % len(digits)]
    images = [
        _image(of, material.ink[digit], material.photographs)
        for of, digit in zip(draws.tolist(), shown.tolist(), strict=True)
    ]
    return torch.stack(images), material.labels[shown]


def _image(draws: list[float], digit: Tensor, photographs: list[Tensor]) -> Tensor:
    """(3, H, W) uint8."""
    *where, tall, wide, down, right, contrast = draws
    pixels = window(photographs, where, _SIZE)
    shape = shape_of(digit, _SIZE[0] * (_SMALLEST + tall * (_LARGEST - _SMALLEST)), 0.8 + 0.4 * wide, _SIZE)
    y, x = int(down * (_SIZE[0] - shape.shape[0] + 1)), int(right * (_SIZE[1] - shape.shape[1] + 1))
    under = pixels[:, y : y + shape.shape[0], x : x + shape.shape[1]]
    behind = float(under.mean())
    difference = _FAINTEST + contrast * (_STRONGEST - _FAINTEST)
    tone = min(max(behind + (difference if behind < 128 else -difference), 0.0), 255.0)
    under += shape * (tone - under)
    return pixels.round().to(torch.uint8)
