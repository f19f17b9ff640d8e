from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from lqkd.data import CIFAR100
from lqkd.errors import UsageError
from tests.unit.data.images import write_classes

NAMES = [f"class{label:02d}" for label in range(100)]


def make(root: Path) -> CIFAR100:
    return CIFAR100(root=str(root), cache_dir=str(root.parent / "cache"), batch_size=8)


def write_files(folder: Path, monkeypatch: pytest.MonkeyPatch, labels: int = 200) -> dict[str, np.ndarray]:
    """The files that torchvision reads, with their checksums."""
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    rng = np.random.default_rng(0)
    written, entries = {}, {}
    for name in ("train", "test"):
        written[name] = rng.integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
        fine = [label % 100 for label in range(labels)]
        entries[name] = write(name, {"data": written[name].reshape(200, -1), "fine_labels": fine, "coarse_labels": []})
    name, checksum = write("meta", {"fine_label_names": NAMES})
    dataset = torchvision.datasets.CIFAR100
    monkeypatch.setattr(dataset, "train_list", [entries["train"]])
    monkeypatch.setattr(dataset, "test_list", [entries["test"]])
    monkeypatch.setattr(dataset, "meta", {"filename": name, "key": "fine_label_names", "md5": checksum})
    return written


def test_torchvision_files_give_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_files(tmp_path / "root" / "cifar-100-python", monkeypatch)
    images = make(tmp_path / "root").load()
    assert np.array_equal(images.train_images.numpy(), written["train"])
    assert images.test_labels.tolist() == [label % 100 for label in range(200)]
    assert images.class_names == tuple(NAMES)


def test_labels_that_do_not_match_the_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "root" / "cifar-100-python", monkeypatch, labels=199)
    with pytest.raises(UsageError, match="has 200 images for 199 labels: the files do not match"):
        make(tmp_path / "root").prepare_data()


def test_class_folders_are_read(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_classes(tmp_path / "root" / part, dict.fromkeys(NAMES, 1), size=(32, 32))
    images = make(tmp_path / "root").load()
    assert images.class_names == tuple(NAMES)
    assert images.train_images.shape == (100, 3, 32, 32)


def test_ten_classes_are_not_a_hundred(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_classes(tmp_path / "root" / part, dict.fromkeys(NAMES[:10], 1), size=(32, 32))
    with pytest.raises(UsageError, match="has 10 class folders: CIFAR-100 has 100"):
        make(tmp_path / "root").prepare_data()
