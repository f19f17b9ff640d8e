"""Segmentation of photographs with torchvision's networks, as docs/tasks.md prints it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from lqkd.cli import main
from lqkd.data import SegmentationFolder
from lqkd.losses import CWD, HintonKL
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule, Tap
from lqkd.tasks import Segmentation
from lqkd.teachers import FrozenTeacher
from tests.documentation import files
from tests.photographs import CLASSES, write_photographs

BRIEF = [
    "--trainer.max_epochs",
    "1",
    "--trainer.enable_progress_bar",
    "false",
    "--data.init_args.image_size",
    "[32, 32]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, the page's files, and a network that has been trained for an epoch."""
    place = tmp_path_factory.mktemp("segmentation")
    write_photographs(place / "pairs")
    for name, text in files().items():
        (place / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "--config", "segmentation_teacher.yaml", *BRIEF]) == 0
    return place


def logged(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def test_a_run_predicts_the_masks_of_its_own_test_images(folder: Path) -> None:
    run = folder / "runs" / "segmentation_teacher" / "version_0"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["predict", "--config", str(run / "config.yaml")]) == 0
    with open(run / "predictions.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    with open(run / "split.csv", newline="", encoding="utf-8") as stream:
        tested = [row["file"] for row in csv.DictReader(stream) if row["split"] == "test"]
    assert [row["file"] for row in rows] == tested
    for row in rows:
        with Image.open(run / row["output"]) as mask:
            assert (mask.size, mask.mode) == ((32, 32), "L")
            assert max(mask.tobytes()) < len(CLASSES)


def test_a_training_logs_the_miou_and_keeps_the_best_by_it(folder: Path) -> None:
    run = folder / "runs" / "segmentation_teacher" / "version_0"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    (miou,) = logged(run, "val/miou")
    assert 0 < miou < 1
    assert (summary["metric"], summary["val"]) == ("val/miou", pytest.approx(miou, abs=1e-6))
    assert summary["test"] == pytest.approx(logged(run, "test/miou")[0], abs=1e-6)


def test_torchvisions_network_is_distilled_pixel_by_pixel(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    untrained = ["--model.init_args.teacher.init_args.minimum_accuracy", "0.0"]
    assert main(["fit", "--config", "segmentation_student.yaml", *BRIEF, *untrained]) == 0
    run = folder / "runs" / "segmentation_student" / "version_0"
    assert len(logged(run, "val/miou")) == 1
    assert logged(run, "train/distill")[-1] > 0
    printed = capsys.readouterr().out
    assert "miou" in printed
    assert "top-1" not in printed


@pytest.mark.parametrize(
    "settings",
    [{"distillation_loss": HintonKL()}, {"distillation_loss": CWD(), "taps": [Tap("classifier.4", "classifier.4")]}],
    ids=["pixels", "channels"],
)
def test_networks_with_auxiliary_heads_are_distilled_by_their_main_head(
    make_trainer: Callable[..., Trainer], tmp_path: Path, settings: dict[str, Any]
) -> None:
    def network() -> FCN:
        backbone = IntermediateLayerGetter(CifarResNet(8, width=4), {"layer2": "aux", "layer3": "out"})
        return FCN(backbone, FCNHead(16, 3), FCNHead(8, 3))

    write_photographs(tmp_path / "pairs")
    data = SegmentationFolder(root=str(tmp_path / "pairs"), classes=CLASSES, image_size=(32, 48), batch_size=8)
    teacher, student = network(), network()
    before = {name: tensor.clone() for name, tensor in student.aux_classifier.named_parameters()}
    module = DistillModule(FrozenTeacher(teacher, minimum_accuracy=0.0), student, task=Segmentation(3), **settings)
    trainer = make_trainer()
    trainer.fit(module, data)
    assert torch.isfinite(trainer.callback_metrics["train/distill"])
    assert trainer.callback_metrics["val/miou"] > 0
    assert set(teacher(torch.zeros(1, 3, 32, 48))) == {"out", "aux"}
    after = module.student.aux_classifier.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
