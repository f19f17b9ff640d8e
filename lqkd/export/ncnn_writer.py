"""Writing a deployed network as ncnn layers, from its own codes and scales.

ncnn's int8 layers quantise their input by rounding half away from zero and clamp it to -127 to 127. So each grid is
written in float32 layers that do what was trained: division by the step (ncnn multiplies by its reciprocal, which is a
unit in the last place apart), rounding half to even, and limits; the int8 layer behind it reads whole numbers with a
scale of 1, which change nothing, and turns its sums to real numbers.
What lies between layers and grids (additions, pooling, activations) runs in float32 on real numbers.

On x86 ncnn (1.0.20261020, ``convolutiondepthwise_x86.cpp``) takes an approximate reciprocal of 12 bits of the scales of
int8 convolutions with groups, so these are written in float32, on whole numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx

from lqkd.errors import UsageError
from lqkd.export.deploy import OUTPUT, Deployed
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer, IntegerLinear, symmetric_padding
from lqkd.export.ncnn_file import Layer, number, written
from lqkd.export.nodes import Operation, place, shape_of
from lqkd.export.operations import operation
from lqkd.models.outputs import heads

NCNN = "ncnn"
"""The format's name, and the target's that it is trained for."""
LARGEST = 127
"""Of the magnitude of a code that an int8 layer reads."""
_ADD, _MULTIPLY, _DIVIDE, _ROUND = "0", "2", "3", "18"
"""Of ncnn's BinaryOp and UnaryOp."""
_ACTIVATIONS = {"Sigmoid": "Sigmoid", "SiLU": "Swish", "Tanh": "TanH", "LeakyRelu": "ReLU"}
"""ncnn's names of those that it computes, in float32."""
_IMAGE = 4
_PLAIN = (2, _IMAGE)
"""Axes of tensors, with that of the batch, which ncnn has not."""


@dataclass(frozen=True)
class Written:
    """A network in ncnn's files.

    Attributes:
        param, content: of ``.param`` and ``.bin``.
        grids: name of each grid's node in the deployed network to the blob with its codes minus that of zero, float32.
        layers: name of each layer that is a product or divides by a step to the module that it has its numbers from,
            and the grid of its input where it reads codes.
    """

    param: str
    content: bytes
    grids: dict[str, str]
    layers: dict[str, tuple[Any, ActivationGrid | None]]


