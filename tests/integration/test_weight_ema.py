"""Averaged students in real trainings: what is reported, saved, tested and resumed is one and the same network."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from safetensors.torch import load_file
from torch import Tensor

from lqkd.callbacks import BatchNormReestimation, BitWidthScheduler, IntegerBiases, Stage, WeightEMA
from lqkd.errors import UsageError
from lqkd.modules import ClassifierModule, DistillModule
from lqkd.quantization import Recipe, quantizers
from lqkd.quantization.batchnorm import reestimate_batchnorm
from lqkd.runs import BestAndLast, RunLogger, RunSummary
from tests.conftest import digits, distiller, network, parameters_of
from tests.integration.test_exact_resume import StopAt
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]


def student(**arguments: Any) -> DistillModule:
    return distiller(quantization=Recipe(bits="w3a3"), **arguments)


def classifier() -> ClassifierModule:
    torch.manual_seed(0)
    return ClassifierModule(network())


def fit(
    make: MakeTrainer, folder: Path, module: LightningModule, *callbacks: Any, resume: bool = False, **settings: Any
) -> Trainer:
    """Train in a run folder, from its last checkpoint where asked."""
    last = folder / "last.ckpt"
    rows = torch.load(last, weights_only=True)["resume"]["rows"] if resume else None
    keeper = BestAndLast(folder, settings.get("limit_val_batches") != 0, every_n_steps=1)
    defaults = {
        "max_epochs": 2,
        "enable_checkpointing": True,
        "limit_test_batches": 1,
        "logger": RunLogger(folder, rows),
    }
    trainer = make(callbacks=[*callbacks, RunSummary(), keeper], **(defaults | settings))
    trainer.fit(module, datamodule=digits(4), ckpt_path=last if resume else None, weights_only=True)
    return trainer


def saved(path: Path, key: str = "state_dict") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)[key]
    return state


def test_the_average_is_that_of_the_weights_after_every_step(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = student()
    recorder = Recorder(lambda trainer, module: parameters_of(module.student))
    fit(make_trainer, tmp_path, module, WeightEMA(0.3), recorder)
    expected = recorder.seen[0]
    for number, weights in enumerate(recorder.seen[1:], start=1):
        expected = torch.lerp(expected, weights, 1 - min(0.3, (1 + number) / (10 + number)))
    torch.testing.assert_close(parameters_of(module.student), expected)
    assert {quantizer.bits for quantizer in quantizers(module.student).values()} == {3, 8}
    formats = [value for key, value in saved(tmp_path / "best.ckpt").items() if key.endswith(".format")]
    assert {int(value[0]) for value in formats} == {3, 8}


def test_training_itself_does_not_see_the_average(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    plain = student()
    fit(make_trainer, tmp_path / "plain", plain, limit_val_batches=0)
    fit(make_trainer, tmp_path / "averaged", student(), WeightEMA(), limit_val_batches=0)
    trained = saved(tmp_path / "averaged" / "last.ckpt", "trained_weights")
    assert all(torch.equal(trained[f"student.{key}"], value) for key, value in plain.student.state_dict().items())


@pytest.mark.parametrize(
    ("make_module", "callbacks"),
    [
        (student, []),
        (student, [IntegerBiases, BatchNormReestimation]),
        (classifier, []),
    ],
)
def test_what_is_reported_is_what_the_files_hold(
    make_trainer: MakeTrainer, tmp_path: Path, make_module: Callable[[], Any], callbacks: list[Any]
) -> None:
    module = make_module()
    trainer = fit(make_trainer, tmp_path, module, *(c() for c in callbacks), WeightEMA(0.5))
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, ckpt_path=tmp_path / "best.ckpt", verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (weights,) = tmp_path.glob("*.safetensors")
    for state in (load_file(weights), None):
        again = make_module()
        if state is not None:
            again.trained().load_state_dict(state)
        else:
            again.load_state_dict(saved(tmp_path / "best.ckpt"))
        other = make_trainer(logger=False, limit_test_batches=1)
        (validated,) = other.validate(again, datamodule=digits(4), verbose=False)
        assert validated["val/acc"] == summary["val"]
        assert other.test(again, datamodule=digits(4), verbose=False) == [tested]
    assert summary["test"] == tested["test/acc"]


def test_statistics_of_batch_norm_are_those_of_the_average(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(make_trainer, tmp_path, student(), WeightEMA(0.9), max_epochs=1, limit_val_batches=0)
    module = student()
    module.load_state_dict(saved(tmp_path / "best.ckpt"))
    before = module.student.bn1.running_mean.clone()
    data = digits(4)
    data.setup()
    batches = [data.preprocess(batch, train=True, epoch=0).images for batch in islice(data.train_dataloader(), 50)]
    reestimate_batchnorm(module.student, batches)
    torch.testing.assert_close(before, module.student.bn1.running_mean)


@pytest.mark.parametrize("stop", [(0, 3), (1, 1), (1, 2)])
def test_a_training_that_is_stopped_resumes_to_the_same_average(
    make_trainer: MakeTrainer, tmp_path: Path, stop: tuple[int, int]
) -> None:
    def train(folder: str, *callbacks: Any, resume: bool = False) -> None:
        stages = BitWidthScheduler([Stage("w6a6", until_step=2), Stage("w4a4", until_epoch=1)])
        fit(make_trainer, tmp_path / folder, student(), WeightEMA(0.9), stages, *callbacks, resume=resume)

    train("whole")
    with pytest.raises(InterruptedError):
        train("cut", StopAt(*stop))
    train("cut", resume=True)
    for name, key in (("last", "state_dict"), ("last", "trained_weights"), ("best", "state_dict")):
        whole, cut = (saved(tmp_path / folder / f"{name}.ckpt", key) for folder in ("whole", "cut"))
        assert all(torch.equal(cut[key], value) for key, value in whole.items())
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_a_training_goes_on_without_an_average_from_the_weights_that_were_trained(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = student()
    fit(make_trainer, tmp_path / "whole", whole, limit_val_batches=0)
    with pytest.raises(InterruptedError):
        fit(make_trainer, tmp_path / "cut", student(), WeightEMA(), StopAt(1, 2), limit_val_batches=0)
    module = student()
    fit(make_trainer, tmp_path / "cut", module, resume=True, limit_val_batches=0)
    assert torch.equal(parameters_of(module), parameters_of(whole))


def test_an_average_does_not_mix_two_numbers_of_bits(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = student()
    stages = BitWidthScheduler([Stage("w8a8", until_step=7)])  # one step before the end
    fit(make_trainer, tmp_path, module, WeightEMA(), stages, limit_val_batches=0)
    trained = saved(tmp_path / "last.ckpt", "trained_weights")
    assert all(torch.equal(trained[f"student.{name}"], p) for name, p in module.student.named_parameters())


@pytest.mark.parametrize("average", [EMAWeightAveraging, WeightAveraging, lambda: StochasticWeightAveraging(0.01)])
@pytest.mark.parametrize("make_module", [student, classifier])
def test_lightnings_averages_are_refused_with_a_word_on_what_works(
    make_trainer: MakeTrainer, make_module: Callable[[], Any], average: Callable[[], Any]
) -> None:
    with pytest.raises(UsageError, match=r"Averaging is not possible: .* use lqkd.callbacks.WeightEMA"):
        make_trainer(callbacks=[average()]).fit(make_module(), datamodule=digits(2))


def test_a_validation_within_an_epoch_is_refused_where_batch_norm_needs_training_batches(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(callbacks=[WeightEMA()], val_check_interval=0.5)
    with pytest.raises(UsageError, match=r"val_check_interval=0.5 is not possible with WeightEMA"):
        trainer.fit(student(), datamodule=digits(4))


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"decay=1.0 is not possible"):
        WeightEMA(1.0)
