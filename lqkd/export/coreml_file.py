"""An ML Program of Core ML, a folder: how it is made of a program of PyTorch, what it says, and how it is read.

No pass of coremltools that would change a number runs. Two are left: what is computed of constants becomes one, as
Core ML asks for zero points, and what nothing reads is left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lqkd.errors import UsageError, first_line

MANIFEST, DATA = "Manifest.json", "Data"
"""What is in the folder."""
SPECIFICATION, WEIGHTS = (f"{DATA}/com.apple.CoreML/{name}" for name in ("model.mlmodel", "weights/weight.bin"))
_PREFIX = "lqkd."
_PASSES = ("common::const_elimination", "common::dead_code_elimination")


def converted(module: fx.GraphModule, inputs: Sequence[Tensor], outputs: Sequence[str]) -> dict[str, bytes]:
    """The files of a program, by their paths in the folder, for Core ML of iOS 18 and macOS 15.

    Args:
        module: between quantize and dequantize.
        inputs: of one sample.
        outputs: what they are called.

    Raises:
        UsageError: when an operator has no counterpart.
    """
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs)).run_decompositions({})
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        import coremltools as ct

        try:
            model = ct.convert(
                program,
                convert_to="mlprogram",
                outputs=[ct.TensorType(name=name) for name in outputs],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline(list(_PASSES), "numbers stay"),
                skip_model_load=True,
            )
        except Exception as error:  # of whichever operator it does not have or take so
            raise UsageError(f"--format coreml cannot have the network ({first_line(error)}): use portable") from error
        path = Path(folder) / "student.mlpackage"
        model.save(str(path))
        found = (file for file in (path / MANIFEST, *(path / DATA).rglob("*")) if file.is_file())
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in found}


def described(files: dict[str, bytes], about: dict[str, Any]) -> dict[str, bytes]:
    """The same files with ``about``, JSON values, in the metadata of the model, each under ``lqkd.NAME``."""
    specification = _specification(files)
    for key, value in about.items():
        specification.description.metadata.userDefined[f"{_PREFIX}{key}"] = json.dumps(value)
    return {**files, SPECIFICATION: specification.SerializeToString()}


def about_of(files: dict[str, bytes]) -> dict[str, Any]:
    """What files say about themselves."""
    told = _specification(files).description.metadata.userDefined
    return {key.removeprefix(_PREFIX): json.loads(told[key]) for key in told if key.startswith(_PREFIX)}


def read(files: dict[str, bytes]) -> Any:
    """The function in the files, of coremltools' intermediate language: ``inputs``, ``operations`` and ``outputs``."""
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        from coremltools.converters.mil.frontend.milproto.load import load

        if WEIGHTS in files:  # small ones are in the specification
            (Path(folder) / Path(WEIGHTS).name).write_bytes(files[WEIGHTS])
        specification = _specification(files)
        return load(specification, specification.specificationVersion, folder).functions["main"]


def _specification(files: dict[str, bytes]) -> Any:
    with _quietly():
        from coremltools.proto import Model_pb2

    return Model_pb2.Model.FromString(files[SPECIFICATION])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without bars of progress, and warnings that Core ML itself is not on this machine."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
