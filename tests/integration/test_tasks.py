"""Other tasks than the classification of images, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MetricCollection

from lqkd.cli import main
from lqkd.errors import UsageError
from lqkd.export import metadata, to_onnx
from lqkd.losses import CWD, HintonKL
from lqkd.modules import ClassifierModule, Constant, DistillModule, Tap
from lqkd.quantization import Recipe, quantizers
from lqkd.regularizers import ElementwiseMLP
from lqkd.runs import RunSummary
from lqkd.runs.checkpoint import BestAndLast
from lqkd.tasks import Classification, Rows, Samples, Segmentation, Task
from lqkd.teachers import FrozenTeacher
from tests.conftest import parameters_of
from tests.documentation import blocks

MakeTrainer = Callable[..., Trainer]


def resumed_and_straight(
    make_trainer: MakeTrainer, make: Callable[[], LightningModule], data: Callable[[], Any], folder: Path
) -> tuple[Tensor, Tensor]:
    """The parameters after two epochs, one of them resumed, and after two in one go."""
    straight, first, second = make(), make(), make()
    make_trainer(max_epochs=2).fit(straight, data())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(first, data())
    trainer.save_checkpoint(folder / "half.ckpt", weights_only=False)
    make_trainer(max_epochs=2).fit(second, data(), ckpt_path=folder / "half.ckpt", weights_only=False)
    return parameters_of(second), parameters_of(straight)


# ---- two inputs and a dict


class Pair(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, width), nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, *, image: Tensor, table: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.left(image) + self.right(table))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Pairs(Classification):
    """Both inputs by name."""

    def inputs(self, batch: Any) -> Any:
        return {"image": batch["image"], "table": batch["table"]}

    def samples(self, batch: Any) -> Samples:
        return Samples(batch["image"], batch["label"], None)


def pairs() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    image, table = torch.randn(32, 6, generator=generator), torch.randn(32, 4, generator=generator)
    label = (image[:, :3] + table[:, :3]).argmax(1)
    rows = [{"image": i, "table": t, "label": y} for i, t, y in zip(image, table, label, strict=True)]
    return DataLoader(rows, batch_size=8)


def distiller_of_pairs(**settings: Any) -> DistillModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "quantization": Recipe(bits="w4a4"),
        "distillation_loss": HintonKL(),
        "regularizer": ElementwiseMLP(hidden=4),
        "student_schedule": Constant(),
        "task": Pairs(),
    }
    return DistillModule(FrozenTeacher(Pair(32), minimum_accuracy=0.0), Pair(), **(defaults | settings))


def test_a_network_with_two_inputs_and_a_dict_distils_and_resumes(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    resumed, straight = resumed_and_straight(make_trainer, distiller_of_pairs, pairs, tmp_path)
    assert torch.equal(resumed, straight)


def test_a_network_with_two_inputs_and_a_dict_is_exported(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = distiller_of_pairs()
    make_trainer().fit(module, pairs())
    batches = list(pairs())
    inputs = [Pairs().inputs(batch) for batch in batches]
    model = to_onnx(module.student, inputs[0], calibration=inputs, test=batches, task=Pairs())
    assert [entry.name for entry in (*model.graph.input, *model.graph.output)] == ["image", "table", "hidden", "logits"]
    parity = metadata.read(model)["parity"]
    assert (parity["samples"], parity["agreement"], parity["metric"]) == (32, 1.0, "acc")
    assert parity["exported"] == parity["pytorch"]


def test_all_quantizers_of_a_network_with_two_inputs_are_fitted(make_trainer: MakeTrainer) -> None:
    module = distiller_of_pairs()
    trainer = make_trainer()
    trainer.fit(module, pairs(), pairs())
    assert all(bool(q.initialized) for q in quantizers(module.student).values())
    assert {"val/acc", "val/loss"} <= set(trainer.callback_metrics)


def test_teachers_may_see_something_else_of_a_batch(make_trainer: MakeTrainer) -> None:
    seen: list[Tensor] = []

    class Other(Pairs):
        def teacher_inputs(self, batch: Any, inputs: Any) -> Any:
            return {"image": 2 * batch["image"], "table": batch["table"]}

    module = distiller_of_pairs(task=Other())
    module.teacher.network.register_forward_pre_hook(lambda m, a, k: seen.append(k["image"]), with_kwargs=True)
    batch = next(iter(pairs()))
    module._connect_unseen()
    module.losses(batch)
    assert torch.equal(seen[-1], 2 * batch["image"])


def test_a_teacher_with_a_normalisation_of_its_own_needs_images_alone(make_trainer: MakeTrainer) -> None:
    module = distiller_of_pairs()
    module.teacher.image_size = 8
    with pytest.raises(UsageError, match=r"teacher image_size is not possible .* teacher_inputs"):
        make_trainer().fit(module, pairs())


def test_label_smoothing_belongs_to_the_task() -> None:
    with pytest.raises(UsageError, match=r"label_smoothing=.* beside a task"):
        distiller_of_pairs(label_smoothing=0.1)


def test_a_monitor_that_the_task_does_not_measure_is_refused() -> None:
    class Wrong(Pairs):
        monitor = "val/f1"

    with pytest.raises(UsageError, match=r"monitor='val/f1' of task Wrong .* val/acc, val/loss"):
        distiller_of_pairs(task=Wrong())


# ---- segmentation


class Segmenter(nn.Module):
    """Half the size of the images, in torchvision's dict."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1),
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(torch.relu(self.body(images)))}


