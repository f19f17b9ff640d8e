"""A TFLite file for LiteRT: what it is called, what it needs, and what a user of it must know."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

from lqkd.errors import UsageError
from lqkd.export.deploy import Deployed
from lqkd.export.litert_file import schema, unpacked
from lqkd.export.litert_values import CHANNELS_LAST, Written
from lqkd.export.litert_writer import Writer
from lqkd.export.runtimes import Kernels

LITERT = "litert"
"""The format's name."""
PACKAGE = "ai-edge-litert"
SUFFIX = ".tflite"
LOADER_NOTE = (
    "images go in, and maps come out, channels last, (1, H, W, C), float32, one sample at a time; the interpreter "
    "computes it with XNNPACK, unless told otherwise: Interpreter(FILE).get_signature_runner()"
)
"""What a user of such a file must know."""
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    for module, package in (("ai_edge_litert", PACKAGE), ("flatbuffers", "flatbuffers")):
        if find_spec(module) is None:
            raise UsageError(
                f"--format {LITERT} needs {package}, to write the file and to verify it: pip install 'lqkd[{LITERT}]'"
            )


def build(deployed: Deployed) -> Written:
    """The network as a TFLite file: int8 codes and weights, int32 biases, one sample at a time.

    Raises:
        UsageError: when an operator has no counterpart, or ai-edge-litert is not installed.
    """
    require()
    return Writer(deployed).build()


def in_file(described: dict[str, Any]) -> dict[str, Any]:
    """What a file says about itself, with the shapes that this format has."""
    shapes = {
        key: {
            name: [shape[axis - 1] for axis in CHANNELS_LAST[1:]] if len(shape) == len(CHANNELS_LAST) - 1 else shape
            for name, shape in described[key].items()
        }
        for key in ("inputs", "outputs")
    }
    runtime = f"{PACKAGE} {metadata.version(PACKAGE)}"
    return {**described, **shapes, "batch": 1, "runtime": runtime, "loader_note": LOADER_NOTE}


def kernels(content: bytes) -> Kernels:
    """The operators of a file: those in integers by kind, and those in floating point by name."""
    s = schema()
    kinds = {value: name for name, value in vars(s.BuiltinOperator).items() if isinstance(value, int)}
    model = unpacked(content)
    graph = model.subgraphs[0]
    integer: dict[str, int] = {}
    floats = []
    for operator in graph.operators:
        kind = kinds[model.operatorCodes[operator.opcodeIndex].builtinCode]
        result = graph.tensors[operator.outputs[0]]
        if result.type == s.TensorType.FLOAT32:
            if kind not in _CONVERSIONS:
                floats.append((result.name.decode(), kind))
        elif kind not in _CONVERSIONS:
            integer[kind] = integer.get(kind, 0) + 1
    return Kernels(integer, tuple(floats))
