"""A run's student as a file, verified, with a model card beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lqkd.data.text import tokenizer_said
from lqkd.errors import ParityError, UsageError, first_line
from lqkd.export import metadata, report
from lqkd.export.card import Summary, card_path, print_card, rejected, write_card
from lqkd.export.coreml import check_replaceable as check_coreml_folder
from lqkd.export.coreml_writer import COREML
from lqkd.export.deploy import as_float32
from lqkd.export.executorch_writer import EXECUTORCH
from lqkd.export.formats import BUILDERS, FOLDERS, check_folder_name, check_format, deployed_for, file_name
from lqkd.export.gguf_command import tokenizer_of, write_gguf
from lqkd.export.gguf_file import GGUF, require
from lqkd.export.large_files import all_files, atomic_model
from lqkd.export.litert import LITERT
from lqkd.export.made import build
from lqkd.export.nbits import NBITS
from lqkd.export.nbits_command import write_nbits
from lqkd.export.ncnn import check_replaceable as check_ncnn_folder
from lqkd.export.ncnn_writer import NCNN
from lqkd.export.openvino import OPENVINO
from lqkd.export.pack_quantized import COMPRESSED, check_replaceable
from lqkd.export.pack_quantized import require as require_compressed
from lqkd.export.pack_quantized_command import write_compressed_tensors
from lqkd.export.parity import TEST, VALIDATION
from lqkd.export.tensorrt import TENSORRT
from lqkd.models.calls import Inputs
from lqkd.modules import DistillModule
from lqkd.modules.references import as_stop, batches_of
from lqkd.quantization import quantizers, size
from lqkd.quantization.residual import other_places
from lqkd.runs.provenance import fingerprint, outdated_exports
from lqkd.runs.reader import RunReader, read_run, take_batches
from lqkd.utils.files import atomic_folder, atomic_path
from lqkd.utils.progress import Progress, Stages, track

CALIBRATION_BATCHES = 8
"""Training batches for grids that training left out."""
_UNTIMED = {
    "qonnx": "its package executes node by node, for tests",
    OPENVINO: "OpenVINO's own benchmark_app times such a file",
    TENSORRT: "TensorRT's own trtexec times such a file",
    LITERT: "LiteRT's own benchmark_model times such a file, on the device that it is for",
    EXECUTORCH: "ExecuTorch's own executor_runner times such a file, on the device that it is for",
    COREML: "Xcode's own performance report times such files, on the device that they are for",
    NCNN: "ncnn's own benchncnn times such files, on the device that they are for",
    GGUF: "llama.cpp's own llama-bench times such a file",
    COMPRESSED: "its time depends on the length of a text",
    NBITS: "its time depends on the length of a text",
}
"""Formats that are not timed, and why."""
_FRAMED = ("portable", "packed4", "packed2")
"""Formats that may take a camera's frames."""
_CHECKS = {COREML: check_coreml_folder, NCNN: check_ncnn_folder, COMPRESSED: check_replaceable}
"""What is asked of a folder before it is replaced."""
COMPARED = 32
"""Samples for the comparison layer by layer."""


