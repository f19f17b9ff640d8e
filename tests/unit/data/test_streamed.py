from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lqkd.cli import main
from lqkd.data import ImageNet, StreamedImageNet
from lqkd.data.shards import make_shards
from lqkd.data.streamed import ShardShuffle
from lqkd.errors import UsageError
from tests.unit.data.images import write_classes

webdataset = pytest.importorskip("webdataset")

SYNSETS = {"n01440764": 12, "n01601694": 12, "n01682714": 26}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_classes(root / "train", SYNSETS)
    write_classes(root / "val", dict.fromkeys(SYNSETS, 2), start=1)
    return root


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Path:
    """Some ten images in each shard."""
    make_shards(source, tmp_path / "shards", 50_000)
    return tmp_path / "shards"


def prepared(root: Path | str, **settings: Any) -> StreamedImageNet:
    settings = {"batch_size": 8, "image_size": 16, "validation_fraction": 0.2, "shuffle_shards": 2, **settings}
    data = StreamedImageNet(root=str(root), **settings)
    data.prepare_data()
    data.setup()
    return data


def refusal(root: Path | str, **settings: Any) -> str:
    def read_everything() -> None:
        data = prepared(root, **settings)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            list(loader)

    with pytest.raises(UsageError) as caught:
        read_everything()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_content(data: Any) -> list[tuple[int, int]]:
    """Sum of the pixels and label of each test image."""
    batches = list(data.test_dataloader())
    return sorted((int(i.sum()), int(label)) for b in batches for i, label in zip(b.images, b.labels, strict=True))


def test_shards_hold_the_images_and_labels_of_the_folders(source: Path, shards: Path) -> None:
    folders = ImageNet(root=str(source), batch_size=8, image_size=16, validation_fraction=0.2)
    folders.setup()
    streamed = prepared(shards)
    assert streamed.class_names == folders.class_names
    assert len(streamed.train_indices) == len(folders.train_indices) == 40
    assert by_content(streamed) == by_content(folders)


def test_webdataset_itself_reads_the_shards(source: Path, shards: Path) -> None:
    samples = list(webdataset.WebDataset([str(p) for p in sorted(shards.glob("train/*.tar"))], shardshuffle=False))
    assert len(samples) == 50
    images = {path.read_bytes(): path.parent.name for path in source.glob("train/*/*.png")}
    assert all(images[sample["png"]] == list(SYNSETS)[int(sample["cls"])] for sample in samples)


def test_the_same_folders_give_the_same_shards(source: Path, shards: Path, tmp_path: Path) -> None:
    make_shards(source, tmp_path / "again", 50_000)
    for path in shards.rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(shards)).read_bytes()


def test_an_epoch_goes_through_a_few_shards_at_a_time(shards: Path) -> None:
    data = prepared(shards)
    of_image = data.load().train_images.shards()  # type: ignore[union-attr]
    assert int(of_image.max()) >= 4
    order = ShardShuffle(data.train_indices, 0, of_image[data.train_indices], 2)
    first = order.order()
    assert torch.equal(first.sort().values, data.train_indices)
    visited = of_image[first].unique_consecutive().tolist()
    assert len(visited) > 2 * len(of_image.unique())  # the images of the shards of a group are mixed
    group, groups = set(), []
    for shard in visited:
        if shard not in group and len(group) == 2:
            groups.append(group)
            group = set()
        group.add(shard)
    groups.append(group)
    assert sum(len(group) for group in groups) == len(of_image.unique())  # no shard is in two groups
    order.set_epoch(1)
    assert not torch.equal(order.order(), first)


def test_two_processes_share_out_the_batches_of_one(shards: Path) -> None:
    def batches(rank: int, processes: int, batch_size: int) -> list[set[int]]:
        data = prepared(shards, batch_size=batch_size, seed=0)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=processes, num_devices=processes, strategy=strategy, overfit_batches=0
        )
        return [set(batch.indices.tolist()) for batch in data.train_dataloader()]

    first, second = batches(0, 2, 4), batches(1, 2, 4)
    assert [a | b for a, b in zip(first, second, strict=True)] == batches(0, 1, 8)


