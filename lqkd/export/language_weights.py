"""Which weights a file of a language model has on grids, and that nothing else is on one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization import Quantizer, quantizers
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.products import AttentionProducts


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer, Quantizer]]:
    """Name, layer and quantizer of what has a quantised weight."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            yield name, module, module.weight_quantizer


def check_unfolded(name: str, layer: QuantizedLayer, file: str) -> None:
    """Refuse a weight that a batch norm was folded into, whose factor ``file`` has no place for.

    Raises:
        UsageError: then.
    """
    if layer.output_scale is not None:
        raise UsageError(f"the weight of {name} has a factor of a folded batch norm, which {file} does not have")


def check_weights_alone(model: nn.Module, told: str) -> None:
    """Refuse a network that has anything but weights on grids.

    Args:
        model: quantised.
        told: what comes behind "puts activations on a grid, which" in the message.

    Raises:
        UsageError: then.
    """
    held = {quantizer for _, _, quantizer in quantized_weights(model)}
    for name, quantizer in quantizers(model).items():
        owner = name.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), AttentionProducts):
            raise UsageError(
                f"attention {owner.rpartition('.')[0]!r} multiplies on grids, which no file of a language model has: "
                "train with quantization.attention_bits=null, or 32 in a rule"
            )
        if quantizer not in held:
            raise UsageError(f"{name} puts activations on a grid, which {told}")
