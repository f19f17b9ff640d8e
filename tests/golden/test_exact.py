"""A change of structure leaves every loss and every tensor of short runs as they were, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lqkd import balances, losses, regularizers
from lqkd.losses.ensembles import COMBINATIONS
from tests.forked import Forks
from tests.golden.exact import KEPT, LOSSES, RUNS, machine, trained

RECORDED = json.loads(KEPT.read_text(encoding="utf-8"))
TOLERANCE = 1e-3
"""Relative, of losses on a machine that has no record: it may sum in another order, and a few codes round otherwise."""


QUICK = ("mlp", "attention", "learned_mixture")
"""Runs that every change meets at once: a regularizer on logits, features, and several teachers."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in RUNS])
def test_losses_and_final_tensors_are_the_recorded_ones(name: str, tmp_path: Path, lqkd: Forks) -> None:
    found = trained(name, tmp_path, lqkd)
    if machine() in RECORDED:
        assert found == RECORDED[machine()][name]
        return
    recorded = next(iter(RECORDED.values()))[name]["losses"]
    for key in LOSSES:
        expected = [float(value) for value in recorded[key]]
        assert [float(value) for value in found["losses"][key]] == pytest.approx(expected, rel=TOLERANCE), key


def test_every_regularizer_balance_and_loss_on_features_is_in_a_recorded_run() -> None:
    text = KEPT.with_suffix(".yaml").read_text(encoding="utf-8")
    kinds = (regularizers.Regularizer, balances.Balance, losses.DistillationLoss)
    for package in (regularizers, balances, losses):
        for name in package.__all__:
            offered = getattr(package, name)
            if isinstance(offered, type) and issubclass(offered, kinds) and offered not in kinds:
                # the balance of a study; a loss for several labels; what needs rows that no run here holds out; what
                # is younger than the records
                others = ("FixedBalance", "BinaryKL", "HeldOutInterpolation", "ExplainedVariance", "MetaWeightNet")
                others += ("CurriculumTemperature", "ForwardKL", "ReverseKL", "JensenShannon", "CAKLD", "PKD")
                others += ("AttentionRelations", "CosineDistance", "StitchedKL")
                others += ("CrossKD", "ForegroundWeighted")  # which ask the head of a detector
                assert f"{package.__name__}.{name}" in text or name in others, name
    for name, combination in COMBINATIONS.items():
        assert combination.trusted or f"ensemble: {name}" in text  # those need rows that no run here holds out
    for recorded in RECORDED.values():
        assert set(recorded) == set(RUNS)
