"""Every configuration that ships parses and runs a step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from _pytest.mark import ParameterSet
from PIL import Image
from safetensors.torch import save_file

from benchmarks.fcn import CifarFCN
from lqkd.cli import main
from lqkd.data.shards import make_shards
from lqkd.models import CifarResNet, SmallFCOS, TorchvisionDetector, build_model
from tests.hugging_face import language_model
from tests.photographs import write_photographs

CONFIGS = Path(__file__).parents[2] / "configs"
ADDED = sorted(CONFIGS.glob("trainer/*.yaml"))
"""Configurations to be added to another one."""
WHOLE = sorted(set(CONFIGS.rglob("*.yaml")) - set(ADDED) - set(CONFIGS.glob("studies/*.yaml")))
LIKE_ANOTHER = [
    *(CONFIGS / "cifar10" / "full" / f"resnet20_{bits}.yaml" for bits in ("w3a3", "w4a4")),
    CONFIGS / "cifar100" / "full" / "resnet20_w4a4.yaml",
]
"""Whole trainings that are ``resnet20_w2a2.yaml`` beside them but for bits and a number."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the name of each data module: of each class one image to test and a few to train."""
    root = tmp_path_factory.mktemp("tiny")
    for name, held_out, classes, images in (
        ("CIFAR10", "test", 10, 10),
        ("CIFAR100", "test", 100, 2),
        ("ImageNet", "val", 1000, 1),
    ):
        for split, count in (("train", images), (held_out, 1)):
            for label in range(classes):
                folder = root / name / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                for index in range(count):
                    Image.new("RGB", (32, 32), (label % 256, 20 * index, 100)).save(folder / f"{index}.png")
    write_photographs(root / "SegmentationFolder", ("train", "val", "test"))
    write_cells(root / "VocDetection")
    write_categories(root / "CocoDetection")
    return root


def write_cells(root: Path) -> None:
    """Pictures with a box each, in VOC's folders."""
    for name in ("JPEGImages", "Annotations"):
        (root / name).mkdir(parents=True)
    sides = "".join(f"<{side}>{at}</{side}>" for side, at in (("xmin", 2), ("ymin", 3), ("xmax", 30), ("ymax", 28)))
    for number in range(12):
        Image.new("RGB", (64, 48), (20 * number, 60, 90)).save(root / "JPEGImages" / f"{number}.jpg")
        text = f"<annotation><object><name>RBC</name><bndbox>{sides}</bndbox></object></annotation>"
        (root / "Annotations" / f"{number}.xml").write_text(text)


