"""The faster copy through which a teacher answers in a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import AttentionTransfer
from lqkd.losses.taps import Taps
from lqkd.modules import DistillModule, Tap, compilation
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache.keys import weights_hash
from lqkd.teachers.inference import computes_bf16
from tests.conftest import digits, distiller, network
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
CPU = torch.device("cpu")


def trained_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm something to do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model


class Views(nn.Module):
    """A network that can only look at contiguous activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images))
        return self.head(features.view(len(images), -1))


class Precise(nn.Module):
    """A network whose answers bfloat16 gets wrong: one number decides that it cannot tell from others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        darkness = images.flatten(1).mean(1) * self.weight
        return torch.stack(
            [(darkness + 1000 * self.weight) - 1000 * self.weight, darkness * 0] + [darkness * 0 - 9] * 8, 1
        )


class Converting(nn.Module):
    """A network that converts what it is given, so that its weights cannot be in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1).float())


def test_a_fast_teacher_answers_as_before_and_its_network_stays_as_it_was() -> None:
    teacher = FrozenTeacher(trained_norms(network(14)), mean=[0.4], std=[0.2])
    teacher.convert_from([0.3], [0.5])
    images, before = torch.randn(20, 1, 8, 8), weights_hash(teacher.network)
    plain = teacher(images)
    teacher.accelerate(bf16=False)
    fast = teacher(images)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    copied = teacher.running(images)
    assert [type(m) for n, m in copied.named_modules() if n.endswith("bn1")] == [nn.Identity] * 7
    assert copied.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert weights_hash(teacher.network) == before
    assert sum(1 for _ in teacher.parameters()) == sum(1 for _ in teacher.network.parameters())
    teacher.restore()
    assert torch.equal(teacher(images), plain)


@pytest.mark.parametrize("tap", ["conv1", "layer1.0.conv1", "layer1.0.bn2", "layer2", "layer3.1", "linear"])
def test_taps_of_a_fast_teacher_see_what_those_of_the_plain_one_see(tap: str) -> None:
    teacher = FrozenTeacher(trained_norms(network(14)))
    taps = Taps(teacher.network, [tap], "teacher")
    images = torch.randn(20, 1, 8, 8)
    with taps.recording() as plain:
        teacher(images)
    teacher.accelerate(bf16=False, untouched=[tap])
    with taps.recording(teacher.running(images)) as fast:
        teacher(images)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-4, atol=1e-4)


def test_bfloat16_answers_are_near_and_come_as_float32() -> None:
    teacher = FrozenTeacher(trained_norms(network(14)))
    images = torch.randn(20, 1, 8, 8)
    plain = teacher(images)
    teacher.accelerate(bf16=True)
    fast = teacher(images)
    assert fast.dtype == torch.float32
    assert 0 < (fast - plain).abs().max() < 0.05 * plain.abs().max()


def test_autocast_around_a_fast_teacher_does_not_matter() -> None:
    teacher = FrozenTeacher(trained_norms(network(14)))
    images = torch.randn(20, 1, 8, 8)
    teacher.accelerate(bf16=False)
    plain = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images), plain)


def test_a_network_that_cannot_be_rearranged_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    teacher = FrozenTeacher(trained_norms(Views()))
    images = torch.randn(20, 1, 8, 8)
    plain = teacher(images)
    teacher.accelerate(bf16=False)
    with caplog.at_level("INFO"):
        torch.testing.assert_close(teacher(images.contiguous()), plain)
    assert "without folded batch norms and channels_last: view size" in caplog.text


def test_a_move_to_another_dtype_makes_another_copy() -> None:
    teacher = FrozenTeacher(network(14))
    images = torch.randn(20, 1, 8, 8)
    teacher.accelerate(bf16=False)
    teacher(images)
    teacher.network.linear.bias += 1
    teacher.double()
    torch.testing.assert_close(teacher(images.double()), teacher.network(images.double()).float())


