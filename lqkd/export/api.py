"""Export from Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import metadata
from lqkd.export.deploy import deploy, deployable_copy
from lqkd.export.formats import BUILDERS, check_expressible
from lqkd.export.parity import check
from lqkd.quantization import quantizers
from lqkd.utils.files import atomic_path


def to_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | Path | None = None,
    *,
    format: str = "portable",
    calibration: Iterable[Tensor] = (),
    test: Iterable[Tensor | Sequence[Any]] | None = None,
    about: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """Export a quantised network to ONNX, and prove that the model computes the same.

    Args:
        model: trained or calibrated, in any mode and precision, also in a wrapper such as that of ``torch.compile`` or
            ``DataParallel``; it is left alone. The file computes in float32.
        example: (B, C, H, W) real inputs, B of at least 2, as the network sees them, for the comparison.
        path: where to write the model, complete or not at all; ``None`` writes nothing. An existing file is replaced.
        format: ``portable``, ``packed4``, ``packed2`` or ``qonnx``.
        calibration: training inputs for grids that training left out, such as of residual additions.
        test: batches of inputs, or of inputs and labels (B,) as a DataLoader gives them: on them PyTorch and the file
            must agree in the first class of all but one in a thousand images (or one image). The file's metadata say
            on how many they do and, where there are labels, the accuracies. Without it only layers, logits and batch
            sizes are compared.
        about: what the file shall also say about itself, JSON values; with ``class_names`` and ``preprocessing``
            (``channels``, ``size``, ``mean``, ``std``, ``resize_size``) it can be asked about image files.

    Returns:
        The model. Input ``images`` (batch, C, H, W), output ``logits`` (batch, classes), float32.

    Raises:
        UsageError: when the network cannot be exported in this format; the message says why.
        ParityError: when the model computes something else; nothing is written then.
    """
    if format not in BUILDERS:
        raise UsageError(f"format={format!r} is not an ONNX format: use one of {', '.join(BUILDERS)}")
    if not isinstance(example, Tensor):
        raise UsageError(f"example is a {type(example).__name__}: a tensor (B, ...) of inputs is needed, B >= 1")
    if not quantizers(model):
        raise UsageError("the network is in floating point: quantise it with lqkd.quantize_model and train it first")
    deployed = deploy(model, example, calibration)
    check_expressible(deployed, format)
    exported = BUILDERS[format](deployed)
    student = None if test is None else deployable_copy(model)
    parity = check(exported, deployed, example, _pairs(test or ()), student)
    if test is not None and not parity.images:
        raise UsageError("test has no images: give a list or DataLoader of batches, not an iterator that was used up")
    metadata.write(exported.model, metadata.describe(format, deployed, parity, about or {}))
    if parity.problem is not None:
        raise ParityError(parity.problem)
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(exported.model.SerializeToString())
    return exported.model


def _pairs(batches: Iterable[Tensor | Sequence[Any]]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches:
        yield (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
