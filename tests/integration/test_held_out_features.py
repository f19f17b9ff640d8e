"""Weights of a teacher's channels by what the student can predict of them on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lqkd.callbacks import RegularizerMonitor
from lqkd.errors import UsageError
from lqkd.losses import HintonKL, Hints
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule, Tap, Term
from lqkd.quantization import Recipe
from lqkd.regularizers import ExplainedVariance
from lqkd.runs import BestAndLast, RunLogger
from lqkd.runs.summary import RunSummary
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, network, parameters_of
from tests.integration.test_exact_resume import StopAt
from tests.integration.test_trust import STUDENT, Marked, held_out, trained_teacher

MakeTrainer = Callable[..., Trainer]


class HalfNoise(nn.Module):
    """Says what its body says, and shows that with noise, which the image decides, in the second half of channels."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.shown = body, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        said: Tensor = self.body(images)
        half = said.shape[1] // 2
        noise = (1e5 * said[:, half:]).sin()
        self.shown(torch.cat([said[:, :half], noise], 1))
        return said


def judging(cache: TeacherCache | None = None, **settings: Any) -> DistillModule:
    """A module whose student learns features of which a half is noise."""
    torch.manual_seed(0)
    teacher = trained_teacher()
    teacher.network.layer2 = HalfNoise(teacher.network.layer2)
    regularizer = ExplainedVariance(**{"rows": 32, "every": 3} | settings)
    return DistillModule(
        student=CifarResNet(8, num_classes=10, width=8, in_channels=1),
        student_weights=STUDENT,
        quantization=Recipe(bits="w4a4"),
        teachers={"large": teacher},
        distillation={
            "features": Term(Hints(), "large", taps=[Tap("layer2.shown", "layer2")], regularizer=regularizer)
        },
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        teacher_cache=cache,
    )


def weights_of(module: DistillModule) -> Tensor:
    regularizer = module.distillation["features"].regularizer
    assert isinstance(regularizer, ExplainedVariance)
    return regularizer.explained


def test_noise_gets_next_to_nothing_and_no_gradient_sees_the_rows_that_say_so(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = judging()
    seen: list[tuple[Tensor, bool, bool]] = []

    def look(student: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((arguments[0][:, 0, 0, 0], output.requires_grad, student.training))

    module.student.register_forward_hook(look)
    trainer = make_trainer(callbacks=[RegularizerMonitor(), RunSummary()], logger=RunLogger(tmp_path))
    trainer.fit(module, datamodule=held_out(Marked))
    weights = weights_of(module)
    assert float(weights[:8].min()) > 0.1
    assert float(weights[8:].max()) < 0.03
    white = torch.cat([corner for corner, *_ in seen]).max()
    assert all(bool((corner < white).all()) for corner, trained, _ in seen if trained)
    asked = [(corner, training) for corner, trained, training in seen if bool((corner == white).any())]
    assert sum(len(corner) for corner, _ in asked) == 300 + 2 * 32  # at first, and in every third of 7 batches
    assert not any(training for _, training in asked)
    told = json.loads((tmp_path / "summary.json").read_text())["regularizer"]["features"]
    assert told["verdict"] == "believed"
    assert "can be predicted from the student on held-out rows, of 8 of 16 less than 0.1" in told["sentence"]


def test_a_resumed_training_weighs_on_where_it_was_and_answers_from_the_cache_weigh_the_same(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def run(folder: Path, stop: tuple[int, int] | None = None, cache: TeacherCache | None = None) -> DistillModule:
        module = judging(cache)
        last = folder / "last.ckpt"
        callbacks: list[Any] = [BestAndLast(folder, every_n_steps=1)] + ([StopAt(*stop)] if stop else [])
        trainer = make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True, logger=RunLogger(folder))
        trainer.fit(module, datamodule=held_out(), ckpt_path=last if last.exists() else None, weights_only=True)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", (1, 1))  # between two times that the networks are asked
    others = run(tmp_path / "cut"), run(tmp_path / "cached", cache=TeacherCache(str(tmp_path / "cache"), "float32"))
    for other in others:
        assert torch.equal(weights_of(other), weights_of(whole))
        assert torch.equal(parameters_of(other), parameters_of(whole))


def test_without_held_out_rows_and_with_logits_it_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=r"distillation.features: regularizer ExplainedVariance needs .*trust_frac"):
        make_trainer().fit(judging(), datamodule=digits())
    with pytest.raises(UsageError, match=r"\d held-out rows are too few to say what .*: at least 20 are needed"):
        make_trainer().fit(judging(), datamodule=held_out(trust_fraction=0.003))
    with pytest.raises(UsageError, match="ExplainedVariance cannot weigh distillation_loss HintonKL"):
        DistillModule(
            student=network(),
            teachers={"a": FrozenTeacher(network())},
            distillation={"x": Term(HintonKL(), "a", regularizer=ExplainedVariance())},
        )