class Squares(LightningDataModule):
    """Bright and dark squares on a grey ground, with a ring of ignored pixels around the image."""

    image_shape = (1, 16, 16)
    mean, std = (0.5,), (0.25,)  # what predict prepares images with

    def __init__(self, samples: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        corners = torch.randint(1, 9, (samples, 2, 2), generator=generator)
        self.images = 0.2 * torch.randn(samples, 1, 16, 16, generator=generator)
        self.masks = torch.zeros(samples, 16, 16, dtype=torch.int64)
        for image, mask, places in zip(self.images, self.masks, corners.tolist(), strict=True):
            for kind, (y, x) in enumerate(places, 1):
                image[0, y : y + 6, x : x + 6] = 3 - 2.0 * kind
                mask[y : y + 6, x : x + 6] = kind
            mask[0] = mask[-1] = 255

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(zip(self.images, self.masks, strict=True)), batch_size=8)

    val_dataloader = train_dataloader


@pytest.fixture(scope="module")
def trained() -> Segmenter:
    torch.manual_seed(0)
    network = Segmenter(16)
    module = ClassifierModule(network, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), task=Segmentation(3))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=15, enable_model_summary=False, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, datamodule=Squares())
    assert float(trainer.callback_metrics["val/miou"]) > 0.6
    return network


def segmenting(teacher: nn.Module, **settings: Any) -> DistillModule:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {
        "quantization": Recipe(bits="w4a4"),
        "distillation_loss": HintonKL(),
        "student_optimizer": lambda p: torch.optim.Adam(p, lr=0.01),
        "student_schedule": Constant(),
        "task": Segmentation(3),
    }
    return DistillModule(FrozenTeacher(teacher), Segmenter(8), **(defaults | settings))


def test_a_segmenter_distils_pixel_by_pixel(make_trainer: MakeTrainer, trained: Segmenter, tmp_path: Path) -> None:
    best, summary = BestAndLast(tmp_path, monitor="val/miou"), RunSummary()
    module = segmenting(trained, regularizer=ElementwiseMLP(hidden=4))
    trainer = make_trainer(max_epochs=10, callbacks=[best, summary], enable_checkpointing=True, limit_test_batches=1.0)
    trainer.fit(module, datamodule=Squares())
    assert float(trainer.callback_metrics["val/miou"]) > 0.45
    assert (summary.values["metric"], summary.values["mode"]) == ("val/miou", "max")
    assert summary.values["val"] == pytest.approx(float(best.best_model_score))
    assert summary.values["teacher"] > 0.6


def test_a_segmenters_training_goes_on_exactly(make_trainer: MakeTrainer, trained: Segmenter, tmp_path: Path) -> None:
    resumed, straight = resumed_and_straight(make_trainer, lambda: segmenting(trained), Squares, tmp_path)
    assert torch.equal(resumed, straight)


def test_a_segmenter_distils_channel_by_channel(make_trainer: MakeTrainer, trained: Segmenter) -> None:
    module = segmenting(trained, distillation_loss=CWD(), taps=[Tap("head", "head"), Tap("body", "body")])
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, datamodule=Squares())
    assert torch.isfinite(trainer.callback_metrics["train/distill"])


def test_an_untrained_segmenter_is_no_teacher(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=r"the teacher reaches val/miou=0\.\d+, less than"):
        make_trainer().fit(segmenting(Segmenter(16)), datamodule=Squares())


# ---- the page "a task of your own"

