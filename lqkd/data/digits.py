"""The 1,797 handwritten digits that scikit-learn carries: real data without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.data.base import ImageDataModule, ImageSet
from lqkd.data.split import stratified_split
from lqkd.utils.counter_rng import STREAM_TEST

_TEST_IMAGES = 359  # a fifth of 1,797
_TEST_SEED = 0  # never the run's: every run is tested on the same images


def split_digits(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted positions of the digits that are tested with and of the others, the same in every run."""
    return stratified_split(torch.arange(len(labels)), labels, _TEST_IMAGES, seed=_TEST_SEED, stream=STREAM_TEST)


class Digits(ImageDataModule):
    """8x8 grey digits (UCI Optical Recognition of Handwritten Digits, as scikit-learn ships them), 10 classes.

    The set has no test part of its own: a fixed, stratified fifth (359 images) serves as one, whatever the seed.

    Args:
        batch_size: Training images per process and step.
        crop_padding: Pixels of black added on every side before a random crop of the original size; 0 means no crop.
        horizontal_flip: Whether half of the training images are mirrored; a mirrored digit is not a digit.
        kwargs: The other settings of :class:`~lqkd.data.ImageDataModule`.
    """

    # Measured on the 1,438 images outside the test part.
    default_mean = (0.3047,)
    default_std = (0.3757,)

    def __init__(
        self, *, batch_size: int = 64, crop_padding: int = 1, horizontal_flip: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(batch_size=batch_size, crop_padding=crop_padding, horizontal_flip=horizontal_flip, **kwargs)

    def load(self) -> ImageSet:
        """Return the images, their values 0 ... 16 spread over 0 ... 255."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None].mul(255 / 16).round().to(torch.uint8)  # (1797, 1, 8, 8)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        test, train = split_digits(labels)
        names = tuple(str(name) for name in digits.target_names)
        return ImageSet(images[train], labels[train], images[test], labels[test], names)
