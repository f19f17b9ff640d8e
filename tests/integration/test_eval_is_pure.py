"""Evaluation, in whatever form the Trainer runs it, writes nothing into the network and disturbs no training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lqkd.modules import DistillModule
from lqkd.quantization import Recipe, quantizers
from lqkd.teachers import FrozenTeacher
from tests.conftest import digits, distiller, parameters_of

MakeTrainer = Callable[..., Trainer]
RECIPES = {
    "learned": Recipe(bits="w4a4"),
    "offsets": Recipe(bits="w4a4", activation_quantizer="lsq_plus"),
    "measured": Recipe(bits="w2a2", weight_quantizer="dorefa", activation_quantizer="n2uq"),
    "binary": Recipe(bits="w1a1"),
    "ternary": Recipe(bits="ternary"),
}


class Watch(Callback):
    """Keeps the state before each evaluation inside of a training and compares it afterwards."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.compared: list[str] = []

    def start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def end(self, trainer: Trainer, pl_module: Any) -> None:
        changed = [key for key, value in pl_module.state_dict().items() if not torch.equal(self.before[key], value)]
        assert changed == []
        self.compared.append("sanity check" if trainer.sanity_checking else "validation")

    on_sanity_check_start = start
    on_validation_start = start
    on_validation_end = end


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_evaluation_changes_the_state_of_the_network(make_trainer: MakeTrainer, recipe: str) -> None:
    module = distiller(quantization=RECIPES[recipe])
    watch = Watch()
    trainer = make_trainer(
        num_sanity_val_steps=2, inference_mode=True, max_epochs=2, callbacks=[watch], limit_test_batches=1.0
    )
    trainer.fit(module, datamodule=digits(2))
    assert watch.compared == ["sanity check", "validation", "validation"]
    before = copy.deepcopy(module.state_dict())
    for evaluate in (trainer.validate, trainer.test):
        evaluate(module, datamodule=digits(2), verbose=False)
    trainer.predict(module, datamodule=digits(2))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("fitted", [False, True])
def test_evaluating_a_network_before_it_is_trained_leaves_no_trace_in_the_training(
    make_trainer: MakeTrainer, fitted: bool
) -> None:
    def trained(evaluate_first: bool) -> DistillModule:
        module = distiller()
        if fitted:
            make_trainer(max_steps=1).fit(module, datamodule=digits(2))
        if evaluate_first:
            make_trainer(inference_mode=True).validate(module, datamodule=digits(2), verbose=False)
            make_trainer(inference_mode=True).predict(module, datamodule=digits(2))
            assert all(bool(q.initialized) == fitted for q in quantizers(module.student).values())
        steps = 2 if evaluate_first else 0
        make_trainer(num_sanity_val_steps=steps, inference_mode=True, limit_test_batches=float(evaluate_first)).fit(
            module, datamodule=digits(3)
        )
        return module

    evaluated, plain = trained(True), trained(False)
    assert torch.equal(parameters_of(evaluated), parameters_of(plain))


def test_the_statistics_of_a_teacher_with_batch_norm_and_dropout_survive_an_epoch(make_trainer: MakeTrainer) -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    module = distiller(teacher=FrozenTeacher(network, minimum_accuracy=0.0))
    before = copy.deepcopy(network.state_dict())
    trainer = make_trainer(num_sanity_val_steps=1, limit_test_batches=1.0)
    trainer.fit(module, datamodule=digits(4))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(part.training for part in network.modules())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in network.parameters()}
    assert sum(p.numel() for p in module.parameters()) == sum(
        p.numel() for part in (module.student, module.regularizer) for p in part.parameters()
    )
