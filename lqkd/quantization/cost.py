"""What a quantised network costs: bytes, multiply-accumulates and bit operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from lqkd.quantization.calibrate import float_mode, without_compiler
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.modes import evaluating
from lqkd.quantization.ports import is_inside
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.recipe import FLOAT_BITS


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Attributes:
        parameters: number of parameters without those of the quantizers.
        float_bytes: all of them, and the buffers of batch norm, in float32.
        packed_bytes: quantised weights at their own number of bits, packed without gaps per layer, plus the
            quantizers' parameters, which take 2 bytes in the blocks of a GGUF file and 4 otherwise, and everything else
            in float32.

    Examples:
        >>> size(nn.Linear(10, 4))
        Size(parameters=44, float_bytes=176, packed_bytes=176)
    """

    parameters: int
    float_bytes: int
    packed_bytes: int


def size(model: nn.Module) -> Size:
    """Count each tensor of ``model`` once, whatever number of names it has.

    Args:
        model: any network, quantised or not.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> recipe = Recipe("w4a4", first_layer_bits=None, last_layer_bits=None)
        >>> model, _ = quantize_model(nn.Sequential(nn.Linear(100, 10)), recipe)
        >>> size(model).float_bytes, size(model).packed_bytes  # 500 for the weights, 40 the bias, 44 the steps
        (4040, 584)
    """
    packed: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            packed[id(module.weight)] = math.ceil(module.weight.numel() * module.weight_quantizer.bits / 8)
    quantizer_tensors = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, Quantizer)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in quantizer_tensors}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in quantizer_tensors)
    float_bytes = sum(4 * t.numel() for t in tensors.values() if t.is_floating_point())
    packed_bytes = sum(packed.get(key, 4 * t.numel()) for key, t in tensors.items() if t.is_floating_point())
    packed_bytes += sum(module.overhead_bytes() for module in model.modules() if isinstance(module, Quantizer))
    return Size(parameters, float_bytes, packed_bytes)


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one forward pass; a layer that is called several times counts each call.

    Attributes:
        name: of the layer in its network.
        weight_bits, activation_bits: 32 for floating point.
        weights: number of weights, without the bias.
        packed_bytes: of the weights at their number of bits.
        multiplications: multiply-accumulates (MACs).

    Examples:
        >>> cost = LayerCost("fc", weight_bits=4, activation_bits=8, weights=100, packed_bytes=50, multiplications=100)
        >>> cost.bit_operations
        3200
    """

    name: str
    weight_bits: int
    activation_bits: int
    weights: int
    packed_bytes: int
    multiplications: int

    @property
    def bit_operations(self) -> int:
        """Multiply-accumulates times weight bits times activation bits."""
        return self.multiplications * self.weight_bits * self.activation_bits


def bit_operations(model: nn.Module, *inputs: Tensor, keywords: Mapping[str, Any] | None = None) -> int:
    """Bit operations of one forward pass: those of its layers, summed; see :func:`layer_costs`.

    Args:
        model: a network with quantised layers; float operands count 32 bits.
        *inputs: one sample with its batch axis, (1, C, H, W) say.
        keywords: inputs that the network takes by name.

    Examples:
        >>> bit_operations(nn.Sequential(nn.Linear(100, 10)), torch.randn(1, 100))  # 1000 MACs of 32 times 32 bits
        1024000
    """
    return sum(layer.bit_operations for layer in layer_costs(model, *inputs, keywords=keywords))


@torch.no_grad()
def layer_costs(model: nn.Module, *inputs: Tensor, keywords: Mapping[str, Any] | None = None) -> list[LayerCost]:
    """The cost of each layer that a forward pass calls, in the order of the calls.

    Args:
        model: a network with quantised layers; float operands count 32 bits.
        *inputs: one sample with its batch axis, (1, C, H, W) say.
        keywords: inputs that the network takes by name.

    Convolutions, transposed convolutions, linear layers and the projections of attention are counted; the two
    products inside attention and everything outside of layers are not.

    Examples:
        >>> layer_costs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(1, 3, 8, 8))
        [LayerCost(name='0', weight_bits=32, activation_bits=32, weights=216, packed_bytes=864, multiplications=7776)]
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        found[module] = found.get(module, 0) + _multiplications(module, inputs, output)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, tuple(QUANTIZED_LAYERS))]
    try:
        with evaluating(model):
            model(*inputs, **(keywords or {}))
    finally:
        for hook in hooks:
            hook.remove()
    return [_layer_cost(names[module], module, multiplications) for module, multiplications in found.items()]


def operation_shares(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """The share of every module in the multiply-accumulates of a forward pass, by its name, without its children's.

    Unlike :func:`layer_costs` this sees modules of any class, and the products that functions compute between them.
    Modules whose operations PyTorch does not count, such as a fused LSTM, are left out.

    Args:
        model: any network; it runs in floating point.
        *inputs: one sample with its batch axis, or more.

    Examples:
        >>> network = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 30))
        >>> shares = operation_shares(network, torch.randn(1, 10))
        >>> shares["0"], shares["2"]
        (0.25, 0.75)
    """
    counter = FlopCounterMode(display=False)
    # With gradients there is no fused attention, which is not counted.
    with evaluating(model), float_mode(model), without_compiler(model), torch.enable_grad(), counter:
        model(*inputs)
    names = {f"{type(model).__name__}.{name}".rstrip("."): name for name, _ in model.named_modules()}
    counts = {names[key]: sum(found.values()) for key, found in counter.get_flop_counts().items() if key in names}
    own = dict(counts)
    for name, count in counts.items():
        above = [other for other in counts if name != other and (other == "" or is_inside(name, other))]
        if above:
            own[max(above, key=len)] -= count
    total = max(sum(own.values()), 1)
    return {name: count / total for name, count in own.items()}


def _layer_cost(name: str, module: nn.Module, multiplications: int) -> LayerCost:
    quantizers = [getattr(module, key, None) for key in ("weight_quantizer", "input_quantizer")]
    weight_bits, activation_bits = (FLOAT_BITS if q is None else q.bits for q in quantizers)
    weights = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
    return LayerCost(name, weight_bits, activation_bits, weights, math.ceil(weights * weight_bits / 8), multiplications)


def _multiplications(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> int:
    """Multiply-accumulates of one call of a layer; those of a float attention include its output projection."""
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        query, key, value = inputs[:3]
        projections = query.numel() * width + key.numel() * width + value.numel() * width
        return projections if isinstance(module, QuantizedLayer) else projections + output[0].numel() * width
    if isinstance(module, _ConvTransposeNd):
        return inputs[0].numel() * module.weight[0].numel()
    assert isinstance(module.weight, Tensor)
    return output.numel() * module.weight[0].numel()
