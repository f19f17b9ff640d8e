"""The pack for a GPU, on the CPU: its trainings are lqkd's own, cuts cost nothing, failures stop nothing else."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

import benchmarks.gpu.__main__ as door
from benchmarks.gpu import accuracy, plan, ways
from benchmarks.gpu.data import image_root
from benchmarks.gpu.plan import Run, Settings
from benchmarks.gpu.recipes import module_of
from benchmarks.gpu.results import Clock, Table
from benchmarks.gpu.training import Place, Training, train
from lqkd.models import CifarResNet
from lqkd.quantization import quantizers
from tests.conftest import parameters_of
from tests.recorder import Recorder
from tests.unit.data.images import write_classes

MakeTrainer = Callable[..., Trainer]
ROOT = Path(__file__).parents[2]
HINTS, KL, TASK = (Run("cifar10", "w2a2", method, 0) for method in ("hints", "kl", "task"))
FLOAT = Run("cifar10", "float", "task", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and weights as they are brought along, few of them."""
    root = tmp_path_factory.mktemp("data")
    for name, classes, images in (("cifar10", 10, 10), ("cifar100", 100, 2)):
        for split, count in (("train", images), ("test", 1)):
            write_classes(root / name / split, {f"c{i:03d}": count for i in range(classes)}, size=(32, 32))
    (root / "weights").mkdir()
    for depth in (20, 56):
        torch.manual_seed(depth)
        save_file(CifarResNet(depth).state_dict(), root / "weights" / f"cifar10_resnet{depth}.safetensors")
    return root


@pytest.fixture
def place(data: Path, tmp_path: Path) -> Place:
    return Place(data, tmp_path / "out", Settings(scale=0.01), torch.device("cpu"))  # two epochs of four steps


def steps(place: Place, run: Run, count: int) -> tuple[Training, list[float]]:
    """A training of ``count`` steps and the loss of each."""
    feed = place.feed(run)
    training = Training(run, place.data, place.out, count, feed.batches(0, 0, 1))
    losses = []
    for batch in feed.parts(feed.batches(0, 0, count)):
        training.step(batch, training.ask(batch.images))
        losses.append(float(training.loss))
    return training, losses


@pytest.mark.parametrize("run", [HINTS, KL, TASK, FLOAT], ids=lambda run: f"{run.bits} {run.method}")
def test_a_step_side_by_side_is_the_step_of_lqkds_own_trainer(
    place: Place, make_trainer: MakeTrainer, run: Run
) -> None:
    ours, losses = steps(place, run, 3)
    module = module_of(run, place.data, place.out, precision="fp32")
    for teacher in module.teachers():
        teacher.minimum_accuracy = 0.0
    recorder = Recorder(lambda trainer, _: float(trainer.callback_metrics["train/loss"]))
    trainer = make_trainer(max_epochs=-1, max_steps=3, callbacks=[recorder], limit_val_batches=1)
    trainer.fit(module, datamodule=place.feed(run).data)
    assert losses == pytest.approx(recorder.seen, rel=1e-5)
    torch.testing.assert_close(parameters_of(ours.student), parameters_of(module.student), rtol=1e-4, atol=1e-6)


class Left(Clock):
    """A clock whose time is over after so many questions."""

    def __init__(self, questions: int) -> None:
        self.questions = questions

    def left(self) -> float:
        self.questions -= 1
        return float(self.questions)


@pytest.mark.parametrize("run", [HINTS, Run("cifar10", "w1a1", "task", 0)], ids=lambda run: run.bits)
def test_a_training_that_is_cut_ends_with_the_same_bits(place: Place, run: Run) -> None:
    whole = place.training(run)
    train([whole], place, Clock(600))
    cut = place.training(run)
    train([cut], place, Left(4))
    assert 0 < cut.steps < whole.total_steps
    cut.save(place.state(run))
    resumed = place.training(run)
    train([resumed], place, Clock(600))
    assert resumed.steps == whole.steps == whole.total_steps
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name
    followed = {q.progress for q in quantizers(resumed.student).values() if q.progress is not None}
    assert followed == ({0.5} if run.bits == "w1a1" else set())  # when the second of two epochs began


def test_trainings_beside_each_other_learn_what_each_learns_alone(data: Path, tmp_path: Path) -> None:
    place = Place(data, tmp_path, Settings(scale=0.001), torch.device("cpu"))
    alone = [place.training(run) for run in (KL, TASK)]
    for training in alone:
        train([training], place, Clock(600))
    together = [place.training(run) for run in (KL, TASK)]
    train(together, place, Clock(600))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(parameters_of(one.student), parameters_of(other.student))


