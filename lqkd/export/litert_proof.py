"""Proof that a TFLite file computes what the student computes, in LiteRT's own interpreter.

Its numbers are compared with the student's one by one. The codes of every grid are compared twice with
:mod:`lqkd.export.litert_reference`, on the file's own input of that layer: as XNNPACK computes them, which is what the
interpreter runs unless told otherwise, and as its own kernels do. Whole answers are compared with XNNPACK.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from lqkd.export.deploy import OUTPUT, Deployed, as_float32
from lqkd.export.differences import LayerDifference
from lqkd.export.litert_file import unpacked
from lqkd.export.litert_reference import OwnKernels, XNNPack
from lqkd.export.litert_runner import Interpreted
from lqkd.export.litert_values import CHANNELS_LAST, Origin, Written, bias_of, real_bias_of, weight_of
from lqkd.export.parity import (
    REPRODUCED,
    Parity,
    agree_whole,
    compared_numbers,
    differences,
    judge_layers,
    judge_outputs,
    output_steps,
)
from lqkd.export.reference import Reference
from lqkd.export.runtimes import Runner
from lqkd.models.calls import Inputs
from lqkd.models.outputs import heads
from lqkd.tasks import Task

FRACTION = 1e-3
"""At most so many codes of a grid may differ by one step on the same input: what is computed in floating point."""
UNKNOWN_FRACTION = 0.25
"""At most so many as the interpreter's own kernels compute on other processors than x86, where they may round halves
otherwise: of so many sums the second of two roundings sees a half where it drops a single bit."""
_IMAGE = len(CHANNELS_LAST)


class LiteRTRunner(Runner):
    """Runs a file on samples as PyTorch has them, and returns what it computes as PyTorch would.

    Args:
        written: the file.
        deployed: the network that it was made of.
        delegated: as of :class:`~lqkd.export.litert_runner.Interpreted`.
        watched: whether the codes of all grids are returned, too, by the names of their nodes.
    """

    disagreement = 2e-3
    metric_tolerance = 1e-3

    def __init__(self, written: Written, deployed: Deployed, *, delegated: bool = True, watched: bool = False) -> None:
        self._deployed = deployed
        self.outputs = list(deployed.outputs)
        self._grids = written.grids if watched else {}
        tensors = [name for name, _ in self._grids.values()]
        self._run = Interpreted(written.content, delegated=delegated, tensors=tensors)

    def __call__(self, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
        assert isinstance(given, Inputs)
        arrays = [_channels_last(tensor.numpy()) for tensor in self._deployed.in_order(given)]
        parts = [self._run([array[i : i + 1] for array in arrays]) for i in range(len(given))]
        found = {name: _channels_first(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        codes = {node: found[name].astype(np.int16) + offset for node, (name, offset) in self._grids.items()}
        return {name: found[name] for name in self.outputs} | codes


def _channels_last(array: np.ndarray) -> np.ndarray:
    return array.transpose(CHANNELS_LAST) if array.ndim == _IMAGE else array


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array.transpose(np.argsort(CHANNELS_LAST)) if array.ndim == _IMAGE else array


def check_litert(
    written: Written,
    deployed: Deployed,
    example: Any,
    test: Iterable[Any] = (),
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Parity:
    """Compare a TFLite file with the network that it was made of; arguments as of :func:`lqkd.export.parity.check`.

    ``unoptimised`` of what is returned is of the interpreter's own kernels, ``optimised`` of XNNPACK.
    """
    parity = compared_numbers(altered_number(written))
    if parity.problem is not None:
        return parity
    inputs = as_float32(example, "an example")
    whole = LiteRTRunner(written, deployed)
    parity.unoptimised = _on_same_input(parity, written, deployed, inputs, OwnKernels)
    known = platform.machine() in REPRODUCED
    judge_layers(parity, parity.unoptimised, "without delegates", FRACTION if known else UNKNOWN_FRACTION)
    parity.optimised = _on_same_input(parity, written, deployed, inputs, XNNPack)
    judge_layers(parity, parity.optimised, "with XNNPACK", FRACTION)
    judge_outputs(parity, ", after layers that agree")
    watched = LiteRTRunner(written, deployed, watched=True)(inputs)
    reference = XNNPack(deployed.network, watched)
    ours = heads(reference(*deployed.in_order(inputs)), OUTPUT)
    parity.end_to_end = reference.rows
    parity.output_steps = output_steps(ours, whole(inputs), deployed, reference)
    agree_whole(parity, whole, Reference(deployed.network), deployed, test, student, task)
    return parity


def _on_same_input(
    parity: Parity, written: Written, deployed: Deployed, inputs: Inputs, arithmetic: type[XNNPack]
) -> list[LayerDifference]:
    run = LiteRTRunner(written, deployed, delegated=arithmetic is XNNPack, watched=True)
    found = run(inputs)
    reference = arithmetic(deployed.network, {name: found[name] for name in written.grids}, forced=True)
    ours = heads(reference(*deployed.in_order(inputs)), OUTPUT)
    apart = differences(ours, {name: torch.from_numpy(found[name]) for name in ours})
    parity.outputs = {name: max(value, parity.outputs.get(name, 0.0)) for name, value in apart.items()}
    return reference.rows


def altered_number(written: Written) -> str | None:
    """The first tensor of a file that has another code, bias, scale or zero point than the student; None for none.

    Few images may never tell: the codes behind a layer are rounded.
    """
    model = unpacked(written.content)
    for tensor in model.subgraphs[0].tensors:
        name, held = tensor.name.decode(), tensor.quantization
        if held is None and name not in written.origins:
            continue
        scale = None if held is None else np.asarray(held.scale, np.float32)
        codes, wanted, zero_point = _of_student(written.origins[name], scale is not None)
        if (
            (codes is not None and bytes(model.buffers[tensor.buffer].data) != codes.tobytes())
            or (scale is not None and scale.tobytes() != np.atleast_1d(wanted).tobytes())
            or (held is not None and np.any(np.asarray(held.zeroPoint) != zero_point))
        ):
            return name
    return None


def _of_student(origin: Origin, on_grid: bool) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Numbers, where they are constant, scales and zero point as they should be."""
    grid, layer = origin.grid, origin.layer
    if layer is None:
        constant = None if origin.code is None else np.array([origin.code], np.int8)
        return constant, grid.scale.numpy(), grid.zero_point - origin.offset
    if not on_grid:
        return real_bias_of(layer), layer.scale.numpy(), 0
    codes, scale = bias_of(layer, grid) if origin.order is None else weight_of(layer, origin.order)
    return codes, scale, 0
