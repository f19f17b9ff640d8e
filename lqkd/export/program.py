"""Writing and checking a program of ``torch.export``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.export.deploy import Deployed
from lqkd.export.parity import BATCHES, Parity, agreement, batch_of

METADATA = "lqkd.json"
"""The name, within the file, of what it says about itself."""


@torch.no_grad()
def check_program(
    program: Any,
    deployed: Deployed,
    images: Tensor,
    test: Iterable[tuple[Tensor, Tensor | None]] = (),
    student: nn.Module | None = None,
) -> Parity:
    """Compare a program with the network that it was made of; arguments as of :func:`lqkd.export.parity.check`."""
    module = program.module()
    ours, theirs = deployed.network(images), module(images)
    parity = Parity(scales_identical=True, logits=float((ours - theirs).abs().max() / ours.abs().max()))
    if not torch.equal(ours, theirs):
        parity.problem = f"logits differ by {parity.logits:.2g} of the largest"
    sizes = [size for size in BATCHES if module(batch_of(images, size)).shape[0] == size]
    parity.batches = tuple(sizes)
    agreement(parity, module, deployed.network, test, student)
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