def test_bfloat16_is_left_where_it_costs_accuracy(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lqkd.teachers.frozen.computes_bf16", lambda device: True)
    seen: dict[type, set[torch.dtype]] = {}
    for model in (network(14), Precise(), Converting()):
        dtypes = seen.setdefault(type(model), set())
        module = distiller(teacher=FrozenTeacher(model, minimum_accuracy=0.0))
        look = Recorder(
            lambda t, m, dtypes=dtypes: dtypes.update(p.dtype for p in m.teacher.running(None).parameters())
        )
        data = digits(2)
        with caplog.at_level("INFO"):
            make_trainer(callbacks=[look]).fit(module, datamodule=data)
    assert seen[Precise] == seen[Converting] == {torch.float32}
    assert "the teacher stays in fp32: in bf16 it cannot answer (mat1 and mat2 must have the same dtype" in caplog.text
    assert "the teacher stays in fp32: in bf16 its val/acc would move from" in caplog.text
    assert module.teacher.running(torch.zeros(1)) is module.teacher.network  # after the training


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_of_the_teacher_can_be_chosen(
    make_trainer: MakeTrainer, precision: str, expected: torch.dtype
) -> None:
    module = distiller(teacher=FrozenTeacher(network(14), minimum_accuracy=0.0, precision=precision))
    look = Recorder(lambda trainer, module: {p.dtype for p in module.teacher.running(None).parameters()})
    make_trainer(callbacks=[look]).fit(module, datamodule=digits(2))
    assert look.seen == [{expected}] * 2


def test_automatic_precision_follows_the_hardware() -> None:
    assert FrozenTeacher(network(8)).wants_bf16(CPU) == computes_bf16(CPU)
    assert computes_bf16(CPU) == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"precision='fp16'.*auto, fp32, bf16"):
        FrozenTeacher(network(8), precision="fp16")


def test_a_compiled_teacher_answers_training_batches_as_before(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")

    def run(compile: bool) -> list[float]:
        torch.manual_seed(1)
        taps: dict[str, Any] = {"distillation_loss": AttentionTransfer(), "taps": [Tap("layer1", "layer1")]}
        answers = FrozenTeacher(network(8), minimum_accuracy=0.0, precision="fp32", compile=compile)
        look = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
        module = distiller(teacher=answers, regularizer=None, **taps)
        make_trainer(callbacks=[look]).fit(module, datamodule=digits(2))
        return look.seen

    expected = run(False)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        assert run(True) == expected
    assert any(text.startswith("compile: teacher, in a step") for text in caplog.messages)


def test_a_student_in_channels_last_learns_the_same_up_to_rounding(make_trainer: MakeTrainer) -> None:
    losses = []
    for channels_last in (False, True):
        torch.manual_seed(1)
        module = distiller(
            teacher=FrozenTeacher(network(14), minimum_accuracy=0.0, precision="fp32"),
            student_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
            channels_last=channels_last,
        )
        look = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
        make_trainer(callbacks=[look]).fit(module, datamodule=digits(4))
        losses.append(look.seen)
    weight = module.student.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_measured_memory_format_leaves_no_other_trace_and_is_kept_by_a_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(channels_last: bool | None, **arguments: Any) -> tuple[DistillModule, list[float]]:
        torch.manual_seed(1)
        module = distiller(channels_last=channels_last)
        look = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
        trainer = make_trainer(callbacks=[look, keeper], enable_checkpointing=True)
        trainer.fit(module, datamodule=digits(3), weights_only=True, **arguments)
        return module, look.seen

    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        measured, losses = run(None)
    (told,) = [text for text in caplog.messages if text.startswith("channels_last=")]
    faster = told.startswith("channels_last=true: a pass of the student takes ")
    last = measured.student.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == faster
    checkpoint = torch.load(keeper.last_model_path, weights_only=True)
    assert checkpoint["channels_last"] == faster
    assert losses == run(faster)[1]
    other = distiller(channels_last=None)
    other.on_load_checkpoint(checkpoint | {"channels_last": True})
    assert other.student.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
