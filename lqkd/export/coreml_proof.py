"""Proof that an ML Program has the student's numbers, and computes by its operators' definitions what the student does.

Core ML does not run here: the files are read back, every number is compared with the student's, and what was read is
evaluated as :mod:`lqkd.export.coreml_arithmetic` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from lqkd.export.coreml import Written
from lqkd.export.coreml_arithmetic import ProgramRunner
from lqkd.export.coreml_file import read
from lqkd.export.coreml_writer import limits_of, zero_of
from lqkd.export.deploy import OUTPUT, Deployed, as_float32
from lqkd.export.differences import Forced
from lqkd.export.grids import ActivationGrid
from lqkd.export.integer import IntegerLayer
from lqkd.export.litert_values import real_bias_of
from lqkd.export.parity import (
    UNOPTIMISED_FRACTION,
    Parity,
    agree_whole,
    compared_numbers,
    differences,
    judge_layers,
    judge_outputs,
)
from lqkd.models.outputs import heads
from lqkd.tasks import Task


def check_coreml(
    written: Written,
    deployed: Deployed,
    example: Any,
    test: Iterable[Any] = (),
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Parity:
    """Compare an ML Program with the network that it was made of; arguments as of :func:`lqkd.export.parity.check`.

    ``optimised`` of what is returned is empty: how Core ML optimises it is not known.
    """
    parity = compared_numbers(altered_number(written))
    if parity.problem is not None:
        return parity
    inputs = as_float32(example, "an example")
    run = ProgramRunner(written.files, deployed, list(written.program.grids))
    found = run(inputs)
    forced = Forced(deployed.network, {name: found[name] for name in written.program.grids})
    with torch.no_grad():
        ours = heads(forced.run(*deployed.in_order(inputs)), OUTPUT)
    parity.unoptimised = forced.rows
    parity.outputs = differences(ours, {name: torch.from_numpy(found[name]) for name in ours})
    judge_layers(parity, parity.unoptimised, "in the written arithmetic", UNOPTIMISED_FRACTION)
    judge_outputs(parity, ", after layers that agree")
    whole = ProgramRunner(written.files, deployed)
    agree_whole(parity, whole, deployed.network, deployed, test, student, task)
    return parity


def altered_number(written: Written) -> str | None:
    """The first layer or grid of the files with another code, scale, bias, zero point or limit than the student; None
    for none.

    Few images may never tell: the codes behind a layer are rounded.
    """
    operations = read(written.files).operations
    weights = [op for op in operations if op.op_type == "constexpr_blockwise_shift_scale"]
    for op, (name, layer) in zip(weights, written.program.layers, strict=True):
        if not _is_of_layer(op, layer):
            return name
    quantizes = [op for op in operations if op.op_type == "quantize"]
    for op, (name, grid) in zip(quantizes, written.program.grids.items(), strict=True):
        if not _is_of_grid(op, grid):
            return name
    return None


def _is_of_layer(op: Any, layer: IntegerLayer) -> bool:
    """Of what a layer's weight is made of, and of the one product that reads it."""
    shape = (-1, *[1] * (layer.codes.ndim - 1))
    (product,) = op.outputs[0].child_ops
    return (
        op.offset is None
        and _same(op.data.val, layer.codes.numpy())
        and _same(op.scale.val, layer.scale.numpy().reshape(shape))
        and _same(product.bias.val, real_bias_of(layer))
    )


def _is_of_grid(op: Any, grid: ActivationGrid) -> bool:
    """Of a quantize, the clip in front of it where there is one, and the one dequantize behind it."""
    (zero, dtype), limits, clip = zero_of(grid), limits_of(grid), op.input.op
    (back,) = op.outputs[0].child_ops
    scales = all(_same(one.scale.val, grid.scale.numpy()) for one in (op, back))
    zeros = all((0 if one.zero_point is None else int(one.zero_point.val)) == zero for one in (op, back))
    types = f"torch.{op.output_dtype.val}" == str(dtype)
    if limits is None:
        return scales and zeros and types
    return scales and zeros and types and _limits(clip) == tuple(np.float32(limit) for limit in limits)


def _limits(clip: Any) -> tuple[Any, ...] | None:
    return (clip.alpha.val, clip.beta.val) if clip is not None and clip.op_type == "clip" else None


def _same(theirs: Any, ours: np.ndarray) -> bool:
    array = np.asarray(theirs)
    return array.dtype == ours.dtype and array.shape == ours.shape and array.tobytes() == ours.tobytes()
