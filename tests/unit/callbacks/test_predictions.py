"""The table of predictions, asked without a trainer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lqkd.callbacks.predictions import Predictions


def test_an_image_without_a_label_has_none_in_the_table_and_is_not_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    predictions, nobody = Predictions(), cast(Any, None)
    batch = (torch.zeros(3, 1), torch.tensor([1, -1, 0]))
    predictions.on_predict_batch_end(nobody, nobody, torch.eye(3)[[1, 2, 1]], batch, 0)
    predictions.write(tmp_path / "table.csv", ["a", "b", "c"], [])
    with open(tmp_path / "table.csv", newline="") as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == ["b", "", "a"]
    assert "1 of them right" in capsys.readouterr().out
