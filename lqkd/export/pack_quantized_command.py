"""A run's language model as a folder of compressed-tensors: written, proven and told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lqkd.export.card import Summary, rejected
from lqkd.export.language_card import Rows, measured_rows, size_row, tell
from lqkd.export.language_proof import compared, keep_proven
from lqkd.export.pack_quantized import (
    COMPRESSED,
    check_replaceable,
    compressed_student,
    from_compressed_tensors,
    to_compressed_tensors,
)
from lqkd.export.parity import Parity
from lqkd.models.calls import Inputs
from lqkd.quantization import size
from lqkd.tasks import Task


def write_compressed_tensors(
    student: nn.Module,
    path: Path,
    inputs: Inputs,
    test: Iterable[Any],
    split: str,
    task: Task,
    about: dict[str, Any],
    tokenizer: str | None = None,
) -> None:
    """Write the folder, compare what transformers reads from it with the student, and print and write what came of it.

    Args:
        student: as it was trained.
        path: of the folder; one that fails the comparison is kept under another name.
        inputs: texts (B, T) of tokens.
        test: batches of the task.
        split: what they are of.
        task: says how good an answer is.
        about: what the folder shall say about itself.
        tokenizer: see :func:`~lqkd.export.to_compressed_tensors`.

    Raises:
        UsageError: when no folder can be made of the student.
        ParityError: when the folder does not hold what was trained.
    """
    check_replaceable(path)
    unproven = rejected(path)
    counts = to_compressed_tensors(student, unproven, about=about, tokenizer=tokenizer)
    parity = prove(unproven, student, inputs, test, task)
    parity.split = split
    keep_proven(unproven, path, parity)
    weights = size(student)
    written = sum(file.stat().st_size for file in path.iterdir())
    summary = Summary(path, written, weights.packed_bytes, weights.float_bytes, None)
    rows = _rows(summary, counts, parity)
    tell(summary, rows, student, inputs, parity, about, format=COMPRESSED, runtime="transformers and vLLM")


def prove(path: Path, student: nn.Module, inputs: Inputs, test: Iterable[Any] = (), task: Task | None = None) -> Parity:
    """Compare the network that transformers reads from a folder with the student, to the last bit of its logits.

    Args:
        path: the folder.
        student: as it was trained.
        inputs: texts.
        test: batches of the task, on which both are measured.
        task: None for the classification of images.
    """
    return compared(from_compressed_tensors(path), compressed_student(student), student, inputs, test, task)


def _rows(summary: Summary, counts: dict[int, int], parity: Parity) -> Rows:
    layers = ", ".join(f"{count} of {bits} bits" for bits, count in counts.items())
    rows = [
        ("format", f"{COMPRESSED}: pack-quantized, symmetric"),
        size_row(summary),
        ("layers", f"{layers}; each has the codes and steps that were trained"),
        ("logits", f"by transformers, at most {max(parity.outputs.values()):.2g} of the largest apart"),
        *measured_rows(parity),
    ]
    if parity.agreement is not None:
        rows.append((f"same {parity.answer}", f"{parity.agreement:.3%}"))
    return rows
