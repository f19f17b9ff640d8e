"""Random resized crop, replayable sample by sample.

The distribution is that of torchvision's ``RandomResizedCrop`` (Szegedy et al., "Going deeper with convolutions",
2015); the numbers come from :mod:`lqkd.utils.counter_rng`, so that the window of a sample depends on (seed, epoch,
sample id) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_RESIZED_CROP, uniform

ATTEMPTS = 10
"""How often a window that does not fit into the image is drawn again, as in torchvision."""
RATIO = (3 / 4, 4 / 3)
"""Range of width / height of a window over that of what it is resized to."""


def crop_draws(*, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Return what decides the windows of these samples: (B, ATTEMPTS, 4) float32, uniform in [0, 1).

    Args:
        seed: the run's seed.
        epoch: the epoch, counted from 0.
        indices: (B,) int64 stable sample ids.
    """
    streams = range(STREAM_RESIZED_CROP, STREAM_RESIZED_CROP + 4 * ATTEMPTS)
    return torch.stack([uniform(seed, epoch, indices, stream) for stream in streams], dim=1).unflatten(1, (ATTEMPTS, 4))


def random_window(
    height: int, width: int, scale: tuple[float, float], draws: list[list[float]], aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a sample's window.

    The area is uniform over ``scale`` times that of the image and log(width / height) over the logarithms of
    :data:`RATIO` times ``aspect``. Where no attempt fits, the largest centred window within these is taken.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: smallest and largest share of the image's area, in (0, 1].
        draws: (ATTEMPTS, 4) numbers in [0, 1): area, ratio, top, left.
        aspect: width / height of what the window is resized to.
    """
    lowest, highest = (math.log(ratio) for ratio in RATIO)
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        ratio = aspect * math.exp(lowest + ratio_draw * (highest - lowest))
        window_height, window_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < window_height <= height and 0 < window_width <= width:
            top = int(top_draw * (height - window_height + 1))
            left = int(left_draw * (width - window_width + 1))
            return top, left, window_height, window_width
    window_height = min(height, round(width / (aspect * RATIO[0])))
    window_width = min(width, round(height * (aspect * RATIO[1])))
    return (height - window_height) // 2, (width - window_width) // 2, window_height, window_width


def check_crop_scale(scale: Sequence[float]) -> tuple[float, float]:
    """The setting ``crop_scale`` of a data module, as two floats.

    Raises:
        UsageError: when it is not two numbers above 0 and at most 1, the smaller first.
    """
    smallest, largest = float(scale[0]), float(scale[1])
    if not 0 < smallest <= largest <= 1:
        raise UsageError(
            f"crop_scale={list(scale)} is not accepted: it must be two numbers above 0 and at most 1, the"
            " smaller first."
        )
    return smallest, largest
