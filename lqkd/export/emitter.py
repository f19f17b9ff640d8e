"""Writing a deployed network as an ONNX graph; what differs between formats is in subclasses."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from lqkd.export.calls import of_all_calls
from lqkd.export.deploy import OUTPUT, Deployed
from lqkd.export.grids import ActivationGrid, LookupGrid
from lqkd.export.integer import IntegerLayer, IntegerLinear, symmetric_padding
from lqkd.export.island_writers import IslandWriters
from lqkd.export.large_files import check_model
from lqkd.export.nodes import Operation, shape_of
from lqkd.export.operations import operation, unsupported
from lqkd.models.outputs import heads
from lqkd.quantization.placement import KEEPS_GRID

BATCH = "batch"
_LARGE = 512
"""So many bytes a constant must have to be looked for among the others."""


@dataclass(frozen=True)
class Exported:
    """A model and where the values of its grids are found in it.

    Attributes:
        model: the ONNX model; inputs and outputs (batch, ...) float32, called as :class:`Deployed` says.
        grids: name of each grid's node in the deployed network to the tensor that holds its codes, or its real numbers
            where the format has no codes.
        integer: whether it is made for integer kernels, whose arithmetic :class:`lqkd.export.reference.Reference` has.
        plain: whether weights are held as 8-bit codes one by one.
        channels: how many channels of a grid are the network's, where the file has more of them, all zero.
        broken_rule: of a format that promises more than the right numbers: the first rule that a model breaks.
    """

    model: onnx.ModelProto
    grids: dict[str, str]
    integer: bool
    plain: bool = False
    channels: dict[str, int] = field(default_factory=dict)
    broken_rule: Callable[[onnx.ModelProto], str | None] = field(default=lambda model: None)

    def codes(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values of the network's grids by node, of the tensors that a run returned by name."""
        return {
            node: found[name][:, : self.channels[node]] if node in self.channels else found[name]
            for node, name in self.grids.items()
        }


