"""The proof of a file of a language model, and what becomes of the file by it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lqkd.errors import ParityError
from lqkd.export.deploy import OUTPUT
from lqkd.export.parity import Parity, agree, differences, judge_outputs
from lqkd.models.calls import Inputs
from lqkd.models.outputs import heads
from lqkd.tasks import Task
from lqkd.utils.files import replace_folder


@torch.no_grad()
def compared(
    held: nn.Module,
    plain: nn.Module,
    student: nn.Module,
    inputs: Inputs,
    test: Iterable[Any] = (),
    task: Task | None = None,
    *,
    tolerance: float = 0.0,
) -> Parity:
    """Compare the network of a file with the student.

    Args:
        held: the network that was read from the file, or that runs it.
        plain: the student as the file has it.
        student: as it was trained.
        inputs: texts, on which logits are compared.
        test: batches of the task, on which all three are measured.
        task: None for the classification of images.
        tolerance: by how much of the largest logits may differ; 0 for the last bit.
    """
    ours, theirs = (heads(inputs.call(network), OUTPUT) for network in (plain, held))
    parity = Parity(scales_identical=True, outputs=differences(ours, theirs))
    judge_outputs(parity, tolerance=tolerance)
    agree(parity, lambda given: given.call(held), lambda given: given.call(plain), test, student, task)
    return parity


def keep_proven(unproven: Path, path: Path, parity: Parity) -> None:
    """Give a file, or a folder, its name once it is proven; what had that name is there until then.

    Args:
        unproven: where it was written.
        path: its name.
        parity: the proof.

    Raises:
        ParityError: when it has failed; the file stays where it was written.
    """
    if parity.problem is not None:
        raise ParityError(f"the file fails the comparison and is kept as {unproven}: {parity.problem}")
    if unproven.is_dir():
        replace_folder(unproven, path)
    else:
        os.replace(unproven, path)
