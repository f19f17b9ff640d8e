"""An ML Program for Core ML, on Apple's devices: what it is called, what it needs, and what a user of it must know."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lqkd.errors import UsageError
from lqkd.export.coreml_file import DATA, MANIFEST, converted
from lqkd.export.coreml_writer import COREML, Program, Writer
from lqkd.export.deploy import Deployed
from lqkd.export.nodes import shape_of
from lqkd.export.own_folder import check_own

PACKAGE = "coremltools"
SUFFIX = ".mlpackage"
LOADER_NOTE = (
    "one sample at a time, float32 in and out, on iOS 18, macOS 15 or later; Core ML itself has not run it, so compare "
    "its answers with the student's before you rely on it, with MLComputeUnits.cpuOnly first: other units compute in "
    "float16 what is not in integers"
)
"""What a user of such a folder must know."""


@dataclass(frozen=True)
class Written:
    """The files of an ML Program and what they were made of.

    Attributes:
        files: by their paths in the folder.
        program: the program.
    """

    files: dict[str, bytes]
    program: Program


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    if find_spec(PACKAGE) is None:
        raise UsageError(f"--format {COREML} needs {PACKAGE}, to write the file: pip install 'lqkd[{COREML}]'")


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that Core ML would not take for one of its own, and to replace one with something else in it.

    Raises:
        UsageError: then.
    """
    if folder.suffix != SUFFIX:
        raise UsageError(f"{str(folder)!r} has another ending than Core ML asks for: use {folder.stem}{SUFFIX}")
    check_own(folder, (MANIFEST, DATA), COREML)


def build(deployed: Deployed) -> Written:
    """The network as an ML Program: weights of int4 or int8, grids of int8 or uint8, one sample at a time.

    Raises:
        UsageError: when an operator has no counterpart, or coremltools is not installed.
    """
    require()
    program = Writer(deployed).build()
    inputs = [node for node in deployed.network.graph.nodes if node.op == "placeholder"]
    example = [torch.zeros(1, *shape_of(node)[1:]) for node in inputs]
    return Written(converted(program.module, example, deployed.outputs), program)


def in_file(described: dict[str, Any]) -> dict[str, Any]:
    """What the files say about themselves."""
    runtime = f"none: written by {PACKAGE} {metadata.version(PACKAGE)}, evaluated in PyTorch"
    return {**described, "batch": 1, "runtime": runtime, "loader_note": LOADER_NOTE}


def save(files: dict[str, bytes], folder: Path) -> None:
    """Write the files into ``folder``, which is there."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
