"""A loss that is NaN or infinite stops the training in its step, and the report says where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lqkd.errors import DivergenceError
from lqkd.models import CifarResNet
from lqkd.modules import ClassifierModule
from lqkd.quantization import quantizers
from lqkd.runs import BestAndLast
from tests.conftest import digits, distiller, parameters_of

MakeTrainer = Callable[..., Trainer]


class At(Callback):
    """Does something to the module before batch ``batch`` of the first epoch, and keeps its parameters after that."""

    def __init__(self, batch: int, what: Callable[[LightningModule], object]) -> None:
        self.batch, self.what = batch, what
        self.parameters: Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            self.what(pl_module)
            self.parameters = parameters_of(pl_module)


def report(make_trainer: MakeTrainer, module: LightningModule, *callbacks: Callback) -> str:
    trainer = make_trainer(callbacks=list(callbacks), enable_checkpointing=True)
    with pytest.raises(DivergenceError) as caught:
        trainer.fit(module, datamodule=digits(5))
    return str(caught.value)


def test_the_report_names_the_step_the_part_of_the_loss_and_the_last_good_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = distiller()
    infinite = At(3, lambda m: m.penalties.update(extra=lambda: torch.tensor(torch.inf)))
    keeper = BestAndLast(tmp_path, every_n_steps=2)
    text = report(make_trainer, module, infinite, keeper)
    assert text.startswith("training diverged at step 3 (epoch 0): the loss is inf (task ")
    assert ", extra inf)" in text
    assert "all weights, steps of quantizers and statistics are finite" in text
    assert f"last good checkpoint: {tmp_path / 'last.ckpt'}" in text
    assert torch.equal(parameters_of(module), infinite.parameters)  # the step was not taken


def test_the_report_names_the_step_of_a_quantizer_and_the_first_layer_that_suffers(make_trainer: MakeTrainer) -> None:
    name = list(quantizers(distiller().student))[4]

    def break_scale(module: LightningModule) -> None:
        module.student.get_submodule(name).scale.data.fill_(torch.nan)

    text = report(make_trainer, distiller(), At(2, break_scale))
    assert f"not finite is {name}.scale" in text
    assert f"the first layer with such an output is {name}" in text


def test_a_float_training_stops_likewise(make_trainer: MakeTrainer) -> None:
    module = ClassifierModule(CifarResNet(8, width=4, in_channels=1))
    text = report(make_trainer, module, At(2, lambda m: nn.init.constant_(m.network.conv1.weight, torch.inf)))
    assert text.startswith("training diverged at step 2 (epoch 0): the loss is nan; not finite is conv1.weight")


def test_a_group_of_accumulated_batches_stops_at_its_first_bad_one(make_trainer: MakeTrainer) -> None:
    module = distiller(accumulate_grad_batches=2)
    calls: list[int] = []

    def penalty() -> Tensor:
        calls.append(1)
        return torch.tensor(torch.nan if len(calls) == 3 else 0.0)

    module.penalties["extra"] = penalty
    assert "diverged at step 1" in report(make_trainer, module)
    assert len(calls) == 3


def test_weights_that_are_not_finite_are_never_saved_as_the_last_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The loss of a step is finite and its gradient is not: the next step would show it, a checkpoint comes first."""

    class BadGradient(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
            if trainer.global_step == 3:
                pl_module.network.conv1.weight.grad.fill_(torch.nan)

    module = ClassifierModule(CifarResNet(8, width=4, in_channels=1))
    text = report(make_trainer, module, BadGradient(), BestAndLast(tmp_path, every_n_steps=1))
    assert text.startswith("training diverged before step 4: network.conv1.weight is no longer finite")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["state_dict"]["network.conv1.weight"].isfinite().all()