def write_categories(root: Path) -> None:
    """Pictures with a box each, of the 80 categories of COCO, in its folders."""
    (root / "annotations").mkdir(parents=True)
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        for number in range(12):
            Image.new("RGB", (64, 48), (20 * number, 60, 90)).save(root / part / f"{number}.jpg")
        said = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": 64, "height": 48} for n in range(12)],
            "categories": [{"id": n, "name": f"category {n}"} for n in range(1, 81)],
            "annotations": [{"image_id": n, "category_id": 1 + n, "bbox": [2, 3, 28, 25]} for n in range(12)],
        }
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def coco_weights(random_weights: Path) -> None:
    """Of detectors, with torchvision's 91 classes where the file is torchvision's."""
    weights = random_weights / "weights"
    of_teacher = TorchvisionDetector("fcos_resnet50_fpn", 91, frozen_norm=True)
    torch.save(of_teacher.state_dict(), weights / "coco_fcos_resnet50.pth")
    torch.save(build_model("torchvision/resnet18").state_dict(), weights / "imagenet_resnet18.pth")
    torch.save(TorchvisionDetector("ssdlite320_mobilenet_v3_large", 90).state_dict(), weights / "coco_ssdlite320.pth")
    of_student = TorchvisionDetector("fcos_resnet18_fpn", 80, norm="batch_per_level")
    save_file(of_student.state_dict(), weights / "coco_fcos_resnet18.safetensors")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights under the names that the configurations expect."""
    root = tmp_path_factory.mktemp("data")
    (root / "weights").mkdir()
    for depth in (20, 56):
        for classes in (10, 100):
            weights = CifarResNet(depth, num_classes=classes).state_dict()
            save_file(weights, root / "weights" / f"cifar{classes}_resnet{depth}.safetensors")
    for name, depth, width in (("teacher", 14, 16), ("student", 8, 8)):
        weights = CifarFCN(depth, width, classes=4).state_dict()
        save_file(weights, root / "weights" / f"bccd_{name}.safetensors")
    detector = SmallFCOS(num_classes=3, width=16, depth=1).state_dict()
    save_file(detector, root / "weights" / "bccd_detector.safetensors")
    return root


@pytest.fixture(scope="module")
def imagenet_weights(random_weights: Path) -> None:
    """Likewise, of networks for ImageNet."""
    for depth in (18, 50):
        weights = random_weights / "weights" / f"imagenet_resnet{depth}.safetensors"
        save_file(build_model(f"torchvision/resnet{depth}").state_dict(), weights)


SLOW = ("imagenet", "detection")
"""Folders of configurations whose networks or evaluations are large."""


def whole_configs() -> list[ParameterSet]:
    return [
        pytest.param(
            path, id=str(path.relative_to(CONFIGS)), marks=pytest.mark.slow if path.parent.name in SLOW else ()
        )
        for path in WHOLE
        if path not in LIKE_ANOTHER
    ]


def test_what_is_not_run_differs_from_what_is_in_bits_a_number_and_its_name() -> None:
    def settings(path: Path) -> str:
        bits = path.stem.partition("_")[2]
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        return "\n".join(line for line in lines if "weight_decay" not in line).replace(bits, "BITS")

    for path in LIKE_ANOTHER:
        assert settings(path) == settings(path.with_name("resnet20_w2a2.yaml"))


@pytest.mark.parametrize("config", whole_configs())
def test_a_shipped_config_runs_one_step(
    config: Path,
    tiny: Path,
    random_weights: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LQKD_DATA", str(random_weights))
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path))
    arguments = ["fit", "--config", str(config), "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path)]
    name = yaml.safe_load(config.read_text())["data"]["class_path"].rpartition(".")[2]
    if name not in ("DigitCrops", "Digits", "DigitScenes", "PythonTopics"):
        folder = tiny / name.removeprefix("Streamed").removeprefix("Rotated")
        if name == "StreamedImageNet":
            make_shards(folder, tmp_path / "shards", 10**6)
            folder = tmp_path / "shards"
        arguments += ["--data.init_args.root", str(folder), "--data.init_args.batch_size", "10"]
    if name == "TextFiles":
        given = str(language_model(tmp_path / "model"))
        for place in ("teacher.init_args.network", "student"):
            arguments += [f"--model.init_args.{place}.init_args.pretrained", given]
        (tmp_path / "text.txt").write_text("the quick brown fox jumps\n" * 2000)
        arguments += ["--data.init_args.tokenizer", given, "--data.init_args.root", str(tmp_path / "text.txt")]
    if name == "CocoDetection":
        request.getfixturevalue("coco_weights")
        size = "[64, 96]" if "fcos" in config.name else "[64, 64]"
        arguments += ["--data.init_args.image_size", size, "--data.init_args.num_workers", "0"]
        arguments += ["--data.init_args.batch_size", "2"]
    if "ImageNet" in name:
        request.getfixturevalue("imagenet_weights")
        arguments += ["--data.init_args.image_size", "32", "--data.init_args.num_workers", "0"]
    assert main(arguments) == 0


@pytest.mark.parametrize("config", ADDED, ids=lambda path: path.stem)
def test_a_config_for_many_devices_can_be_added_to_another(config: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(config)]
    one = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert main([*arguments, *one, "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path)]) == 0


@pytest.mark.parametrize("config", WHOLE + ADDED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_says_how_to_run_it(config: Path) -> None:
    assert f"--config configs/{config.relative_to(CONFIGS)}" in config.read_text()


FULL = sorted(CONFIGS.glob("*/full/*.yaml"))
"""Whole trainings, to be held against the literature."""


@pytest.mark.parametrize("config", FULL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_whole_training_says_what_it_has_to_beat_and_what_it_reached(config: Path) -> None:
    text = config.read_text()
    assert re.search(r"^# To beat: (\d+\.\d+ %, [^(]+\([^)]+\)|no published number known to us\.)", text, re.MULTILINE)
    assert re.search(r"^# Reached: (not yet run\.|\d+\.\d+ %)", text, re.MULTILINE)
