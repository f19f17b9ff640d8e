"""CIFAR-10 with forty classes: what is to be seen, and which way up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.rotated_cifar10 import RotatedCIFAR10


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RotatedCIFAR10:
    """Eight images of each class, whose top left quarter is white."""
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path / "cache"))
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = 255
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(8):
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return RotatedCIFAR10(root=str(tmp_path))


def test_the_class_tells_what_is_seen_and_its_turn(data: RotatedCIFAR10) -> None:
    images = data.load()
    assert len(images.class_names) == 40
    assert images.train_labels.bincount().tolist() == [2] * 40
    corners = {
        0: (0, 0),
        90: (31, 0),
        180: (31, 31),
        270: (0, 31),
    }
    for image, label in zip(images.test_images, images.test_labels, strict=True):
        name, _, degrees = images.class_names[int(label)].partition(" ")
        assert name == f"class{int(label) // 4}"
        assert [place for place in corners.values() if image[0, place[0], place[1]] == 255] == [corners[int(degrees)]]


def test_images_are_not_mirrored(data: RotatedCIFAR10) -> None:
    assert not data.augmentation.horizontal_flip
    with pytest.raises(TypeError, match="horizontal_flip"):
        RotatedCIFAR10(root=".", horizontal_flip=True)


def test_an_image_is_turned_the_same_way_each_time(data: RotatedCIFAR10) -> None:
    assert torch.equal(data.load().train_images, data.load().train_images)
