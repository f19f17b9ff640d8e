"""Optimizers that share one backward pass, and those that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import LBFGS, SGD, SparseAdam

from lqkd.balances import BoundedUncertaintyBalance
from lqkd.errors import UsageError
from lqkd.regularizers import LearnableTable
from tests.conftest import digits, distiller, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]


class SharpnessAware(SGD):
    """Climbs, asks for the gradient there, comes back and descends (Foret et al., arXiv 2010.01412)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        climbs = [0.05 * p.grad for p in parameters]
        torch._foreach_add_(parameters, climbs)
        self.zero_grad()
        torch.enable_grad()(closure)()
        torch._foreach_sub_(parameters, climbs)
        super().step()


class Twice(SGD):
    """Asks twice, as optimizers do that search along a line."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        super().step(closure)


class NeedsClosure(SGD):
    """Its closure has no default, and it calls it where optimizers of PyTorch do."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


class TakesNone(SGD):
    def step(self) -> Any:  # type: ignore[override]
        return super().step()


class Rebuilds(SGD):
    """Builds its groups anew, of parameters and the settings that it knows."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.param_groups = [{k: v for k, v in group.items() if k != "name"} for group in self.param_groups]


def flat(groups: Any) -> list[Any]:
    return [p for group in groups for p in group["params"]]


@pytest.mark.parametrize("setting", ["student_optimizer", "regularizer_optimizer"])
@pytest.mark.parametrize("make", [SharpnessAware, Twice])
def test_an_optimizer_that_asks_for_gradients_again_is_refused_at_its_first_step(
    make_trainer: MakeTrainer, setting: str, make: type[SGD]
) -> None:
    trainer = make_trainer()
    message = rf"{setting}={make.__name__} is not possible, since its step asks for gradients a second time.*AdamW"
    with pytest.raises(UsageError, match=message):
        trainer.fit(distiller(**{setting: lambda p: make(p, lr=0.01)}), datamodule=digits(2))
    assert trainer.fit_loop.epoch_loop.total_batch_idx == 0


@pytest.mark.parametrize("setting", ["student_optimizer", "regularizer_optimizer"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: LBFGS(flat(p)), "LBFGS is not possible, since it computes the loss again"),
        (lambda p: TakesNone(p, lr=0.01), r"TakesNone is not possible: its step\(\) takes no closure"),
        (lambda p: SparseAdam(flat(p)), "SparseAdam is not possible: gradients here are dense"),
        (lambda p: SGD(flat(p), lr=0.01), None),
        (lambda p: SGD(p, lr=0.01, momentum=0.9, fused=True), "SGD with momentum"),
    ],
    ids=["LBFGS", "no closure", "dense gradients", "one group", "fused"],
)
def test_an_optimizer_that_cannot_be_used_is_refused_before_the_first_batch(
    make_trainer: MakeTrainer, setting: str, make: Callable[[Any], Any], message: str | None
) -> None:
    trainer = make_trainer()
    balance = BoundedUncertaintyBalance()  # a second group for the regularizer's optimizer
    with pytest.raises(
        UsageError, match=f"{setting}.*" + (message or "SGD is not possible: it puts the parameters of")
    ):
        trainer.fit(distiller(balance=balance, **{setting: make}), datamodule=digits(2))
    assert trainer.global_step == 0


def test_an_optimizer_whose_closure_has_no_default_steps_both_players(make_trainer: MakeTrainer) -> None:
    def make(parameters: Any) -> SGD:
        return NeedsClosure(parameters, lr=0.01)

    found = []
    for optimizer in (make, lambda p: SGD(p, lr=0.01)):
        module = distiller(student_optimizer=optimizer, regularizer_optimizer=optimizer)
        make_trainer().fit(module, datamodule=digits(2))
        found.append(parameters_of(module))
    assert torch.equal(*found)


def test_groups_that_an_optimizer_builds_anew_keep_their_names_and_rates(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: [{g["name"]: g["lr"] for g in o.param_groups} for o in t.optimizers])
    module = distiller(
        student_optimizer=lambda p: Rebuilds(p, lr=0.1),
        regularizer=LearnableTable(),
        balance=BoundedUncertaintyBalance(),
        regularizer_optimizer=lambda p: Rebuilds(p, lr=0.1),
        student_schedule=None,
    )
    make_trainer(callbacks=[recorder]).fit(module, datamodule=digits(2))
    assert set(recorder.seen[0][0]) == {"student", "student_quantizers"}
    assert recorder.seen[0][1] == pytest.approx({"regularizer": 3.0, "balance": 1.0})
