"""What an exported file says about itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import onnx

from lqkd.errors import UsageError, first_line
from lqkd.export.coreml import LOADER_NOTE as COREML_NOTE
from lqkd.export.coreml_writer import COREML
from lqkd.export.deploy import OUTPUT, Deployed, grid_of
from lqkd.export.executorch import LOADER_NOTE as EXECUTORCH_NOTE
from lqkd.export.executorch_writer import EXECUTORCH
from lqkd.export.grids import ActivationGrid, LookupGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.litert import LITERT
from lqkd.export.litert import LOADER_NOTE as LITERT_NOTE
from lqkd.export.ncnn import LOADER_NOTE as NCNN_NOTE
from lqkd.export.ncnn_writer import NCNN
from lqkd.export.nodes import shape_of
from lqkd.export.openvino import LOADER_NOTE as OPENVINO_NOTE
from lqkd.export.openvino import OPENVINO
from lqkd.export.packed import LOADER_NOTE as PACKED2_NOTE
from lqkd.export.parity import Parity
from lqkd.export.power_of_two import LOADER_NOTE as POWER_OF_TWO_NOTE
from lqkd.export.power_of_two import POWER_OF_TWO
from lqkd.export.runtimes import is_qonnx
from lqkd.export.tensorrt import LOADER_NOTE as TENSORRT_NOTE
from lqkd.export.tensorrt import TENSORRT
from lqkd.models.outputs import heads

PREFIX = "lqkd."
LOADER_NOTES = {
    "packed2": PACKED2_NOTE,
    OPENVINO: OPENVINO_NOTE,
    LITERT: LITERT_NOTE,
    EXECUTORCH: EXECUTORCH_NOTE,
    COREML: COREML_NOTE,
    TENSORRT: TENSORRT_NOTE,
    POWER_OF_TWO: POWER_OF_TWO_NOTE,
    NCNN: NCNN_NOTE,
}
"""By format, what a user of a file must know."""
_SCHEMES = {
    POWER_OF_TWO: "weights and activations per tensor, symmetric, static, scales powers of two; biases int32",
    COREML: "weights per channel, symmetric; activations per tensor, static; biases float32",
    NCNN: "weights per channel, symmetric; activations per tensor, static; biases float32",
}
"""By format, where it is not that of the others."""


def layer_bits(deployed: Deployed) -> dict[str, str]:
    """Name of each layer to its bits, e.g. ``W4A4``; float is ``W32`` or ``A32``."""
    found = {}
    for node in deployed.network.graph.nodes:
        module = deployed.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, IntegerLayer):
            grid = grid_of(node.all_input_nodes[0], deployed.network)
            activation = grid.bits if isinstance(grid, ActivationGrid | LookupGrid) else 32
            found[str(node.target)] = f"W{module.bits}A{activation}"
    return found


def summary_of_bits(deployed: Deployed) -> str:
    """Bits and how many layers have them, e.g. ``W2A2 (20 layers), W8A8 (2 layers)``."""
    counts = Counter(layer_bits(deployed).values()).most_common()
    return ", ".join(f"{bits} ({count} layers)" for bits, count in counts)


def describe(format_name: str, deployed: Deployed, parity: Parity, about: dict[str, Any]) -> dict[str, Any]:
    """All that is kept in a file, as JSON values.

    Args:
        format_name: of the file.
        deployed: the network.
        parity: its comparison with the file.
        about: what the caller knows: class names, preprocessing, teacher ...
    """
    return {
        "version": metadata.version("lqkd"),
        "format": format_name,
        "bits": layer_bits(deployed),
        "scheme": _SCHEMES.get(
            format_name, "weights per channel, symmetric; activations per tensor, static; biases int32"
        ),
        **about,
        "inputs": _shapes(deployed, deployed.inputs, "placeholder"),
        "outputs": _shapes(deployed, deployed.outputs, "output"),
        "calibrated": deployed.calibrated,
        "rerouted": deployed.rerouted,
        "parity": parity.numbers(),
    }


_OWN = ("version", "format", "bits", "scheme", "inputs", "outputs", "calibrated", "rerouted", "parity", "batch")
"""What :func:`describe` tells by itself."""


def check_about(about: Mapping[str, Any]) -> None:
    """Refuse what a file says about itself already, and what is no JSON.

    Raises:
        UsageError: then.
    """
    for key in about:
        if key in _OWN:
            raise UsageError(f"about[{key!r}] is not possible: the file says {', '.join(_OWN)} by itself")
    try:
        json.dumps(dict(about), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"about is not possible: a file keeps JSON values ({first_line(error)})") from error


def _shapes(deployed: Deployed, names: tuple[str, ...], kind: str) -> dict[str, list[int]]:
    """Name of each input or output to its shape without the batch axis."""
    found = [node for node in deployed.network.graph.nodes if node.op == kind]
    nodes = heads(found[0].args[0], OUTPUT).values() if kind == "output" else found
    return {name: list(shape_of(node)[1:]) for name, node in zip(names, nodes, strict=True)}


def write(model: onnx.ModelProto, described: dict[str, Any]) -> None:
    """Put ``described`` into ``metadata_props`` of the model, each value as JSON under ``lqkd.NAME``."""
    described = dict(described) | {"runtime": runtime(model, described["format"])}
    if described["format"] in LOADER_NOTES:
        described["loader_note"] = LOADER_NOTES[described["format"]]
    onnx.helper.set_model_props(model, {f"{PREFIX}{key}": json.dumps(value) for key, value in described.items()})


def read(model: onnx.ModelProto) -> dict[str, Any]:
    """What :func:`write` put there."""
    props = {entry.key: entry.value for entry in model.metadata_props}
    return {key.removeprefix(PREFIX): json.loads(value) for key, value in props.items() if key.startswith(PREFIX)}


def runtime(model: onnx.ModelProto, format_name: str) -> str:
    """Name and version of what the file was run with."""
    package = OPENVINO if format_name == OPENVINO else "qonnx" if is_qonnx(model) else "onnxruntime"
    return f"{package} {metadata.version(package)}"
