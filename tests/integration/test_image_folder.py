"""Someone's own 30 photographs of two classes: a teacher, then a low-bit student, through the command line."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from lqkd.cli import main


def network(depth: int) -> dict[str, Any]:
    return {"class_path": "lqkd.models.CifarResNet", "init_args": {"depth": depth, "num_classes": 2, "width": 4}}


def write_config(folder: Path, name: str, model: dict[str, Any], epochs: int) -> list[str]:
    config = {
        "run": {"name": name, "root": str(folder / "runs")},
        "trainer": {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": model,
        "data": {
            "class_path": "lqkd.data.ImageFolder",
            "init_args": {"root": str(folder / "photographs"), "image_size": 24, "batch_size": 8},
        },
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / f"{name}.yaml")]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Bright noise and dark noise, in sizes of their own."""
    rng = np.random.default_rng(0)
    for name, brightness in (("jour", 190), ("nuit étoilée", 60)):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        for number in range(15):
            size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
            pixels = (brightness + rng.integers(-50, 50, size)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path


def newest(folder: Path, name: str) -> Path:
    (run,) = (folder / "runs" / name).iterdir()
    return run


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_thirty_photographs_make_a_teacher_and_a_student_of_four_bits(photographs: Path) -> None:
    classifier = {
        "class_path": "lqkd.modules.ClassifierModule",
        "init_args": {
            "network": network(8),
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        },
    }
    assert main(["fit", *write_config(photographs, "teacher", classifier, epochs=10)]) == 0
    weights = newest(photographs, "teacher") / "network.safetensors"
    distiller = {
        "class_path": "lqkd.modules.DistillModule",
        "init_args": {
            "teacher": {
                "class_path": "lqkd.teachers.FrozenTeacher",
                "init_args": {"network": network(8), "weights": str(weights), "class_names": ["jour", "nuit étoilée"]},
            },
            "student": network(8),
            "student_weights": str(weights),
            "quantization": {"bits": "w4a4"},
            "student_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}},
        },
    }
    assert main(["fit", *write_config(photographs, "student", distiller, epochs=2)]) == 0
    summary = json.loads((newest(photographs, "student") / "summary.json").read_text())
    with safe_open(newest(photographs, "student") / "student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["jour", "nuit étoilée"]
    assert summary["teacher"] == 1.0
    assert summary["test"] >= 5 / 6
    assert main(["predict", "--config", str(newest(photographs, "student") / "config.yaml")]) == 0
    split = table(newest(photographs, "student") / "split.csv")
    assert Counter(row["split"] for row in split) == {"train": 19, "val": 5, "test": 6}
    assert len({row["file"] for row in split}) == 30
    assert all(row["file"].startswith(f"{row['class']}/") for row in split)
    predictions = table(newest(photographs, "student") / "predictions.csv")
    assert [(row["file"], row["label"]) for row in predictions] == [
        (row["file"], row["class"]) for row in split if row["split"] == "test"
    ]
    right = sum(row["label"] == row["class"] for row in predictions)
    assert right / 6 == pytest.approx(summary["test"])


def test_a_damaged_photograph_is_told_in_one_line_before_the_training(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = photographs / "photographs" / "jour" / "3.jpg"
    os.truncate(damaged, 200)
    classifier = {
        "class_path": "lqkd.modules.ClassifierModule",
        "init_args": {"network": network(8), "optimizer": {"class_path": "torch.optim.Adam"}},
    }
    assert main(["fit", *write_config(photographs, "teacher", classifier, epochs=1)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lqkd: error")]
    assert errors == [line for line in errors if f"{damaged} cannot be read as an image" in line]
    assert len(errors) == 1
    assert not list((photographs / "runs").glob("*/*"))
