"""The table of predictions, asked by a trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lqkd.callbacks.predictions import Predictions
from lqkd.errors import UsageError
from lqkd.modules import ClassifierModule
from lqkd.tasks import Classification, MultiLabel, Rows, Segmentation, Task

MakeTrainer = Callable[..., Trainer]


class Batches(LightningDataModule):
    class_names = ("=a", "b", "c")

    def __init__(self, *batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def predict_dataloader(self) -> Any:
        return iter(self.batches)


class Plain(Task):
    """The inputs themselves."""

    monitor = "val/mean"

    def inputs(self, batch: Any) -> Tensor:
        return batch[0]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.mean()

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        return Rows(outputs, None)

    def metrics(self) -> MetricCollection:
        return MetricCollection({"mean": MeanMetric()})


@pytest.fixture
def written(make_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., list[str]]:
    """The lines of the table for a task and batches, of which the network returns the first part."""

    def write(task: Task, *batches: Any) -> list[str]:
        predictions = Predictions(task, tmp_path / "predictions")
        trainer = make_trainer(callbacks=[predictions], logger=False)
        module = ClassifierModule(nn.Identity(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), task=task)
        trainer.predict(module, datamodule=Batches(*batches), return_predictions=False)
        predictions.write(tmp_path / "predictions.csv", ["x.png", "y.png", "z.png"])
        return (tmp_path / "predictions.csv").read_text().splitlines()

    return write


def test_an_image_without_a_label_has_none_in_the_table_and_is_not_wrong(
    written: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (torch.eye(3)[[1, 2]], torch.tensor([1, -1])), (torch.eye(3)[[1]], torch.tensor([0]))
    assert written(Classification(), first, second) == [
        "index,file,label,class,confidence",
        "0,x.png,b,b,0.576117",
        "1,y.png,,c,0.576117",
        "2,z.png,'=a,b,0.576117",
    ]
    assert "3 predictions written" in (told := capsys.readouterr().out)
    assert told.endswith(", 1 of them right\n")


def test_the_classes_of_a_half_or_more_are_told_with_their_probabilities(written: Callable[..., list[str]]) -> None:
    batch = (torch.tensor([[0.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]), torch.tensor([[0, 1, 1], [1, -1, 0]]))
    assert written(MultiLabel(3), batch) == [
        "index,file,labels,classes,confidences",
        "0,x.png,b; c,'=a; c,0.500000; 0.731059",
        "1,y.png,'=a,,",
    ]


def test_classes_of_pixels_and_other_arrays_are_files_that_the_table_names(
    written: Callable[..., list[str]], tmp_path: Path
) -> None:
    from PIL import Image

    logits = torch.zeros(2, 3, 4, 5)
    logits[1, 2] = 1
    assert written(Segmentation(3), (logits[:1],), (logits[1:],)) == [
        "index,file,output",
        "0,x.png,predictions/000000.png",
        "1,y.png,predictions/000001.png",
    ]
    with Image.open(tmp_path / "predictions" / "000001.png") as mask:
        assert (mask.size, mask.mode, mask.getextrema()) == ((5, 4), "L", (2, 2))
    boxes = torch.rand(1, 2, 4)
    assert written(Plain(), (boxes,))[1] == "0,x.png,predictions/000000.npy"
    assert np.array_equal(np.load(tmp_path / "predictions" / "000000.npy"), boxes[0])


def test_numbers_of_a_task_of_ones_own_are_columns(written: Callable[..., list[str]]) -> None:
    lines = written(Plain(), (torch.tensor([[-0.1, 2.0]]),))
    assert lines == ["index,file,output_0,output_1", "0,x.png,-0.1,2.0"]


def test_what_a_task_of_ones_own_cannot_tell_is_refused_with_the_method_that_can(
    written: Callable[..., list[str]],
) -> None:
    class Boxes(Plain):
        def predictions(self, outputs: Tensor, batch: Any) -> Any:
            return {"boxes": outputs}

    class Short(Plain):
        def table(self, predictions: Any, batch: Any, names: Any) -> list[dict[str, Any]]:
            return []

    batch = (torch.zeros(2, 3),)
    with pytest.raises(UsageError, match=r"task Boxes predicts a dict: .* its method predictions\(outputs, batch\)"):
        written(Boxes(), batch)
    with pytest.raises(UsageError, match=r"task Short makes a table of 0 rows for 2 samples: its method table\("):
        written(Short(), batch)
