"""A program of ExecuTorch: how it is lowered to XNNPACK, and what is in the file.

The file is a flatbuffer, ExecuTorch's ``program.fbs``; what XNNPACK computes in it are further ones, ``schema.fbs`` of
its delegate, and constants by name. The package brings both schemas and the compiler that reads by them.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

METADATA = "lqkd.json"
"""The name, among the constants of the file, of what it says about itself."""
_HEADER = 30
"""Bytes of a delegate's header."""
_SOURCES = ("input_id", *(f"input{index}_id" for index in range(1, 6)))
_ABSENT = 2**32 - 1


@dataclass(frozen=True)
class Node:
    """An operator that XNNPACK computes.

    Attributes:
        kind: the schema's name of it, without the ``XNN`` in front.
        source, result: the bits of the scale and the code of zero of what it reads first and of what it writes; None
            for real numbers.
        constants: of a layer: the bytes of weight and bias and of their scales, empty where there are none.
        limits: the bits of the smallest and largest real number, where it has limits.
    """

    kind: str
    source: tuple[int, int] | None
    result: tuple[int, int] | None
    constants: tuple[bytes, ...] = ()
    limits: tuple[int, int] | None = None


@dataclass(frozen=True)
class Contents:
    """What is in a file.

    Attributes:
        nodes: what XNNPACK computes.
        others: names of the operators that ExecuTorch's own kernels compute.
        about: what the file says about itself.
    """

    nodes: list[Node]
    others: list[str]
    about: dict[str, Any]


def lowered(module: fx.GraphModule, inputs: Sequence[Tensor]) -> bytes:
    """The file of a program.

    Args:
        module: between quantize and dequantize, what XNNPACK shall compute on codes.
        inputs: of one sample.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def described(content: bytes, about: dict[str, Any]) -> bytes:
    """The same file with ``about``, JSON values, among its constants."""
    from executorch.exir._serialize import _deserialize_pte_binary, _serialize_pte_binary
    from executorch.exir._serialize.data_serializer import DataEntry

    file = _deserialize_pte_binary(content)
    file.named_data.pte_data[METADATA] = DataEntry(len(file.named_data.buffers), 1, None)
    file.named_data.buffers.append(json.dumps(about).encode())
    return bytes(_serialize_pte_binary(file))


def read(content: bytes) -> Contents:
    """What is in a file."""
    from executorch.exir._serialize import _deserialize_pte_binary

    file = _deserialize_pte_binary(content)
    held = {name: bytes(file.named_data.buffers[x.buffer_index]) for name, x in file.named_data.pte_data.items()}
    (plan,) = file.program.execution_plan
    nodes: list[Node] = []
    others = []
    for instruction in (x.instr_args for chain in plan.chains for x in chain.instructions):
        kind = type(instruction).__name__
        if kind == "DelegateCall":
            place = plan.delegates[instruction.delegate_index].processed.index
            nodes += _nodes(bytes(file.program.backend_delegate_data[place].data), held)
        elif kind == "KernelCall":
            operator = plan.operators[instruction.op_index]
            others.append(".".join(filter(None, (operator.name, operator.overload))))
    return Contents(nodes, others, json.loads(held[METADATA]) if METADATA in held else {})


def _nodes(content: bytes, held: dict[str, bytes]) -> list[Node]:
    """The operators of one of XNNPACK's graphs."""
    graph = _unpacked(content)
    values = {}
    constants = [held.get(entry["named_key"], b"") for entry in graph["constant_data"]]
    for value in (entry["xvalue_union"] for entry in graph["xvalues"]):
        tensor = value.get("tensor_value", value)
        values[tensor["id_out"]] = (tensor["constant_buffer_idx"], value.get("quant_params"))

    def grid(place: int) -> tuple[int, int] | None:
        quantised = values[place][1]
        return None if quantised is None or "zero_point" not in quantised else tuple(quantised.values())

    nodes = []
    for entry in graph["xnodes"]:
        found, limits = entry["xnode_union"], entry.get("output_min_max")
        layer = [values.get(found[key], (0, None)) for key in ("filter_id", "bias_id") if key in found]
        scales = [(quantised or {}).get("scale_buffer_idx", 0) for _, quantised in layer]
        nodes.append(
            Node(
                entry["xnode_union_type"].removeprefix("XNN"),
                grid(next(found[key] for key in _SOURCES if key in found)),
                grid(found["output_id"]),
                tuple(constants[place] for place in (*(place for place, _ in layer), *scales)),
                None if limits is None else (limits["output_min"], limits["output_max"]),
            )
        )
    return nodes


def _unpacked(content: bytes) -> Any:
    """A graph of XNNPACK by its schema, in which floating-point numbers are read as their bits: as text they are
    rounded."""
    from executorch.backends.xnnpack import serialization
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    start, size = (int.from_bytes(content[place : place + 4], "little") for place in (10, 14))
    schema = importlib.resources.files(serialization).joinpath("schema.fbs").read_text()
    with tempfile.TemporaryDirectory() as folder:
        by, packed = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        by.write_text(re.sub(r":\s*float\b", ":uint", schema))
        packed.write_bytes(content[start : start + size])
        _flatc_decompile(folder, str(by), str(packed), ["--raw-binary"])
        return json.loads(packed.with_suffix(".json").read_text())
