"""The tensors of a TFLite file: names, shapes, constants, real numbers of codes, and codes of real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from torch import fx

from lqkd.errors import UsageError
from lqkd.export.deploy import Deployed
from lqkd.export.litert_file import Builder
from lqkd.export.litert_values import (
    CHANNELS_LAST,
    IMAGE,
    RELU,
    RELUS,
    SAME,
    VALID,
    Codes,
    Origin,
    Pending,
    Target,
)
from lqkd.export.nodes import place, shape_of


class TensorWriter:
    """The part of a writer that makes tensors.

    Args:
        deployed: the network.
    """

    def __init__(self, deployed: Deployed) -> None:
        self.network = deployed.network
        self.file = Builder(taken=set(deployed.outputs))
        self.values: dict[fx.Node, Any] = {}
        self.grids: dict[str, tuple[str, int]] = {}
        self.origins: dict[int, Origin] = {}
        self.named: set[int] = set()
        nodes = list(self.network.graph.nodes)
        self.inputs = dict(zip((node for node in nodes if node.op == "placeholder"), deployed.inputs, strict=True))
        self.example = shape_of(next(iter(self.inputs)))[0]

    def refuse(self, node: fx.Node, what: str) -> NoReturn:
        raise UsageError(
            f"--format litert cannot have {what} in {place(node)}: it takes networks whose layers are integers between "
            "grids; use portable, which has more operators, or replace it in the network"
        )

    def _called(self, node: fx.Node) -> str:
        """What ``node`` calls: a class of modules or a function."""
        if node.op == "call_module":
            return type(self.network.get_submodule(str(node.target))).__name__
        return getattr(node.target, "__name__", str(node.target))

    # ---- shapes, names and tensors

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's value in PyTorch, of one sample."""
        return self.of_one(shape_of(node))

    def of_one(self, shape: Sequence[int]) -> list[int]:
        """``shape`` with one sample in place of the example's."""
        return [shape[0] // self.example, *shape[1:]]

    def label(self, node: fx.Node) -> str:
        """A name that says where ``node`` comes from."""
        if node.op == "call_module":
            return str(node.target)
        where = str(next(reversed(node.meta.get("nn_module_stack") or {}), ""))
        return f"{where}.{node.name}" if where else node.name

    def floats(self, name: str, shape: Sequence[int]) -> int:
        """A new float32 tensor; ``shape`` is the file's."""
        return self.file.tensor(name, shape, "float32")

    def codes(self, target: Target, shape: Sequence[int]) -> int:
        """A new tensor for codes; ``shape`` is the file's."""
        zero_point = target.grid.zero_point - target.offset
        made = self.file.tensor(target.name, shape, "int8", target.grid.scale.numpy(), zero_point)
        self.origins[made] = Origin(target.grid, target.offset)
        return made

    def like(self, tensor: int, name: str, shape: Sequence[int]) -> int:
        """A new tensor with the type and grid of another."""
        made = self.file.tensor(name, shape, "int8")
        self.file.tensors[made].type = self.file.tensors[tensor].type
        self.file.tensors[made].quantization = self.file.tensors[tensor].quantization
        if tensor in self.origins:
            self.origins[made] = self.origins[tensor]
        return made

    def constant_codes(self, tensor: int, code: int, name: str) -> int:
        """A constant code on the grid of a tensor."""
        made = self.like(tensor, name, [1])
        self.file.tensors[made].buffer = self.file.buffer(np.array([code], np.int8))
        self.origins[made] = replace(self.origins[made], code=code)
        return made

    def shape_in_file(self, tensor: int) -> list[int]:
        """The shape of a tensor."""
        return list(self.file.tensors[tensor].shape)

    def integers(self, name: str, values: Any) -> int:
        """A constant of whole numbers that an operator is told by."""
        array = np.asarray(values, np.int32)
        return self.file.tensor(name, array.shape, "int32", data=array)

    def number(self, name: str, value: float) -> int:
        """A constant real number."""
        return self.file.tensor(name, [1], "float32", data=np.array([value], np.float32))

    # ---- values

    def real(self, node: fx.Node) -> int:
        """The tensor of a node's real numbers."""
        value = self.values[node]
        if isinstance(value, Codes):
            made = self.floats(f"{self.label(node)}.float", self.shape_in_file(value.tensor))
            return self.file.operator("DEQUANTIZE", [value.tensor], made, "DequantizeOptions", 2)
        if not isinstance(value, Pending) or value.real is None:
            self.refuse(node, "a result that no grid rounds")
        tensor = value.real()
        for limits in reversed(value.clamps):
            tensor = self._clamped(tensor, limits, self.label(node))
        return tensor

    def _clamped(self, x: int, limits: tuple[float | None, float | None], label: str) -> int:
        """Real numbers within limits."""
        if limits in RELUS:
            made = self.floats(f"{label}.clamped", self.shape_in_file(x))
            return self.file.operator(RELUS[limits], [x], made)
        for kind, bound in zip(("MAXIMUM", "MINIMUM"), limits, strict=True):
            if bound is not None:
                made = self.floats(f"{label}.clamped", self.shape_in_file(x))
                limit = self.number(f"{label}.limit", bound)
                x = self.file.operator(kind, [x, limit], made, "MaximumMinimumOptions")
        return x

    def _returned(self, name: str, node: fx.Node) -> int:
        """The output ``name``: real numbers in a tensor of that name."""
        tensor = self.real(node)
        if tensor in self.named:
            self.refuse(node, "an input that is returned, or a result that is returned twice,")
        self.named.add(tensor)
        self.file.tensors[tensor].name = name.encode()
        return tensor

    def quantized(self, node: fx.Node, tensor: int) -> Pending:
        """Real numbers in a tensor, for a grid to round."""

        def write(target: Target) -> int:
            made = self.codes(target, self.shape_in_file(tensor))
            return self.file.operator("QUANTIZE", [tensor], made, "QuantizeOptions")

        return Pending(write, lambda: tensor, fuses=False)

    def requantized(self, codes: Codes) -> Pending:
        """Codes for another grid: an addition of nothing rounds more precisely than Quantize."""

        def write(target: Target) -> int:
            nothing = self.constant_codes(codes.tensor, codes.grid.zero_point - codes.offset, f"{target.name}.nothing")
            made = self.codes(target, self.shape_in_file(codes.tensor))
            return self._pair("ADD", [codes.tensor, nothing], made, target)

        return Pending(write)

    def _pair(self, kind: str, operands: list[int], made: int, target: Target) -> int:
        options = f"{kind.title()}Options"
        return self.file.operator(kind, operands, made, options, 2, fusedActivationFunction=RELU * target.relu)

    def _shape_of_result(self, node: fx.Node) -> list[int]:
        shape = self.shape(node)
        return [shape[axis] for axis in CHANNELS_LAST] if len(shape) == IMAGE else shape

    def _axis(self, axis: int, rank: int) -> int:
        """The file's axis for one of PyTorch."""
        axis %= rank
        return CHANNELS_LAST.index(axis) if rank == IMAGE else axis

    def _padded(
        self,
        node: fx.Node,
        x: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        value: int | None = None,
    ) -> tuple[int, int]:
        """The tensor that a window slides over, with zeros beside it where TFLite's own padding puts others.

        Args:
            value: the code that is put beside instead; None for that of zero.
        """
        before, after, same = [], [], True
        for axis in (0, 1):
            inside, outside = self.shape_in_file(x)[1 + axis], shape_of(node)[2 + axis]
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            missing = max((outside - 1) * stride[axis] + reach - inside, 0)
            same = same and outside == -(-inside // stride[axis]) and missing // 2 == padding[axis]
            before.append(padding[axis])
            after.append(max(missing - padding[axis], 0))
        if not any((*before, *after)):
            return x, VALID
        if same:
            return x, SAME
        return self._beside(x, [0, *before, 0], [0, *after, 0], f"{self.label(node)}.padded", value), VALID

    def _beside(self, x: int, before: Sequence[int], after: Sequence[int], name: str, value: int | None = None) -> int:
        shape = [b + size + a for b, size, a in zip(before, self.shape_in_file(x), after, strict=True)]
        made = self.like(x, name, shape)
        pads = self.integers(f"{name}.sizes", list(zip(before, after, strict=True)))
        if value is None:
            return self.file.operator("PAD", [x, pads], made, "PadOptions", 2)
        beside = self.constant_codes(x, value, f"{name}.value")
        return self.file.operator("PADV2", [x, pads, beside], made, "PadV2Options", 2)

    def _pool(self, kind: str, node: fx.Node, x: int, kernel: Any, stride: Any, padding: int) -> int:
        made = self.like(x, self.label(node), self._shape_of_result(node))
        settings = {"filterHeight": kernel[0], "filterWidth": kernel[1], "strideH": stride[0], "strideW": stride[1]}
        version = 1 if self.file.tensors[x].quantization is None else 2
        return self.file.operator(kind, [x], made, "Pool2DOptions", version, padding=padding, **settings)