class Emitter(IslandWriters):
    """Turns the nodes of a deployed network into ONNX nodes, in order.

    A value that is on a grid may exist as codes, and then becomes real numbers separately for each reader. A clamp is
    written only where something else than a grid reads it: a grid behind it takes the limits over.
    """

    opset = 21
    ir_version = 10
    domains: tuple[str, ...] = ()
    integer = False
    plain = False

    def __init__(self, deployed: Deployed) -> None:
        self.network = deployed.network
        placeholders = [node for node in self.network.graph.nodes if node.op == "placeholder"]
        self.inputs = dict(zip(placeholders, deployed.inputs, strict=True))
        self.outputs = deployed.outputs
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.large: dict[tuple[Any, ...], str] = {}
        self.floats: dict[fx.Node, str] = {}
        self.codes: dict[fx.Node, tuple[str, ActivationGrid]] = {}
        self.deferred: dict[fx.Node, tuple[fx.Node, float | None, float | None]] = {}
        self.pooled: dict[fx.Node, str] = {}
        self.parts: dict[fx.Node, list[str]] = {}
        self.read: dict[fx.Node, int] = {}
        self.taken: set[str] = {*deployed.inputs, *deployed.outputs}

    def build(self) -> Exported:
        """The model, checked; its inputs and outputs are (batch, ...) float32."""
        graph = self.network.graph
        output = next(node for node in graph.nodes if node.op == "output")
        for node in graph.nodes:
            if node.op == "output":
                continue
            found = operation(node, self.network)
            if found is not None:
                self._write(node, found)
        results = heads(output.args[0], OUTPUT)
        self._name_outputs({name: self.floating(node) for name, node in results.items()})
        taken = [_described(name, node) for node, name in self.inputs.items()]
        returned = [_described(name, node) for name, node in results.items()]
        body = helper.make_graph(self.nodes, "lqkd", taken, returned)
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in self.domains)]
        model = helper.make_model(body, opset_imports=imports, producer_name="lqkd", ir_version=self.ir_version)
        model.graph.initializer.extend(self.initializers.values())  # not with the body, which may be too large to copy
        if not self.domains:
            check_model(model)
        return Exported(model, self._grids(), self.integer, self.plain)

    def _grids(self) -> dict[str, str]:
        return {node.name: self.codes[node][0] for node in self.codes if self._is_grid(node)}

    def _is_grid(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.network.get_submodule(str(node.target)), ActivationGrid)

    def _name_outputs(self, tensors: dict[str, str]) -> None:
        """Give tensors the names of the outputs that they are."""
        read = Counter(name for node in self.nodes for name in node.input) + Counter(tensors.values())
        for wanted, name in tensors.items():
            producer = next((node for node in self.nodes if name in node.output), None)
            if producer is None or read[name] > 1:  # another node or output reads it, too
                self.nodes.append(helper.make_node("Identity", [name], [wanted], wanted))
            else:
                producer.output[list(producer.output).index(name)] = wanted

    # ---- names and constants

    def name(self, wanted: str) -> str:
        """``wanted``, or with a number behind it where that is taken."""
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}_{number}"
        self.taken.add(name)
        return name

    def add(self, kind: str, inputs: list[str], wanted: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        name = self.name(wanted)
        self.nodes.append(helper.make_node(kind, inputs, [name], name, domain=domain, **attributes))
        return name

    def constant(self, value: Any, wanted: str, dtype: Any = None) -> str:
        """Keep a tensor or array in the file and return its name; a large one that all calls of a layer share, once."""
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        array = array if dtype is None else array.astype(dtype)
        if array.nbytes >= _LARGE and (whole := of_all_calls(wanted)) != wanted:  # a head that each level calls
            key = (whole, str(array.dtype), array.shape, sha256(np.ascontiguousarray(array).tobytes()).digest())
            if key in self.large:
                return self.large[key]
            self.large[key] = name = self.name(wanted)
        else:
            name = self.name(wanted)
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def label(self, node: fx.Node) -> str:
        """A name that says where ``node`` comes from."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        where = str(next(reversed(stack), ""))
        return f"{where}.{node.name}" if where else node.name

    # ---- values

    def floating(self, node: fx.Node) -> str:
        """The name of the real numbers of ``node``."""
        if node in self.codes:
            return self.dequantize(*self.codes[node], self.label(node))
        if node in self.deferred:
            source, low, high = self.deferred[node]
            if node not in self.floats:
                x = self.floating(source)
                self.floats[node] = self._clamped(x, low, high, self.label(node))
            return self.floats[node]
        if node in self.pooled and node not in self.floats:
            self.floats[node] = self.add("Flatten", [self.pooled[node]], self.label(node), axis=1)
        self.read[node] = self.read.get(node, 0) + 1
        if self.read[node] > 1:
            again = self._again(node)
            if again is not None:
                return again
        return self.floats[node]

    def _again(self, node: fx.Node) -> str | None:
        """A second copy of a cheap operation for a second grid; ``None`` where the first result serves both.

        A runtime fuses an operation with the grid behind it, and only where there is one. The operands change places,
        lest the runtime finds that it computes the same twice.
        """
        found = operation(node, self.network)
        if found is None or found.kind not in ("add", "mul") or len(found.inputs) != 2 or self.read[node] > 2:
            return None
        operands = [self.floating(x) for x in reversed(found.inputs)]
        return self.add(found.kind.title(), operands, f"{self.label(node)}.again")

    def _clamped(self, x: str, low: float | None, high: float | None, label: str) -> str:
        if (low, high) == (0.0, None):
            return self.add("Relu", [x], label)
        bounds = [
            "" if bound is None else self.constant(bound, f"{label}.{name}", np.float32)
            for bound, name in ((low, "min"), (high, "max"))
        ]
        return self.add("Clip", [x, *bounds], label)

    def dequantize(self, codes: str, grid: ActivationGrid, label: str) -> str:
        """Real numbers from codes, in a dialect that has codes."""
        raise AssertionError(f"{type(self).__name__} writes no codes")

    def grid(self, node: fx.Node, source: fx.Node, grid: ActivationGrid) -> None:
        """Write the quantization of an activation, in a dialect that has grids."""
        raise AssertionError(f"{type(self).__name__} writes no grids")

    @abstractmethod
    def weight(self, layer: IntegerLayer, label: str) -> str:
        """The real numbers of a weight, in its shape."""

    @abstractmethod
    def bias(self, layer: IntegerLayer, label: str) -> str:
        """The real numbers of a bias, (channels,); an empty name where there is none."""

    # ---- operations

    def _write(self, node: fx.Node, found: Operation) -> None:
        if found.kind in KEEPS_GRID and found.inputs[0] in self.codes:
            codes, grid = self.codes[found.inputs[0]]
            self.codes[node] = (self._moved(node, found, codes, grid), grid)
            return
        writer = getattr(self, f"_write_{found.kind}")
        writer(node, found)

    def code_of_zero(self, grid: ActivationGrid) -> Any:
        """The code of zero, in the type in which the file has the codes of ``grid``."""
        return np.uint8(grid.zero_point)

    def _moved(self, node: fx.Node, found: Operation, codes: str, grid: ActivationGrid) -> str:
        zero = self.code_of_zero(grid)
        if found.kind == "relu":
            return self.add("Clip", [codes, self.constant(zero, f"{self.label(node)}.min")], self.label(node))
        return self._structural(node, found, codes, zero.dtype, zero)

    def _structural(  # noqa: PLR0911
        self, node: fx.Node, found: Operation, x: str, dtype: Any, zero: int
    ) -> str:
        label = self.label(node)
        if found.kind == "maxpool":
            return self.add("MaxPool", [x], label, **_pooling(found.settings, dilations=True))
        if found.kind == "reshape":
            before, after = shape_of(found.inputs[0]), shape_of(node)
            if before[0] == after[0] and len(after) == 2 and len(before) > 2:
                return self.add("Flatten", [x], label, axis=1)
            first = 0 if before[0] == after[0] else -1
            return self.add("Reshape", [x, self.constant([first, *after[1:]], f"{label}.shape", np.int64)], label)
        if found.kind == "nearest":
            return self._resized(node, found, x)
        if found.kind == "transpose":
            return self.add("Transpose", [x], label, perm=found.settings["order"])
        if found.kind == "slice":
            slices = np.array(found.settings["slices"], np.int64)  # (axes, 4): axis, start, end, step
            names = ((1, "starts"), (2, "ends"), (0, "axes"), (3, "steps"))
            if len(slices):
                x = self.add("Slice", [x, *(self.constant(slices[:, i], f"{label}.{n}") for i, n in names)], label)
            dropped = found.settings["dropped"]
            return self.add("Squeeze", [x, self.constant(dropped, f"{label}.axes", np.int64)], label) if dropped else x
        if found.kind == "pad":
            pads = self.constant(found.settings["pads"], f"{label}.pads", np.int64)
            return self.add("Pad", [x, pads, self.constant(zero, f"{label}.zero", dtype)], label)
        raise AssertionError(found.kind)

    def _write_floating(self, node: fx.Node, found: Operation) -> None:
        x = self.floating(found.inputs[0])
        self.floats[node] = self._structural(node, found, x, np.float32, 0)

    _write_maxpool = _write_reshape = _write_transpose = _write_slice = _write_pad = _write_floating
    _write_nearest = _write_floating

    def _write_input(self, node: fx.Node, found: Operation) -> None:
        self.floats[node] = self.inputs[node]

    def _write_constant(self, node: fx.Node, found: Operation) -> None:
        self.floats[node] = self.constant(found.settings["value"], self.label(node))

    def _write_identity(self, node: fx.Node, found: Operation) -> None:
        self.deferred[node] = (found.inputs[0], None, None)

    def _write_relu(self, node: fx.Node, found: Operation) -> None:
        self.deferred[node] = (found.inputs[0], 0.0, None)

    def _write_clamp(self, node: fx.Node, found: Operation) -> None:
        low, high = (found.settings[key] for key in ("low", "high"))
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            raise unsupported(node, self.network, " with limits that are computed")
        self.deferred[node] = (found.inputs[0], low, high)

    def _write_grid(self, node: fx.Node, found: Operation) -> None:
        grid = found.settings["module"]
        if isinstance(grid, LookupGrid):
            raise AssertionError("refused before")
        self.grid(node, found.inputs[0], grid)

    def _write_layer(self, node: fx.Node, found: Operation) -> None:
        module: Any = found.settings["module"]
        label, x = self.label(node), self.floating(found.inputs[0])
        if isinstance(module, IntegerLayer):
            weight, bias = self.weight(module, label), self.bias(module, label)
        else:
            weight = self.constant(module.weight, f"{label}.weight")
            bias = "" if module.bias is None else self.constant(module.bias, f"{label}.bias")
        operands = [x, weight, *([bias] if bias else [])]
        if isinstance(module, IntegerLinear | nn.Linear):
            self.floats[node] = self._linear(node, found, operands)
            return
        padding: Any = module.padding if isinstance(module, IntegerLayer) else symmetric_padding(module, label)
        kernel = list(module.codes.shape[2:] if isinstance(module, IntegerLayer) else module.kernel_size)
        attributes: dict[str, Any] = {
            "strides": list(module.stride),
            "pads": [*padding, *padding],
            "dilations": list(module.dilation),
        }
        self.floats[node] = self.add("Conv", operands, label, kernel_shape=kernel, group=module.groups, **attributes)

    def _linear(self, node: fx.Node, found: Operation, operands: list[str]) -> str:
        label, source = self.label(node), found.inputs[0]
        if len(shape_of(source)) == 2:
            return self.add("Gemm", operands, label, transB=1)
        # Runtimes have an integer kernel for two axes alone.
        rows = self.constant([-1, shape_of(source)[-1]], f"{label}.rows", np.int64)
        if source in self.codes:
            codes, grid = self.codes[source]
            operands[0] = self.dequantize(self.add("Reshape", [codes, rows], f"{label}.codes"), grid, label)
        else:
            operands[0] = self.add("Reshape", [operands[0], rows], f"{label}.flat")
        product = self.add("Gemm", operands, f"{label}.product", transB=1)
        shape = self.constant([-1, *shape_of(node)[1:]], f"{label}.shape", np.int64)
        return self.add("Reshape", [product, shape], label)

    def _write_norm(self, node: fx.Node, found: Operation) -> None:
        norm: Any = found.settings["module"]
        label = self.label(node)
        ones = torch.ones_like(norm.running_mean)
        values = [norm.weight if norm.affine else ones, norm.bias if norm.affine else 0 * ones]
        names = ("weight", "bias", "mean", "variance")
        constants = [
            self.constant(value, f"{label}.{name}")
            for value, name in zip([*values, norm.running_mean, norm.running_var], names, strict=True)
        ]
        x = self.floating(found.inputs[0])
        self.floats[node] = self.add("BatchNormalization", [x, *constants], label, epsilon=norm.eps)

    def _write_add(self, node: fx.Node, found: Operation) -> None:
        operands = [self.floating(x) for x in found.inputs]
        label = self.label(node)
        if "number" in found.settings:
            operands.append(self.constant(found.settings["number"], f"{label}.number", np.float32))
        self.floats[node] = self.add(found.kind.title(), operands, label)

    _write_mul = _write_add

    def _write_cat(self, node: fx.Node, found: Operation) -> None:
        operands = [self.floating(x) for x in found.inputs]
        self.floats[node] = self.add("Concat", operands, self.label(node), axis=found.settings["axis"])

    def _write_globalpool(self, node: fx.Node, found: Operation) -> None:
        x = self.floating(found.inputs[0])
        if found.settings["keepdim"]:
            self.floats[node] = self.add("GlobalAveragePool", [x], self.label(node))
        else:
            self.pooled[node] = self.add("GlobalAveragePool", [x], f"{self.label(node)}.pooled")

    def _write_mean(self, node: fx.Node, found: Operation) -> None:
        x, label = self.floating(found.inputs[0]), self.label(node)
        axes = self.constant(found.settings["axes"], f"{label}.axes", np.int64)
        self.floats[node] = self.add("ReduceMean", [x, axes], label, keepdims=int(found.settings["keepdim"]))

    def _write_resize(self, node: fx.Node, found: Operation) -> None:
        self.floats[node] = self._resized(node, found, self.floating(found.inputs[0]))

    def _resized(self, node: fx.Node, found: Operation, x: str) -> str:
        label, (_, _, *before), (_, _, *after) = self.label(node), shape_of(found.inputs[0]), shape_of(node)
        scales = np.array([1, 1, *(a / b for a, b in zip(after, before, strict=True))], np.float32)
        short = np.floor(scales[2:].astype(np.float64) * before) < after  # by the rounding of the quotient
        scales[2:] = np.where(short, np.nextafter(scales[2:], np.float32(np.inf)), scales[2:])
        return self.add("Resize", [x, "", self.constant(scales, f"{label}.scales")], label, **found.settings)

    def _write_avgpool(self, node: fx.Node, found: Operation) -> None:
        settings = found.settings
        if settings.get("divisor_override"):
            raise unsupported(node, self.network, " with divisor_override")
        attributes = _pooling(settings, dilations=False)
        attributes["count_include_pad"] = int(settings.get("count_include_pad", True))
        self.floats[node] = self.add("AveragePool", [self.floating(found.inputs[0])], self.label(node), **attributes)

    def _write_activation(self, node: fx.Node, found: Operation) -> None:
        settings, label = dict(found.settings), self.label(node)
        name, x = settings.pop("name"), self.floating(found.inputs[0])
        if name == "SiLU":
            self.floats[node] = self.add("Mul", [x, self.add("Sigmoid", [x], f"{label}.sigmoid")], label)
            return
        if name == "HardSigmoid":
            settings["alpha"] = 1 / 6
        self.floats[node] = self.add(name, [x], label, **settings)

    def _write_chunks(self, node: fx.Node, found: Operation) -> None:
        axis, label = found.settings["axis"], self.label(node)
        sizes = [meta.shape[axis] for meta in node.meta["tensor_meta"]]
        self.parts[node] = self._split(found, sizes, label)

    def _write_unbound(self, node: fx.Node, found: Operation) -> None:
        label = self.label(node)
        parts = self._split(found, [1] * len(node.meta["tensor_meta"]), f"{label}.split")
        axes = self.constant([found.settings["axis"]], f"{label}.axes", np.int64)
        self.parts[node] = [self.add("Squeeze", [part, axes], f"{label}.{i}") for i, part in enumerate(parts)]

    def _split(self, found: Operation, sizes: list[int], label: str) -> list[str]:
        names = [self.name(f"{label}.{index}") for index in range(len(sizes))]
        source = found.inputs[0]
        x = self.codes[source][0] if source in self.codes else self.floating(source)
        lengths = self.constant(sizes, f"{label}.sizes", np.int64)
        self.nodes.append(helper.make_node("Split", [x, lengths], names, names[0], axis=found.settings["axis"]))
        return names

    def _write_part(self, node: fx.Node, found: Operation) -> None:
        whole = found.inputs[0]
        name = self.parts[whole][found.settings["index"]]
        source = whole.all_input_nodes[0]
        if source in self.codes:
            self.codes[node] = (name, self.codes[source][1])
        else:
            self.floats[node] = name


def _described(name: str, node: fx.Node) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *shape_of(node)[1:]])


def _pooling(settings: dict[str, Any], dilations: bool) -> dict[str, Any]:
    padding = settings["padding"]
    attributes = {
        "kernel_shape": list(settings["kernel"]),
        "strides": list(settings["stride"]),
        "pads": [*padding, *padding],
        "ceil_mode": int(bool(settings.get("ceil_mode", False))),
    }
    return attributes | ({"dilations": list(settings["dilation"])} if dilations else {})
