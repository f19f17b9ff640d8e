from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import lqkd.data
from lqkd.data import Digits


def make_digits(**settings: Any) -> Digits:
    digits = Digits(**settings)
    digits.setup("fit")
    return digits


def test_every_seed_is_tested_on_the_same_fifth() -> None:
    first, second = make_digits(seed=0).load(), make_digits(seed=1).load()
    assert torch.equal(first.test_images, second.test_images)
    assert (len(first.train_images), len(first.test_images)) == (1438, 359)


def test_no_test_image_is_a_training_image() -> None:
    from sklearn.datasets import load_digits

    images = make_digits().load()
    everything = torch.cat([images.train_images, images.test_images]).flatten(1)
    original = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.uint8).flatten(1)
    assert sorted(everything.tolist()) == sorted(original.tolist())


def test_the_test_part_is_stratified() -> None:
    images = make_digits().load()
    counts = torch.bincount(torch.cat([images.train_labels, images.test_labels]))
    assert (torch.bincount(images.test_labels) - counts * 359 / 1797).abs().max() < 1


def test_the_images_are_eight_by_eight_grey_and_use_the_whole_range() -> None:
    digits = make_digits()
    images = digits.load().train_images
    assert digits.image_shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert (images.dtype, int(images.min()), int(images.max())) == (torch.uint8, 0, 255)


def test_mean_and_std_are_those_of_the_images_outside_the_test_part() -> None:
    digits = make_digits()
    scaled = digits.load().train_images.double() / 255
    assert digits.mean[0] == pytest.approx(scaled.mean().item(), abs=1e-4)
    assert digits.std[0] == pytest.approx(scaled.std(correction=0).item(), abs=1e-4)


@pytest.mark.parametrize("path", sorted(Path(lqkd.data.__path__[0]).glob("*.py")), ids=lambda path: path.name)
def test_importing_the_data_room_imports_no_heavy_library(path: Path) -> None:
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert not {name.partition(".")[0] for name in modules} & {"sklearn", "torchvision", "PIL", "matplotlib", "wandb"}
