"""Detection from the first step to the file: a small detector of digits on photographs."""

from __future__ import annotations

import base64
import csv
import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from lqkd import load_student
from lqkd.errors import UsageError
from lqkd.export import to_onnx
from lqkd.export.predict import load_predictor
from lqkd.models import SmallFCOS
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model
from lqkd.quantization.quantizers import LevelwiseStep
from lqkd.tasks import Detection
from tests.forked import Forks, send

CONFIG = Path(__file__).parents[2] / "configs" / "detection" / "quickstart.yaml"
SMALL = [
    *("--data.init_args.scenes", "60", "--data.init_args.image_size", "[64, 64]", "--trainer.max_epochs", "2"),
    *(
        "--trainer.limit_test_batches",
        "1",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.log_every_n_steps",
        "1",
    ),
    *("--model.init_args.teachers.own.init_args.minimum_accuracy", "0.0"),
    *("--model.init_args.teachers.own.init_args.precision", "fp32"),
]

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(lqkd: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps."""
    folder = tmp_path_factory.mktemp("detection")
    assert lqkd.run("fit", "--config", str(CONFIG), "--run.root", str(folder), *SMALL) == 0, lqkd.log.read_text()
    return folder / "detection" / "version_0"


def test_a_run_says_its_metric_and_leaves_a_student_with_a_step_for_each_level(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["metric"], summary["mode"], summary["weight_bits"]) == ("val/map", "max", "2 (8 in 4 layers)")
    assert all(0 <= summary[name] <= 1 for name in ("teacher", "student_float", "student_start", "val", "test"))
    student = load_student(run)
    assert isinstance(student.get_submodule("head.boxes").input_quantizer, LevelwiseStep)
    maps = student(torch.zeros(1, 3, 64, 64))
    assert {name: tuple(maps[name].shape) for name in ("classes_8", "boxes_16")} == {
        "classes_8": (1, 10, 8, 8),
        "boxes_16": (1, 4, 4, 4),
    }


def test_a_run_becomes_one_integer_file_whose_map_is_that_of_the_network(run: Path, lqkd: Forks) -> None:
    assert lqkd.run("export", str(run)) == 0, lqkd.log.read_text()
    report = json.loads((run / "student.onnx.report.json").read_text(encoding="utf-8"))
    model = onnx.load(run / "student.onnx")
    parity = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "lqkd.parity"))
    assert parity["passed"]
    assert len(parity["outputs"]) == 9
    assert (parity["metric"], report["measured"]["value"]) == ("map", parity["exported"])
    assert parity["exported"] == pytest.approx(parity["pytorch"], abs=1e-3)
    assert len(model.graph.output) == 9
    assert "NonMaxSuppression" not in {node.op_type for node in model.graph.node}


def test_a_run_tells_the_objects_of_its_test_images(run: Path, lqkd: Forks) -> None:
    assert lqkd.run("predict", "--config", str(run / "config.yaml")) == 0, lqkd.log.read_text()
    with open(run / "predictions.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert rows
    assert all(int(row["objects"]) == len([one for one in row["found"].split("; ") if one]) for row in rows)
    assert [Image.open(run / row["picture"]).size for row in rows[:2]] == [(640, 640)] * 2


def test_a_run_leaves_a_picture_of_what_is_there_and_of_what_the_networks_find(run: Path, lqkd: Forks) -> None:
    assert np.asarray(Image.open(run / "boxes.png")).std() > 10
    assert lqkd.run("report", str(run)) == 0, lqkd.log.read_text()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "What the networks find" in page
    assert base64.b64encode((run / "boxes.png").read_bytes()).decode() in page


def test_a_photograph_of_another_shape_is_seen_whole_and_gets_its_boxes(run: Path, lqkd: Forks, tmp_path: Path) -> None:
    photograph = np.zeros((480, 960, 3), np.uint8)
    photograph[:, 800:] = 255  # what is cut off where the middle alone is seen
    Image.fromarray(photograph).save(tmp_path / "wide.png")
    assert lqkd.run("predict", str(run), str(tmp_path / "wide.png"), "--output", str(tmp_path / "out")) == 0
    assert f"{tmp_path}/out/wide.npy, {tmp_path}/out/wide.png" in lqkd.log.read_text()
    assert Image.open(tmp_path / "out" / "wide.png").size == (960, 480)
    seen = load_predictor(run).preprocessing.read(tmp_path / "wide.png")
    assert seen.shape == (3, 64, 64)
    assert seen[0, 32, 60] > seen[0, 32, 40]


def test_a_head_with_group_norm_is_refused_at_export_with_what_helps() -> None:
    network = SmallFCOS(3, width=4, depth=1)
    network.head.class_tower.norms[0][1] = nn.GroupNorm(2, 8)
    task, images = Detection(3), torch.randn(4, 3, 32, 32)
    student, _ = quantize_model(network, task.recipe(Recipe("w4a4"), network))
    initialize_quantizers(student, images)
    with pytest.raises(
        UsageError, match=r"operator GroupNorm in head.class_tower.norms.0.1 cannot be exported: .* batch norm"
    ):
        to_onnx(student, images, calibration=[images])


@pytest.fixture(scope="module")
def student() -> nn.Module:
    """A small one with a step for each level but in one layer, fitted to images."""
    network, rule = SmallFCOS(3, width=4, depth=1), Rule("head.boxes", activation_quantizer="minmax")
    student, _ = quantize_model(network, Detection(3).recipe(Recipe("w4a4", rules=[rule]), network))
    initialize_quantizers(student, IMAGES)
    return student


def test_a_file_is_made_with_images_alone_to_test_it(student: nn.Module) -> None:
    model = to_onnx(student, IMAGES, calibration=[IMAGES], test=[IMAGES], task=Detection(3))
    parity = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "lqkd.parity"))
    assert (parity["passed"], parity["samples"], parity["exported"]) == (True, 4, None)


def test_a_file_has_the_weight_of_a_layer_that_is_called_for_each_level_once(student: nn.Module) -> None:
    model = to_onnx(student, IMAGES, calibration=[IMAGES])
    weights = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith("weight_codes")}
    called = [node.input[0] for node in model.graph.node if node.input and node.input[0] in weights]
    of_head = Counter(name for name in called if "tower" in name)
    assert set(of_head.values()) == {3}
    assert len(of_head) == 2  # a convolution of each tower


def test_a_file_with_the_steps_of_another_level_is_refused(student: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LevelwiseStep.at
    monkeypatch.setattr(LevelwiseStep, "at", lambda self, call: right(self, 0))
    with pytest.raises(UsageError, match="with a layer of its own for each call of a pass it computes something else"):
        to_onnx(student, IMAGES, calibration=[IMAGES])


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_numbers_of_one_that_was_not(
    run: Path, lqkd: Forks, tmp_path: Path
) -> None:
    command = ["fit", "--config", str(CONFIG), "--run.root", str(tmp_path), *SMALL]
    folder = tmp_path / "detection" / "version_0"
    last = folder / "checkpoints" / "last.ckpt"
    status = lqkd.run(*command, meanwhile=lambda pid: send(pid, signal.SIGKILL, last.exists))
    assert status == -signal.SIGKILL, lqkd.log.read_text()
    assert lqkd.run("resume", str(folder)) == 0, lqkd.log.read_text()
    whole, resumed = (load_student(of).state_dict() for of in (run, folder))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
