"""torchvision's attention in shifted windows (Swin) through its layers, which are quantised and exported then.

torchvision hands the weights of its two layers to a function, where no quantizer reaches them. Here the same is
computed by calling the layers (Liu et al., "Swin Transformer", arXiv 2103.14030, section 3.2, and "Swin Transformer
V2", arXiv 2111.09883, section 3.3). Importing this imports torchvision: whoever has not has no such network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from lqkd.quantization.products import AttentionProducts

MASKED = -100.0
"""What is added to the score of two positions that are neighbours only since the map was shifted around."""


def call_window_layers(model: nn.Module) -> None:
    """Let attention in shifted windows call its layers, in place; no parameter changes, and no result."""
    for module in model.modules():
        own = _OWN.get(type(module))
        if own is not None:
            module.__class__ = own
            module.register_module("products", None)


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a trace that does not know sizes stop at ``function``, which decides by them."""

    @wraps(function)
    def called(*args: Any) -> Any:
        proxy = next((x for x in args if isinstance(x, fx.Proxy)), None)
        if proxy is not None and not isinstance(proxy.shape, tuple):
            return proxy.tracer.create_proxy("call_function", called, args, {})
        return function(*args)

    return called


def _geometry(
    x: Tensor, window: list[int], shift: list[int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Sides of the map (B, H, W, C), of the padded map, its numbers of windows, and by how much it is shifted.

    An axis with a single window is not shifted.
    """
    height, width = x.shape[1], x.shape[2]
    counts = (math.ceil(height / window[0]), math.ceil(width / window[1]))
    padded = (counts[0] * window[0], counts[1] * window[1])
    shifts = (shift[0] if counts[0] > 1 else 0, shift[1] if counts[1] > 1 else 0)
    return (height, width), padded, counts, shifts


@_whole
def _parted(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """(B, H, W, C) as windows, (B * windows, positions, C), padded with zeros at the right and bottom and shifted."""
    sides, padded, counts, shifts = _geometry(x, window, shift)
    x = F.pad(x, (0, 0, 0, padded[1] - sides[1], 0, padded[0] - sides[0]))
    if any(shifts):
        x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
    channels = x.shape[3]
    x = x.reshape(-1, counts[0], window[0], counts[1], window[1], channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window[0] * window[1], channels)


@_whole
def _joined(windows: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """What :func:`_parted` made of a map like ``x``, as a map again."""
    sides, padded, counts, shifts = _geometry(x, window, shift)
    channels = windows.shape[2]
    joined = windows.reshape(-1, counts[0], counts[1], window[0], window[1], channels).permute(0, 1, 3, 2, 4, 5)
    joined = joined.reshape(-1, padded[0], padded[1], channels)
    if any(shifts):
        joined = torch.roll(joined, shifts, (1, 2))
    return joined[:, : sides[0], : sides[1]]


@_whole
def _unmasked(scores: Tensor, x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """Scores (B * windows, heads, positions, positions), less where two positions come from two edges of the map."""
    _, padded, counts, shifts = _geometry(x, window, shift)
    if not any(shifts):
        return scores
    regions = torch.zeros(padded, device=x.device)
    for axis in (0, 1):
        edge = torch.arange(padded[axis], device=x.device)
        region = (edge >= padded[axis] - window[axis]).float() + (edge >= padded[axis] - shifts[axis]).float()
        regions += (region * 3**axis).view(-1, 1) if axis == 0 else region * 3**axis
    regions = regions.reshape(counts[0], window[0], counts[1], window[1]).transpose(1, 2)
    regions = regions.reshape(counts[0] * counts[1], window[0] * window[1])
    apart = (regions.unsqueeze(1) != regions.unsqueeze(2)).to(scores.dtype) * MASKED
    heads, positions = scores.shape[1], scores.shape[2]
    by_map = scores.reshape(-1, counts[0] * counts[1], heads, positions, positions)
    return (by_map + apart.unsqueeze(1)).reshape(-1, heads, positions, positions)


class _Layers:
    """Attention in windows that calls its layers; the rest is torchvision's."""

    qkv: nn.Linear
    proj: nn.Linear
    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    training: bool
    get_relative_position_bias: Callable[[], Tensor]
    products: AttentionProducts | None
    calls_layers = True
    """What tells these classes from others to whoever does not import torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        """A map of the same shape, (B, H, W, C)."""
        windows = _parted(x, self.window_size, self.shift_size)
        parts = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]  # (B * windows, heads, positions, width)
        scores = self.scores(query, key) + self.get_relative_position_bias()
        weights = _unmasked(scores, x, self.window_size, self.shift_size).softmax(-1)
        dropout = self.attention_dropout if self.training else 0.0
        if self.products is None:
            attended = F.dropout(weights, dropout) @ value
        else:
            attended, _ = self.products.weighed(weights, value, dropout)
        attended = F.dropout(self.proj(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        joined: Tensor = _joined(attended, x, self.window_size, self.shift_size)
        return joined

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled products."""
        scale = (self.qkv.in_features // self.num_heads) ** -0.5
        if self.products is None:
            return (query * scale) @ key.transpose(-2, -1)
        return self.products.scores(query, key) * scale


class WindowAttention(_Layers, ShiftedWindowAttention):  # type: ignore[misc]
    """Swin's attention in shifted windows."""


class WindowAttentionV2(_Layers, ShiftedWindowAttentionV2):  # type: ignore[misc]
    """Swin V2's, which compares directions; keys have no bias, whatever a step has made of its zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """A map of the same shape, (B, H, W, C)."""
        if self.qkv.bias is not None and isinstance(x, Tensor):  # torchvision leaves it out; a step may have moved it
            with torch.no_grad():
                self.qkv.bias.chunk(3)[1].zero_()
        return super().forward(x)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Cosines over a learned temperature, at least 0.01."""
        temperature = torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        product = query @ key.transpose(-2, -1) if self.products is None else self.products.scores(query, key)
        return product * temperature


_OWN: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: WindowAttention,
    ShiftedWindowAttentionV2: WindowAttentionV2,
}