def test_a_run_that_cannot_begin_is_recorded_and_the_others_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    brought = tmp_path / "brought"
    (brought / "weights").mkdir(parents=True)
    (brought / "cifar10").symlink_to(data / "cifar10")
    (brought / "weights" / "cifar10_resnet20.safetensors").symlink_to(data / "weights" / "cifar10_resnet20.safetensors")
    monkeypatch.setattr(accuracy, "runs", lambda *_: [KL, TASK])
    accuracy.side_by_side(Place(brought, place.out, Settings(0.001), place.device), Clock(600))
    with open(place.out / "accuracy.csv", newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    assert "cifar10_resnet56.safetensors" in rows[KL.name]["note"]
    assert 0 <= float(rows[TASK.name]["test_accuracy"]) <= 100
    assert accuracy.pending(place.out, place.settings) == []
    accuracy.forget_failures(place.out)
    assert accuracy.pending(place.out, place.settings) == [KL]  # a later visit tries it again


def test_runs_wait_for_the_float_network_that_they_start_from(place: Place) -> None:
    of_cifar100 = [run for run in plan.runs(seeds=(0,)) if run.data == "cifar100"]
    assert [run for run in accuracy.pending(place.out, place.settings) if run.data == "cifar100"] == of_cifar100[:1]
    weights = place.out / "weights" / f"{of_cifar100[0].name}.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert [run for run in accuracy.pending(place.out, place.settings) if run.data == "cifar100"] == of_cifar100


def test_every_comparison_is_planned_with_two_seeds() -> None:
    named = {(run.data, run.bits, run.method, run.seed) for run in plan.runs()}
    bits = ("w4a4", "w3a3", "w2a2", "w1a1")
    wanted = {("cifar10", b, method, seed) for b in bits for method in ("hints", "kl", "task") for seed in (0, 1)}
    wanted |= {("cifar10", "float", "task", seed) for seed in (0, 1)}
    wanted |= {("cifar100", "w2a2", method, seed) for method in ("hints", "kl", "task") for seed in (0, 1)}
    assert named == wanted | {("cifar100", "float", "task", 0)}
    assert len(plan.runs()) == len(named)


def test_a_rehearsal_plans_one_seed() -> None:
    planned = plan.runs(Settings(scale=0.01).seeds)
    assert planned == [run for run in plan.runs() if run.seed == 0]


def test_the_fastest_way_that_ends_in_time_is_taken(tmp_path: Path) -> None:
    table = Table(tmp_path / "ways.csv", "way", "runs")
    for name, count, rate in (
        ("streams", 1, 100.0),
        ("streams", 4, 200.0),
        ("streams", 8, 240.0),
        ("processes", 4, 250.0),
    ):
        table.add({"way": name, "runs": count, "steps_per_second": rate})
    table.add({"way": "streams", "runs": 12, "steps_per_second": "", "note": "failed: no memory"})
    assert not table.has("streams", 12)  # a later visit tries it again
    assert ways.best_way(tmp_path, None, 10.0) == ways.Way("processes", 4, 250.0)
    assert ways.best_way(tmp_path, 1000, 100.0, processes=False).runs == 8
    assert ways.best_way(tmp_path, 1000, 25.0, processes=False).runs == 4
    assert ways.best_way(tmp_path, 1000, 15.0, processes=False).runs == 1
    assert ways.best_way(tmp_path, 1000, 5.0, processes=False).runs == 8  # a later visit goes on
    assert ways.best_way(tmp_path / "unmeasured", 1000, 5.0).runs == 4


@pytest.mark.slow
def test_runs_train_in_processes_of_their_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    place.settings.keep(place.out)
    keeper = accuracy.Keeper(place, Clock(60.0))
    for run in plan.runs():
        if run not in (KL, TASK):
            keeper.fail(run, "left out")
    accuracy.processes(place, ways.Way("processes", 2, 1.0), Clock(600.0))
    with open(place.out / "accuracy.csv", newline="") as stream:
        measured = {row["run"]: row["steps"] for row in csv.DictReader(stream) if row["test_accuracy"]}
    assert measured == {KL.name: "8", TASK.name: "8"}


def test_an_archive_in_pieces_is_joined(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "whole", "w:gz") as archive:
        for split in ("train", "test"):
            archive.add(data / "cifar10" / split, split)
    content = (tmp_path / "whole").read_bytes()
    brought = tmp_path / "brought"
    brought.mkdir()
    for number, start in enumerate(range(0, len(content), 50_000)):
        (brought / f"cifar10.tar.gz.{number:02d}").write_bytes(content[start : start + 50_000])
    assert len(list(brought.iterdir())) > 1
    root = image_root("cifar10", brought)
    assert len(list(root.rglob("*.png"))) == 110
    assert image_root("cifar10", brought) == root


def test_a_stage_that_takes_too_long_is_ended_and_the_next_one_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Settings(0.001).keep(tmp_path)
    monkeypatch.setattr(door, "GRACE", 0.1)
    monkeypatch.setattr(door, "PREPARE", door.Stage("nothing_of_this_name", 1.0, 60.0))
    monkeypatch.setattr(
        door, "STAGES", (door.Stage("steps", 1.0, 0.1), door.Stage("nothing_of_another_name", 1.0, 60.0))
    )
    assert not door.Visit(tmp_path, data, 60.0).run()
    records = {name: record["status"] for name, record in json.loads((tmp_path / "stages.json").read_text()).items()}
    assert records == {
        "nothing_of_this_name": "failed with status 1",
        "steps": "took too long",
        "nothing_of_another_name": "failed with status 1",
    }
    assert "nothing_of_another_name" in (tmp_path / "nothing_of_another_name.log").read_text()


def test_a_folder_of_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Settings().keep(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path), "--scale", "0.001"])
    with pytest.raises(SystemExit):
        door.main()
    assert f"--scale 0.001 is not possible with --out {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_pack_is_rehearsed_at_a_thousandth_of_its_budget(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--scale", "0.001", "--minutes", "10"]
    command += ["--out", str(tmp_path), "--data", str(data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LQKD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in ("sanity", "steps", "ways", "accuracy"):
        with open(tmp_path / f"{name}.csv", newline="") as stream:
            tables[name] = list(csv.DictReader(stream))
    assert {row["outcome"] for row in tables["sanity"]} <= {"passed", "skipped"}
    assert not [row["note"] for row in (*tables["steps"], *tables["ways"]) if row["note"].startswith("failed")]
    assert {row["run"] for row in tables["accuracy"]} == {run.name for run in plan.runs(seeds=(0,))}
    assert all(row["test_accuracy"] for row in tables["accuracy"])
    assert not list((tmp_path / "states").glob("*"))
