"""Images and masks from folders."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lqkd.data import SegmentationFolder
from lqkd.errors import UsageError
from tests.photographs import CLASSES, write_photographs


def prepared(root: Path, **settings: Any) -> SegmentationFolder:
    defaults = {"root": str(root), "classes": CLASSES, "image_size": (24, 32), "batch_size": 4}
    data = SegmentationFolder(**(defaults | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def refusal(root: Path, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        prepared(root, **settings)
    return str(caught.value)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    write_photographs(tmp_path)
    return tmp_path


def position_pairs(folder: Path, count: int = 8, size: tuple[int, int] = (60, 80)) -> None:
    """Images that are their own masks: each pixel's number is its place, in quarters."""
    rows, columns = np.indices(size)
    pixels = (4 * (4 * rows // size[0]) + 4 * columns // size[1]).astype(np.uint8)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels if kind == "masks" else 10 * pixels).save(folder / kind / f"{number}.png")


def test_images_come_normalised_with_their_masks(photographs: Path) -> None:
    data = prepared(photographs)
    assert (data.class_names, data.image_shape, data.num_classes) == (CLASSES, (3, 24, 32), 3)
    batch = data.preprocess(next(iter(data.test_dataloader())), train=False, epoch=0)
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 24, 32), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((3, 24, 32), torch.int64)
    assert batch.images.is_contiguous()
    assert batch.indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ([""], (15, 4, 5)),
        (["train", "test"], (10, 2, 12)),
        (["train", "val"], (10, 2, 12)),
        (["train", "val", "test"], (8, 8, 8)),
    ],
)
def test_the_folders_decide_what_is_for_what(tmp_path: Path, parts: list[str], counts: tuple[int, ...]) -> None:
    write_photographs(tmp_path, parts)
    data = prepared(tmp_path)
    tested = sum(len(batch.indices) for batch in data.test_dataloader())
    assert (len(data.train_indices), len(data.val_indices), tested) == counts


def test_a_mask_is_cropped_and_mirrored_with_its_image(tmp_path: Path) -> None:
    position_pairs(tmp_path)
    data = prepared(tmp_path, classes=[str(number) for number in range(16)], mean=(0.0,) * 3, std=(10 / 255,) * 3)
    loader = data.train_dataloader()
    drawn = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        drawn += [data.preprocess(batch, train=True, epoch=epoch) for batch in loader]
    images, masks = (torch.cat([getattr(batch, name) for batch in drawn]) for name in ("images", "labels"))
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)  # no two windows are alike
    mirrored = masks[:, 0, 0] > masks[:, 0, -1]
    assert 0 < int(mirrored.sum()) < len(masks)
    inner = ((images[:, 0] - masks).abs() < 0.6).float().mean()  # all but the edges between quarters
    assert inner > 0.85


