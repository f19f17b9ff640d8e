"""Export from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import coreml, coreml_file, executorch, executorch_file, litert, metadata, ncnn, torch_program
from lqkd.export.coreml_proof import check_coreml
from lqkd.export.coreml_writer import COREML
from lqkd.export.deploy import Deployed, deployable_copy
from lqkd.export.executorch_proof import check_executorch
from lqkd.export.executorch_writer import EXECUTORCH
from lqkd.export.fixed_batch import check_batch, of_batch
from lqkd.export.formats import BUILDERS, RUNNERS, TORCH, check_folder_name, deployed_for
from lqkd.export.large_files import atomic_model, save
from lqkd.export.litert_file import described
from lqkd.export.litert_proof import check_litert
from lqkd.export.ncnn_proof import check_ncnn
from lqkd.export.ncnn_writer import NCNN, Written
from lqkd.export.parity import Parity, check
from lqkd.export.program import check_program, save_program
from lqkd.export.runtimes import Runner
from lqkd.models.calls import Inputs
from lqkd.quantization import quantizers
from lqkd.tasks import Task
from lqkd.utils.files import atomic_folder, atomic_path


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path | None = None,
    *,
    format: str = "portable",
    calibration: Iterable[Any] = (),
    test: Iterable[Any] | None = None,
    about: dict[str, Any] | None = None,
    task: Task | None = None,
    batch: int | None = None,
) -> onnx.ModelProto:
    """Export a quantised network to ONNX, and prove that the model computes the same.

    Args:
        model: trained or calibrated, in any mode and precision, also in a wrapper such as that of ``torch.compile`` or
            ``DataParallel``; it is left alone. The file computes in float32.
        example: real inputs, B of at least 2, as the network sees them, for the comparison: a tensor (B, C, H, W),
            say, a tuple of several, or a dict of keyword arguments.
        path: where to write the model, complete or not at all; ``None`` writes nothing. An existing file is replaced.
            Above 2 GB its numbers are in a second file beside it, ``NAME.xxxxxxxx.onnx.data``.
        format: ``portable``, ``packed4``, ``packed2``, ``qonnx``, ``openvino``, ``tensorrt`` or ``power_of_two``.
        calibration: training inputs likewise, for grids that training left out, such as of residual additions.
        test: batches of the task as a DataLoader gives them, such as images, or (images, labels): on them PyTorch and
            the file must give the same answer, such as the first class, to all but one in a thousand samples (or one
            sample). The file's metadata say to how many they do and, where there are labels, what the task measures.
            Without it only layers, outputs and batch sizes are compared.
        about: what the file shall also say about itself, JSON values; with ``class_names`` and ``preprocessing``
            (``channels``, ``size``, ``mean``, ``std``, ``resize_size``) it can be asked about image files.
        task: what the network was trained for; None for the classification of images.
        batch: samples that the file takes at a time; None for any number, on which it is compared in any case.

    Returns:
        The model, of float32. The input of a network that takes one tensor is called ``images``, that of another as
        the network calls it; a tensor that it returns by itself ``logits``, those in a dict as they are called there,
        those in a tuple ``output_0``, ``output_1``, ...

    Raises:
        UsageError: when the network cannot be exported in this format; the message says why.
        ParityError: when the model computes something else; nothing is written then.
    """
    if format not in BUILDERS:
        raise UsageError(f"format={format!r} is not an ONNX format: use one of {', '.join(BUILDERS)}")
    if batch is not None:
        check_batch(batch)
    deployed = _deployed(model, example, format, calibration, about)
    exported = BUILDERS[format](deployed)
    student = None if test is None else deployable_copy(model)
    parity = check(exported, deployed, example, test or (), student, task, RUNNERS.get(format, Runner))
    _check_judged(test, parity)
    metadata.write(exported.model, metadata.describe(format, deployed, parity, about or {}))
    _judge(parity)
    model_of_file = exported.model if batch is None else of_batch(exported.model, batch)
    if path is not None:
        with atomic_model(path) as temporary:
            save(model_of_file, temporary)
    return model_of_file


def to_litert(
    model: nn.Module,
    example: Any,
    path: str | Path | None = None,
    *,
    calibration: Iterable[Any] = (),
    test: Iterable[Any] | None = None,
    about: dict[str, Any] | None = None,
    task: Task | None = None,
) -> bytes:
    """Export a quantised network to a TFLite file, and prove in LiteRT's interpreter that it computes the same.

    Args:
        model, example, path, calibration, test, about, task: as of :func:`to_onnx`.

    Returns:
        The file, for one sample at a time: float32, images and maps channels last, inputs and outputs called as those
        of :func:`to_onnx`.

    Raises:
        UsageError: when the network cannot be exported in this format, or ai-edge-litert is not installed.
        ParityError: when the file computes something else; nothing is written then.

    Examples:
        >>> import torch
        >>> from ai_edge_litert.interpreter import Interpreter
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_litert
        >>> from lqkd.models import CifarResNet
        >>> from lqkd.quantization import initialize_quantizers
        >>> student, _ = quantize_model(CifarResNet(8, width=8), Recipe(bits="w4a4", residual_bits=8))
        >>> images = torch.randn(16, 3, 32, 32)
        >>> initialize_quantizers(student, images)
        >>> file = to_litert(student.eval(), images, calibration=[images])
        >>> run = Interpreter(model_content=file).get_signature_runner()
        >>> run(images=images[:1].permute(0, 2, 3, 1).numpy())["logits"].shape
        (1, 10)
    """
    litert.require()
    deployed = _deployed(model, example, litert.LITERT, calibration, about)
    written = litert.build(deployed)
    student = None if test is None else deployable_copy(model)
    parity = check_litert(written, deployed, example, test or (), student, task)
    _check_judged(test, parity)
    _judge(parity)
    told = litert.in_file(metadata.describe(litert.LITERT, deployed, parity, about or {}))
    content = described(written.content, told)
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return content


def to_executorch(
    model: nn.Module,
    example: Any,
    path: str | Path | None = None,
    *,
    calibration: Iterable[Any] = (),
    test: Iterable[Any] | None = None,
    about: dict[str, Any] | None = None,
    task: Task | None = None,
) -> bytes:
    """Export a quantised network to a program of ExecuTorch, and prove in its runtime that it computes the same.

    Args:
        model, example, path, calibration, test, about, task: as of :func:`to_onnx`.

    Returns:
        The file, for one sample at a time: float32, inputs and outputs by position, in the order of those of
        :func:`to_onnx`.

    Raises:
        UsageError: when the network cannot be exported in this format, or executorch is not installed.
        ParityError: when the file computes something else; nothing is written then.

    Examples:
        >>> import torch
        >>> from executorch.runtime import Runtime
        >>> from torch import nn
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_executorch
        >>> from lqkd.quantization import initialize_quantizers
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> student, _ = quantize_model(network, Recipe(bits="w4a4"))
        >>> images = torch.randn(16, 3, 8, 8)
        >>> initialize_quantizers(student, images)
        >>> file = to_executorch(student.eval(), images)
        >>> program = Runtime.get().load_program(file)
        >>> program.load_method("forward").execute([images[:1]])[0].shape
        torch.Size([1, 10])
    """
    executorch.require()
    deployed = _deployed(model, example, EXECUTORCH, calibration, about)
    written = executorch.build(deployed)
    student = None if test is None else deployable_copy(model)
    parity = check_executorch(written, deployed, example, test or (), student, task)
    _check_judged(test, parity)
    _judge(parity)
    told = executorch.in_file(metadata.describe(EXECUTORCH, deployed, parity, about or {}))
    content = executorch_file.described(written.content, told)
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return content


def to_coreml(
    model: nn.Module,
    example: Any,
    path: str | Path | None = None,
    *,
    calibration: Iterable[Any] = (),
    test: Iterable[Any] | None = None,
    about: dict[str, Any] | None = None,
    task: Task | None = None,
) -> dict[str, bytes]:
    """Export a quantised network to an ML Program, and prove that it has the student's numbers and operators.

    Core ML runs on Apple's systems alone: what is read back from the files is compared and evaluated in PyTorch.

    Args:
        model, example, calibration, test, about, task: as of :func:`to_onnx`.
        path: a folder ``NAME.mlpackage``, complete or not at all; ``None`` writes nothing. One that this format has
            written is replaced.

    Returns:
        The files by their paths in the folder, for one sample at a time: float32, inputs and outputs called as those of
        :func:`to_onnx`.

    Raises:
        UsageError: when the network cannot be exported in this format, the folder has something else in it, or
            coremltools is not installed.
        ParityError: when the files compute something else; nothing is written then.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_coreml
        >>> from lqkd.quantization import initialize_quantizers
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> student, _ = quantize_model(network, Recipe(bits="w4a4"))
        >>> images = torch.randn(16, 3, 8, 8)
        >>> initialize_quantizers(student, images)
        >>> sorted(to_coreml(student.eval(), images))[:2]
        ['Data/com.apple.CoreML/model.mlmodel', 'Data/com.apple.CoreML/weights/weight.bin']
    """
    coreml.require()
    if path is not None:
        coreml.check_replaceable(Path(path))
    deployed = _deployed(model, example, COREML, calibration, about)
    written = coreml.build(deployed)
    student = None if test is None else deployable_copy(model)
    parity = check_coreml(written, deployed, example, test or (), student, task)
    _check_judged(test, parity)
    _judge(parity)
    told = coreml.in_file(metadata.describe(COREML, deployed, parity, about or {}))
    files = coreml_file.described(written.files, told)
    if path is not None:
        with atomic_folder(path) as temporary:
            coreml.save(files, temporary)
    return files


def to_ncnn(
    model: nn.Module,
    example: Any,
    path: str | Path | None = None,
    *,
    calibration: Iterable[Any] = (),
    test: Iterable[Any] | None = None,
    about: dict[str, Any] | None = None,
    task: Task | None = None,
) -> Written:
    """Export a quantised network to ncnn's files, and prove in ncnn that they compute the same.

    Args:
        model, example, calibration, test, about, task: as of :func:`to_onnx`.
        path: a folder for ``student.param``, ``student.bin`` and ``student.json``, complete or not at all; ``None``
            writes nothing. One that this format has written is replaced.

    Returns:
        The files, for one sample at a time: float32, inputs and outputs called as those of :func:`to_onnx`.

    Raises:
        UsageError: when the network cannot be exported in this format, the folder has something else in it, or ncnn is
            not installed.
        ParityError: when the files compute something else; nothing is written then.

    Examples:
        >>> import torch
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_ncnn
        >>> from lqkd.models import CifarResNet
        >>> from lqkd.quantization import initialize_quantizers
        >>> student, _ = quantize_model(CifarResNet(8, width=8), Recipe("w4a4", residual_bits=8, target="ncnn"))
        >>> images = torch.randn(16, 3, 32, 32)
        >>> initialize_quantizers(student, images)
        >>> files = to_ncnn(student.eval(), images, calibration=[images])
        >>> files.param.splitlines()[2]
        'Input images 0 1 images 0=32 1=32 2=3'
    """
    ncnn.require()
    if path is not None:
        check_folder_name(Path(path), NCNN)
        ncnn.check_replaceable(Path(path))
    deployed = _deployed(model, example, NCNN, calibration, about)
    written = ncnn.build(deployed)
    student = None if test is None else deployable_copy(model)
    parity = check_ncnn(written, deployed, example, test or (), student, task)
    _check_judged(test, parity)
    _judge(parity)
    if path is not None:
        with atomic_folder(path) as temporary:
            told = metadata.describe(NCNN, deployed, parity, about or {})
            ncnn.save(written, temporary, ncnn.in_file(told))
    return written


def write_program(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    calibration: Iterable[Any] = (),
    test: Iterable[Any] | None = None,
    about: dict[str, Any] | None = None,
    task: Task | None = None,
) -> None:
    """Export a quantised network to a program of :mod:`torch.export`, and prove that it computes the same.

    Args:
        model, example, path, calibration, test, about, task: as of :func:`to_onnx`.

    Raises:
        UsageError: when the network cannot be exported; the message says why.
        ParityError: when the program computes something else; nothing is written then.
    """
    deployed = _deployed(model, example, TORCH, calibration, about)
    program = torch_program.build(deployed, example)
    student = None if test is None else deployable_copy(model)
    parity = check_program(program, deployed, example, test or (), student, task)
    _check_judged(test, parity)
    _judge(parity)
    with atomic_path(path) as temporary:
        save_program(program, temporary, metadata.describe(TORCH, deployed, parity, about or {}))


def _deployed(
    model: nn.Module, example: Any, format: str, calibration: Iterable[Any], about: dict[str, Any] | None
) -> Deployed:
    metadata.check_about(about or {})
    if not isinstance(example, Inputs | Tensor | tuple | Mapping):
        raise UsageError(
            f"example is a {type(example).__name__}: a tensor (B, ...) of inputs is needed, B >= 1, or a tuple or dict "
            "of them"
        )
    if not quantizers(model):
        raise UsageError("the network is in floating point: quantise it with lqkd.quantize_model and train it first")
    return deployed_for(format, model, example, calibration)


def _check_judged(test: Iterable[Any] | None, parity: Parity) -> None:
    if test is not None and not parity.samples:
        raise UsageError("test has no samples: give a list or DataLoader of batches, not an iterator that was used up")


def _judge(parity: Parity) -> None:
    if parity.problem is not None:
        raise ParityError(parity.problem)
