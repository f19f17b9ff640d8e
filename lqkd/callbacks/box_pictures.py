"""A picture of what detectors find on photographs, beside what is there."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import nn

from lqkd.callbacks.folder import run_folder_of
from lqkd.modules.base import TaskModule
from lqkd.modules.distill import DistillModule
from lqkd.modules.metrics import last_batch
from lqkd.quantization.modes import evaluating
from lqkd.tasks import Asked, BoxDetection, Inputs
from lqkd.tasks.object_pictures import found_beside_truth, pixels_of

_KEY = "pictures/boxes"
"""What loggers call it."""
_COUNT = 3
"""Photographs."""


class BoxPictures(Callback):
    """Draws, when a detector is tested, the first photographs with what is there, and what every network finds there.

    Teacher and student of a distillation are beside each other, objects of a score of 0.5 or more, in ``boxes.png`` of
    the run's folder; W&B and TensorBoard get it as ``pictures/boxes``. A training ends with a test of its best
    checkpoint, whose student it is. Other tasks are left alone.
    """

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        first = batch_idx == 0 and dataloader_idx == 0 and trainer.is_global_zero
        if first and isinstance(pl_module, TaskModule) and isinstance(pl_module.task, BoxDetection):
            self._draw(trainer, pl_module, pl_module.task, batch)

    def _draw(self, trainer: Trainer, module: TaskModule, task: BoxDetection, batch: Any) -> None:
        folder = run_folder_of(trainer)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        scenes = task.scenes(batch)
        if (folder is None and not loggers) or scenes.objects is None:
            return
        from lqkd.utils import figures
        from lqkd.utils.box_figures import PICTURE

        found = {name: task.predictions(answer, batch).cpu() for name, answer in _answers(trainer, module, batch)}
        objects = [(boxes.cpu(), labels.cpu()) for boxes, labels in scenes.objects]
        data = getattr(trainer, "datamodule", None)
        photographs = pixels_of(scenes.images, getattr(data, "mean", ()), getattr(data, "std", ()))
        names = [*getattr(data, "class_names", ())] or [*task.names]
        image = figures.pixels(found_beside_truth(photographs[:_COUNT], objects, found, names))
        if folder is not None:
            figures.write_image(folder / PICTURE, image)
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                logger.log_metrics({_KEY: wandb.Image(image)}, step=last_batch(trainer))  # type: ignore[dict-item]
            else:
                logger.experiment.add_image(_KEY, image, global_step=last_batch(trainer), dataformats="HWC")


@torch.no_grad()
def _answers(trainer: Trainer, module: TaskModule, batch: Any) -> list[tuple[str, Any]]:
    """What each network says of a batch, teachers first."""
    inputs = module.inputs(batch)
    asked: list[tuple[str, nn.Module, Inputs]] = []
    if isinstance(module, DistillModule):
        given = module.passes.teacher_inputs(batch, inputs)
        alone = len(module.judged) == 1
        asked = [("teacher" if alone else name, teacher, given) for name, teacher in module.judged.items()]
    asked.append(("student" if asked else "network", module.product(), inputs))
    answers = []
    for name, network, taken in asked:
        with evaluating(network), trainer.precision_plugin.forward_context():
            answers.append((name, module.task.outputs(taken.call(network), Asked("network", len(taken)))))
    return answers
