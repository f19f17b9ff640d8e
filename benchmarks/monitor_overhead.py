"""What RegularizerMonitor costs: epochs of one training with it, in turn with epochs of the same training without it.

    python -m benchmarks.monitor_overhead --json FILE [--network digits|resnet20] [--epochs N]

W2A2 with ElementwiseMLP on the CPU, at the default frequency: epochs of 20 steps through Lightning, on digits (batch
64) or on random images in the shape of CIFAR-10 (ResNet-20 from ResNet-56, batch 128). What counts is the median over
pairs of adjacent epochs of the time with the monitor over the time without. Tables are written as usual, to a temporary
folder, and the monitor's state is asked for once an epoch, as by a checkpoint; what is drawn when training ends, which
costs the same however long it was, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lqkd.callbacks import RegularizerMonitor
from lqkd.data import Digits
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe
from lqkd.regularizers import ElementwiseMLP
from lqkd.runs import RunLogger
from lqkd.teachers import FrozenTeacher

STEPS = 20


class Alternating(RegularizerMonitor):
    """Works in every second epoch, and times all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[float] = []
        self.drawing = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.starts.append(time.perf_counter())
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.current_epoch % 2:
            super().on_train_batch_start(trainer, *rest)

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.current_epoch % 2:
            super().on_train_batch_end(trainer, *rest)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch % 2:
            super().on_train_epoch_end(trainer, pl_module)
            self.state_dict()
        else:  # the table of metrics, written every two seconds, must not fall to the epochs with the monitor alone
            for logger in trainer.loggers:
                logger.save()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        super().on_fit_end(trainer, pl_module)
        self.drawing = time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--network", choices=("digits", "resnet20"), default="digits")
    parser.add_argument("--epochs", type=int, default=60, help="half of them with the monitor")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    fit: dict[str, Any]
    if arguments.network == "digits":
        teacher, student = CifarResNet(14, width=8, in_channels=1), CifarResNet(8, width=8, in_channels=1)
        fit = {"datamodule": Digits(batch_size=64, limit_train=64 * STEPS)}
    else:
        teacher, student = CifarResNet(56), CifarResNet(20)
        batches = [(torch.randn(128, 3, 32, 32), torch.randint(10, (128,))) for _ in range(STEPS)]
        fit = {"train_dataloaders": DataLoader(batches, batch_size=None)}  # type: ignore[arg-type]
    module = DistillModule(
        FrozenTeacher(teacher, minimum_accuracy=0.0),
        student,
        quantization=Recipe(bits="w2a2"),
        regularizer=ElementwiseMLP(guard="barrier"),
    )
    monitor = Alternating()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=arguments.epochs + 3,  # the first two warm up, and the last has no next one to end at
            limit_val_batches=0,
            logger=RunLogger(folder),
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, **fit)
    seconds = [end - start for start, end in zip(monitor.starts, monitor.starts[1:], strict=False)][2:]
    without, with_monitor = seconds[0::2], seconds[1::2]
    result = {
        "network": arguments.network,
        "epochs": len(seconds),
        "milliseconds_a_step": round(1000 * statistics.median(without) / STEPS, 2),
        "milliseconds_a_step_with_monitor": round(1000 * statistics.median(with_monitor) / STEPS, 2),
        "ratio": round(statistics.median(b / a for a, b in zip(without, with_monitor, strict=True)), 4),
        "seconds_at_the_end": round(monitor.drawing, 2),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
