"""Trainings on a GPU: what lqkd does on CPUs it does there, in every way that a GPU adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.data import Batch, Digits, ImageFolder
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.modules.compilation import Compilation
from lqkd.quantization import Recipe, kernel, quantize_model, quantizers
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, distiller, network, parameters_of
from tests.gpu.conftest import DEVICE
from tests.integration.test_compiled_augmentation import CROPPED, MIXED
from tests.integration.test_exact_resume import assert_same, train
from tests.recorder import Recorder
from tests.unit.data.images import write_classes

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.gpu
RECIPES = [Recipe(bits="w4a4"), Recipe(bits="w1a1")]


def teacher() -> FrozenTeacher:
    """The same one each time, in float32."""
    torch.manual_seed(7)
    return FrozenTeacher(network(14), minimum_accuracy=0.0, precision="fp32")


def losses(make: MakeTrainer, batches: int = 6, **arguments: Any) -> tuple[list[float], DistillModule]:
    """The loss of each step of an epoch, and the module."""
    model = arguments.pop("model", {})
    recorder = Recorder(lambda trainer, _: float(trainer.callback_metrics["train/loss"]))
    module = distiller(**model)
    make(callbacks=[recorder], **arguments).fit(module, datamodule=digits(batches))
    return recorder.seen, module


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bits)
def test_a_gpu_trains_as_a_cpu_does(on_gpu: MakeTrainer, make_trainer: MakeTrainer, recipe: Recipe) -> None:
    there, module = losses(on_gpu, model={"quantization": recipe, "teacher": teacher()})
    here, _ = losses(make_trainer, model={"quantization": recipe, "teacher": teacher()})
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert there == pytest.approx(here, rel=0.02)  # a value on a rounding boundary falls to the other side
    assert all(quantizer.initialized for quantizer in quantizers(module.student).values())


def test_compiled_kernels_train_as_eager_ones_do(on_gpu: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, _ = losses(on_gpu)
    monkeypatch.setenv("LQKD_COMPILE", "1")
    monkeypatch.setattr(kernel, "COMPILE_FROM", 1)
    compiled, _ = losses(on_gpu)
    assert not kernel._compiler.failed
    assert compiled == pytest.approx(eager, rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bits)
def test_bfloat16_trains_and_keeps_float32_parameters(on_gpu: MakeTrainer, recipe: Recipe) -> None:
    whole, _ = losses(on_gpu, model={"quantization": recipe})
    half, module = losses(on_gpu, precision="bf16-mixed", model={"quantization": recipe})
    assert all(map(math.isfinite, half))
    assert half[0] == pytest.approx(whole[0], rel=0.1)
    assert {parameter.dtype for parameter in module.student.parameters()} == {torch.float32}


class Plain(LightningModule):
    """A quantised network in somebody's own module, with one optimizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.model(batch[0])
        self.dtypes.add(logits.dtype)
        loss = F.cross_entropy(logits.float(), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bits)
def test_float16_trains_with_a_gradient_scaler(on_gpu: MakeTrainer, recipe: Recipe) -> None:
    model, _ = quantize_model(network(), recipe)
    module = Plain(model)
    trainer = on_gpu(precision="16-mixed", max_steps=20, max_epochs=-1)
    trainer.fit(module, datamodule=digits(10))
    assert module.dtypes == {torch.float16}
    assert trainer.precision_plugin.scaler.get_scale() > 0
    assert sum(module.losses[-5:]) < sum(module.losses[:5])
    assert bool(parameters_of(model).isfinite().all())


def test_nccl_with_one_process_trains_as_without(on_gpu: MakeTrainer) -> None:
    alone, _ = losses(on_gpu, deterministic=True)
    try:
        seen, _ = losses(on_gpu, deterministic=True, strategy="ddp")
        assert torch.distributed.get_backend() == "nccl"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert seen == pytest.approx(alone, rel=1e-5)


class Pinned(Callback):
    """Looks at what the loader gives before it is moved."""

    def __init__(self) -> None:
        self.pinned: bool | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pinned = next(iter(trainer.train_dataloader)).images.is_pinned()


def test_workers_hand_over_pinned_batches(on_gpu: MakeTrainer, tmp_path: Path) -> None:
    write_classes(tmp_path / "images", {"a": 20, "b": 20})
    data = ImageFolder(root=str(tmp_path / "images"), image_size=32, batch_size=8, num_workers=1)
    pinned = Pinned()
    colours = {"num_classes": 2, "width": 4}
    answering = FrozenTeacher(CifarResNet(14, **colours), minimum_accuracy=0.0)
    module = distiller(teacher=answering, student=CifarResNet(8, **colours))
    on_gpu(callbacks=[pinned], max_steps=2, max_epochs=-1).fit(module, datamodule=data)
    assert pinned.pinned
    assert module.device.type == DEVICE


def test_cached_answers_give_the_losses_of_a_live_teacher(on_gpu: MakeTrainer, tmp_path: Path) -> None:
    def run(cache: TeacherCache | None) -> list[float]:
        return losses(on_gpu, deterministic=True, model={"teacher": teacher(), "teacher_cache": cache})[0]

    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    live = run(None)
    assert run(cache) == live
    assert run(cache) == live


def test_a_training_that_is_cut_resumes_to_the_same_bits(on_gpu: MakeTrainer, tmp_path: Path) -> None:
    whole = train(on_gpu, tmp_path / "whole", deterministic=True)
    with pytest.raises(InterruptedError):
        train(on_gpu, tmp_path / "cut", (1, 2), deterministic=True)
    resumed = train(on_gpu, tmp_path / "cut", deterministic=True)
    assert_same(resumed, tmp_path / "cut", whole, tmp_path / "whole")


def test_augmentation_is_the_same_on_the_gpu(tmp_path: Path) -> None:
    data = digits()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    there = batch._replace(
        images=batch.images.to(DEVICE), labels=batch.labels.to(DEVICE), indices=batch.indices.to(DEVICE)
    )
    for epoch in (0, 1):
        expected = data.preprocess(batch, train=True, epoch=epoch).images
        torch.testing.assert_close(data.preprocess(there, train=True, epoch=epoch).images.cpu(), expected)


@pytest.mark.parametrize("how", [True, "cuda_graphs"])
def test_a_compiled_training_has_the_losses_of_an_eager_one(on_gpu: MakeTrainer, how: bool | str) -> None:
    """Over two epochs, between which it is evaluated eagerly."""
    eager, _ = losses(on_gpu, 4, max_epochs=2, model={"teacher": teacher()})
    compiled, module = losses(on_gpu, 4, max_epochs=2, model={"teacher": teacher(), "compile": how})
    assert module.compilation.seconds > 0
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4)
    assert compiled == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize("settings", [CROPPED, MIXED], ids=["cropped", "mixed"])
def test_compiled_augmentation_makes_the_images_of_an_eager_one(
    settings: dict[str, Any],
) -> None:
    def batches(compile: bool) -> list[Batch]:
        data = Digits(batch_size=16, limit_train=32, seed=3, **settings)
        data.setup("fit")
        Compilation(compile).start_augmentation(data, torch.device(DEVICE))
        loaded = [Batch(*(part.to(DEVICE) for part in batch[:3])) for batch in data.train_dataloader()]
        return [data.preprocess(batch, train=True, epoch=epoch) for epoch in range(2) for batch in loaded]

    for compiled, eager in zip(batches(True), batches(False), strict=True):
        assert torch.equal(compiled.labels, eager.labels)
        torch.testing.assert_close(compiled.images, eager.images, rtol=1e-6, atol=1e-6)
