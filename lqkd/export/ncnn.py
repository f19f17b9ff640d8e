"""Files for ncnn, on phones: what they are called, what they need, and what a user of them must know."""

from __future__ import annotations

import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError
from lqkd.export.deploy import Deployed
from lqkd.export.ncnn_file import PRODUCTS, read
from lqkd.export.ncnn_writer import NCNN, Writer, Written
from lqkd.export.own_folder import check_own
from lqkd.export.runtimes import Kernels

PARAM, WEIGHTS, ABOUT = "student.param", "student.bin", "student.json"
"""What is in the folder."""
LOADER_NOTE = (
    "one sample at a time, float32 in and out; without fp16 and bf16, which would round steps: set use_fp16_packed, "
    "use_fp16_storage, use_fp16_arithmetic, use_bf16_packed and use_bf16_storage of net.opt to false before load_param"
)
"""What a user of such files must know."""


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    if find_spec("ncnn") is None:
        raise UsageError(f"--format {NCNN} needs ncnn, to verify the files: pip install 'lqkd[{NCNN}]'")


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder with something else in it.

    Raises:
        UsageError: then.
    """
    check_own(folder, (PARAM, WEIGHTS, ABOUT), NCNN)


def build(deployed: Deployed) -> Written:
    """The network in ncnn's layers: int8 weights, one sample at a time.

    Raises:
        UsageError: when an operator has no counterpart, or a grid none in ncnn's int8 layers.
    """
    return Writer(deployed).build()


def in_file(described: dict[str, Any]) -> dict[str, Any]:
    """What the files say about themselves."""
    runtime = f"{NCNN} {metadata.version(NCNN)}"
    return {**described, "batch": 1, "runtime": runtime, "loader_note": LOADER_NOTE}


def save(written: Written, folder: Path, described: dict[str, Any]) -> None:
    """Write the files into ``folder``, which is there."""
    (folder / PARAM).write_text(written.param, encoding="utf-8")
    (folder / WEIGHTS).write_bytes(written.content)
    (folder / ABOUT).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def kernels(written: Written) -> Kernels:
    """The products in int8 by kind, and those in floating point by name."""
    integer: dict[str, int] = {}
    floats = []
    for layer in read(written.param, written.content):
        if layer.kind in PRODUCTS and layer.scales is None:
            floats.append((layer.name, "Conv" if layer.kind != "InnerProduct" else "Gemm"))
        elif layer.kind in PRODUCTS:
            integer[layer.kind] = integer.get(layer.kind, 0) + 1
    return Kernels(integer, tuple(floats))
