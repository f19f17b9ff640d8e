"""Augmentation of whole uint8 batches on whatever device they are, replayable sample by sample.

What happens to a sample depends on (seed, epoch, sample id) alone; see :mod:`lqkd.utils.counter_rng`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lqkd.utils.counter_rng import STREAM_CROP_X, STREAM_CROP_Y, STREAM_FLIP, uniform


def crop_offsets(padding: int, *, seed: int, epoch: int | Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top and left corner of each sample's window in its padded image.

    Args:
        padding: pixels added on every side.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids.

    Returns:
        Two (B,) int64 tensors, each uniform over 0 ... 2 * padding; ``padding`` is the unshifted image.
    """
    choices = 2 * padding + 1
    top = (uniform(seed, epoch, indices, STREAM_CROP_Y) * choices).to(torch.int64)
    left = (uniform(seed, epoch, indices, STREAM_CROP_X) * choices).to(torch.int64)
    return top, left


def random_crop(images: Tensor, padding: int, *, seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Pad with zeros (black, before normalisation) and cut a window of the original size, one per sample.

    Args:
        images: (B, C, H, W) uint8.
        padding: pixels added on every side.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids on the device of ``images``.

    Returns:
        (B, C, H, W) uint8, contiguous.
    """
    batch, channels, height, width = images.shape
    top, left = crop_offsets(padding, seed=seed, epoch=epoch, indices=indices)
    padded = pad(images.contiguous(), (padding, padding, padding, padding))
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * padded[0, 0].numel()
    rows = (torch.arange(height, device=images.device) + top[:, None])[:, None] * padded.shape[-1]  # (B, 1, H)
    starts = planes + rows + left[:, None, None]  # (B, C, H): where each row of each window begins in memory
    # Every row that could be cut, overlapping: copying rows takes a quarter of the time of copying value by value.
    every_row = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
    return every_row.index_select(0, starts.flatten()).view(images.shape)


def random_flip(images: Tensor, *, seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Mirror each sample left to right with probability one half.

    Args:
        images: (B, C, H, W) uint8.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids on the device of ``images``.

    Returns:
        (B, C, H, W) uint8.
    """
    mirrored = uniform(seed, epoch, indices, STREAM_FLIP) < 0.5  # (B,)
    both = torch.cat([images, images.flip(-1)])
    # index_select copies whole images, which is several times as fast as torch.where.
    return both.index_select(0, torch.arange(len(images), device=images.device) + mirrored * len(images))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return ``(images / 255 - mean) / std``, the same bits as torchvision's ``ToTensor`` and ``Normalize``.

    Args:
        images: (B, C, H, W) uint8.
        mean: C channel means on the [0, 1] scale.
        std: C channel standard deviations on the [0, 1] scale, each > 0.

    Returns:
        (B, C, H, W) float32, contiguous.
    """
    scaled = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) float32."""
    return _made(values, device) if torch.compiler.is_compiling() else _kept(values, device)


def _made(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


# Copying it to a GPU for every batch would wait for the GPU each time; a compiled graph has it as a constant.
_kept = lru_cache(maxsize=64)(_made)
