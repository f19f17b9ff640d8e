"""Mixup and CutMix, replayable: each image is mixed with another training image that its own numbers choose.

A partner within the batch, as is usual, depends on who else is in the batch: on the batch size, the number of
processes and the order. Here the partner is drawn from the whole training set, so that a mixed image, like any other
augmented image, is a function of (seed, epoch, sample id) alone. That needs the training images at hand, in memory.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lqkd.data.augment_erase import box_mask
from lqkd.utils.counter_rng import (
    STREAM_CUTMIX_X,
    STREAM_CUTMIX_Y,
    STREAM_MIX,
    STREAM_MIX_KIND,
    STREAM_MIX_PARTNER,
    STREAM_MIX_SHARE,
    integers,
    uniform,
)

_QUANTILES = 2**14


def choose_partners(candidates: Tensor, *, seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Return the partner of each sample, uniform over all candidates but the sample itself.

    Args:
        candidates: (N,) int64 stable sample ids, sorted.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids, each of them among the candidates.

    Returns:
        (B,) int64 stable sample ids. Where there is one candidate only, it is its own partner.
    """
    own = torch.searchsorted(candidates, indices.contiguous())
    others = len(candidates) - 1
    further = 1 + integers(seed, epoch, indices, STREAM_MIX_PARTNER, max(1, others))
    return candidates[(own + further) % len(candidates)]


def mix(
    images: Tensor,
    partners: Tensor,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    seed: int,
    epoch: int | Tensor,
    indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner by mixup or CutMix; where both are on, each has half of the mixed images.

    Args:
        images: (B, C, H, W) float32; it and ``partners`` are overwritten.
        partners: (B, C, H, W) float32.
        mixup: alpha of mixup's Beta(alpha, alpha) distribution of shares; 0 means no mixup.
        cutmix: likewise of CutMix; one of the two is above 0.
        probability: that an image is mixed at all.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids of ``images`` on their device.

    Returns:
        The mixed images (B, C, H, W) float32, and (B,) float32 shares of ``images`` in them, 0 ... 1, which are also
        the weights of the labels.
    """
    cut = torch.full_like(indices, bool(cutmix), dtype=torch.bool)
    if mixup and cutmix:
        cut = uniform(seed, epoch, indices, STREAM_MIX_KIND) < 0.5
    mixed = uniform(seed, epoch, indices, STREAM_MIX) < probability
    share = torch.ones(len(images), device=images.device)
    of_mixup, of_cutmix = quantiles((mixup or 1.0, cutmix or 1.0), images.device)
    if mixup:
        share = torch.where(mixed & ~cut, shares(of_mixup, seed=seed, epoch=epoch, indices=indices), share)
    keep = share[:, None, None, None]  # of each pixel the image's own share
    if cutmix:
        drawn = shares(of_cutmix, seed=seed, epoch=epoch, indices=indices)
        drawn = torch.where(mixed & cut, drawn, 1)  # the others get an empty rectangle
        inside = cut_boxes(drawn, *images.shape[-2:], seed=seed, epoch=epoch, indices=indices)
        keep = keep * (1 - inside)  # (B, 1, H, W)
        share = share * (1 - inside.mean(dim=(1, 2, 3)))
    return blend(images, partners, keep), share


def shares(quantiles: Tensor, *, seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Return each sample's own share: (B,) float32, one of the equally likely ``quantiles`` (16384,) of a Beta."""
    return quantiles[integers(seed, epoch, indices, STREAM_MIX_SHARE, _QUANTILES)]


def blend(images: Tensor, partners: Tensor, keep: Tensor) -> Tensor:
    """Return ``keep * images + (1 - keep) * partners``.

    With one share an image it is mixup (Zhang et al., arXiv 1710.09412, equation 1), with a mask of ones and zeros it
    is CutMix (Yun et al., arXiv 1905.04899, equation 1).

    Args:
        images: (B, C, H, W) float32; it and ``partners`` are overwritten, which spares the CPU two fresh copies.
        partners: (B, C, H, W) float32.
        keep: (B, 1, 1, 1) or (B, 1, H, W) float32, 0 ... 1.

    Returns:
        ``images``.
    """
    return images.mul_(keep).add_(partners.mul_(1 - keep))


def cut_boxes(share: Tensor, height: int, width: int, *, seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Return where CutMix shows the partner (Yun et al., arXiv 1905.04899, equation 2).

    A rectangle in the image's proportions with ``1 - share`` of its area, centred on any pixel and cut off at the
    borders; as in torchvision, half its sides are rounded down.

    Args:
        share: (B,) float32 of the image itself, before anything is cut off.
        height: of the images.
        width: of the images.
        seed: the run's seed.
        epoch: the epoch, counted from 0; a 0-dim int64 tensor in a graph.
        indices: (B,) int64 stable sample ids on the device of ``share``.

    Returns:
        (B, 1, H, W) float32, 1 where the partner is shown and 0 elsewhere.
    """
    half = 0.5 * (1 - share).sqrt()
    tall, wide = (half * height).long(), (half * width).long()
    y = integers(seed, epoch, indices, STREAM_CUTMIX_Y, height)
    x = integers(seed, epoch, indices, STREAM_CUTMIX_X, width)
    return box_mask(y - tall, x - wide, y + tall, x + wide, height, width)


def quantiles(alphas: tuple[float, ...], device: torch.device) -> Tensor:
    """Return 16,384 equally likely quantiles of Beta(alpha, alpha) for each alpha: (N, 16384) float32."""
    return _kept(alphas, device)


# A compiled graph has them as a constant, for which a function may be called once only.
quantiles._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=16)
def _kept(alphas: tuple[float, ...], device: torch.device) -> Tensor:
    from scipy.special import betaincinv

    middles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return torch.from_numpy(np.stack([betaincinv(alpha, alpha, middles) for alpha in alphas])).to(device, torch.float32)
