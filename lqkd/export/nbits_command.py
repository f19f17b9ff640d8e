"""A run's language model as ONNX for MatMulNBits: written, proven and told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lqkd.export.card import Summary, rejected
from lqkd.export.language_card import measured_rows, size_row, tell
from lqkd.export.language_proof import compared, keep_proven
from lqkd.export.nbits import NBITS, Runtime, nbits_student, to_nbits
from lqkd.export.parity import OUTPUT_TOLERANCE, Parity
from lqkd.models.calls import Inputs
from lqkd.quantization import size
from lqkd.tasks import Task


def write_nbits(
    student: nn.Module, path: Path, inputs: Inputs, test: Iterable[Any], split: str, task: Task, about: dict[str, Any]
) -> None:
    """Write the file, compare what ONNX Runtime makes of it with the student, and print and write what came of it.

    Args:
        student: as it was trained.
        path: of the file; one that fails the comparison is kept under another name.
        inputs: texts (B, T) of tokens.
        test: batches of the task.
        split: what they are of.
        task: says how good an answer is.
        about: what the file shall say about itself.

    Raises:
        UsageError: when no file can be made of the student.
        ParityError: when the file does not compute what was trained.
    """
    unproven = rejected(path)
    counts = to_nbits(student, unproven, about=about)
    parity = prove(unproven, student, inputs, test, task)
    parity.split = split
    keep_proven(unproven, path, parity)
    weights = size(student)
    summary = Summary(path, path.stat().st_size, weights.packed_bytes, weights.float_bytes, None)
    rows = _rows(summary, counts, parity)
    tell(summary, rows, student, inputs, parity, about, format=NBITS, runtime="ONNX Runtime")


def prove(path: Path, student: nn.Module, inputs: Inputs, test: Iterable[Any] = (), task: Task | None = None) -> Parity:
    """Compare a file, run by ONNX Runtime, with the student.

    Args:
        path: the file.
        student: as it was trained.
        inputs: texts, on which logits may differ by no more than sums in another order make them.
        test: batches of the task, on which both are measured.
        task: None for the classification of images.
    """
    return compared(Runtime(path), nbits_student(student), student, inputs, test, task, tolerance=OUTPUT_TOLERANCE)


def _rows(summary: Summary, counts: dict[int, int], parity: Parity) -> list[tuple[str, str]]:
    layers = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    rows = [
        ("format", f"{NBITS}: MatMulNBits of ONNX Runtime"),
        size_row(summary),
        ("layers", f"{layers}; each decodes to the bits that were trained"),
        ("logits", f"at most {max(parity.outputs.values()):.2g} of the largest apart"),
        *measured_rows(parity),
    ]
    if parity.agreement is not None:
        rows.append((f"same {parity.answer}", f"{parity.agreement:.3%}"))
    return rows
