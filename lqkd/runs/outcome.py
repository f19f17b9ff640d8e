"""The table that ends a training."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lqkd.runs.folder import SUMMARY
from lqkd.runs.verdicts import verdicts
from lqkd.tasks.values import name_of, shown
from lqkd.utils.tables import print_table


@rank_zero_only
def print_outcome(folder: Path) -> None:
    """Print the metric of teacher and student, sizes, what the regularizer came to, and where everything is.

    On the test split, or on the validation split where a finished training had no other.

    Args:
        folder: of a run that has ended.
    """
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    metric = summary["metric"]
    bits = f"W{summary['weight_bits']} A{summary['activation_bits']}" if summary["weight_bits"] else "float"
    float_size, packed_size = (f"{summary[key] / 1000:.1f} kB" for key in ("float_bytes", "packed_bytes"))
    tested = summary["test"] is not None
    values = [
        ("teacher", "teacher", ""),
        ("student in float", "student_float", float_size),
        ("student before training", "student_start", packed_size),
        ("student" if summary["weight_bits"] else "network", "test" if tested else "val", packed_size),
    ]
    rows = []
    for name, key, shown_size in values:
        if summary[key] is not None:
            rows.append((name, shown(metric, summary[key], 2), shown_size))
        elif key == "student_float" and summary["student_start"] is not None:
            rows.append((name, "not trained", shown_size))
    split = "test split" if tested else "validation split, which chose the checkpoint"
    if not rows:
        print(f"{bits}: nothing was measured, for there are neither validation nor test data")
    else:
        print_table(f"{bits}: {name_of(metric)} on the {split}", ("network", name_of(metric), "size"), rows)
    if summary["regularizer"] is None and summary["balance"] is not None and summary["steps"]:
        print("no regularizer: every element of the distillation loss has the same, fixed weight")
    for told in verdicts(summary).values():
        print(told.sentence)
    print(f"run folder: {folder}")
