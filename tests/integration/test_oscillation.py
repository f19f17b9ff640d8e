"""Weights that cross rounding boundaries, counted in real trainings."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lqkd.callbacks import OscillationMonitor
from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe
from tests.conftest import Recorder, digits, distiller, parameters_of

MakeTrainer = Callable[..., Trainer]


def fit(make: MakeTrainer, *callbacks: object, lr: float = 0.1, accumulate: int = 1) -> DistillModule:
    module = distiller(
        quantization=Recipe(bits="w2a2"),
        student_optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        accumulate_grad_batches=accumulate,
    )
    make(callbacks=list(callbacks)).fit(module, datamodule=digits(8))
    return module


def logged(folder: Path) -> dict[int, tuple[float, float]]:
    with open(folder / "metrics.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("oscillation/crossings")]
    return {int(r["step"]): (float(r["oscillation/crossings"]), float(r["oscillation/reversals"])) for r in rows}


def test_counts_are_those_of_the_codes_from_step_to_step(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def codes(trainer: Trainer, module: DistillModule) -> torch.Tensor:
        layers = [m for m in module.student.modules() if getattr(m, "weight_quantizer", None) is not None]
        low = [m for m in layers if m.weight_quantizer.bits <= 4]
        return torch.cat([m.weight_quantizer.codes(m.weight).flatten() for m in low])

    recorder = Recorder(codes)
    fit(make_trainer, OscillationMonitor(every_n_steps=4), recorder)
    seen = logged(tmp_path)
    assert list(seen) == [3, 7]
    expected = sum(int((a != b).sum()) for a, b in zip(recorder.seen[3:], recorder.seen[4:], strict=False))
    assert seen[7][0] == expected > 0
    assert seen[7][1] <= seen[7][0]


def test_without_a_step_nothing_crosses(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(make_trainer, OscillationMonitor(every_n_steps=4), lr=0.0)
    assert logged(tmp_path) == {3: (0.0, 0.0), 7: (0.0, 0.0)}


def test_steps_are_those_of_the_student_under_accumulation(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(make_trainer, OscillationMonitor(every_n_steps=2), accumulate=2)
    assert list(logged(tmp_path)) == [1, 3]


def test_watching_changes_no_training(make_trainer: MakeTrainer) -> None:
    assert torch.equal(parameters_of(fit(make_trainer, OscillationMonitor(1))), parameters_of(fit(make_trainer)))


def test_no_step_is_refused() -> None:
    with pytest.raises(UsageError, match="every_n_steps=0 is not possible"):
        OscillationMonitor(every_n_steps=0)
