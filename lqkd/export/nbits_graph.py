"""A graph of ONNX in the making, with layers whose weights are codes in groups along the input axis."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization import Quantizer
from lqkd.quantization.codes import check_finite, check_fitted
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import LSQ, SEQ

RUNTIME_DOMAIN = "com.microsoft"
OPSET = 21
WIDTHS = (2, 4, 8)
"""Bits of codes that MatMulNBits reads."""
GROUPS = (16, 32, 64, 128, 256)
"""Of what sizes its groups are."""


class Packed(NamedTuple):
    """A weight on a grid within a graph: names of initializers, and sizes."""

    codes: str
    """(N, groups, size * bits / 8) uint8."""
    scales: str
    """(N, groups) float32."""
    zero: str | None
    """(1,) float32: where zero is between two codes; None where it is the code in the middle."""
    blocks: tuple[int, int]
    """N and groups."""
    bits: int
    size: int


class Graph:
    """Nodes and initializers; a call adds a node and gives the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._packed: dict[int, Packed] = {}

    def __call__(self, operation: str, *inputs: str, results: int = 1, **attributes: Any) -> Any:
        names = [f"{operation.lower()}_{len(self.nodes)}" + (f"_{place}" if place else "") for place in range(results)]
        self.nodes.append(helper.make_node(operation, list(inputs), names, **attributes))
        return names[0] if results == 1 else names

    def hold(self, name: str, values: np.ndarray) -> str:
        """An initializer."""
        self.initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.hold(f"float_{value!r}", np.array(value, np.float32))

    def axes(self, *values: int) -> str:
        """An int64 vector, of axes or of a shape."""
        return self.hold("shape_" + "_".join(map(str, values)), np.array(values, np.int64))

    def reshape(self, x: str, *shape: int) -> str:
        """Where 0 is the axis as it was, -1 the rest."""
        return self("Reshape", x, self.axes(*shape))

    # ---- layers

    @torch.no_grad()
    def linear(self, x: str, layer: nn.Module, name: str) -> str:
        """``x`` through a linear layer, quantised or not."""
        weight = cast(Tensor, layer.weight)
        if getattr(layer, "weight_quantizer", None) is None:
            held = self.hold(f"{name}.weight", _finite(weight, name).t().numpy())
            product = self("MatMul", x, held)
        else:
            packed = self._codes(layer, name)
            product = self(
                "MatMulNBits",
                x,
                packed.codes,
                packed.scales,
                # One number in the file, and (N, groups) of them once ONNX Runtime has folded constants.
                *([] if packed.zero is None else [self("Expand", packed.zero, self.axes(*packed.blocks))]),
                domain=RUNTIME_DOMAIN,
                K=weight.shape[1],
                N=weight.shape[0],
                bits=packed.bits,
                block_size=packed.size,
                accuracy_level=1,  # sums in float32, as in training
            )
        bias = cast("Tensor | None", layer.bias)
        return product if bias is None else self("Add", product, self.hold(f"{name}.bias", _finite(bias, name).numpy()))

    @torch.no_grad()
    def embedding(self, tokens: str, layer: nn.Module, name: str) -> str:
        """The rows of an embedding, quantised or not; codes are turned into numbers for these rows alone."""
        weight = cast(Tensor, layer.weight)
        if getattr(layer, "weight_quantizer", None) is None:
            return self("Gather", self.hold(f"{name}.weight", _finite(weight, name).numpy()), tokens)
        codes, scales, zero, _, bits, size = self._codes(layer, name)
        rows = self("Gather", codes, tokens)  # (B, T, groups, bytes)
        if bits < 8:
            mask = self.hold(f"mask_{bits}", np.array(2**bits - 1, np.uint8))
            shifts = [
                self.hold(f"shift_{bits * place}", np.array(bits * place, np.uint8)) for place in range(8 // bits)
            ]
            parts = [self("BitwiseAnd", self("BitShift", rows, by, direction="RIGHT"), mask) for by in shifts]
            rows = self("Concat", *(self("Unsqueeze", part, self.axes(-1)) for part in parts), axis=-1)
            rows = self.reshape(rows, 0, 0, weight.shape[1] // size, size)
        numbers = self("Sub", self("Cast", rows, to=TensorProto.FLOAT), zero or self.number(2.0 ** (bits - 1)))
        steps = self("Unsqueeze", self("Gather", scales, tokens), self.axes(-1))  # (B, T, groups, 1)
        return self.reshape(self("Mul", numbers, steps), 0, 0, weight.shape[1])

    def _codes(self, layer: nn.Module, name: str) -> Packed:
        """A weight as it is held, once for all layers that share it."""
        weight = cast(Tensor, layer.weight)
        if id(weight) not in self._packed:
            quantizer = check_grid(layer, name)
            codes, scales, bits = codes_and_scales(quantizer, weight, name)
            shift = quantizer.shift if isinstance(quantizer, SEQ) else 0.0
            zero = np.array([2 ** (bits - 1) - shift], np.float32)
            self._packed[id(weight)] = Packed(
                self.hold(f"{name}.codes", pack(codes, bits)),
                self.hold(f"{name}.scales", scales),
                self.hold(f"{name}.zero", zero) if shift else None,
                scales.shape,
                bits,
                cast(int, quantizer.group_size),
            )
        return self._packed[id(weight)]


IN_FLOAT = "give it activation_bits: 32 in a rule, or the recipe 32 activation bits and last_layer_bits: null"
"""What helps where a file would need a grid for activations."""


def check_grid(layer: nn.Module, name: str) -> Quantizer:
    """The quantizer of a layer's weight, where MatMulNBits has its grid.

    Raises:
        UsageError: where it has not.
    """
    quantized = cast(QuantizedLayer, layer)
    quantizer = quantized.weight_quantizer
    widths = range(2, 9) if isinstance(quantizer, LSQ) else range(2, 5) if isinstance(quantizer, SEQ) else ()
    if quantizer is None or quantizer.group_size not in GROUPS or quantizer.bits not in widths:
        kind = f"{type(quantizer).__name__}" + ("" if getattr(quantizer, "group_size", None) else " without groups")
        raise UsageError(
            f"the weight of {name} is on the grid of {kind}, which MatMulNBits does not have: train with "
            "quantization.bits=q4_0, q8_0 or tq2_0, or with lsq, or seq up to 4 bits, and a group_size of "
            f"{', '.join(map(str, GROUPS))}"
        )
    if quantized.input_quantizer is not None:
        raise UsageError(f"the input of {name} is on a grid, which a file of --format nbits does not have: {IN_FLOAT}")
    if quantized.output_scale is not None:
        raise UsageError(f"the weight of {name} has a factor of a folded batch norm, which MatMulNBits does not have")
    return quantizer


@torch.no_grad()
def codes_and_scales(quantizer: Quantizer, weight: Tensor, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Codes (N, groups, size) uint8 from 0 on, scales (N, groups) float32, and the bits that a code takes.

    Raises:
        UsageError: when the training has failed.
    """
    check_fitted(quantizer, name)
    check_finite(weight, name, "weight")
    check_finite(cast("LSQ | SEQ", quantizer).scale, name, "scale")
    bits = next(width for width in WIDTHS if width >= quantizer.bits)
    size = cast(int, quantizer.group_size)
    codes = quantizer.codes(weight).reshape(len(weight), -1, size).numpy() + 2 ** (bits - 1)
    return codes.astype(np.uint8), cast("LSQ | SEQ", quantizer).step().reshape(len(weight), -1).numpy(), bits


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, groups, size) as bytes (N, groups, size * bits / 8), the first in the lowest bits."""
    apart = codes.reshape(*codes.shape[:2], -1, 8 // bits)
    return np.bitwise_or.reduce(apart << (bits * np.arange(8 // bits, dtype=np.uint8)), axis=-1).astype(np.uint8)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """What :func:`pack` has packed."""
    apart = (packed[..., None] >> (bits * np.arange(8 // bits, dtype=np.uint8))) & (2**bits - 1)
    return apart.reshape(*packed.shape[:2], -1)


def _finite(values: Tensor, name: str) -> Tensor:
    check_finite(values, name, "number")
    return values
