"""A file that is built and not written yet, whichever its format is: how it is proven, described, written and timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lqkd.export import (
    coreml,
    coreml_file,
    executorch,
    executorch_file,
    litert,
    litert_file,
    metadata,
    ncnn,
    openvino,
    torch_program,
)
from lqkd.export.coreml_proof import check_coreml
from lqkd.export.coreml_writer import COREML
from lqkd.export.deploy import Deployed
from lqkd.export.executorch_proof import check_executorch
from lqkd.export.executorch_writer import EXECUTORCH
from lqkd.export.fixed_batch import of_batch
from lqkd.export.formats import BUILDERS, RUNNERS, TORCH
from lqkd.export.frames import takes_frames
from lqkd.export.large_files import save
from lqkd.export.litert import LITERT
from lqkd.export.litert_proof import check_litert
from lqkd.export.ncnn_proof import check_ncnn
from lqkd.export.ncnn_writer import NCNN
from lqkd.export.openvino import OPENVINO
from lqkd.export.parity import Parity, check
from lqkd.export.program import check_program, save_program
from lqkd.export.runtimes import Kernels, Runner, is_qonnx, kernels
from lqkd.export.tensorrt import TENSORRT
from lqkd.models.calls import Inputs
from lqkd.tasks import Task


class Made(ABC):
    """A file of a deployed network.

    Attributes:
        is_folder: whether it is several files, in a folder.
    """

    is_folder = False

    @abstractmethod
    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        """Compare it; arguments as of :func:`lqkd.export.parity.check` behind the first."""

    def describe(self, told: dict[str, Any]) -> dict[str, Any]:
        """``told``, what :func:`lqkd.export.metadata.describe` gives, as this format has it."""
        return told

    @abstractmethod
    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        """Write it with what it says about itself; where its format can, for ``frames`` and for one ``batch``.

        A folder is there and empty.
        """

    def kernels(self) -> Kernels | None:
        """What its runtime makes of it; None where that is not told."""
        return None

    @abstractmethod
    def runs(self) -> Any:
        """What :func:`lqkd.export.report.measure_latency` times, of a format that it does time."""


class _Onnx(Made):
    def __init__(self, format: str, deployed: Deployed) -> None:
        self.format = format
        self.exported = BUILDERS[format](deployed)

    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        return check(self.exported, deployed, inputs, test, student, task, RUNNERS.get(self.format, Runner))

    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        metadata.write(self.exported.model, described)
        model = self.exported.model
        if frames:
            model = takes_frames(model, described["preprocessing"])
        save(model if batch is None else of_batch(model, batch), path)

    def kernels(self) -> Kernels | None:
        if is_qonnx(self.exported.model) or self.format == TENSORRT:  # which ONNX Runtime only stands in for
            return None
        return (openvino.kernels if self.format == OPENVINO else kernels)(self.exported.model)

    def runs(self) -> Any:
        return self.exported.model


class _Program(Made):
    def __init__(self, deployed: Deployed, inputs: Inputs) -> None:
        self.program = torch_program.build(deployed, inputs)

    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        return check_program(self.program, deployed, inputs, test, student, task)

    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        save_program(self.program, path, described)

    def runs(self) -> Any:
        return self.program.module()


class _LiteRT(Made):
    def __init__(self, deployed: Deployed) -> None:
        self.written = litert.build(deployed)

    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        return check_litert(self.written, deployed, inputs, test, student, task)

    def describe(self, told: dict[str, Any]) -> dict[str, Any]:
        return litert.in_file(told)

    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        path.write_bytes(litert_file.described(self.written.content, described))

    def kernels(self) -> Kernels:
        return litert.kernels(self.written.content)

    def runs(self) -> Any:
        raise AssertionError("refused before")


class _ExecuTorch(Made):
    def __init__(self, deployed: Deployed) -> None:
        self.written = executorch.build(deployed)

    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        return check_executorch(self.written, deployed, inputs, test, student, task)

    def describe(self, told: dict[str, Any]) -> dict[str, Any]:
        return executorch.in_file(told)

    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        path.write_bytes(executorch_file.described(self.written.content, described))

    def kernels(self) -> Kernels:
        return executorch.kernels(self.written.content)

    def runs(self) -> Any:
        raise AssertionError("refused before")


class _CoreML(Made):
    is_folder = True

    def __init__(self, deployed: Deployed) -> None:
        self.written = coreml.build(deployed)

    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        return check_coreml(self.written, deployed, inputs, test, student, task)

    def describe(self, told: dict[str, Any]) -> dict[str, Any]:
        return coreml.in_file(told)

    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        coreml.save(coreml_file.described(self.written.files, described), path)

    def runs(self) -> Any:
        raise AssertionError("refused before")


class _Ncnn(Made):
    is_folder = True

    def __init__(self, deployed: Deployed) -> None:
        self.written = ncnn.build(deployed)

    def check(self, deployed: Deployed, inputs: Inputs, test: Iterator[Any], student: nn.Module, task: Task) -> Parity:
        return check_ncnn(self.written, deployed, inputs, test, student, task)

    def describe(self, told: dict[str, Any]) -> dict[str, Any]:
        return ncnn.in_file(told)

    def write(self, path: Path, described: dict[str, Any], frames: bool, batch: int | None) -> None:
        ncnn.save(self.written, path, described)

    def kernels(self) -> Kernels:
        return ncnn.kernels(self.written)

    def runs(self) -> Any:
        raise AssertionError("refused before")


_OTHERS: dict[str, type[_LiteRT] | type[_ExecuTorch] | type[_CoreML] | type[_Ncnn]] = {
    LITERT: _LiteRT,
    EXECUTORCH: _ExecuTorch,
    COREML: _CoreML,
    NCNN: _Ncnn,
}


def build(format: str, deployed: Deployed, inputs: Inputs) -> Made:
    """The file of a network in one of :data:`lqkd.export.FORMATS` but those of language models.

    Args:
        format: its name.
        deployed: the network.
        inputs: of it, for a program of ``torch.export``.

    Raises:
        UsageError: when the format cannot have the network.
    """
    if format == TORCH:
        return _Program(deployed, inputs)
    return _OTHERS[format](deployed) if format in _OTHERS else _Onnx(format, deployed)
