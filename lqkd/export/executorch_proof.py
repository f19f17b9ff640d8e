"""Proof that a program computes what the student computes, in ExecuTorch's own runtime.

Its numbers are compared with the student's one by one. The codes of every grid are compared with the arithmetic of
:mod:`lqkd.export.executorch_reference`, on the program's own input of that layer. A program returns no codes; so a
second one is lowered that does, and must return the same to the last bit besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lqkd.errors import UsageError, first_line
from lqkd.export.deploy import OUTPUT, Deployed, as_float32
from lqkd.export.executorch import Written
from lqkd.export.executorch_file import lowered, read
from lqkd.export.executorch_reference import Delegated
from lqkd.export.executorch_writer import on_grid
from lqkd.export.litert_values import BYTE
from lqkd.export.parity import (
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


class ExecuTorchRunner(Runner):
    """Runs a program on samples.

    Args:
        content: the file.
        deployed: the network that it was made of.
        grids: names of the grids whose codes it returns behind its outputs.

    Raises:
        UsageError: when the runtime does not take the file.
    """

    disagreement = 2e-3
    metric_tolerance = 1e-3

    def __init__(self, content: bytes, deployed: Deployed, grids: Sequence[str] = ()) -> None:
        from executorch.runtime import Runtime

        self._deployed = deployed
        self.outputs = list(deployed.outputs)
        self._grids = list(grids)
        try:
            self._program: Any = Runtime.get().load_program(content)  # which the method needs as long as it is called
            self._method: Any = self._program.load_method("forward")
        except RuntimeError as error:
            raise UsageError(f"executorch does not take the file ({first_line(error)})") from error

    def __call__(self, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
        assert isinstance(given, Inputs)
        tensors = self._deployed.in_order(given)
        parts = [
            self._method.execute([tensor[i : i + 1].contiguous() for tensor in tensors]) for i in range(len(given))
        ]
        names = (*self.outputs, *self._grids)
        found = {name: torch.cat(values).numpy() for name, values in zip(names, zip(*parts, strict=True), strict=True)}
        return found | {name: found[name].astype(np.int16) + BYTE for name in self._grids}


def check_executorch(
    written: Written,
    deployed: Deployed,
    example: Any,
    test: Iterable[Any] = (),
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Parity:
    """Compare a program with the network that it was made of; arguments as of :func:`lqkd.export.parity.check`.

    ``optimised`` of what is returned is empty: the runtime has one way to run it.
    """
    parity = compared_numbers(altered_number(written))
    if parity.problem is not None:
        return parity
    inputs = as_float32(example, "an example")
    whole = ExecuTorchRunner(written.content, deployed)
    watched = lowered(written.program.watched, written.example)
    found, theirs = ExecuTorchRunner(watched, deployed, list(written.program.grids))(inputs), whole(inputs)
    codes = {name: found[name] for name in written.program.grids}
    forced = Delegated(deployed.network, codes, forced=True)
    ours = heads(forced(*deployed.in_order(inputs)), OUTPUT)
    parity.unoptimised = forced.rows
    parity.outputs = differences(ours, {name: torch.from_numpy(theirs[name]) for name in ours})
    judge_layers(parity, parity.unoptimised, "in ExecuTorch", FRACTION)
    judge_outputs(parity, ", after layers that agree")
    other = next((name for name in whole.outputs if not np.array_equal(found[name], theirs[name])), None)
    if parity.problem is None and other is not None:
        parity.problem = f"{other} of the file are not those of the same program that returns its codes, too"
    reference = Delegated(deployed.network, codes)
    ours = heads(reference(*deployed.in_order(inputs)), OUTPUT)
    parity.end_to_end = reference.rows
    parity.output_steps = output_steps(ours, theirs, deployed, reference)
    agree_whole(parity, whole, Reference(deployed.network), deployed, test, student, task)
    return parity


def altered_number(written: Written) -> str | None:
    """The first layer or grid of a file with another code, bias, scale, zero point or limit than the student; None for
    none.

    Few images may never tell: the codes behind a layer are rounded.
    """
    program, nodes = written.program, read(written.content).nodes
    held = Counter((*node.constants, node.source, node.result) for node in nodes if node.constants)
    for product in program.products:
        numbers = product.numbers()
        if not held[numbers]:
            return product.name
        held[numbers] -= 1
    found = {grid for node in nodes for grid in (node.source, node.result) if grid is not None}
    limited = {(node.result, node.limits) for node in nodes}
    for name, grid in program.grids.items():
        place = on_grid(grid)
        if place not in found or (name in program.limits and (place, _bits(program.limits[name])) not in limited):
            return name
    return None if found <= {on_grid(grid) for grid in program.grids.values()} else "a scale or zero point"


def _bits(limits: tuple[float, float]) -> tuple[int, int]:
    least, most = (int(np.float32(limit).view(np.uint32)) for limit in limits)
    return least, most
