from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lqkd.data import FashionMNIST
from lqkd.errors import UsageError

PARTS = {"train": 40, "t10k": 20}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_files(folder: Path, packed: bool = False, extra_labels: int = 0, highest: int = 9) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for part, count in PARTS.items():
        written[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        written[f"{part}-labels-idx1-ubyte"] = (np.arange(count + extra_labels) % (highest + 1)).astype(np.uint8)
    for name, array in written.items():
        content = idx(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return written


def make(root: Path, **settings: Any) -> FashionMNIST:
    return FashionMNIST(root=str(root), cache_dir=str(root.parent / "cache"), batch_size=8, **settings)


def refusal(root: Path) -> str:
    with pytest.raises(UsageError) as caught:
        make(root).prepare_data()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inner", ["FashionMNIST/raw", "."])
def test_the_files_are_read_packed_or_not_where_torchvision_or_a_person_puts_them(
    tmp_path: Path, inner: str, packed: bool
) -> None:
    written = write_files(tmp_path / "root" / inner, packed)
    images = make(tmp_path / "root").load()
    assert np.array_equal(images.train_images.numpy()[:, 0], written["train-images-idx3-ubyte"])
    assert images.test_labels.tolist() == written["t10k-labels-idx1-ubyte"].tolist()
    assert images.class_names[:2] == ("T-shirt/top", "Trouser")


def test_a_batch_is_grey_and_normalised(tmp_path: Path) -> None:
    write_files(tmp_path / "root")
    data = make(tmp_path / "root", validation_fraction=0.25)
    data.setup()
    batch = data.preprocess(next(iter(data.train_dataloader())), train=True, epoch=0)
    assert (data.image_shape, batch.images.shape) == ((1, 28, 28), (8, 1, 28, 28))
    assert batch.images.dtype == torch.float32


def test_class_folders_are_read_as_grey(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "root" / part / str(label)
            folder.mkdir(parents=True)
            Image.new("RGB", (28, 28), (label, label, label)).save(folder / "0.png")
    images = make(tmp_path / "root").load()
    assert images.train_images[:, 0, 0, 0].tolist() == images.train_labels.tolist() == list(range(10))


def test_labels_that_do_not_match_the_images_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "root", extra_labels=1)
    assert refusal(tmp_path / "root").endswith("has 40 images for 41 labels: the files do not match.")


def test_a_label_above_the_highest_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "root", highest=10)
    assert refusal(tmp_path / "root").endswith("has labels from 0 to 10: Fashion-MNIST has 0 to 9.")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str, packed: bool) -> None:
    write_files(tmp_path / "root", packed)
    path = tmp_path / "root" / (f"{name}.gz" if packed else name)
    os.truncate(path, path.stat().st_size // 2)
    assert f"{tmp_path}/root" in refusal(tmp_path / "root")
    assert "incomplete or damaged" in refusal(tmp_path / "root")


def test_images_in_the_place_of_labels_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "root")
    content = (tmp_path / "root" / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "root" / "train-labels-idx1-ubyte").write_bytes(content)
    assert "incomplete or damaged" in refusal(tmp_path / "root")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_files(tmp_path / "root")
    (tmp_path / "root" / "t10k-labels-idx1-ubyte").unlink()
    assert "t10k-labels-idx1-ubyte" in refusal(tmp_path / "root")


def test_an_empty_root_says_what_it_must_hold(tmp_path: Path) -> None:
    assert refusal(tmp_path / "root").startswith(f"root={tmp_path}/root does not hold Fashion-MNIST")