class Writer:
    """Turns the nodes of a deployed network into layers for one sample, in order."""

    def __init__(self, deployed: Deployed) -> None:
        self.network = deployed.network
        placeholders = [node for node in self.network.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip(placeholders, deployed.inputs, strict=True))
        self.layers: list[Layer] = []
        self.reals: dict[fx.Node, str] = {}
        self.codes: dict[fx.Node, tuple[str, ActivationGrid]] = {}
        self.deferred: dict[fx.Node, tuple[fx.Node, float | None, float | None]] = {}
        self.grids: dict[str, str] = {}
        self.origins: dict[str, tuple[Any, ActivationGrid | None]] = {}
        self.calls: Counter[str] = Counter()

    def build(self) -> Written:
        """The files.

        Raises:
            UsageError: for the first operation that they cannot have.
        """
        result: Any = None
        for node in self.network.graph.nodes:
            if node.op == "output":
                result = node.args[0]
                continue
            found = operation(node, self.network)
            if found is None:
                continue
            write = getattr(self, f"_{found.kind}", None)
            if write is None:
                self._refuse(node, getattr(node.target, "__name__", str(node.target)))
            if len(shape_of(node)) not in _PLAIN:
                self._refuse(node, f"a tensor of {len(shape_of(node))} axes")
            write(node, found)
        for name, node in heads(result, OUTPUT).items():
            self._append("Noop", f"{name}.output", [self.real(node)], {}, blob=name)
        return Written(*written(self.layers), self.grids, self.origins)

    def _refuse(self, node: fx.Node, what: str) -> NoReturn:
        raise UsageError(f"--format {NCNN} cannot express {what} in {place(node)}: replace it in the network")

    def _label(self, node: fx.Node) -> str:
        """The name of the module that ``node`` calls, with the number of the call behind the first one."""
        name = str(node.target)
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}_call{self.calls[name] - 1}"

    def _append(
        self, kind: str, name: str, inputs: list[str], parameters: dict[str, str], blob: str = "", **arrays: Any
    ) -> str:
        blob = blob or f"{name}.blob"
        self.layers.append(Layer(kind, name, tuple(inputs), (blob,), parameters, **arrays))
        return blob

    # ---- values

    def real(self, node: fx.Node) -> str:
        """The blob with the real numbers of ``node``."""
        if node in self.reals:
            return self.reals[node]
        if node in self.codes:
            blob, grid = self.codes[node]
            name = f"{node.name}.real"
            self.origins[name] = (grid, None)
            self.reals[node] = self._scalar(_MULTIPLY, name, blob, float(grid.scale))
        else:
            source, low, high = self.deferred[node]
            self.reals[node] = self._limited(node.name, self.real(source), low, high)
        return self.reals[node]

    def _scalar(self, kind: str, name: str, blob: str, value: float) -> str:
        return self._append("BinaryOp", name, [blob], {"0": kind, "1": "1", "2": number(value)})

    def _limited(self, name: str, blob: str, low: float | None, high: float | None) -> str:
        if low is None and high is None:
            return blob
        if (low, high) == (0.0, None):
            return self._append("ReLU", name, [blob], {})
        limits = {key: number(value) for key, value in (("0", low), ("1", high)) if value is not None}
        return self._append("Clip", name, [blob], limits)

    # ---- grids and what they take over

    def _input(self, node: fx.Node, found: Operation) -> None:
        name, shape = self.inputs[node], shape_of(node)[1:]
        sizes = {str(index): str(size) for index, size in enumerate(shape[::-1] if len(shape) == 1 else shape[:0:-1])}
        sizes |= {"2": str(shape[0])} if len(shape) > 1 else {}
        self.reals[node] = self._append("Input", name, [], sizes, blob=name)

    def _identity(self, node: fx.Node, found: Operation) -> None:
        self._clamped(node, found.inputs[0], None, None)

    def _relu(self, node: fx.Node, found: Operation) -> None:
        self._clamped(node, found.inputs[0], 0.0, None)

    def _clamp(self, node: fx.Node, found: Operation) -> None:
        low, high = (found.settings[key] for key in ("low", "high"))
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            self._refuse(node, "limits that are computed")
        self.deferred[node] = (found.inputs[0], low, high)

    def _clamped(self, node: fx.Node, source: fx.Node, low: float | None, high: float | None) -> None:
        if source in self.codes:  # on codes as on real numbers: zero is zero
            blob, grid = self.codes[source]
            self.codes[node] = (self._limited(node.name, blob, low, high), grid)
        else:
            self.deferred[node] = (source, low, high)

    def _grid(self, node: fx.Node, found: Operation) -> None:
        grid, source, clamps = found.settings["module"], found.inputs[0], []
        if type(grid) is not ActivationGrid:
            self._refuse(node, f"activations of {grid.bits} bit")
        while source in self.deferred:
            source, least, most = self.deferred[source]
            clamps.append((least, most))
        low, high = grid.limits(clamps)
        label = self._label(node)
        self.origins[f"{label}.steps"] = (grid, None)
        steps = self._scalar(_DIVIDE, f"{label}.steps", self.real(source), float(grid.scale))
        whole = self._append("UnaryOp", f"{label}.whole", [steps], {"0": _ROUND})
        blob = self._limited(f"{label}.limits", whole, low - grid.zero_point, high - grid.zero_point)
        self.codes[node], self.grids[node.name] = (blob, grid), blob

    # ---- layers

    def _layer(self, node: fx.Node, found: Operation) -> None:
        layer, source, name = found.settings["module"], found.inputs[0], self._label(node)
        grid = self.codes[source][1] if source in self.codes else None
        if isinstance(layer, IntegerLayer) and grid is not None:
            reach = max(abs(grid.low - grid.zero_point), abs(grid.high - grid.zero_point))
            if reach > LARGEST:
                raise UsageError(
                    f"--format {NCNN} cannot express the grid of the input of {place(node)} ({grid.extra_repr()}): "
                    f"an int8 layer of ncnn reads codes from -{LARGEST} to {LARGEST}; train the student with "
                    f"quantization.target={NCNN}"
                )
        else:
            grid = None
        blob = self.codes[source][0] if grid is not None else self.real(source)
        self.origins[name] = (layer, grid)
        arrays = numbers(layer, grid)
        bias, size = int(arrays["bias"] is not None), arrays["weight"].size
        scaled = {} if arrays["scales"] is None else {"8": "1"}
        if isinstance(layer, IntegerLinear | torch.nn.Linear):
            if len(shape_of(source)) == _IMAGE:
                self._refuse(node, "a linear layer on four axes")
            parameters = {"0": str(len(arrays["weight"])), "1": str(bias), "2": str(size)} | scaled
            self.reals[node] = self._append("InnerProduct", name, [blob], parameters, **arrays)
            return
        if len(shape_of(source)) != _IMAGE:
            self._refuse(node, "a convolution over other than two axes")
        padding: Any = layer.padding if isinstance(layer, IntegerLayer) else symmetric_padding(layer, name)
        pairs = {
            ("1", "11"): arrays["weight"].shape[2:],
            ("2", "12"): layer.dilation,
            ("3", "13"): layer.stride,
            ("4", "14"): padding,
        }
        parameters = {"0": str(len(arrays["weight"])), "5": str(bias), "6": str(size)} | scaled
        for (of_width, of_height), (height, width) in pairs.items():
            parameters |= {of_width: str(width), of_height: str(height)}
        grouped = layer.groups > 1
        parameters |= {"7": str(layer.groups)} if grouped else {}
        kind = "ConvolutionDepthWise" if grouped else "Convolution"
        self.reals[node] = self._append(kind, name, [blob], parameters, **arrays)

    # ---- between them

    def _add_or_multiply(self, node: fx.Node, found: Operation, kind: str) -> None:
        if "number" in found.settings:
            blob = self._scalar(kind, node.name, self.real(found.inputs[0]), found.settings["number"])
        else:
            blob = self._append("BinaryOp", node.name, [self.real(x) for x in found.inputs], {"0": kind})
        self.reals[node] = blob

    def _add(self, node: fx.Node, found: Operation) -> None:
        self._add_or_multiply(node, found, _ADD)

    def _mul(self, node: fx.Node, found: Operation) -> None:
        self._add_or_multiply(node, found, _MULTIPLY)

    def _activation(self, node: fx.Node, found: Operation) -> None:
        name, x = found.settings["name"], self.real(found.inputs[0])
        if name in ("HardSigmoid", "HardSwish"):  # in the operations that PyTorch has, to the last bit
            blob = self._limited(f"{node.name}.limits", self._scalar(_ADD, f"{node.name}.three", x, 3.0), 0.0, 6.0)
            if name == "HardSwish":
                blob = self._append("BinaryOp", f"{node.name}.product", [x, blob], {"0": _MULTIPLY})
            self.reals[node] = self._scalar(_DIVIDE, node.name, blob, 6.0)
            return
        if name not in _ACTIVATIONS:
            self._refuse(node, name)
        slope = {"0": number(found.settings["alpha"])} if "alpha" in found.settings else {}
        self.reals[node] = self._append(_ACTIVATIONS[name], node.name, [x], slope)

    def _cat(self, node: fx.Node, found: Operation) -> None:
        if found.settings["axis"] % len(shape_of(node)) != 1:
            self._refuse(node, "a concatenation along another axis than that of channels")
        self.reals[node] = self._append("Concat", node.name, [self.real(x) for x in found.inputs], {"0": "0"})

    def _moved(self, node: fx.Node, found: Operation, kind: str, parameters: dict[str, str]) -> None:
        """What keeps codes codes."""
        source = found.inputs[0]
        if source in self.codes:
            blob, grid = self.codes[source]
            self.codes[node] = (self._append(kind, node.name, [blob], parameters), grid)
        else:
            self.reals[node] = self._append(kind, node.name, [self.real(source)], parameters)

    def _maxpool(self, node: fx.Node, found: Operation) -> None:
        if set(found.settings["dilation"]) != {1}:
            self._refuse(node, "a max pooling with dilation")
        self._moved(node, found, "Pooling", {"0": "0"} | _pooling(found.settings))

    def _slice(self, node: fx.Node, found: Operation) -> None:
        steps = ["1", "1"]
        for axis, start, end, step in found.settings["slices"]:
            if axis < 2 or start != 0 or end < shape_of(found.inputs[0])[axis]:
                self._refuse(node, "a part of a tensor other than every k-th row or column")
            steps[axis - 2] = str(step)
        if found.settings["dropped"]:
            self._refuse(node, "a single row or column of a tensor")
        # The largest of one number, with strides.
        self._moved(node, found, "Pooling", {"0": "0", "1": "1", "2": steps[1], "12": steps[0], "5": "1"})

    def _pad(self, node: fx.Node, found: Operation) -> None:
        pads = found.settings["pads"]
        if len(pads) != 2 * _IMAGE or pads[0] or pads[_IMAGE]:
            self._refuse(node, "zeros beside a tensor without images")
        keys = (("7", "0", "2"), ("8", "1", "3"))  # channels, rows, columns: before and behind
        given = {key: pads[half * _IMAGE + axis + 1] for half in (0, 1) for axis, key in enumerate(keys[half])}
        self._moved(node, found, "Padding", {key: str(count) for key, count in given.items()})

    def _avgpool(self, node: fx.Node, found: Operation) -> None:
        if found.settings.get("divisor_override") or found.settings.get("ceil_mode"):
            self._refuse(node, "an average pooling with divisor_override or ceil_mode")
        counts = int(found.settings.get("count_include_pad", True))
        parameters = {"0": "1", "6": str(counts)} | _pooling(found.settings)
        self.reals[node] = self._append("Pooling", node.name, [self.real(found.inputs[0])], parameters)

    def _globalpool(self, node: fx.Node, found: Operation) -> None:
        blob = self._append("Pooling", node.name, [self.real(found.inputs[0])], {"0": "1", "4": "1"})
        if found.settings["keepdim"]:
            blob = self._append("Reshape", f"{node.name}.kept", [blob], {"0": "1", "1": "1", "2": "-1"})
        self.reals[node] = blob

    def _reshape(self, node: fx.Node, found: Operation) -> None:
        if len(shape_of(node)) != 2 or shape_of(node)[0] != shape_of(found.inputs[0])[0]:
            self._refuse(node, "a reshape that does not flatten each sample")
        self._moved(node, found, "Reshape", {"0": "-1"})


