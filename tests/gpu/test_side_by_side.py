"""The trainings of benchmarks.gpu as CUDA graphs on streams: what they are eagerly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.gpu.plan import Run, Settings
from benchmarks.gpu.results import Clock
from benchmarks.gpu.training import Place, Training, train
from lqkd.models import CifarResNet
from tests.gpu.conftest import DEVICE
from tests.unit.data.images import write_classes

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 20), ("test", 1)):
        write_classes(root / "cifar10" / split, {f"c{i}": count for i in range(10)}, size=(32, 32))
    (root / "weights").mkdir()
    for depth in (20, 56):
        save_file(CifarResNet(depth).state_dict(), root / "weights" / f"cifar10_resnet{depth}.safetensors")
    out: Path = tmp_path_factory.mktemp("out")
    return Place(root, out, Settings(scale=0.01), torch.device(DEVICE))  # two epochs of four steps


def trained(place: Place, runs: list[Run], graph: bool) -> list[Training]:
    trainings = [place.training(run, graph=graph) for run in runs]
    train(trainings, place, Clock(60))
    return trainings


@pytest.mark.parametrize("bits", ["w4a4", "w1a1"])
def test_a_step_replayed_as_a_graph_is_the_eager_step(place: Place, bits: str) -> None:
    run = Run("cifar10", bits, "hints", 0)
    (eager,), (graphed,) = trained(place, [run], False), trained(place, [run], True)
    assert graphed.note == ""
    assert graphed._graph is not None
    assert graphed.steps == eager.steps == graphed.total_steps
    assert float(graphed.loss) == pytest.approx(float(eager.loss), rel=0.05)  # bfloat16


def test_trainings_on_several_streams_do_not_disturb_each_other(place: Place) -> None:
    runs = [Run("cifar10", "w2a2", method, 0) for method in ("hints", "kl", "task")]
    alone = [trained(place, [run], True)[0] for run in runs]
    for one, other in zip(alone, trained(place, runs, True), strict=True):
        assert other.note == ""
        assert float(other.loss) == pytest.approx(float(one.loss), rel=0.05)
