"""Trainings whose networks are compiled: the numbers of eager ones, and what cannot be compiled is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lqkd.losses import Hints
from lqkd.modules import DistillModule, Tap, compilation
from lqkd.modules.terms import Term
from lqkd.losses import HintonKL
from lqkd.teachers import FrozenTeacher
from tests.conftest import Recorder, digits, distiller, network, parameters_of

MakeTrainer = Callable[..., Trainer]


def terms() -> dict[str, Any]:
    """KL and hints with taps."""
    taps = [Tap("layer1", "layer1"), Tap("layer2", "layer2")]
    return {
        "teacher": None,
        "regularizer": None,
        "teachers": {"large": FrozenTeacher(network(14), minimum_accuracy=0.0, precision="fp32")},
        "distillation": {"logits": Term(HintonKL(), "large"), "features": Term(Hints(), "large", taps=taps)},
    }


def train(make: MakeTrainer, batches: int = 4, **arguments: Any) -> tuple[DistillModule, list[float]]:
    module = distiller(**arguments)
    recorder = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
    make(callbacks=[recorder]).fit(module, datamodule=digits(batches))
    return module, recorder.seen


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, and run without generating code, which takes most of the time."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


def test_a(traced: None, make_trainer: MakeTrainer) -> None:
    torch.manual_seed(1)
    eager, expected = train(make_trainer, **terms())
    torch.manual_seed(1)
    compiled, losses = train(make_trainer, **terms(), compile=True)
    print(expected, losses, (parameters_of(eager.student) - parameters_of(compiled.student)).abs().max())
    calls = compiled.compilation
    print(calls.seconds)
