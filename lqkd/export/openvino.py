"""An ONNX file that OpenVINO computes as integer kernels do, and how to run it there.

OpenVINO fuses a convolution, the Quantize behind it, an addition and the Quantize of the sum into one kernel, and the
first of the two Quantizes does not round then. So the operands of residual additions are on no grid: MobileNetV2 at
W4A4 gets another class on one image in fifteen, without a warning. Here the rounding of such an operand is an operator
of its own, which the kernel keeps, and the Quantize behind it has whole numbers to quantise. It is so in front of a
hard swish, too, which OpenVINO fuses likewise: single codes at the edge of two levels became others there.

Signed grids have int8 codes: OpenVINO adds a zero point before it rounds, in float32, which is coarse beside 128.

Where a processor has bfloat16, OpenVINO computes in it what is not in integers, unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lqkd.errors import UsageError, first_line
from lqkd.export.deploy import Deployed
from lqkd.export.emitter import Exported
from lqkd.export.grids import ActivationGrid
from lqkd.export.large_files import check_model, copy_of, readable
from lqkd.export.portable import QuantizeDequantize
from lqkd.export.runtimes import Kernels, Runner, feeds
from lqkd.models.calls import Inputs
from lqkd.quantization.codes import MIDDLE

OPENVINO = "openvino"
"""The format's name, and the package's."""
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}
"""What OpenVINO must be told: to compute in float32 what it computes in floating point."""
LOADER_NOTE = (
    "where a processor has bfloat16, OpenVINO computes in it what is not in integers, unless told: "
    'core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})'
)
"""What a user of such a file must know."""
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_READERS = ("Add", "HardSwish")
"""Operators with which OpenVINO fuses a product in front of them and its rounding."""
_UNNAMED = ("Const", "Input", "Output", "Reorder", "Reshape")
"""Layers of OpenVINO's graph that compute nothing."""


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    if find_spec(OPENVINO) is None:
        raise UsageError("--format openvino needs openvino, to verify the file: pip install 'lqkd[openvino]'")


class SignedCodes(QuantizeDequantize):
    """Signed grids have int8 codes, whose zero is 0."""

    def code_of_zero(self, grid: ActivationGrid) -> Any:
        return np.int8(0) if grid.zero_point == MIDDLE else super().code_of_zero(grid)


def build(deployed: Deployed) -> Exported:
    """The model in the portable format, with signed codes, and explicit rounding where OpenVINO would leave it out.

    Raises:
        UsageError: when an operator has no counterpart, or openvino is not installed.
    """
    require()
    exported = SignedCodes(deployed).build()
    return Exported(with_explicit_rounding(exported.model), exported.grids, exported.integer, exported.plain)


def with_explicit_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which ``Quantize(x, s)`` is ``Quantize(Round(x / s), 1)``, of products that such an operator reads.

    These are additions and hard swish. Both forms round half to even, so every code stays what it was.

    Args:
        model: in the portable format.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    explicit = {
        quantized.output[0]
        for node in model.graph.node
        if node.op_type in _READERS
        for name in node.input
        if (quantized := _quantized_product(name, producers)) is not None
    }
    written = copy_of(model)
    del written.graph.node[:]
    for node in model.graph.node:
        if node.output[0] not in explicit:
            written.graph.node.append(node)
            continue
        x, scale, zero_point = node.input
        steps, whole, one = (f"{node.output[0]}.{name}" for name in ("steps", "whole", "one"))
        written.graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), one))
        written.graph.node.extend(
            [
                helper.make_node("Div", [x, scale], [steps], steps),
                helper.make_node("Round", [steps], [whole], whole),
                helper.make_node("QuantizeLinear", [whole, one, zero_point], list(node.output), node.name),
            ]
        )
    check_model(written)
    return written


def _quantized_product(name: str, producers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The Quantize of a convolution or matrix product whose numbers ``name`` are; None where they are another's."""
    node = producers.get(name)
    while node is not None and node.op_type in ("DequantizeLinear", "Clip"):
        node = producers.get(node.input[0])
    if node is None or node.op_type != "QuantizeLinear":
        return None
    source = producers.get(node.input[0])
    return node if source is not None and source.op_type in _PRODUCTS else None


def compile_model(model: onnx.ModelProto | str | Path, threads: int | None = None) -> Any:
    """The model on OpenVINO's CPU, told to compute in float32 what it does not compute in integers.

    Args:
        model: a file, or what :func:`lqkd.export.to_onnx` returns.
        threads: None for as many as OpenVINO takes.

    Returns:
        ``openvino.CompiledModel``: called with arrays, float32, it returns arrays.

    Raises:
        UsageError: when openvino is not installed, or does not take the model.

    Example:
        >>> import torch
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_onnx
        >>> from lqkd.export.openvino import compile_model
        >>> from lqkd.models import CifarResNet
        >>> from lqkd.quantization import initialize_quantizers
        >>> student, _ = quantize_model(CifarResNet(8, width=8), Recipe(bits="w4a4", residual_bits=8))
        >>> images = torch.randn(8, 3, 32, 32)
        >>> initialize_quantizers(student, images)
        >>> model = to_onnx(student.eval(), images, format="openvino", calibration=[images])
        >>> compile_model(model, threads=1)(images.numpy())["logits"].shape
        (8, 10)
    """
    require()
    import openvino

    settings: dict[str, Any] = dict(SETTINGS) | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
    core = openvino.Core()
    try:
        if isinstance(model, str | Path):
            return core.compile_model(core.read_model(model), "CPU", settings)
        with readable(model) as given:
            return core.compile_model(core.read_model(given), "CPU", settings)
    except RuntimeError as error:
        raise UsageError(f"openvino {openvino.__version__} does not take the file ({first_line(error)})") from error


class OpenVINORunner(Runner):
    """Runs a model in OpenVINO where it may be optimised, and in ONNX Runtime, node by node, where it may not."""

    reproduced = False
    disagreement = 2e-3
    metric_tolerance = 1e-3

    def __init__(self, model: onnx.ModelProto, *, optimised: bool, tensors: Sequence[str] = ()) -> None:
        self._compiled: Any = None
        if not optimised:
            super().__init__(model, optimised=False, tensors=tensors)
            return
        self.outputs = [entry.name for entry in model.graph.output]
        self._names = list(dict.fromkeys([*self.outputs, *tensors]))
        self._model = self.watched(model)
        self._compiled = compile_model(self._model, threads=1)

    def __call__(self, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
        if self._compiled is None:
            return super().__call__(given)
        found = self._compiled(feeds(self._model, given))
        return {name: np.array(found[index]) for index, name in enumerate(self._names)}


def kernels(model: onnx.ModelProto) -> Kernels:
    """What OpenVINO makes of a model: its layers in 8 bits by operator, and those in floating point by name."""
    integer: dict[str, int] = {}
    floats = []
    for node in compile_model(model, threads=1).get_runtime_model().get_ordered_ops():
        told = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        kind = str(told["layerType"])
        if kind in _UNNAMED:
            continue
        if str(told["runtimePrecision"]) in ("u8", "i8"):
            integer[kind] = integer.get(kind, 0) + 1
        else:
            floats.append((node.get_friendly_name(), kind))
    return Kernels(integer, tuple(floats))
