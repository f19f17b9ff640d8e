"""A picture of where on photographs the learned weights lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor

from lqkd.callbacks.regularizer.photographs import COUNT, Photographs
from lqkd.utils import figures
from lqkd.utils.figures import HEIGHT, canvas

_PANELS = 3
"""Taps, at most, that are drawn: the first, the last and what is between."""
_SAME = 1.05
"""Part of the smallest weight from which the largest is told apart."""


def over_photographs(photographs: Photographs) -> Figure:
    """The photographs, and beside them, for each tap, the weight of every place laid over them."""
    images, taps = photographs
    chosen = sorted({round(i * (len(taps) - 1) / max(1, _PANELS - 1)) for i in range(_PANELS)})
    weights = [taps[tap].clamp_min(1e-4) for tap in chosen]
    low, high = min(float(one.min()) for one in weights), max(float(one.max()) for one in weights)
    told = f"On these photographs a place counts from {low:.2g} to {high:.2g}"
    if high < _SAME * low:
        told, high = f"On these photographs every place counts as much: {low:.2g}", _SAME * low
    names = [f"weight of {taps[tap].shape[1]} x {taps[tap].shape[2]} places" for tap in chosen]
    rows = 2 if len(names) == _PANELS else 1  # four beside each other would be small
    figure, panels = canvas(told, ["as the student sees them", *names], rows * HEIGHT, fitted=True, rows=rows)
    seen = _mosaic(_stretched(images))
    grey = seen.mean(-1)
    panels[0].imshow(seen if seen.shape[-1] == 3 else grey, cmap="gray", interpolation="nearest")
    for axes, one in zip(panels[1:], weights, strict=True):
        over = F.interpolate(one[:, None], images.shape[-2:], mode="nearest")
        axes.imshow(grey, cmap="gray", interpolation="nearest")
        drawn = axes.imshow(
            _mosaic(over)[..., 0], cmap="viridis", norm=LogNorm(low, high), alpha=0.65, interpolation="nearest"
        )
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
    figures.scale_beside(figure, panels, drawn, "weight of a place")
    scale = drawn.colorbar.ax.yaxis  # type: ignore[union-attr]
    for formatted in (scale.set_major_formatter, scale.set_minor_formatter):
        formatted(StrMethodFormatter("{x:.2g}"))
    return figure


def _stretched(images: Tensor) -> Tensor:
    """Each from its darkest to its brightest value, as [0, 1]: what they were normalised by is not known."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)


def _mosaic(images: Tensor) -> np.ndarray[Any, Any]:
    """(N, C, H, W) as rows and columns of one picture (H', W', C)."""
    rows = [torch.cat([*row], dim=-1) for row in images.split(COUNT // 2)]
    return torch.cat(rows, dim=-2).permute(1, 2, 0).numpy()
