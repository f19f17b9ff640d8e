"""Running an exported file, with the values of its grids where they are wanted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from lqkd.errors import UsageError, first_line
from lqkd.export.large_files import copy_of, is_large, readable
from lqkd.export.qonnx import DOMAIN
from lqkd.models.calls import Inputs

NO_FUSION = ("session.disable_quant_qdq", "1")
"""What ONNX Runtime must be told of files with 2-bit weights: it has no such kernels and fails at fusing them."""
_NUMBERS_BESIDE = "session.optimized_model_external_initializers_file_name"
_CPU = ["CPUExecutionProvider"]


def session(
    model: onnx.ModelProto, *, optimised: bool, save: Path | None = None, threads: int = 1, profile: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: without nodes of the QONNX domain.
        optimised: with all optimisations of the runtime, or none.
        save: where to write the graph that the runtime made of it.
        threads: within an operator.
        profile: where the runtime shall write how long each node takes; it appends the time to the name.

    Raises:
        UsageError: when the runtime does not take the model, as one older than a format does.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if has_two_bits(model):
        options.add_session_config_entry(*NO_FUSION)
    if save is not None:
        options.optimized_model_filepath = str(save)
        if is_large(model):
            options.add_session_config_entry(_NUMBERS_BESIDE, f"{save.name}.data")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        with readable(model) as given:
            return onnxruntime.InferenceSession(given, options, providers=_CPU)
    except Exception as error:  # the runtime raises many types
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} does not take the file ({first_line(error)}): {_helps(model)}"
        ) from error


def _helps(model: onnx.ModelProto) -> str:
    """What helps where the runtime is too old for a model."""
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    if not products:
        return "a newer one may, or export it as portable"
    between = any(len(node.input) > 3 and node.input[3] for node in products)  # zero is no code, as of seq
    return "it needs 1.27 or newer" if between else "a newer one may"


def has_two_bits(model: onnx.ModelProto) -> bool:
    """Whether weights are stored in 2 bits."""
    return any(tensor.data_type in (TensorProto.INT2, TensorProto.UINT2) for tensor in model.graph.initializer)


def is_qonnx(model: onnx.ModelProto) -> bool:
    """Whether the model has nodes of the QONNX domain."""
    return any(entry.domain == DOMAIN for entry in model.opset_import)


def feeds(model: onnx.ModelProto, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
    """The float32 arrays that a model takes, by the names of its inputs; a single array is its only input."""
    names = [entry.name for entry in model.graph.input]
    if isinstance(given, np.ndarray):
        return {names[0]: given}
    if given.alone() is not None:  # whose name the file has chosen
        given = Inputs(given.args)
    return {name: tensor.detach().cpu().float().numpy() for name, tensor in given.by_name(names).items()}


_FAR = (
    ": where the step of a grid is far from that before it, as in a network that was not trained, its kernels cannot "
    "compute"
)


class Runner:
    """Runs a model on its inputs and returns its outputs, and further tensors, by name.

    Args:
        model: portable, packed or QONNX.
        optimised: whether the runtime may optimise; the ``qonnx`` package never does.
        tensors: names of further tensors.

    Attributes:
        reproduced: whether :class:`lqkd.export.reference.Reference` has the formulas of its kernels.
        disagreement: share of samples whose answer, such as the first class, may differ, but always one sample.
        metric_tolerance: how far what the task measures may be from the deployed network's, but always what one sample
            makes; None where that is not judged.
    """

    reproduced = True
    disagreement = 1e-3
    metric_tolerance: float | None = None

    def __init__(self, model: onnx.ModelProto, *, optimised: bool, tensors: Sequence[str] = ()) -> None:
        self.outputs = [entry.name for entry in model.graph.output]
        self._names = list(dict.fromkeys([*self.outputs, *tensors]))
        self._model = model
        self._qonnx = is_qonnx(model)
        if self._qonnx:
            return
        self._session = session(self.watched(model), optimised=optimised)

    def watched(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of ``model`` that returns the further tensors, too."""
        watched = copy_of(model)
        for name in self._names[len(self.outputs) :]:
            watched.graph.output.append(helper.make_empty_tensor_value_info(name))
        return watched

    def __call__(self, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
        return self.on(feeds(self._model, given))

    def on(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What it returns for ``arrays``, by the names of its inputs."""
        if self._qonnx:
            return _execute_qonnx(self._model, arrays, self._names)
        import onnxruntime

        try:
            found = self._session.run(self._names, arrays)
        except Exception as error:  # the runtime's own, of a kernel whose numbers are out of its range
            raise UsageError(
                f"onnxruntime {onnxruntime.__version__} does not run the file ({first_line(error)})"
                + (_FAR if "range" in str(error) else "")
            ) from error
        return dict(zip(self._names, found, strict=True))


def _execute_qonnx(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    try:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.infer_shapes import InferShapes
    except ImportError:
        raise UsageError("--format qonnx needs the package qonnx to verify the file: pip install qonnx") from None
    wrapped = ModelWrapper(model, make_deepcopy=True)
    for name, array in arrays.items():
        wrapped.set_tensor_shape(name, list(array.shape))
    found = execute_onnx(wrapped.transform(InferShapes()), dict(arrays), return_full_exec_context=True)
    return {name: found[name] for name in names}


_MOVES = (
    "Transpose",
    "Reshape",
    "Flatten",
    "Slice",
    "Pad",
    "MaxPool",
    "NhwcMaxPool",
    "Clip",
    "Concat",
    "Split",
    "Resize",
)
_KERNELS = ("Conv", "MatMul", "Add", "Mul", "GlobalAveragePool", "AveragePool", "Concat", "Sigmoid", "LeakyRelu")
_TO_FLOAT = "MatMulIntegerToFloat"
_INTEGER = ("QGemm", _TO_FLOAT, *(f"QLinear{kind}" for kind in _KERNELS))


@dataclass(frozen=True)
class Kernels:
    """What ONNX Runtime makes of a model.

    Attributes:
        integer: number of nodes on integer kernels, by operator.
        floats: name and operator of each node that computes in floating point, but for the quantization of the
            network's input.
    """

    integer: dict[str, int] = field(default_factory=dict)
    floats: tuple[tuple[str, str], ...] = ()

    @property
    def float_products(self) -> tuple[str, ...]:
        """Names of convolutions and matrix products in floating point."""
        products = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "MatMulNBits", "FusedMatMul", "ConvTranspose")
        return tuple(name for name, kind in self.floats if kind in products)


def kernels(model: onnx.ModelProto) -> Kernels:
    """Ask ONNX Runtime for the graph that it runs, and tell integer kernels from others.

    Raises:
        UsageError: when the runtime does not take the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(model, optimised=True, save=path)
        graph = onnx.load(path, load_external_data=False).graph
    types = _types(graph)
    integer: dict[str, int] = {}
    floats = []
    taken = {entry.name for entry in graph.input}
    for node in graph.node:
        if node.op_type in _INTEGER:
            integer[node.op_type] = integer.get(node.op_type, 0) + 1
        elif node.op_type in _MOVES and types.get(node.output[0]) != TensorProto.FLOAT:
            continue
        elif not (node.op_type == "QuantizeLinear" and node.input[0] in taken):
            floats.append((node.name or node.output[0], node.op_type))
    return Kernels(integer, tuple(floats))


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """The element type of tensors, followed through nodes that move values."""
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    returned = {entry.name for entry in graph.output}
    for node in graph.node:
        if node.op_type in _MOVES:
            types[node.output[0]] = types.get(node.input[0], TensorProto.FLOAT)
        elif node.op_type == "QuantizeLinear" or (
            node.op_type in _INTEGER and node.op_type != _TO_FLOAT and node.output[0] not in returned
        ):
            types[node.output[0]] = TensorProto.UINT8
        else:
            types.setdefault(node.output[0], TensorProto.FLOAT)
    return types