def test_resizing_makes_no_numbers_that_a_mask_has_not(photographs: Path) -> None:
    for path in (photographs / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 2 * 2).save(path)
    data = prepared(photographs)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        assert torch.cat([batch.images[:, 3] for batch in loader]).unique().tolist() == [0, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_done_to_a_pair_depends_on_seed_epoch_and_image_alone(photographs: Path, workers: int) -> None:
    def seen(**settings: Any) -> dict[int, torch.Tensor]:
        data = prepared(photographs, seed=3, **settings)
        batches = [data.preprocess(batch, train=True, epoch=0) for batch in data.train_dataloader()]
        return {
            index: torch.cat([image.flatten(), mask.flatten()])
            for batch in batches
            for index, image, mask in zip(batch.indices.tolist(), batch.images, batch.labels, strict=True)
        }

    first, second = seen(), seen(batch_size=3, num_workers=workers)
    both = first.keys() & second.keys()
    assert len(both) > 10
    assert all(torch.equal(first[index], second[index]) for index in both)


def test_pixels_that_are_ignored_have_no_label(photographs: Path) -> None:
    for path in (photographs / "masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[:53] = 9
        Image.fromarray(mask).save(path)
    data = prepared(photographs, ignore_index=9)
    masks = data.preprocess(next(iter(data.test_dataloader())), train=False, epoch=0).labels
    assert bool((masks[:, :12] == -1).all())
    assert bool((masks[:, 12:] >= 0).all())


def test_a_palette_gives_the_number_of_the_class_and_not_its_colour(photographs: Path) -> None:
    grey = prepared(photographs)
    expected = next(iter(grey.test_dataloader())).images
    for path in (photographs / "masks").iterdir():
        mask = Image.fromarray(np.asarray(Image.open(path)), mode="P")
        mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
        mask.save(path)
    assert torch.equal(next(iter(prepared(photographs).test_dataloader())).images, expected)


def test_a_table_tells_of_every_pair_what_it_is_for(photographs: Path, tmp_path: Path) -> None:
    data = prepared(photographs)
    data.write_split(tmp_path / "split.csv")
    with open(tmp_path / "split.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["split"] for row in rows] == ["train"] * 15 + ["val"] * 4 + ["test"] * 5
    assert len({row["file"] for row in rows}) == 24
    assert all(row["mask"] == row["file"].replace("images", "masks").replace("jpg", "png") for row in rows)


def test_the_fingerprint_changes_with_a_mask(photographs: Path) -> None:
    before = prepared(photographs).fingerprint()
    assert prepared(photographs).fingerprint() == before
    os.utime(photographs / "masks" / "3.png", (1, 1))
    assert prepared(photographs).fingerprint() != before


def _replace(mask: np.ndarray) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(mask).save(root / "masks" / "7.png")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: (root / "masks" / "7.png").unlink(), r"image .*7.jpg has no mask: .*masks/7.png does not exist"),
        (_replace(np.zeros((50, 40), np.uint8)), r"7.jpg has 106x106 pixels and mask .*7.png 50x40: they must agree"),
        (_replace(np.full((106, 106), 7, np.uint8)), r"has the number 7: accepted are 0 to 2, the classes, and 255"),
        (_replace(np.full((106, 106), 700, np.uint16)), "has the number 700: the numbers of classes are 0 to 255"),
        (
            _replace(np.zeros((106, 106, 3), np.uint8)),
            r"has colours \(RGB\): each pixel must be the number",
        ),
        (lambda root: os.truncate(root / "masks" / "7.png", 60), "mask .*7.png cannot be read"),
        (lambda root: os.truncate(root / "images" / "7.jpg", 60), "7.jpg cannot be read as an image"),
        (lambda root: (root / "images" / "7.png").write_bytes(b""), "7.jpg and .*7.png have the same mask"),
        (lambda root: (root / "masks").rename(root / "labels"), "has no folder 'masks'"),
        (lambda root: [path.unlink() for path in (root / "images").iterdir()], "holds no image"),
        (
            lambda root: (root / "train" / "images").mkdir(parents=True),
            "neither val nor test: add one, or put images",
        ),
    ],
)
def test_pairs_that_are_none_are_told_in_one_sentence(
    photographs: Path, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(photographs)
    message = refusal(photographs)
    assert re.search(told, message)
    assert "\n" not in message


def test_masks_of_which_all_but_one_class_is_ignored_are_refused(photographs: Path) -> None:
    for path in (photographs / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 2 * 255).save(path)
    assert "have the numbers 0, 255: at least two of the classes 0 to 1 must occur; 255 is ignored" in refusal(
        photographs, classes=["no", "yes"]
    )


def test_a_class_without_a_pixel_and_masks_without_an_image_are_told(photographs: Path) -> None:
    (photographs / "masks" / "7.txt").write_text("")
    with pytest.warns(UserWarning, match="'green'") as caught:
        prepared(photographs, classes=[*CLASSES, "green"])
    told = " ".join(str(warning.message) for warning in caught)
    assert "is of class 'green'" in told
    assert "masks/7.txt': neither an image nor the mask (PNG) of one" in told


@pytest.mark.parametrize(
    "settings",
    [
        {"classes": ["one"]},
        {"classes": ["one", "one"]},
        {"classes": "ab"},
        {"ignore_index": 2},
        {"ignore_index": 256},
        {"image_size": (0, 8)},
        {"crop_scale": (0.0, 1.0)},
        {"test_fraction": 1.0},
        {"num_workers": -1},
    ],
)
def test_settings_that_are_not_possible_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    (name,) = settings
    assert refusal(tmp_path, **settings).startswith(f"{name}=")