def export(
    run: str | Path,
    *,
    format: str = "portable",
    output: str | Path | None = None,
    overwrite: bool = False,
    latency: bool = False,
    frames: bool = False,
    batch: int | None = None,
    allow_code: bool = False,
) -> Path:
    """Export the student of a run from its best checkpoint, verify the file and write a model card beside it.

    Args:
        run: folder of a finished training.
        format: one of :data:`lqkd.export.FORMATS`.
        output: file, or folder of ``compressed-tensors``, ``coreml`` and ``ncnn``, to write; None for ``student.onnx``
            or its like in the run folder.
        overwrite: whether to replace a file that exists.
        latency: whether to time it against float32 ONNX and PyTorch on this CPU.
        frames: whether it takes a camera's frames, bytes (B, H, W, C), and prepares them itself.
        batch: samples that it takes at a time; None for any number, where the format can.
        allow_code: whether classes of a folder that somebody else made may be run.

    Returns:
        The file.

    Raises:
        UsageError: after a user's mistake.
        ParityError: when the file does not compute what the student computes; it is kept under another name.
    """
    check_format(format)
    if latency and format in _UNTIMED:
        raise UsageError(f"--latency is not possible with --format {format}: {_UNTIMED[format]}")
    if frames and format not in _FRAMED:
        raise UsageError(f"--frames is not possible with --format {format}: use one of {', '.join(_FRAMED)}")
    if batch is not None:
        _check_batch(batch, format, latency)
    wanted = _output(Path(run), format, output, overwrite)
    if format in (GGUF, NBITS, COMPRESSED):
        return _export_language_model(Path(run), wanted, format, allow_code)
    with Stages(5) as stage:
        stage("reading the run")
        reader, student, checkpoint = read_student(run, allow_code)
        stage("reading calibration data")
        calibration, inputs = _inputs(reader)
        stage("making weights integer and calibrating")
        with Progress("fitting grids") as bar:
            deployed = deployed_for(format, student.cpu().eval(), inputs, calibration, bar.update)
        about = _about(reader, inputs) | {"checkpoint": checkpoint}
        split, test = _test(reader)
        task = reader.model.task.cpu()
        stage("building the file's network")
        made = build(format, deployed, inputs)
        stage("comparing it with PyTorch")
        parity = made.check(deployed, inputs, test, student, task)
    parity.split = split
    if batch is not None:
        parity.batches = (batch,)
        about |= {"batch": batch}
    described = made.describe(metadata.describe(format, deployed, parity, about))
    target = wanted if parity.problem is None else rejected(wanted)
    with (atomic_folder if made.is_folder else atomic_model)(target) as temporary:
        made.write(temporary, described, frames, batch)
    weights = size(student)
    summary = Summary(target, _bytes(target), weights.packed_bytes, weights.float_bytes, made.kernels())
    print_card(summary, described, parity)
    if parity.problem is not None:
        raise ParityError(f"the file fails the comparison and is kept as {target}: {parity.problem}")
    write_card(summary, described, parity, deployed)
    one = inputs.part(slice(1))
    timed = (
        report.measure_latency(made.runs(), f"{target.name} ({format})", deployed, student, one) if latency else None
    )
    report.tell(report.describe(student, one, summary, described, timed), target)
    _warn_of_outdated(Path(run))
    return target


def _check_batch(batch: int, format: str, latency: bool) -> None:
    if format in (LITERT, EXECUTORCH, COREML, NCNN):
        raise UsageError(f"--batch is not possible with --format {format}: its files take one sample at a time anyway")
    if format not in BUILDERS:
        raise UsageError(f"--batch is not possible with --format {format}: use one of {', '.join(BUILDERS)}")
    if batch < 1:
        raise UsageError(f"--batch {batch} is not possible: it is a number of samples, 1 or more")
    if latency and batch > 1:
        raise UsageError(f"--latency is not possible with --batch {batch}: it times one sample at a time")


def _export_language_model(run: Path, target: Path, format: str, allow_code: bool) -> Path:
    {GGUF: require, COMPRESSED: require_compressed}.get(format, lambda: None)()
    reader, student, checkpoint = read_student(run, allow_code)
    _, inputs = _inputs(reader)
    about: dict[str, Any] = {"name": run.resolve().parent.name, "checkpoint": checkpoint}
    about |= {"data": type(reader.datamodule).__name__, **tokenizer_said(reader.datamodule)}
    split, test = _test(reader)
    student, task = student.cpu().eval(), reader.model.task.cpu()
    if format == NBITS:
        write_nbits(student, target, inputs, test, split, task, about)
    else:
        write = write_gguf if format == GGUF else write_compressed_tensors
        write(student, target, inputs, test, split, task, about, tokenizer_of(reader.datamodule, student))
    _warn_of_outdated(run)
    return target


def _warn_of_outdated(run: Path) -> None:
    for sentence in outdated_exports(run).values():
        print(f"lqkd: warning: {sentence}", file=sys.stderr)


def _output(run: Path, format: str, given: str | Path | None, overwrite: bool) -> Path:
    if not run.is_dir():
        raise UsageError(f"{str(run)!r} is not a run folder: export takes the folder of a finished training")
    suffix = Path(file_name(format)).suffix
    output = run / file_name(format) if given is None else Path(given)
    if format in FOLDERS:
        check_folder_name(output, format)
        _CHECKS[format](output)
    elif output.is_dir():
        raise UsageError(f"--output {str(output)!r} is a folder: give a file name")
    elif output.suffix != suffix:
        raise UsageError(f"--output {str(output)!r} has another ending than the format: use {suffix}")
    for path in (output, card_path(output), report.report_path(output)):
        if path.exists() and not overwrite:
            old = outdated_exports(output.parent).get(output)
            raise UsageError(
                f"{str(path)!r} exists: give --overwrite, or another --output" + ("" if old is None else f"; {old}")
            )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output.parent / f"{output.name}.probe") as probe:
            probe.touch()
        (output.parent / f"{output.name}.probe").unlink()
    except OSError as error:
        raise UsageError(f"--output {str(output)!r} cannot be written ({error.strerror}): choose another") from error
    return output


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else all_files(path)
    return sum(file.stat().st_size for file in files if file.is_file())


