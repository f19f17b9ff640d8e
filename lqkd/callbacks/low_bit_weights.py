"""The layers of a student that the callbacks against oscillations work on, checked before the first batch."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization.analysis.oscillation import MOST_BITS, refusal, weight_layers
from lqkd.quantization.layers import QuantizedLayer


def distill_module(callback: str, module: LightningModule) -> DistillModule:
    """``module`` as what it must be for ``callback``.

    Raises:
        UsageError: when it is another kind of module.
    """
    if not isinstance(module, DistillModule):
        raise UsageError(f"{callback} needs a DistillModule: {type(module).__name__} has no quantised weights")
    return module


def low_bit_layers(callback: str, module: DistillModule) -> dict[str, QuantizedLayer]:
    """The layers whose weights the recipe gives at most ``MOST_BITS`` bits, by name.

    Raises:
        UsageError: when there is none, one's levels are not on the scale of its weights, or two share their weights.
    """
    low = {layer.name for layer in module.coverage.layers if layer.weight_bits <= MOST_BITS}
    layers = {name: layer for name, layer in weight_layers(module.student).items() if name in low}
    if not layers:
        raise UsageError(f"{callback} is for weights of at most {MOST_BITS} bits: this student has none")
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        assert layer.weight_quantizer is not None
        reason = refusal(layer.weight_quantizer)
        if reason is not None:
            raise UsageError(
                f"{callback} cannot work on layer {name!r} ({reason}): use lsq, lsq_plus, lsq_ewgs, minmax or mse for "
                "its weights"
            )
        if owners.setdefault(id(layer.weight), name) != name:
            raise UsageError(f"{callback} cannot work on {name!r} and {owners[id(layer.weight)]!r}: they share weights")
    return layers


def active(layer: QuantizedLayer) -> bool:
    """Whether the weights have at most ``MOST_BITS`` bits now: a bit-width schedule may still give them more."""
    quantizer = layer.weight_quantizer
    return quantizer is not None and quantizer.is_ready and quantizer.bits <= MOST_BITS
