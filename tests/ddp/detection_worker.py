"""One process of the training of a detector: measures, trains a little and saves what it saw."""

from __future__ import annotations

import math
import os

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lqkd.data import DigitScenes
from lqkd.losses import BinaryKL
from lqkd.models import SmallFCOS
from lqkd.modules import ClassifierModule, DistillModule, Term
from lqkd.quantization import Recipe
from lqkd.tasks import Detection
from lqkd.teachers import FrozenTeacher
from tests.conftest import parameters_of


def without_batch_norm(network: nn.Module) -> nn.Module:
    """Which sees only its own process's images."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return network


def main(output: str, processes: int, batch_size: int) -> None:
    torch.manual_seed(0)
    student = without_batch_norm(SmallFCOS(width=4, depth=1))
    teacher = without_batch_norm(SmallFCOS(width=4, depth=1))
    module = DistillModule(
        student=student,
        teachers={"other": FrozenTeacher(teacher, minimum_accuracy=0.0, precision="fp32")},
        distillation={"classes": Term(BinaryKL(), "other")},
        task=Detection(10, reach=2.0),
        quantization=Recipe("w4a4"),
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.001),
    )
    data = DigitScenes(scenes=33, image_size=(64, 64), batch_size=batch_size, eval_batch_size=3)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto",
        max_epochs=1,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    known = ClassifierModule(
        SmallFCOS(width=16, depth=1), "builtin:scenes_detector", task=Detection(10, reach=1.5, min_score=0.01)
    )
    measured = trainer.validate(known, datamodule=data, verbose=False)[0]  # of 7 images
    trainer.fit(module, datamodule=data)
    saved = {
        "measured": {name: value for name, value in measured.items() if not math.isnan(value)},
        "parameters": parameters_of(module.student),
    }
    torch.save(saved, f"{output}_{os.environ['RANK']}.pt")