def _pooling(settings: dict[str, Any]) -> dict[str, str]:
    (height, width), (rows, columns), (top, left) = (settings[key] for key in ("kernel", "stride", "padding"))
    mode = "0" if settings.get("ceil_mode") else "1"
    given = {"1": width, "11": height, "2": columns, "12": rows, "3": left, "13": top, "5": mode}
    return {key: str(value) for key, value in given.items()}


def numbers(layer: Any, grid: ActivationGrid | None) -> dict[str, Any]:
    """``weight``, ``bias`` and ``scales`` of a layer in the file, as :class:`~lqkd.export.ncnn_file.Layer` has them.

    Args:
        layer: integer, or of PyTorch.
        grid: that of its input, where it reads codes.
    """
    if not isinstance(layer, IntegerLayer):
        bias = None if layer.bias is None else layer.bias.detach().numpy()
        return {"weight": layer.weight.detach().numpy(), "bias": bias, "scales": None}
    bias = layer.float_bias()
    told: dict[str, Any] = {"bias": None if bias is None else bias.numpy(), "scales": None}
    if grid is None:
        return {"weight": layer.float_weight().numpy(), **told}
    scale = layer.scale * grid.scale  # of the accumulator
    if getattr(layer, "groups", 1) > 1:
        return {"weight": (layer.codes.float() * scale.view(-1, 1, 1, 1)).numpy(), **told}
    return {"weight": layer.codes.numpy(), **told, "scales": ((1 / scale).numpy(), np.ones(1, np.float32))}
