"""Writing and checking a program of ``torch.export``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lqkd.export.deploy import OUTPUT, Deployed, as_float32
from lqkd.export.parity import BATCHES, Parity, agree, batch_of, differences, judge_outputs
from lqkd.models.outputs import heads
from lqkd.tasks import Task

METADATA = "lqkd.json"
"""The name, within the file, of what it says about itself."""


@torch.no_grad()
def check_program(
    program: Any,
    deployed: Deployed,
    example: Any,
    test: Iterable[Any] = (),
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Parity:
    """Compare a program with the network that it was made of; arguments as of :func:`lqkd.export.parity.check`."""
    module = program.module()
    inputs = as_float32(example, "an example")
    ours, theirs = (heads(inputs.call(network), OUTPUT) for network in (deployed.network, module))
    parity = Parity(scales_identical=True, outputs=differences(ours, theirs))
    judge_outputs(parity, tolerance=0.0)

    def fits(size: int) -> bool:
        found = heads(batch_of(inputs, size).call(module), OUTPUT)
        return all(len(values) == size for values in found.values())

    parity.batches = tuple(size for size in BATCHES if fits(size))

    def runs(network: Any) -> Any:
        return lambda given: given.call(network)

    agree(parity, runs(module), runs(deployed.network), test, student, task)
    return parity


def save_program(program: Any, path: Path, described: dict[str, Any]) -> None:
    """Write the program with its description; :func:`load_program` reads both."""
    with open(path, "wb") as stream:
        torch.export.save(program, stream, extra_files={METADATA: json.dumps(described)})


def load_program(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The program in a file and its description."""
    extra = {METADATA: ""}
    with open(path, "rb") as stream:
        program = torch.export.load(stream, extra_files=extra)
    return program, json.loads(extra[METADATA])
