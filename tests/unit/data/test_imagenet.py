from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lqkd.data import ImageNet
from lqkd.errors import UsageError
from tests.unit.data.images import write_classes

SYNSETS = {"n01440764": 10, "n01601694": 10, "n01682714": 20}


def make(root: Path, **settings: Any) -> ImageNet:
    return ImageNet(**{"root": str(root), "batch_size": 8, "image_size": 16, "validation_fraction": 0.1, **settings})


def refusal(root: Path) -> str:
    with pytest.raises(UsageError) as caught:
        make(root).prepare_data()
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_classes(tmp_path / "train", SYNSETS)
    write_classes(tmp_path / "val", dict.fromkeys(SYNSETS, 2), start=1)
    return tmp_path


def test_validation_is_held_out_of_training_and_val_is_tested_on(root: Path) -> None:
    data = make(root)
    data.prepare_data()
    data.setup()
    assert data.class_names == tuple(SYNSETS)
    val, test = (
        torch.bincount(torch.cat([batch.labels for batch in loader])).tolist()
        for loader in (data.val_dataloader(), data.test_dataloader())
    )
    assert (val, test) == ([1, 1, 2], [2, 2, 2])
    assert len(data.train_indices) == 36


def test_val_without_synset_folders_says_how_to_get_them(root: Path) -> None:
    for folder in (root / "val").iterdir():
        shutil.move(folder / "0.png", root / "val" / f"ILSVRC2012_{folder.name}.png")
        shutil.rmtree(folder)
    message = refusal(root)
    assert message.startswith(f"{root}/val is not sorted into one folder per synset")
    assert "torchvision.datasets.ImageNet" in message


def test_a_missing_part_says_how_to_get_it(root: Path) -> None:
    shutil.rmtree(root / "train")
    assert refusal(root).startswith(f"root={root} has no folder 'train' with one folder of images per synset")


def test_folders_of_other_names_are_for_another_data_module(root: Path) -> None:
    write_classes(root / "train", {"tench": 1})
    assert "has folder 'tench', which is no synset" in refusal(root)


def test_a_synset_that_one_part_lacks_is_named(root: Path) -> None:
    shutil.rmtree(root / "val" / "n01682714")
    assert refusal(root).endswith("but only one has: n01682714.")


@pytest.mark.skipif("LQKD_DATA" not in os.environ, reason="LQKD_DATA is not set")
def test_real_photographs_are_read(tmp_path: Path) -> None:
    photographs = Path(os.environ["LQKD_DATA"]) / "imagenet_sample" / "val"
    (tmp_path / "val").symlink_to(photographs)
    for folder in photographs.iterdir():
        (tmp_path / "train" / folder.name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "train" / folder.name / f"{number}.JPEG").symlink_to(next(folder.iterdir()))
    data = make(tmp_path, image_size=224, validation_fraction=0.5, num_workers=2)
    data.prepare_data()
    data.setup()
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert sum(len(batch.labels) for batch in batches) >= 140
    assert 90 < torch.cat([batch.images for batch in batches]).float().mean() < 140
