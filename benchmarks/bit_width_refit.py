"""How quantizers should be refitted when a bit-width schedule takes bits away: 8 -> 4 -> 2 on digits.

    python -m benchmarks.bit_width_refit --csv FILE [--seeds N] [--epochs-per-stage N]

Teacher, student and settings are those of configs/regularizer.yaml. Accuracies are on the validation split, which is
another one for every seed; the test split is not looked at. "After a switch" is before any training with the new bits:
activations have seen the one batch that they are fitted to, and batch norm is re-estimated over ten training batches.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import statistics
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.trainer.states import RunningStage

from lqkd.callbacks import BitWidthScheduler, Stage
from lqkd.data import Digits
from lqkd.models import CifarResNet
from lqkd.modules import Cosine, DistillModule
from lqkd.modules.stages import in_stage
from lqkd.quantization import Recipe, reestimate_batchnorm
from lqkd.regularizers import ElementwiseMLP
from lqkd.teachers import FrozenTeacher
from lqkd.utils.files import atomic_path

RULES = ("clip", "mse", "data")


class Switches(Callback):
    """Measures a copy of the student at each switch of bits, before the first step with the new ones."""

    def __init__(self, scheduler: BitWidthScheduler) -> None:
        self.scheduler = scheduler
        self.stage = 0
        self.measured: dict[str, float] = {}
        self.accuracies: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.scheduler.current == self.stage:
            return
        self.stage = self.scheduler.current
        bits = {1: 4, 2: 2}[self.stage]
        self.measured[f"val_acc_before_{bits}"] = self.accuracies[-1]
        student = copy.deepcopy(pl_module.student)
        with torch.no_grad():
            student(batch[0])  # fits what waits for a batch
            self.measured[f"train_loss_at_switch_{bits}"] = F.cross_entropy(student(batch[0]), batch[1]).item()
        with in_stage(trainer, RunningStage.TRAINING):
            assert trainer.train_dataloader is not None, "there was a batch"
            batches = islice(trainer.train_dataloader, 10)
            reestimate_batchnorm(student, (trainer.strategy.batch_to_device(b, dataloader_idx=0)[0] for b in batches))
        self.measured[f"val_acc_after_{bits}"] = self._accuracy(trainer, student)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.accuracies.append(trainer.callback_metrics["val/acc"].item())

    @torch.no_grad()
    def _accuracy(self, trainer: Any, student: torch.nn.Module) -> float:
        student.eval()
        right = total = 0
        with in_stage(trainer, RunningStage.VALIDATING):
            for batch in trainer.datamodule.val_dataloader():
                images, labels = trainer.strategy.batch_to_device(batch, dataloader_idx=0)[:2]
                right += int((student(images).argmax(1) == labels).sum())
                total += len(labels)
        return right / total


def train(rule: str, seed: int, epochs_per_stage: int) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    teacher = FrozenTeacher(CifarResNet(14, width=8, in_channels=1), weights="builtin:digits_teacher")
    module = DistillModule(
        teacher,
        CifarResNet(8, width=8, in_channels=1),
        student_weights="builtin:digits_student",
        quantization=Recipe(bits="w2a2"),
        regularizer=ElementwiseMLP(guard="barrier"),
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4),
        student_schedule=Cosine(warmup_fraction=0.05),
    )
    stages = [Stage("w8a8", until_epoch=epochs_per_stage), Stage("w4a4", until_epoch=2 * epochs_per_stage)]
    scheduler = BitWidthScheduler(stages, refit=rule)  # type: ignore[arg-type]
    switches = Switches(scheduler)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3 * epochs_per_stage,
        callbacks=[scheduler, switches],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_test_batches=0,
    )
    trainer.fit(module, datamodule=Digits(seed=seed))
    last = switches.accuracies[2 * epochs_per_stage :]
    return {"refit": rule, "seed": seed, **switches.measured, "val_acc_end": last[-1], "val_acc_best": max(last)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs-per-stage", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)  # gradients of a network that a switch has killed would be slow
    rows = []
    for seed in range(arguments.seeds):
        for rule in RULES:
            rows.append(train(rule, seed, arguments.epochs_per_stage))
            print(rows[-1], flush=True)
    with atomic_path(arguments.csv) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for rule in RULES:
        own = [row for row in rows if row["refit"] == rule]
        means = {key: statistics.mean(row[key] for row in own) for key in rows[0] if key not in ("refit", "seed")}
        print(rule, {key: round(value, 4) for key, value in means.items()})


if __name__ == "__main__":
    main()
