"""Batch norm in real trainings: statistics re-estimated before validation, and synchronised batch norm."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lqkd.callbacks import BatchNormReestimation, IntegerBiases
from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.quantization import QuantizedLayer, Recipe, fold_batchnorm, initialize_quantizers
from lqkd.quantization.batchnorm import foldable, reestimate_batchnorm
from lqkd.quantization.biases import integer_biases
from lqkd.runs import BestAndLast
from lqkd.runs.stopping import StopOnSignal
from tests.conftest import digits, distiller, parameters_of
from tests.integration.test_exact_resume import StopAt

MakeTrainer = Callable[..., Trainer]


def fit(make: MakeTrainer, *callbacks: Callback, lr: float = 0.05, epochs: int = 1) -> DistillModule:
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


class Counted(BatchNormReestimation):
    """Counts how often it works for a file."""

    copies = 0

    def finish_copy(self, trainer: Trainer, module: TaskModule) -> None:
        self.copies += 1
        super().finish_copy(trainer, module)


def test_what_is_saved_within_an_epoch_has_them_too_once_a_step(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Light(ModelCheckpoint):  # saves when a batch ends, and BestAndLast before the next
        """Two of one class have one state."""

    counted = Counted(2)
    savers = [BestAndLast(tmp_path, every_n_steps=1), ModelCheckpoint(tmp_path, "all", every_n_train_steps=1)]
    savers.append(Light(tmp_path, "weights", every_n_train_steps=1, save_weights_only=True))
    callbacks = [counted, IntegerBiases(), *savers, StopAt(0, 3)]
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, limit_test_batches=1.0)
    with pytest.raises(InterruptedError):
        trainer.fit(distiller(), datamodule=digits(4))
    assert counted.copies == 1 + 3  # one for what is measured before the first step
    data = digits(4)
    data.setup()
    batches = [data.preprocess(batch, train=True, epoch=0).images for batch in islice(data.train_dataloader(), 2)]
    for name in ("last", "all", "weights"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] == (2 if name == "last" else 3)
        module = distiller()
        module.load_state_dict(saved["state_dict"])
        folded = foldable(module.student).folded
        for layer, bias in integer_biases(module.student, folded).items():
            torch.testing.assert_close(module.student.get_submodule(layer).bias.detach(), bias)
        fresh = module.student.bn1.running_mean.clone()
        reestimate_batchnorm(module.student, batches)
        torch.testing.assert_close(fresh, module.student.bn1.running_mean)


def test_a_file_within_an_epoch_changes_nothing_of_the_training(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Of what it goes on from, when it is resumed from there either."""

    def stopped(folder: str, *stops: tuple[int, int], every: int | None = 1) -> dict[str, Any]:
        for stop in stops:
            last = tmp_path / folder / "last.ckpt"
            keeper = BestAndLast(tmp_path / folder, every_n_steps=every)
            callbacks = [BatchNormReestimation(2), IntegerBiases(), keeper, StopAt(*stop)]
            trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2, logger=False)
            resumed = {"ckpt_path": last, "weights_only": True} if last.exists() else {}
            with pytest.raises(InterruptedError):
                trainer.fit(distiller(), datamodule=digits(4), **resumed)
        return dict(torch.load(last, weights_only=True))

    whole = stopped("whole", (1, 3), every=6)  # which saves at the end of an epoch and once within
    cut = stopped("cut", (0, 3), (1, 2), (1, 3))
    assert whole["global_step"] == cut["global_step"] == 6
    for key in ("state_dict", "unfinished"):
        assert whole[key].keys() == cut[key].keys()
        assert all(torch.equal(cut[key][name], value) for name, value in whole[key].items())
    mean = "student.bn1.running_mean"
    assert not torch.equal(whole["unfinished"][mean], whole["state_dict"][mean])


def test_a_loader_with_workers_that_stay_is_read_within_an_epoch_as_if_nothing_were_saved(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    samples = TensorDataset(torch.randn(48, 1, 8, 8), torch.arange(48) % 10)

    def trained(*callbacks: Any) -> torch.Tensor:
        order = torch.Generator().manual_seed(2)
        workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}
        loader = DataLoader(samples, batch_size=12, shuffle=True, generator=order, **workers)
        saves = {"callbacks": [*callbacks], "enable_checkpointing": bool(callbacks), "logger": False}
        module = distiller()
        make_trainer(max_epochs=2, limit_val_batches=0, **saves).fit(module, loader)
        return parameters_of(module)

    keeper = BestAndLast(tmp_path, validates=False, every_n_steps=1)
    assert torch.equal(trained(BatchNormReestimation(2), keeper), trained())


def test_a_signal_saves_before_statistics_are_computed_for_which_there_may_be_no_time(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Impatient(BatchNormReestimation):
        def finish_copy(self, trainer: Trainer, module: TaskModule) -> None:
            if trainer.global_step > 0:
                signal.raise_signal(signal.SIGINT)

    class Stopping(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    callbacks = [Impatient(), Stopping(), StopOnSignal(), BestAndLast(tmp_path)]
    with pytest.raises(SystemExit):
        make_trainer(callbacks=callbacks, enable_checkpointing=True).fit(distiller(), datamodule=digits(4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


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


def test_the_student_that_is_not_trained_is_measured_as_the_trained_one_is(make_trainer: MakeTrainer) -> None:
    # With a learning rate of zero both are the same network.
    def measured(*callbacks: Callback) -> tuple[float | None, float]:
        module = distiller(
            student=CifarResNet(8, width=8, in_channels=1),
            student_weights="builtin:digits_student",
            quantization=Recipe("w2a2"),
            student_optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        )
        trainer = make_trainer(callbacks=list(callbacks), limit_test_batches=1.0)
        trainer.fit(module, datamodule=digits(4))
        (tested,) = trainer.test(module, datamodule=digits(4), verbose=False)
        return module.references["student_start"], tested["test/acc"]

    start, end = measured(BatchNormReestimation(3), IntegerBiases())
    assert start == pytest.approx(end)
    as_it_was, _ = measured()
    assert as_it_was is not None
    assert start > as_it_was + 0.05


def test_measuring_it_changes_no_bit_of_the_training(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(make_trainer, limit_test_batches=1.0)
    measured = fit(make, BatchNormReestimation(3), IntegerBiases())
    monkeypatch.setattr(TaskModule, "finished", lambda self: nullcontext())
    plain = fit(make, BatchNormReestimation(3), IntegerBiases())
    assert measured.references["student_start"] != plain.references["student_start"]
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name
