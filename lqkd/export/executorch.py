"""A program for ExecuTorch, on phones: what it is called, what it needs, and what a user of it must know."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.export.deploy import Deployed
from lqkd.export.executorch_file import lowered, read
from lqkd.export.executorch_writer import EXECUTORCH, Program, Writer
from lqkd.export.nodes import shape_of
from lqkd.export.runtimes import Kernels

SUFFIX = ".pte"
LOADER_NOTE = (
    "one sample at a time, float32 in and out, several by position: "
    'executorch.runtime.Runtime.get().load_program(FILE).load_method("forward").execute([images])'
)
"""What a user of such a file must know."""
_ROUTES = ("Convert", "StaticTranspose", "StaticReshape", "StaticSlice", "Copy")
"""What turns numbers into others or moves them."""
_MOVES = (*_ROUTES, "Clamp", "MaxPooling2d", *(f"Concatenate{count}" for count in range(2, 6)))
"""What leaves codes on their grid."""


@dataclass(frozen=True)
class Written:
    """A file and what it was lowered from.

    Attributes:
        content: the file.
        program: the program.
        example: one sample of the size that it takes.
    """

    content: bytes
    program: Program
    example: tuple[Tensor, ...]


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    if find_spec(EXECUTORCH) is None:
        raise UsageError(
            f"--format {EXECUTORCH} needs executorch, to lower the program and to verify it: pip install "
            f"'lqkd[{EXECUTORCH}]'"
        )


def build(deployed: Deployed) -> Written:
    """The network as a program for XNNPACK: int8 codes and weights, int32 biases, one sample at a time.

    Raises:
        UsageError: when an operator has no counterpart, or executorch is not installed.
    """
    require()
    program = Writer(deployed).build()
    inputs = [node for node in deployed.network.graph.nodes if node.op == "placeholder"]
    example = tuple(torch.zeros(1, *shape_of(node)[1:]) for node in inputs)
    return Written(lowered(program.module, example), program, example)


def in_file(described: dict[str, Any]) -> dict[str, Any]:
    """What a file says about itself."""
    runtime = f"{EXECUTORCH} {metadata.version(EXECUTORCH)}"
    return {**described, "batch": 1, "runtime": runtime, "loader_note": LOADER_NOTE}


def kernels(content: bytes) -> Kernels:
    """The operators of a file: those on codes by kind, and those in floating point, by XNNPACK or not delegated."""
    contents = read(content)
    integer: dict[str, int] = {}
    floats = []
    for node in contents.nodes:
        if node.result is not None and node.kind not in _MOVES:
            integer[node.kind] = integer.get(node.kind, 0) + 1
        elif node.result is None and node.kind not in _ROUTES:
            floats.append(("XNNPACK", node.kind))
    return Kernels(integer, (*floats, *(("not delegated", name) for name in contents.others)))
