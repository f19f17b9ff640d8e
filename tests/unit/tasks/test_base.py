"""What a task has that says no more than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lqkd.tasks import Rows, Task


class Numbers(Task):
    monitor, mode = "val/loss", "min"

    def inputs(self, batch: Any) -> Any:
        return batch

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs.mean()

    def rows(self, outputs: Any, batch: Any) -> Rows:
        return Rows(outputs, None)

    def metrics(self) -> MetricCollection:
        return MetricCollection({"loss": MeanMetric()})


def test_answers_are_the_same_within_a_hundredth_of_their_root_mean_square() -> None:
    ours = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-4.0, 3.0]])  # 50 / 6 squared on the mean
    apart = (50 / 6) ** 0.5 * torch.tensor([[0.009], [0.009], [0.011]])
    assert Numbers().agreement(ours, ours + apart).tolist() == [1, 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_no_number_is_never_the_same(value: float) -> None:
    assert Numbers().agreement(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [1, 1, value]])).tolist() == [1, 0]


def test_all_tensors_of_an_answer_count() -> None:
    ours = {"a": torch.ones(2, 3), "b": torch.ones(2, 4, 4)}
    assert Numbers().agreement(
        ours, ours | {"b": torch.ones(2, 4, 4).index_fill(0, torch.tensor(1), 2.0)}
    ).tolist() == [
        1,
        0,
    ]
