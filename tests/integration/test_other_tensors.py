"""Inputs that are no images: sequences of numbers and of tokens, from a user's own DataModule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lqkd.data import Batch
from lqkd.errors import UsageError
from lqkd.losses import Hints
from lqkd.modules import DistillModule, Tap
from lqkd.quantization import Recipe, quantizers
from lqkd.regularizers import ElementwiseMLP, SampleWeight
from lqkd.runs import RunLogger, RunSummary
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache

CLASSES = 3


class Tokens(LightningDataModule):
    """Texts of 12 tokens, of which those of a class are more frequent."""

    class_names = ("a", "b", "c")
    image_shape: tuple[int, ...] = (12,)
    input_dtype = torch.int64

    def inputs(self, labels: Tensor) -> Tensor:
        return (torch.randint(0, 4, (len(labels), 12)) + 2 * labels[:, None]) % 8

    def _loader(self) -> DataLoader[Any]:
        labels = torch.arange(24) % CLASSES
        return DataLoader(TensorDataset(self.inputs(labels), labels), 8)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader()


class Sounds(Tokens):
    """Sequences of 16 samples in 2 channels."""

    image_shape = (2, 16)
    input_dtype = torch.float32

    def inputs(self, labels: Tensor) -> Tensor:
        return torch.sin(torch.arange(16) * (labels[:, None, None] + 1.0)) + 0.1 * torch.randn(len(labels), 2, 16)


class TextNetwork(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, width)
        self.hidden = nn.Linear(width, width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.hidden(self.embedding(tokens)).relu().mean(1))


def sound_network(width: int) -> nn.Module:
    convolution = nn.Conv1d(2, width, 3, bias=False)
    return nn.Sequential(
        convolution, nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, CLASSES),
    )  # fmt: skip


def distiller(network: Callable[[int], nn.Module], **arguments: Any) -> DistillModule:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"regularizer": ElementwiseMLP(hidden=8), "quantization": Recipe(bits="w4a4")}
    teacher = FrozenTeacher(network(8), minimum_accuracy=0.0)
    return DistillModule(teacher, network(4), **(defaults | arguments))


class IndexedTokens(Tokens):
    """Tokens that can be told apart, with all that a cache of the teacher's answers asks for."""

    train_indices = torch.arange(24)

    def fingerprint(self) -> str:
        return "always the same"

    def augmentation_key(self) -> dict[str, Any]:
        return {}

    def _loader(self) -> Any:
        labels = torch.arange(24) % CLASSES
        torch.manual_seed(3)
        parts = (x.split(8) for x in (self.inputs(labels), labels, torch.arange(24)))
        return DataLoader([Batch(*part) for part in zip(*parts, strict=True)], batch_size=None)  # type: ignore[arg-type]


def test_a_teachers_answers_to_texts_are_stored_and_replayed(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    cache = TeacherCache(str(tmp_path), dtype="float32")
    losses, asked = [], []
    for used in (None, cache, cache):
        module = distiller(TextNetwork, teacher_cache=used)
        calls = []
        module.teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make_trainer(max_epochs=2)
        trainer.fit(module, datamodule=IndexedTokens())
        losses.append(float(trainer.callback_metrics["train/loss"]))
        asked.append(len(calls))
    assert losses[1] == losses[0]
    assert losses[2] == losses[0]
    assert asked[2] < asked[1]


@pytest.mark.parametrize(("data", "network"), [(Tokens, TextNetwork), (Sounds, sound_network)])
def test_a_student_of_other_inputs_trains(
    data: type[Tokens], network: Callable[[int], nn.Module], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module = distiller(network)
    before = {name: q.bits for name, q in quantizers(module.student).items()}
    logger = RunLogger(tmp_path / "run")
    trainer = make_trainer(logger=logger, callbacks=[RunSummary()], limit_test_batches=1.0)
    trainer.fit(module, datamodule=data())
    assert {4, 8} <= set(before.values())
    assert trainer.callback_metrics["train/distill"].isfinite()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bit_operations"] > 0
    assert summary["teacher"] is not None


@pytest.mark.parametrize(("data", "network"), [(Tokens, TextNetwork), (Sounds, sound_network)])
def test_the_fast_teacher_answers_other_inputs_as_the_network_does(
    data: type[Tokens], network: Callable[[int], nn.Module]
) -> None:
    torch.manual_seed(0)
    teacher = FrozenTeacher(network(8))
    inputs = data().inputs(torch.arange(24) % CLASSES)
    expected = teacher.network(inputs)
    teacher.accelerate(bf16=False)
    torch.testing.assert_close(teacher(inputs), expected)
    teacher.accelerate(bf16=True)
    torch.testing.assert_close(teacher(inputs), expected, atol=0.05, rtol=0.05)


def test_features_of_tokens_are_compared(make_trainer: Callable[..., Trainer]) -> None:
    module = distiller(
        TextNetwork,
        distillation_loss=Hints(),
        regularizer=SampleWeight(),
        taps=[Tap(teacher="hidden", student="hidden")],
    )
    trainer = make_trainer()
    trainer.fit(module, datamodule=Tokens())
    assert trainer.callback_metrics["train/distill"].isfinite()


def test_a_network_that_cannot_take_the_tokens_is_refused(make_trainer: Callable[..., Trainer]) -> None:
    class Mistaken(Tokens):
        input_dtype = torch.float32

    with pytest.raises(UsageError, match="the teacher cannot take inputs of 12 from the data"):
        make_trainer().fit(distiller(TextNetwork), datamodule=Mistaken())
