"""Terms of a detection: losses on levels of the pyramid, with learned weights, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.data import DigitScenes
from lqkd.errors import UsageError
from lqkd.losses import CWD, MGD, PKD, BinaryKL, CrossKD, ForegroundWeighted, HintonKL
from lqkd.models import SmallFCOS
from lqkd.modules import DistillModule, Tap, Term
from lqkd.quantization import Recipe
from lqkd.regularizers import ConvModulator, SampleWeight
from lqkd.tasks import Detection
from lqkd.teachers import FrozenTeacher

LEVELS = [Tap(f"pyramid.outputs.{level}", f"pyramid.outputs.{level}") for level in range(3)]


def distilling(**terms: Term) -> DistillModule:
    torch.manual_seed(0)
    teacher = FrozenTeacher(SmallFCOS(width=4, depth=1), minimum_accuracy=0.0, precision="fp32")
    return DistillModule(
        student=SmallFCOS(width=2, depth=1),
        teachers={"other": teacher},
        distillation=terms,
        task=Detection(10, reach=1.5),
        quantization=Recipe("w4a4"),
        student_optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
    )


class OfOneRow(SampleWeight):
    """As a user's own may be."""

    sees_several_rows = False


class Began(Callback):
    """Keeps the parameters of the terms as they were before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)
        self.phi = {name: value.clone() for name, value in pl_module.distillation.named_parameters()}


def test_every_loss_on_levels_trains_with_a_learned_weight_for_each_position() -> None:
    module = distilling(
        classes=Term(BinaryKL(), "other", regularizer=SampleWeight()),
        correlation=Term(ForegroundWeighted(PKD()), "other", taps=LEVELS, regularizer=ConvModulator()),
        channels=Term(CWD(), "other", taps=LEVELS[:2], regularizer=ConvModulator(per="channel")),
        generated=Term(MGD(), "other", taps=LEVELS[:1], regularizer=ConvModulator()),
        crossed=Term(CrossKD(), "other", taps=LEVELS, regularizer=ConvModulator()),
        imaged=Term(PKD(), "other", taps=LEVELS, regularizer=SampleWeight()),
    )
    data = DigitScenes(scenes=24, image_size=(64, 64), batch_size=4)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    began = Began()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        limit_val_batches=0,
        enable_model_summary=False,
        callbacks=began,
        **quiet,
    )
    trainer.fit(module, datamodule=data)
    moved = {
        name.partition(".")[0]
        for name, value in module.distillation.named_parameters()
        if "regularizers" in name and not torch.equal(value, began.phi[name])
    }
    assert moved == {"classes", "correlation", "channels", "generated", "crossed", "imaged"}
    assert not [name for name in module.distillation.state_dict() if "class_tower" in name]  # of the teacher


@pytest.mark.parametrize(
    ("term", "told"),
    [
        (Term(PKD(), "other", taps=LEVELS, regularizer=OfOneRow()), "OfOneRow looks at one row .* take SampleWeight"),
        (Term(BinaryKL(), "other", regularizer=ConvModulator()), "ConvModulator cannot weigh .* BinaryKL"),
        (
            Term(HintonKL(), "other"),
            "HintonKL compares the softmax of logits, which is no prediction of task Detection",
        ),
        (Term(CrossKD(), "other", taps=[Tap("layer1", "layer1")]), "tap 'layer1' of SmallFCOS is not on the way"),
        (Term(CWD(), "other", taps=[Tap("head.classes", "head.classes")]), "was called 3 times in one pass"),
    ],
)
def test_what_cannot_be_compared_or_weighed_is_refused_before_the_first_batch(term: Term, told: str) -> None:
    data = DigitScenes(scenes=24, image_size=(64, 64), batch_size=4)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False)

    def start() -> None:
        trainer.fit(distilling(term=term), datamodule=data)

    with pytest.raises(UsageError, match=told):
        start()
