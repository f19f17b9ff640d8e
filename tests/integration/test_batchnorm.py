"""Batch norm in real trainings: statistics re-estimated before validation, and synchronised batch norm."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lqkd.callbacks import BatchNormReestimation
from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization import QuantizedLayer, fold_batchnorm, initialize_quantizers
from lqkd.quantization.batchnorm import reestimate_batchnorm
from lqkd.runs import BestAndLast
from tests.conftest import digits, distiller

MakeTrainer = Callable[..., Trainer]


def fit(make: MakeTrainer, *callbacks: BatchNormReestimation, lr: float = 0.05, epochs: int = 1) -> DistillModule:
    module = distiller(student_optimizer=lambda p: torch.optim.SGD(p, lr=lr))
    make(callbacks=list(callbacks), num_sanity_val_steps=1, max_epochs=epochs).fit(module, datamodule=digits(4))
    return module


def test_statistics_are_the_average_over_training_batches(make_trainer: MakeTrainer) -> None:
    # With a learning rate of zero the network stays the same, so the statistics can be computed afterwards.
    module = fit(make_trainer, BatchNormReestimation(batches=3), lr=0.0)
    data = digits(4)
    data.setup()
    inputs: list[torch.Tensor] = []
    hook = module.student.bn1.register_forward_pre_hook(lambda norm, arguments: inputs.append(arguments[0]))
    module.student.eval()
    with torch.no_grad():
        for _, batch in zip(range(3), data.train_dataloader(), strict=False):
            module.student(data.preprocess(batch, train=True, epoch=0).images)
    hook.remove()
    expected = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    torch.testing.assert_close(module.student.bn1.running_mean, expected)


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        ({"max_epochs": 2, "limit_val_batches": 0}, 1),
        ({"max_epochs": 2, "check_val_every_n_epoch": 5}, 1),
        ({"max_steps": 2}, 0),  # within the first epoch
    ],
)
def test_what_is_saved_without_a_validation_has_them_too(
    make_trainer: MakeTrainer, tmp_path: Path, settings: dict[str, Any], epoch: int
) -> None:
    keeper = BestAndLast(tmp_path, validates=settings.get("limit_val_batches") != 0)
    trainer = make_trainer(callbacks=[BatchNormReestimation(2), keeper], enable_checkpointing=True, **settings)
    trainer.fit(distiller(), datamodule=digits(4))
    data = digits(4)
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
    batches = [data.preprocess(batch, train=True, epoch=epoch).images for batch in islice(loader, 2)]
    for name in ("best", "last"):
        module = distiller()
        module.load_state_dict(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"])
        saved = module.student.bn1.running_mean.clone()
        reestimate_batchnorm(module.student, batches)
        torch.testing.assert_close(saved, module.student.bn1.running_mean)


def test_training_itself_is_not_changed(make_trainer: MakeTrainer) -> None:
    with_callback, without = fit(make_trainer, BatchNormReestimation(2), epochs=2), fit(make_trainer, epochs=2)
    for (name, a), (_, b) in zip(with_callback.named_parameters(), without.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(with_callback.student.bn1.running_mean, without.student.bn1.running_mean)


def test_a_validation_on_its_own_changes_nothing(make_trainer: MakeTrainer) -> None:
    module = fit(make_trainer)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    make_trainer(callbacks=[BatchNormReestimation()]).validate(module, datamodule=digits(4), verbose=False)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_validation_within_an_epoch_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[BatchNormReestimation()], val_check_interval=0.5)
    with pytest.raises(UsageError, match=r"val_check_interval=0.5 is not possible with BatchNormReestimation"):
        trainer.fit(distiller(), datamodule=digits(4))


def test_no_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="batches=0 is not possible"):
        BatchNormReestimation(batches=0)


def test_conversion_to_synchronised_batch_norm_leaves_quantised_layers_and_the_teacher_alone() -> None:
    module = distiller()
    before = {name: type(layer) for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module.student.bn1, nn.SyncBatchNorm)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in module.teacher.modules())
    assert {name: type(x) for name, x in module.named_modules() if isinstance(x, QuantizedLayer)} == before
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    initialize_quantizers(module.student, torch.randn(2, 1, 8, 8))
    fold_batchnorm(module.student.eval())
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in module.student.modules())
