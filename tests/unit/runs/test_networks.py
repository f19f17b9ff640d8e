"""The networks of a run, from the teacher to its exported files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lqkd.errors import UsageError
from lqkd.runs.networks import networks_of
from lqkd.runs.verdicts import in_a_sentence

SUMMARY: dict[str, Any] = {
    "metric": "val/acc", "mode": "max", "teacher": 0.97, "student_float": 0.96, "student_start": 0.2, "test": 0.95,
    "weight_bits": "4 (8 in 2 layers)", "activation_bits": "4", "packed_bytes": 10_000, "float_bytes": 80_000,
}  # fmt: skip


def exported(folder: Path, **said: Any) -> None:
    (folder / "student.onnx").write_bytes(b"")
    report = {"file": "student.onnx", "file_bytes": 12_340, "measured": {"value": 0.94}} | said
    (folder / "student.onnx.report.json").write_text(json.dumps(report))


def test_every_network_has_a_row_up_to_the_exported_file(tmp_path: Path) -> None:
    exported(tmp_path)
    assert networks_of(tmp_path, SUMMARY) == [
        ("teacher", "97.00%", ""),
        ("student in float", "96.00%", "80.0 kB"),
        ("quantised only (PTQ)", "20.00%", "10.0 kB"),
        ("trained, W4 A4", "95.00%", "10.0 kB"),
        ("student.onnx", "94.00%", "12.3 kB"),
    ]


def test_a_file_of_an_earlier_student_has_no_row(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"later")
    exported(tmp_path, checkpoint="0" * 64)
    assert networks_of(tmp_path, SUMMARY)[-1].name == "trained, W4 A4"


def test_the_report_of_an_earlier_version_tells_no_value(tmp_path: Path) -> None:
    exported(tmp_path, measured=None)
    assert networks_of(tmp_path, SUMMARY)[-1] == ("student.onnx", "not measured", "12.3 kB")


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, measured={"value": "good"})
    with pytest.raises(UsageError, match=r"measured\.value='good' where it must be a finite number"):
        networks_of(tmp_path, SUMMARY)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "W4 A4: accuracy 95.00%, 1.00 points worse than in float (96.00%), packed weights 8 times smaller"),
        ({"test": 0.98}, "2.00 points better than in float"),
        ({"test": 0.96}, "as good as in float"),
        ({"metric": "val/mae", "mode": "min", "test": 0.98}, "mae 0.98, 0.02 worse than in float (0.96)"),
        (
            {"test": None, "val": 0.95},
            "accuracy 95.00% on the validation split, which chose the checkpoint, 1.0",
        ),
        ({"test": None}, "W4 A4: nothing was measured"),
    ],
)
def test_a_sentence_says_what_the_numbers_come_to(changed: dict[str, Any], told: str) -> None:
    assert told in in_a_sentence(SUMMARY | changed)
