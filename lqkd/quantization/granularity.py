"""Which values of a weight share a grid: those of a channel, of a group along the input axis, or all."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import Dynamic, LevelwiseStep, Quantizer
from lqkd.quantization.recipe import LayerSettings, find_quantizer


def grids(layer: nn.Module, weight: Tensor, settings: LayerSettings, axis: int, kind: str) -> dict[str, int | None]:
    """Which values of a weight share a grid, as arguments of its quantizer: ``channels``, their axis, ``group_size``.

    Args:
        layer: quantised already or not.
        weight: its own.
        settings: what the recipe says about it.
        axis: of its channels.
        kind: what messages call it.

    Raises:
        UsageError: when there cannot be such groups.
    """
    group = settings.group_size
    block = find_quantizer(settings.weight_quantizer)[0].block_size
    if group is None and block is None:
        return {"channels": weight.shape[axis] if settings.per_channel else None, "channel_axis": axis}
    asked = f"weight_quantizer={settings.weight_quantizer!r}" if group is None else f"group_size={group!r}"
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 2):
        raise UsageError(f"{asked} is not possible: it is a whole number from 2 on, such as 32, 64 or 128, or null")
    if block is not None and group not in (None, block):
        raise UsageError(f"{asked} is not possible with {settings.weight_quantizer!r}, whose blocks are of {block}")
    if not isinstance(layer, nn.Linear | nn.Embedding | nn.MultiheadAttention):
        raise UsageError(
            f"{asked} is not possible for a {kind}: groups are along the input axis of linear layers, "
            "embeddings and attention; give it in a rule for these"
        )
    if not settings.per_channel:
        raise UsageError(f"{asked} is not possible with per_channel=false: a group is a part of an output channel")
    size = cast(int, group or block)
    width = weight.shape[-1]
    if width % size:
        raise UsageError(f"{asked} is not possible for inputs of width {width}: groups of {size} must divide it")
    return {"channels": weight.numel() // size, "channel_axis": 0, "group_size": size}


def check_tokens(quantizer: Quantizer, layer: nn.Module | None, place: str) -> None:
    """Refuse to measure tokens where the last axis does not hold one.

    Args:
        quantizer: of activations.
        layer: whose input it is of; None where it is of an addition.
        place: what messages call it.

    Raises:
        UsageError: then.
    """
    if isinstance(quantizer, Dynamic) and not isinstance(layer, nn.Linear | nn.MultiheadAttention):
        raise UsageError(
            f"quantizer dynamic is not possible for a {place}: it has a grid for each vector along the last axis, as "
            "inputs of linear layers and of attention have them; use lsq"
        )


def granularity(quantizer: Quantizer) -> str:
    """The same of a quantizer, in words."""
    if quantizer.group_size is not None:
        return f"in groups of {quantizer.group_size}"
    if isinstance(quantizer, Dynamic):
        return "per token"
    if isinstance(quantizer, LevelwiseStep) and not quantizer.shared:
        return "per call"
    return "per tensor" if quantizer.channels is None else "per channel"
