"""The formats by name, and what each can express."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lqkd.errors import UsageError
from lqkd.export import openvino, packed, portable, power_of_two, qonnx, tensorrt
from lqkd.export.coreml import SUFFIX as MLPACKAGE
from lqkd.export.coreml import require as require_coreml
from lqkd.export.coreml_writer import COREML
from lqkd.export.deploy import Deployed, deploy
from lqkd.export.emitter import Exported
from lqkd.export.executorch import SUFFIX as PTE
from lqkd.export.executorch import require as require_executorch
from lqkd.export.executorch_writer import EXECUTORCH
from lqkd.export.gguf_file import GGUF
from lqkd.export.grids import LookupGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.litert import LITERT, SUFFIX
from lqkd.export.litert import require as require_litert
from lqkd.export.nbits import NBITS
from lqkd.export.ncnn import require as require_ncnn
from lqkd.export.ncnn_writer import NCNN
from lqkd.export.pack_quantized import COMPRESSED
from lqkd.export.runtimes import Runner
from lqkd.quantization.targets import TARGETS

PORTABLE, TORCH = "portable", "torch"
BUILDERS: dict[str, Callable[[Deployed], Exported]] = {
    PORTABLE: portable.build,
    "packed4": packed.build4,
    "packed2": packed.build2,
    "qonnx": qonnx.build,
    openvino.OPENVINO: openvino.build,
    tensorrt.TENSORRT: tensorrt.build,
    power_of_two.POWER_OF_TWO: power_of_two.build,
}
"""The formats that are ONNX files."""
RUNNERS: dict[str, type[Runner]] = {openvino.OPENVINO: openvino.OpenVINORunner}
"""What they are verified in where it is not ONNX Runtime, or the ``qonnx`` package."""
FORMATS = (*BUILDERS, LITERT, EXECUTORCH, COREML, NCNN, TORCH, GGUF, NBITS, COMPRESSED)
"""All formats."""
FOLDERS = (COREML, NCNN, COMPRESSED)
"""Those that are folders."""
_SUFFIXES = {
    LITERT: SUFFIX,
    EXECUTORCH: PTE,
    COREML: MLPACKAGE,
    NCNN: f".{NCNN}",
    TORCH: ".pt2",
    GGUF: ".gguf",
    COMPRESSED: f".{COMPRESSED}",
}
"""Of files that are not ONNX."""


def file_name(format: str) -> str:
    """What a file of a format is called in the run folder."""
    stem = "student" if format in (PORTABLE, *_SUFFIXES) else f"student.{format}"
    return f"{stem}{_SUFFIXES.get(format, '.onnx')}"


def check_folder_name(path: Path, format: str) -> None:
    """Refuse a folder of a format with the ending of another format's file.

    Raises:
        UsageError: then.
    """
    if path.suffix in {Path(file_name(other)).suffix for other in FORMATS if other not in FOLDERS}:
        raise UsageError(
            f"{str(path)!r} has the ending of a file, and the format {format} writes a folder: use "
            f"{path.stem}{_SUFFIXES[format]}"
        )


def check_format(name: str) -> None:
    """Refuse an unknown format, and one whose package is not installed.

    Raises:
        UsageError: likewise.
    """
    if name not in FORMATS:
        raise UsageError(f"--format {name} is unknown: use one of {', '.join(FORMATS)}")
    if name == openvino.OPENVINO:
        openvino.require()
    if name == LITERT:
        require_litert()
    if name == EXECUTORCH:
        require_executorch()
    if name == COREML:
        require_coreml()
    if name == NCNN:
        require_ncnn()


def deployed_for(
    name: str,
    student: torch.nn.Module,
    example: Any,
    calibration: Iterable[Any] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Deployed:
    """A network as it is deployed in a format; arguments behind the first as of :func:`lqkd.export.deploy.deploy`.

    Raises:
        UsageError: likewise, and when the format cannot express the network.
    """
    elsewhere = name in (openvino.OPENVINO, LITERT, EXECUTORCH, COREML)
    target = TARGETS.get(name)
    deployed = deploy(student, example, calibration, progress, target, gates=name == PORTABLE, off_middles=elsewhere)
    check_expressible(deployed, name)
    return deployed


def check_expressible(deployed: Deployed, name: str) -> None:
    """Refuse a format that cannot express a grid of the network exactly, or would store nothing in few bits.

    Raises:
        UsageError: for the first grid that it cannot express, with the formats that can.
    """
    if name == TORCH:
        return
    for place, module in deployed.network.named_modules():
        levels = isinstance(module, IntegerLayer) and module.levels is not None
        if levels or isinstance(module, LookupGrid):
            what = "weights" if levels else "input grid"
            raise UsageError(
                f"--format {name} cannot express the levels of {place} ({what}), which are not evenly spaced in 8 "
                f"bits: the formats that can are {TORCH}"
            )
    bits = {"packed4": 4, "packed2": 2}.get(name)
    if bits is not None and not any(_fits(module, bits) for module in deployed.network.modules()):
        raise UsageError(f"--format {name} has nothing to pack: no layer has {bits} bits or fewer, use portable")


def _fits(module: torch.nn.Module, bits: int) -> bool:
    if not isinstance(module, IntegerLayer):
        return False
    return packed.fit(module.codes.to(torch.int16), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) is not None
