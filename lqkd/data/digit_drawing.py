"""Drawing scikit-learn's handwritten digits on its photographs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.data.digits import split_digits

_INK = 0.3
"""How opaque a pixel is from which on it belongs to a digit."""


class Material(NamedTuple):
    """What pictures are drawn of."""

    ink: Tensor
    """(1797, 8, 8) float32 from 0 to 1."""
    labels: Tensor
    """(1797,) int64."""
    train: Tensor
    """Sorted int64 positions of the digits that may be trained on."""
    test: Tensor
    """Of the 359 others, those that :class:`~lqkd.data.Digits` tests with."""
    photographs: list[Tensor]
    """(3, 427, 640) uint8 each."""
    names: tuple[str, ...]
    """The classes."""


def load_material() -> Material:
    """Return what scikit-learn ships: 1,797 digits and two photographs."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    labels = torch.from_numpy(digits.target).to(torch.int64)
    test, train = split_digits(labels)
    return Material(
        ink=torch.from_numpy(digits.images).float() / 16,
        labels=labels,
        train=train,
        test=test,
        photographs=[torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images],
        names=tuple(str(name) for name in digits.target_names),
    )


def window(photographs: list[Tensor], draws: list[float], size: tuple[int, int]) -> Tensor:
    """Return a part of a photograph, (3, H, W) float32 from 0 to 255.

    Args:
        photographs: (3, H, W) uint8 each.
        draws: three numbers in [0, 1): which photograph, how far from its top, how far from its left.
        size: height and width of the part, in pixels.
    """
    photograph = photographs[int(draws[0] * len(photographs))]
    top, left = (
        int(draw * (whole - part + 1)) for draw, whole, part in zip(draws[1:3], photograph.shape[1:], size, strict=True)
    )
    return photograph[:, top : top + size[0], left : left + size[1]].float()


def shape_of(digit: Tensor, height: float, aspect: float, size: tuple[int, int]) -> Tensor:
    """Return how opaque a digit is that fills its box, (H, W) from 0 to 1.

    Args:
        digit: (8, 8) from 0 to 1.
        height: of the box, in pixels; at least 4.
        aspect: by which its width is stretched.
        size: of the picture; no box is larger.
    """
    rows, columns = ((digit > _INK).any(dim=axis).nonzero().squeeze(1) for axis in (1, 0))
    tight = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ratio = aspect * tight.shape[1] / tight.shape[0]
    shape = [max(4, round(height)), min(size[1], max(4, round(height * ratio)))]
    return F.interpolate(tight[None, None], shape, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