def read_student(run: str | Path, allow_code: bool = False) -> tuple[RunReader, nn.Module, str]:
    """The run of a folder, its network with all of its best checkpoint, and the fingerprint of that.

    Raises:
        UsageError: when the folder, its config or checkpoint is missing or damaged, the network is in floating point,
            its bits are not those of the config yet, or the config names code that is not allowed.
    """
    reader, checkpoint = read_run(run, allow_code)
    if checkpoint is None:
        raise UsageError(f"{str(run)!r} is a config: give a run folder with a checkpoint")
    network = reader.model.product()
    wanted = {name: quantizer.bits for name, quantizer in quantizers(network).items()}
    if not wanted:
        raise UsageError(f"the network of {str(run)!r} is in floating point: train a student with bits below 32")
    name = "student" if isinstance(reader.model, DistillModule) else "network"
    saved = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    state = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        moved = other_places(network.state_dict(), state)
        raise UsageError(
            f"checkpoint {str(checkpoint)!r} is of another network than its config ({first_line(error)})"
            if moved is None
            else f"checkpoint {str(checkpoint)!r} does not fit: {moved}"
        ) from error
    for key, quantizer in quantizers(network).items():
        if quantizer.bits != wanted[key]:
            raise UsageError(
                f"the bit schedule of {str(run)!r} is not finished: {key} has {quantizer.bits} bits in the best "
                f"checkpoint and {wanted[key]} in the config; train to the end of the schedule"
            )
    return reader, network, fingerprint(checkpoint)


def _inputs(reader: RunReader) -> tuple[list[Inputs], Inputs]:
    """Training batches for grids that training left out, and the samples that are compared layer by layer."""
    calibration, validation = take_batches(reader, CALIBRATION_BATCHES, 1)
    if not calibration:
        raise UsageError("data has no training images to calibrate with: raise data.limit_train or lower batch_size")
    compared = [*(reader.model.inputs(batch) for batch in validation), *calibration]
    return [as_float32(x, "calibration data") for x in calibration], as_float32(
        Inputs.joined(compared).part(slice(COMPARED)), "an example"
    )


def _about(reader: RunReader, inputs: Inputs) -> dict[str, Any]:
    model = yaml.safe_load(reader.config_text)["model"]  # of the model itself, files of weights are left out
    settings = model.get("init_args", model)
    return {
        **told_of_data(reader.datamodule, inputs),
        "task": settings.get("task"),
        "teacher": settings.get("teacher") or settings.get("teachers"),
        "network": settings.get("student", settings.get("network")),
        "data": type(reader.datamodule).__name__,
    }


def told_of_data(data: Any, inputs: Inputs) -> dict[str, Any]:
    """What a file says of the data that its network was trained on: ``class_names`` and ``preprocessing``.

    Args:
        data: a DataModule; None, or one that tells neither, for an empty list and None.
        inputs: of the network, which knows how an image becomes one only where it takes one tensor.
    """
    shape = list(getattr(data, "image_shape", ()))
    images = inputs.alone() is not None and len(shape) > 1
    preprocessing = (
        {
            "channels": shape[0],
            "size": shape[1:],
            "mean": list(getattr(data, "mean", ())),
            "std": list(getattr(data, "std", ())),
            "resize_size": getattr(data, "resize_size", None),
            **({"whole": True} if getattr(data, "whole_images", False) else {}),
            "scale": "pixels from 0 to 255 are divided by 255 before mean and std",
        }
        if images
        else None
    )
    return {"class_names": list(getattr(data, "class_names", ())), "preprocessing": preprocessing}


def _test(reader: RunReader) -> tuple[str, Iterator[Any]]:
    """The batches of the test split, or of the validation split where none is tested on, and which it is."""
    data = cast(LightningDataModule, reader.datamodule)
    if is_overridden("test_dataloader", data, LightningDataModule):
        data.setup("test")
        loader, limit = data.test_dataloader(), reader.trainer.limit_test_batches
        if batches_of(loader, limit):
            return TEST, _batches(reader, loader, limit)
        told = f"trainer.limit_test_batches is {limit}, so the file is judged on the validation split"
        print(f"lqkd: warning: {told}", file=sys.stderr)
    return VALIDATION, _batches(reader, data.val_dataloader(), 1.0)


def _batches(reader: RunReader, loader: Any, limit: float) -> Iterator[Any]:
    """As many batches as the training was tested on."""
    most = as_stop(batches_of(loader, limit))
    for batch in loader if most is None else track(islice(loader, most), "comparing samples", most):
        yield move_data_to_device(reader.trainer.strategy.batch_to_device(batch, dataloader_idx=0), torch.device("cpu"))
