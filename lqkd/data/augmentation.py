"""What is done to training images, as one value: settings, their checks, and the steps in order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lqkd.data.augment import normalize, random_crop, random_flip
from lqkd.data.augment_erase import random_erasing
from lqkd.data.augment_mix import mix
from lqkd.data.augment_rand import LARGEST_MAGNITUDE, OPERATIONS, rand_augment
from lqkd.errors import UsageError

_LARGEST_ALPHA = 1000
"""Of Beta(alpha, alpha): beyond it all shares are one half."""


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a data set; everything is off by default.

    Two equal values do the same to the same sample of the same epoch and seed: a stored result, as that of a teacher,
    is known by the value's fields.

    Args:
        crop_padding: pixels of black added on every side before a random crop of the original size; 0 means no crop.
        horizontal_flip: whether half of the images are mirrored.
        rand_augment: operations of RandAugment per image, at most as many as there are; 0 means none.
        rand_augment_magnitude: their strength, 0 ... 30; None means 9.
        random_erasing: probability that a rectangle of an image is blanked.
        mixup: alpha of mixup's Beta(alpha, alpha) distribution; 0 means no mixup.
        cutmix: alpha of CutMix's Beta(alpha, alpha) distribution; 0 means no CutMix.
        mix_probability: probability that an image is mixed; None means 1.

    Raises:
        UsageError: when a setting is out of range, or would have no effect.
    """

    crop_padding: int = 0
    horizontal_flip: bool = False
    rand_augment: int = 0
    rand_augment_magnitude: int | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding={self.crop_padding} is not accepted: it must be at least 0.")
        for name, largest in (
            ("rand_augment", len(OPERATIONS)),
            ("rand_augment_magnitude", LARGEST_MAGNITUDE),
            ("mixup", _LARGEST_ALPHA),
            ("cutmix", _LARGEST_ALPHA),
            ("random_erasing", 1),
            ("mix_probability", 1),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= largest:
                raise UsageError(f"{name}={value} is not accepted: it must lie between 0 and {largest}.")
        if self.rand_augment_magnitude is not None and not self.rand_augment:
            raise UsageError(
                f"rand_augment_magnitude={self.rand_augment_magnitude} has no effect: set rand_augment above 0, or"
                " leave the magnitude null."
            )
        if self.mix_probability is not None and not self.mixes:
            raise UsageError(
                f"mix_probability={self.mix_probability} has no effect: set mixup or cutmix above 0, or leave the"
                " probability null."
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Refuse images that the operations do not take.

        Raises:
            UsageError: for RandAugment on images that are neither grey nor RGB, and for a crop that can miss an image.
        """
        if self.crop_padding >= min(height, width):
            raise UsageError(
                f"crop_padding={self.crop_padding} is not accepted for images of {height}x{width}: it must be less"
                f" than {min(height, width)}, or a crop could hold nothing but padding."
            )
        if self.rand_augment and channels not in {1, 3}:
            raise UsageError(
                f"rand_augment={self.rand_augment} is not accepted for images of {channels} channels: it needs 1 or 3."
            )

    def single(
        self,
        images: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        seed: int,
        epoch: int | Tensor,
        indices: Tensor,
    ) -> Tensor:
        """Do all that is done to an image by itself: crop, flip, RandAugment, normalisation, erasing.

        Args:
            images: (B, C, H, W) uint8.
            mean: C channel means on the [0, 1] scale.
            std: C channel standard deviations on the [0, 1] scale.
            seed: the run's seed.
            epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
            indices: (B,) int64 stable sample ids on the device of ``images``.

        Returns:
            (B, C, H, W) float32, contiguous.
        """
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, seed=seed, epoch=epoch, indices=indices)
        if self.horizontal_flip:
            images = random_flip(images, seed=seed, epoch=epoch, indices=indices)
        if self.rand_augment:
            magnitude = 9 if self.rand_augment_magnitude is None else self.rand_augment_magnitude
            images = rand_augment(images, self.rand_augment, magnitude, seed=seed, epoch=epoch, indices=indices)
        normal = normalize(images, mean, std)
        if self.random_erasing:
            normal = random_erasing(normal, self.random_erasing, seed=seed, epoch=epoch, indices=indices)
        return normal

    def mix(
        self, images: Tensor, partners: Tensor, *, seed: int, epoch: int | Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mix images with their partners, both as :meth:`single` leaves them; see :func:`lqkd.data.augment_mix.mix`."""
        return mix(
            images,
            partners,
            mixup=self.mixup,
            cutmix=self.cutmix,
            probability=1.0 if self.mix_probability is None else self.mix_probability,
            seed=seed,
            epoch=epoch,
            indices=indices,
        )
