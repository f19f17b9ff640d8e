"""RandAugment on whole uint8 batches: every image its own operations, torchvision's kernels.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", arXiv 1909.13719, with
the operations and magnitudes of ``torchvision.transforms.v2.RandAugment``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lqkd.data.augment_geometry import GEOMETRIC, inverse_matrix, transform
from lqkd.utils.counter_rng import STREAM_OPERATION, STREAM_OPERATION_SIGN, integers, uniform

OPERATIONS = (
    "Identity",
    *GEOMETRIC,
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""In torchvision's order; an image's operation is a position here."""

LARGEST_MAGNITUDE = 30

_SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")


def amount(operation: str, magnitude: int, height: int, width: int) -> float:
    """Return what ``magnitude`` (0 ... 30) means for an operation, positive, in the unit that its kernel takes."""
    part = magnitude / LARGEST_MAGNITUDE
    if operation in {"ShearX", "ShearY"}:
        return 0.3 * part
    if operation in {"TranslateX", "TranslateY"}:
        return 150 / 331 * (width if operation == "TranslateX" else height) * part
    if operation == "Rotate":
        return 30 * part
    if operation == "Posterize":
        return float(round(8 - 4 * part))
    if operation == "Solarize":
        return 255 * (1 - part)
    return 0.9 * part if operation in _SIGNED else 0.0


def choose_operations(draw: int, *, seed: int, epoch: int | Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's operation of a round, all equally likely, and whether its amount is negative.

    Args:
        draw: the round, counted from 0.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids.

    Returns:
        (B,) int64 positions in :data:`OPERATIONS` and (B,) bool, one half each; only the signed operations heed it.
    """
    operations = integers(seed, epoch, indices, STREAM_OPERATION, len(OPERATIONS), draw)
    return operations, uniform(seed, epoch, indices, STREAM_OPERATION_SIGN, draw) < 0.5


def rand_augment(
    images: Tensor, rounds: int, magnitude: int, *, seed: int, epoch: int | Tensor, indices: Tensor
) -> Tensor:
    """Apply ``rounds`` random operations to each image, one after the other.

    Args:
        images: (B, C, H, W) uint8, C of 1 or 3; see :func:`apply_operations`.
        rounds: operations per image.
        magnitude: their strength, 0 ... 30.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids on the device of ``images``.

    Returns:
        (B, C, H, W) uint8.
    """
    for draw in range(rounds):
        operations, negative = choose_operations(draw, seed=seed, epoch=epoch, indices=indices)
        images = apply_operations(images, operations, negative, magnitude)
    return images


def apply_operations(images: Tensor, operations: Tensor, negative: Tensor, magnitude: int) -> Tensor:
    """Apply to each image its own operation: images are sorted into groups, and each group is one call.

    Args:
        images: (B, C, H, W) uint8, C of 1 or 3.
        operations: (B,) int64 positions in :data:`OPERATIONS`.
        negative: (B,) bool, whether the amount of a signed operation is negative.
        magnitude: 0 ... 30.

    Returns:
        (B, C, H, W) uint8, a new tensor.
    """
    height, width = images.shape[-2:]
    groups = (2 * operations + negative).sort(stable=True)
    counts = torch.bincount(groups.values, minlength=2 * len(OPERATIONS)).tolist()  # the only wait for a GPU
    rows = groups.indices
    result = images.clone()

    first, last = (OPERATIONS.index(name) for name in (GEOMETRIC[0], GEOMETRIC[-1]))
    start, stop = sum(counts[: 2 * first]), sum(counts[: 2 * last + 2])
    if stop > start:  # all of them are one call
        matrices = _matrices(magnitude, height, width, images.device)[groups.values[start:stop] - 2 * first]
        group = rows[start:stop]
        result.index_copy_(0, group, transform(images.index_select(0, group), matrices))
    for operation in range(last + 1, len(OPERATIONS)):
        name = OPERATIONS[operation]
        sizes = counts[2 * operation : 2 * operation + 2]
        for size, sign in zip(sizes, (1, -1), strict=True) if name in _SIGNED else [(sum(sizes), 1)]:
            start, stop = stop, stop + size
            if size:
                strength = sign * amount(name, magnitude, height, width)
                group = rows[start:stop]
                result.index_copy_(0, group, _apply(name, images.index_select(0, group), strength))
    return result


@lru_cache(maxsize=16)
def _matrices(magnitude: int, height: int, width: int, device: torch.device) -> Tensor:
    """(2 * len(GEOMETRIC), 2, 3) float32: of each operation the matrix of its positive and of its negative amount."""
    matrices = [
        inverse_matrix(name, sign * amount(name, magnitude, height, width), height, width)
        for name in GEOMETRIC
        for sign in (1, -1)
    ]
    return torch.tensor(matrices, dtype=torch.float32, device=device)


def _apply(operation: str, images: Tensor, strength: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    if operation == "Posterize":
        return functional.posterize_image(images, int(strength))
    if operation == "Solarize":
        return functional.solarize_image(images, strength)
    if operation == "AutoContrast":
        return functional.autocontrast_image(images)
    if operation == "Equalize":
        return functional.equalize_image(images)
    adjust = {
        "Brightness": functional.adjust_brightness_image,
        "Color": functional.adjust_saturation_image,
        "Contrast": functional.adjust_contrast_image,
        "Sharpness": functional.adjust_sharpness_image,
    }[operation]
    return adjust(images, 1.0 + strength)
