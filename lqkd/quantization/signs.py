"""Negative values at quantizers that were fitted to data without any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lqkd.quantization.calibrate import quantizers
from lqkd.quantization.quantizers import LSQPlus, Quantizer
from lqkd.quantization.quantizers.base import max_over_ranks


class NegativeWatch:
    """Watches what reaches the quantizers of activations whose grid begins at zero, until it is closed.

    Whether a grid has negative values is decided by the first batch. LSQ+ is left out, which learns where its grid
    begins.

    Args:
        model: a network with fitted quantizers, which is then called without a compiler; nothing waits for the device.

    Examples:
        >>> from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
        >>> model, _ = quantize_model(nn.Sequential(nn.Linear(4, 2)), Recipe())
        >>> initialize_quantizers(model, torch.rand(16, 4))
        >>> watch = NegativeWatch(model)
        >>> _ = model.eval()(torch.full((1, 4), -2.0))
        >>> watch.close()
        {'0.input_quantizer': -2.0}
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = {name: q for name, q in quantizers(model).items() if q.batched and _begins_at_zero(q)}
        self._lowest = {name: quantizer.levels().detach().new_zeros(()) for name, quantizer in self._watched.items()}
        self._handles = [q.register_forward_pre_hook(self._hook(name)) for name, q in self._watched.items()]

    def __bool__(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._watched)

    def _hook(self, name: str) -> Any:
        def look(quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel():
                lowest = self._lowest[name]
                self._lowest[name] = torch.minimum(lowest, inputs[0].detach().amin().to(lowest.dtype))

        return look

    def close(self) -> dict[str, float]:
        """Stop watching, and return the lowest value that reached each quantizer where it was clipped by half a step.

        Under ``torch.distributed`` all processes call this together and get the same.
        """
        for handle in self._handles:
            handle.remove()
        if not self._watched:
            return {}
        lowest = (-max_over_ranks(-torch.stack(list(self._lowest.values())))).tolist()
        halves = [float(q.levels().detach().diff().amin()) / 2 for q in self._watched.values()]
        pairs = zip(self._watched, lowest, halves, strict=True)
        return {name: value for name, value, half in pairs if value < -half}


def _begins_at_zero(quantizer: Quantizer) -> bool:
    fixed = quantizer.is_ready and quantizer.signed is False and not isinstance(quantizer, LSQPlus)
    return fixed and float(quantizer.levels().detach().amin()) >= 0