def test_workers_change_nothing(shards: Path) -> None:
    alone, two = (list(prepared(shards, num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(alone, two, strict=True)
    )


def test_shards_behind_a_url_are_fetched_once(shards: Path, tmp_path: Path) -> None:
    expected = by_content(prepared(shards))
    cache = tmp_path / "cache"
    assert by_content(prepared(f"file://{shards}", cache_dir=str(cache))) == expected
    fetched = list(cache.rglob("*.tar"))
    assert [path.name for path in fetched] == ["val-000000.tar"]
    before = fetched[0].stat().st_mtime_ns
    assert by_content(prepared(f"file://{shards}", cache_dir=str(cache))) == expected
    assert fetched[0].stat().st_mtime_ns == before


def test_a_shard_that_is_cut_short_is_named(shards: Path, tmp_path: Path) -> None:
    path = shards / "train" / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    expected = f"{size // 2} bytes instead of {size}: it is cut short, missing or another file."
    assert refusal(shards) == f"{path} has {expected}"
    assert refusal(f"file://{shards}", cache_dir=str(tmp_path / "cache")).endswith(expected)
    assert not list((tmp_path / "cache").rglob("train-000001.tar"))


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "val" / "val-000000.tar").unlink()
    assert refusal(shards).startswith(f"{shards}/val/val-000000.tar has 0 bytes instead of")


def test_a_shard_of_another_set_gives_no_wrong_label(shards: Path) -> None:
    path = shards / "val" / "val-000000.tar"
    content = path.read_bytes()
    position = content.index(b"000000003.cls") + 512
    label = b"012"[(int(content[position : position + 1]) + 1) % 3 :][:1]
    path.write_bytes(content[:position] + label + content[position + 1 :])
    assert refusal(shards) == (
        f"{path}, image 000000003 is not where the index says: the shard is of another set, or damaged."
    )


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("size", lambda sizes: sizes * 0 - 1),
        ("size", lambda sizes: sizes * 0 + 2**62),
        ("size", lambda sizes: sizes.astype(float)),
        ("offset", lambda offsets: -offsets),
        ("shard_bytes", lambda sizes: -sizes),
        ("class_names", lambda names: np.arange(len(names))),
    ],
)
def test_an_index_with_values_that_cannot_be_is_refused(
    shards: Path, field: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    index = shards / "train" / "index.npz"
    with np.load(index) as arrays:
        held = dict(arrays)
    np.savez(index, **held | {field: change(held[field])})
    assert refusal(shards).startswith(f"{index} contradicts itself: make it again")


def test_an_index_that_unpacks_to_more_than_its_size_is_refused(shards: Path) -> None:
    index = shards / "train" / "index.npz"
    with np.load(index) as arrays:
        held = dict(arrays)
    np.savez_compressed(index, **held | {"label": np.zeros(10**7, np.int64)})
    assert "damaged or no index of shards (it unpacks to more than its size)" in refusal(shards)


def test_a_damaged_index_is_named(shards: Path) -> None:
    index = shards / "train" / "index.npz"
    os.truncate(index, index.stat().st_size // 2)
    assert refusal(shards).startswith(f"{index} is damaged or no index of shards")


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_root_without_shards_says_how_to_make_them(tmp_path: Path, address: str) -> None:
    assert "python -m lqkd make-shards SOURCE DEST makes shards" in refusal(address.format(tmp_path))


def test_parts_with_other_classes_are_refused(shards: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / "other" / part, {"n00000001": 2, "n00000002": 2})
    make_shards(tmp_path / "other", tmp_path / "others", 50_000)
    shutil.rmtree(shards / "val")
    shutil.move(tmp_path / "others" / "val", shards / "val")
    assert "have different classes" in refusal(shards)


def test_the_command_names_a_damaged_image_and_leaves_no_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / "source" / part, {"n00000001": 2, "n00000002": 2})
    path = tmp_path / "source" / "train" / "n00000002" / "1.png"
    os.truncate(path, 100)
    assert main(["make-shards", str(tmp_path / "source"), str(tmp_path / "shards")]) == 2
    assert capsys.readouterr().err.startswith(f"lqkd: error: {path} cannot be read as an image")
    assert not [file for file in tmp_path.glob("shards/**/*") if file.is_file()]


def test_the_command_overwrites_no_shards(source: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-shards", str(source), str(shards)]) == 2
    assert "holds shards already" in capsys.readouterr().err
