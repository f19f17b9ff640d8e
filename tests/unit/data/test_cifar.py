from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

from lqkd.data import CIFAR10
from lqkd.errors import UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Class folders with four training images and one test image per class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 1)):
        for name in CLASSES:
            folder = tmp_path / "cifar" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                suffix = "webp" if number % 2 else "png"
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}", lossless=True)
    return tmp_path / "cifar"


def make_cifar(root: Path, **settings: Any) -> CIFAR10:
    return CIFAR10(**{"root": str(root), "cache_dir": str(root.parent / "cache"), "batch_size": 8, **settings})


def prepared(root: Path, **settings: Any) -> CIFAR10:
    data = make_cifar(root, validation_fraction=0.25, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def refusal(root: Path, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        make_cifar(root, **settings).prepare_data()
    return str(caught.value)


def test_class_folders_read_like_torchvision_image_folder(root: Path) -> None:
    images = make_cifar(root).load()
    reference = ImageFolder(str(root / "train"))
    assert images.train_labels.tolist() == reference.targets
    assert images.class_names == tuple(reference.classes)
    for row, (image, _) in enumerate(reference):
        assert np.array_equal(images.train_images[row].permute(1, 2, 0).numpy(), np.asarray(image))
    assert images.test_images.shape == (10, 3, 32, 32)


def test_grey_images_become_rgb_and_other_files_are_ignored(root: Path) -> None:
    Image.new("L", (32, 32), 77).save(root / "test" / "bird" / "0.png")
    (root / "test" / "bird" / "notes.txt").write_text("not an image")
    (root / "test" / ".hidden").mkdir()
    images = make_cifar(root).load()
    assert (images.test_images[2] == 77).all()
    assert len(images.test_images) == 10


def test_a_second_run_reads_the_packed_copy_and_no_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_cifar(root).load()
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"{path} was decoded again"))
    second = make_cifar(root).load()
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)


@pytest.mark.parametrize("image_format", ["PNG", "BMP"])
def test_a_changed_image_is_read_again_even_if_its_size_in_bytes_is_the_same(root: Path, image_format: str) -> None:
    path = root / "train" / "airplane" / "0.png"
    for shade in (1, 2):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(path, format=image_format)
        os.utime(path, (shade, shade))
        assert (make_cifar(root).load().train_images[0, 0] == shade).all()


def test_a_damaged_packed_copy_is_made_again(root: Path) -> None:
    first = make_cifar(root).load()
    (packed,) = (root.parent / "cache").iterdir()
    packed.write_bytes(packed.read_bytes()[:1000])
    assert torch.equal(make_cifar(root).load().train_images, first.train_images)


def test_an_unwritable_cache_warns_once_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = prepared(root, cache_dir=str(tmp_path / "file" / "cache"))
    assert len(data.train_indices) == 30
    assert [str(warning.message).partition(" cannot")[0] for warning in caught] == [f"cache_dir={tmp_path}/file/cache"]


def test_the_cache_folder_comes_from_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQKD_CACHE", str(root.parent / "elsewhere"))
    make_cifar(root, cache_dir=None).load()
    assert [path.suffix for path in (root.parent / "elsewhere").iterdir()] == [".pt"]


def test_setup_knows_shape_classes_and_split(root: Path) -> None:
    data = prepared(root)
    assert (data.num_classes, data.class_names, data.image_shape) == (10, CLASSES, (3, 32, 32))
    labels = torch.cat([batch.labels for batch in data.val_dataloader()])
    assert torch.bincount(labels).tolist() == [1] * 10


def test_a_corrupt_image_is_named(root: Path) -> None:
    path = root / "train" / "cat" / "1.webp"
    path.write_bytes(path.read_bytes()[:40])
    assert refusal(root).startswith(f"{path} cannot be read as an image")


def test_an_image_of_another_size_is_named(root: Path) -> None:
    path = root / "test" / "dog" / "0.png"
    Image.new("RGB", (40, 32)).save(path)
    assert refusal(root) == f"{path} is 40x32 pixels: every image must be 32x32."


def test_an_empty_class_folder_is_named(root: Path) -> None:
    (root / "test" / "ship" / "0.png").unlink()
    assert refusal(root).startswith(f"{root}/test/ship holds no image")


def test_a_class_that_one_part_lacks_is_named(root: Path) -> None:
    (root / "test" / "ship").rename(root / "test" / "boat")
    assert refusal(root).endswith("only one has: boat, ship.")


def test_another_number_of_classes_is_refused(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "truck").rename(root / part / ".truck")
    assert refusal(root) == f"root={root} has 9 class folders: CIFAR-10 has 10."


def test_a_missing_root_says_what_it_must_hold_and_that_it_can_be_downloaded(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"root={tmp_path}/nowhere does not hold CIFAR-10")
    assert "cifar-10-batches-py" in message
    assert "train/<class>/" in message
    assert "download=true" in message


def test_incomplete_torchvision_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}/cifar-10-batches-py is incomplete or damaged")


def test_torchvision_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def write_images(name: str, count: int) -> tuple[np.ndarray, list[str]]:
        pixels = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        return pixels, write(name, {"data": pixels.reshape(count, -1), "labels": [i % 10 for i in range(count)]})

    train, train_entry = write_images("data_batch_1", 20)
    test, test_entry = write_images("test_batch", 10)
    meta_name, meta_checksum = write("batches.meta", {"label_names": list(CLASSES)})
    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [train_entry])
    monkeypatch.setattr(dataset, "test_list", [test_entry])
    monkeypatch.setattr(dataset, "meta", {"filename": meta_name, "key": "label_names", "md5": meta_checksum})

    images = make_cifar(tmp_path).load()
    assert np.array_equal(images.train_images.numpy(), train)
    assert np.array_equal(images.test_images.numpy(), test)
    assert images.train_labels.tolist() == [i % 10 for i in range(20)]
    assert images.class_names == CLASSES
