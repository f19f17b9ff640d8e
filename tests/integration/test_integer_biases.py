"""Biases of integer kernels in real trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lqkd.callbacks import BatchNormReestimation, IntegerBiases
from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe
from lqkd.quantization.batchnorm import foldable
from lqkd.quantization.biases import integer_biases
from tests.conftest import digits, distiller

MakeTrainer = Callable[..., Trainer]


class Validated(Callback):
    """Keeps the student of each validation."""

    def __init__(self) -> None:
        self.students: list[nn.Module] = []

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        assert isinstance(pl_module, DistillModule)
        if not trainer.sanity_checking:
            self.students.append(copy.deepcopy(pl_module.student))


def distance(network: nn.Module) -> float:
    """How far the biases are from those of an integer kernel."""
    found = integer_biases(network, foldable(network).folded)
    assert found
    return max(float((value - network.get_submodule(name).bias.detach()).abs().max()) for name, value in found.items())


@pytest.mark.parametrize("order", [1, -1])
def test_the_network_that_is_validated_has_them_after_batch_norm_is_estimated(
    make_trainer: MakeTrainer, order: int
) -> None:
    seen = Validated()
    callbacks = [BatchNormReestimation(2), IntegerBiases()][::order]
    module = distiller(quantization=Recipe(bits="w2a2", residual_bits=8))
    make_trainer(callbacks=[*callbacks, seen], max_epochs=2, num_sanity_val_steps=1).fit(module, datamodule=digits(4))
    assert len(seen.students) >= 2
    assert max(distance(student) for student in seen.students) < 1e-6
    assert distance(module.student) < 1e-6


def test_a_training_that_ends_without_a_validation_ends_with_them(make_trainer: MakeTrainer) -> None:
    module = distiller()
    make_trainer(callbacks=[IntegerBiases()], max_steps=2, limit_val_batches=0).fit(module, datamodule=digits(4))
    assert distance(module.student) < 1e-6
    plain = distiller()
    make_trainer(max_steps=2, limit_val_batches=0).fit(plain, datamodule=digits(4))
    assert distance(plain.student) > 1e-5


def test_a_validation_on_its_own_changes_nothing(make_trainer: MakeTrainer) -> None:
    module = distiller()
    make_trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=digits(4))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    make_trainer(callbacks=[IntegerBiases()]).validate(module, datamodule=digits(4), verbose=False)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_network_without_such_biases_is_refused_before_the_first_batch(make_trainer: MakeTrainer) -> None:
    module = distiller(quantization=Recipe(bits="w4a4", activation_quantizer="n2uq"))
    with pytest.raises(UsageError, match="IntegerBiases has nothing to do"):
        make_trainer(callbacks=[IntegerBiases()]).fit(module, datamodule=digits(4))