(PAGE,) = [b for b in blocks("python") if b.page == "docs/tasks.md" and "# brightness.py" in b.text]


def test_the_task_of_the_page_takes_less_than_sixty_lines() -> None:
    assert len([line for line in PAGE.text.splitlines() if line.strip()]) < 60


def test_the_task_of_the_page_trains_a_teacher_and_a_student(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PAGE.text, "brightness.py", "exec"), {"__name__": "brightness"})
    teacher, student = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert teacher < 0.3
    assert student < 0.3


# ---- the command line


class Halves(Task):
    """The mean of each half of a vector."""

    monitor, mode = "val/mae", "min"

    def inputs(self, batch: Any) -> Tensor:
        return batch[0]

    def truth(self, batch: Any) -> Tensor:
        return batch[0].unflatten(1, (2, 3)).mean(2)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, self.truth(batch))

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        return Rows(outputs, None)

    def metrics(self) -> MetricCollection:
        return MetricCollection({"mae": MeanAbsoluteError()})

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: Any) -> None:
        metrics.update(outputs, self.truth(batch))


class Signs(LightningDataModule):
    """Vectors, with two labels each: whether the first two numbers are positive."""

    def train_dataloader(self) -> DataLoader:
        vectors = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(zip(vectors, (vectors[:, :2] > 0).long(), strict=True)), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ({"class_path": "lqkd.tasks.MultiLabel", "init_args": {"classes": 2}}, ["labels", "classes", "confidences"]),
        ({"class_path": "tests.integration.test_tasks.Halves"}, ["output_0", "output_1"]),
    ],
)
def test_a_run_of_any_task_predicts_its_own_test_split(tmp_path: Path, task: dict[str, Any], columns: Any) -> None:
    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 6, "out_features": 2}}
    config = {
        "model": {"class_path": "lqkd.modules.ClassifierModule", "init_args": {"network": network, "task": task}},
        "data": {"class_path": "tests.integration.test_tasks.Signs"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "run": {"root": str(tmp_path), "name": "any", "version": "a"},
    }
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "any.yaml")]) == 0
    assert main(["predict", "--config", str(tmp_path / "any" / "a" / "config.yaml")]) == 0
    heading, *rows = (tmp_path / "any" / "a" / "predictions.csv").read_text().splitlines()
    assert heading.split(",") == ["index", "file", *columns]
    assert len(rows) == 32


@pytest.mark.slow
def test_a_run_of_a_segmenter_is_exported_asked_and_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = "tests.integration.test_tasks"
    task = {"class_path": "lqkd.tasks.Segmentation", "init_args": {"classes": 3}}
    network = {"class_path": f"{here}.Segmenter", "init_args": {"width": 8}}
    model = {
        "class_path": "lqkd.modules.DistillModule",
        "init_args": {
            "teacher": {"network": network | {"init_args": {"width": 16}}, "minimum_accuracy": 0},
            "student": network,
            "task": task,
            "quantization": {"bits": "w4a4"},
        },
    }
    config = {
        "model": model,
        "data": {"class_path": f"{here}.Squares"},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "run": {"root": str(tmp_path), "name": "seg", "version": "a"},
    }
    (tmp_path / "seg.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "seg.yaml")]) == 0
    run = tmp_path / "seg" / "a"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["metric"], summary["mode"]) == ("val/miou", "max")
    assert all(summary[key] is not None for key in ("teacher", "student_start", "val"))
    assert main(["export", str(run)]) == 0
    card = (run / "student.onnx.md").read_text()
    assert "same class of a pixel" in card
    assert "`out`: (batch, 3, 8, 8)" in card
    Image.new("L", (16, 16), 200).save(tmp_path / "bright.png")
    for source in (run, run / "student.onnx"):
        output = tmp_path / f"masks of {source.name}"
        assert main(["predict", str(source), str(tmp_path / "bright.png"), "--output", str(output)]) == 0
        with Image.open(output / "bright.png") as mask:
            assert (mask.size, mask.mode) == ((16, 16), "L")
            assert max(mask.tobytes()) < 3
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "bright.png")]) == 2
    assert "--output is missing: task Segmentation gives an array for each image" in capsys.readouterr().err
    assert main(["sensitivity", str(run), "--bits", "4"]) == 0
    assert json.loads((run / "sensitivity.json").read_text())["float"]["metric"] == "miou"
    assert main(["report", str(run)]) == 0
    assert "Miou on the validation split" in (run / "report.html").read_text()
