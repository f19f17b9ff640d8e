"""A file for one number of samples, as runtimes want it that plan their memory before they see an input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from lqkd.errors import ParityError, UsageError
from lqkd.export import metadata
from lqkd.export.large_files import check_model, copy_of
from lqkd.export.runtimes import Runner, is_qonnx


def check_batch(batch: int) -> None:
    """Refuse what is no number of samples.

    Raises:
        UsageError: then.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise UsageError(f"batch={batch!r} is not possible: it is a number of samples, 1 or more")


def of_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The same network for ``batch`` samples at a time and no other number, proven to give the same numbers.

    Args:
        model: of :func:`lqkd.export.to_onnx` or :func:`lqkd.export.frames.takes_frames`, for any number.
        batch: at least 1.

    Raises:
        UsageError: when ``batch`` is not possible, or the model is for one number already.
        ParityError: when a result differs in a single bit.

    Examples:
        >>> import torch
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_onnx
        >>> from lqkd.quantization import initialize_quantizers
        >>> network, _ = quantize_model(torch.nn.Sequential(torch.nn.Linear(6, 3)), Recipe())
        >>> initialize_quantizers(network, torch.randn(4, 6))
        >>> model = of_batch(to_onnx(network, torch.randn(2, 6)), 4)
        >>> [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
        [4, 6]
    """
    check_batch(batch)
    own = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if own:
        raise UsageError(
            f"batch={batch} is not possible: the model takes {own} samples at a time; give one for any number"
        )
    fixed = copy_of(model)
    for entry in (*fixed.graph.input, *fixed.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = batch
    if not is_qonnx(fixed):
        check_model(fixed)
    described = metadata.read(model)
    if described:
        parity = described["parity"] | {"batches": [batch]}
        metadata.write(fixed, described | {"batch": batch, "parity": parity})
    _compare(model, fixed, batch)
    return fixed


def in_batches(
    run: Callable[[np.ndarray], dict[str, np.ndarray]], given: np.ndarray, batch: int
) -> dict[str, np.ndarray]:
    """What a file for ``batch`` samples returns for any number, of which the last is repeated to fill the last batch.

    Args:
        run: the file.
        given: (N, ...), N of at least 1.
        batch: of the file.
    """
    filled = np.concatenate([given, np.repeat(given[-1:], -len(given) % batch, axis=0)])
    found = [run(filled[start : start + batch]) for start in range(0, len(filled), batch)]
    return {name: np.concatenate([part[name] for part in found])[: len(given)] for name in found[0]}


def _compare(model: onnx.ModelProto, fixed: onnx.ModelProto, batch: int) -> None:
    draw = np.random.default_rng(0)
    arrays = {}
    for entry in fixed.graph.input:
        shape = [size.dim_value for size in entry.type.tensor_type.shape.dim]
        pixels = entry.type.tensor_type.elem_type == TensorProto.UINT8
        arrays[entry.name] = (
            draw.integers(0, 256, shape, np.uint8) if pixels else draw.standard_normal(shape).astype(np.float32)
        )
    expected, found = (Runner(file, optimised=True).on(arrays) for file in (model, fixed))
    for name, values in expected.items():
        if not np.array_equal(values, found[name], equal_nan=True):
            raise ParityError(f"for {batch} samples at a time the file gives other {name} than for any number")
