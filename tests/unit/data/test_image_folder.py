from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lqkd.callbacks.predictions import Predictions
from lqkd.data import Batch, ImageFolder
from lqkd.data.encoded import ImageFiles
from lqkd.errors import UsageError
from lqkd.tasks import Classification
from tests.unit.data.images import write_classes


def prepared(root: Path, **settings: Any) -> ImageFolder:
    data = ImageFolder(**{"root": str(root), "image_size": 16, "batch_size": 4, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def refusal(root: Path, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        prepared(root, **settings)
    return str(caught.value)


def counts(loader: Any) -> list[int]:
    return torch.bincount(torch.cat([batch.labels for batch in loader])).tolist()


def paths(data: ImageFolder, part: str) -> set[str]:
    images = data.load()
    files = images.test_images if part == "test" else images.train_images
    assert isinstance(files, ImageFiles)
    chosen = {"train": data.train_indices, "val": data.val_indices}.get(part, torch.arange(len(images.test_labels)))
    return {files.path(index) for index in chosen.tolist()}


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """Thirty images of two classes, and nothing else: what someone has who tries this for the first time."""
    write_classes(tmp_path / "mine", {"cat": 15, "dog": 15})
    return tmp_path / "mine"


def test_thirty_images_of_two_classes_are_trained_validated_and_tested_on(two_classes: Path) -> None:
    data = prepared(two_classes)
    assert (data.class_names, data.image_shape) == (("cat", "dog"), (3, 16, 16))
    assert counts(data.val_dataloader()) == [3, 2]
    assert counts(data.test_dataloader()) == [3, 3]
    parts = [paths(data, part) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [19, 5, 6]
    assert len(set().union(*parts)) == 30
    assert [batch.images.shape for batch in data.train_dataloader()] == [(4, 3, 16, 16)] * 4


def test_the_test_images_are_the_same_for_every_seed_and_the_validation_images_are_not(two_classes: Path) -> None:
    first, second = prepared(two_classes, seed=0), prepared(two_classes, seed=1)
    assert paths(first, "test") == paths(second, "test")
    assert paths(first, "val") != paths(second, "val")


def test_a_table_tells_of_every_image_what_it_is_for(two_classes: Path, tmp_path: Path) -> None:
    data = prepared(two_classes, limit_train=10)
    data.write_split(tmp_path / "split.csv")
    with open(tmp_path / "split.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for part, expected in (("train", 10), ("val", 5), ("test", 6)):
        files = {str(two_classes / row["file"]) for row in rows if row["split"] == part}
        assert files == paths(data, part)
        assert len(files) == expected
    assert [row["file"] for row in rows if row["split"] == "test"] == data.test_files()
    assert all(row["file"].split("/")[0] == row["class"] for row in rows)


def test_a_class_called_like_a_formula_or_a_terminal_code_is_neither_in_the_table(tmp_path: Path) -> None:
    formula, code = '=HYPERLINK("http:x","y")', "\x1b[2Jcat"
    write_classes(tmp_path / "images", {formula: 15, code: 15})
    data = prepared(tmp_path / "images")
    data.write_split(tmp_path / "split.csv")
    with open(tmp_path / "split.csv", newline="", encoding="utf-8") as stream:
        names = {row["class"] for row in csv.DictReader(stream)}
    assert names == {f"'{formula}", r"\x1b[2Jcat"}
    task, batch = Classification(), (torch.zeros(1, 3, 16, 16), torch.tensor([0]))
    predictions = Predictions(task, tmp_path)
    predictions.positions, predictions.rows = [0], task.table(torch.eye(2)[1:], batch, data.class_names)
    predictions.write(tmp_path / "predictions.csv", data.test_files())
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    assert {row["label"], row["class"]} == names
    assert row["file"][0] in "'\\"


@pytest.mark.parametrize("held_out", ["val", "test", "valid"])
def test_the_one_folder_that_is_not_trained_on_is_for_testing(held_out: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 10, "dog": 10})
    write_classes(tmp_path / held_out, {"cat": 2, "dog": 3})
    data = prepared(tmp_path)
    assert counts(data.test_dataloader()) == [2, 3]
    assert counts(data.val_dataloader()) == [2, 2]


def test_three_folders_are_used_as_they_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    write_classes(tmp_path / "val", {"cat": 3, "dog": 1})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 2})
    data = prepared(tmp_path)
    assert counts(data.train_dataloader()) == [4, 4]
    assert counts(data.val_dataloader()) == [3, 1]
    assert counts(data.test_dataloader()) == [1, 2]
    assert all("/val/" in path for path in paths(data, "val"))


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path, {"car": 5, "train": 5})
    assert prepared(tmp_path).class_names == ("car", "train")


def test_evaluation_crops_as_torchvisions_reference_does(two_classes: Path) -> None:
    data = prepared(two_classes, image_size=14)
    batch = next(iter(data.val_dataloader()))
    files = data.load().train_images
    assert isinstance(files, ImageFiles)
    reference = v2.Compose([v2.PILToTensor(), v2.Resize(16), v2.CenterCrop(14)])
    for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
        assert torch.equal(image, reference(Image.open(files.path(index))))


def epoch_by_sample(data: ImageFolder, epoch: int) -> dict[int, torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return {int(i): image for batch in loader for i, image in zip(batch.indices, batch.images, strict=True)}


def test_crops_do_not_depend_on_batch_size_and_workers(two_classes: Path) -> None:
    alone = epoch_by_sample(prepared(two_classes, batch_size=1, num_workers=0), 3)
    others = epoch_by_sample(prepared(two_classes, batch_size=19, num_workers=2), 3)
    assert len(alone) == 19
    assert all(torch.equal(alone[index], others[index]) for index in alone)
    later = epoch_by_sample(prepared(two_classes, batch_size=1, num_workers=0), 4)
    assert not any(torch.equal(alone[index], later[index]) for index in alone)


def test_kept_workers_are_told_of_the_next_epoch(two_classes: Path) -> None:
    loader = prepared(two_classes, num_workers=1).train_dataloader()
    expected = prepared(two_classes, num_workers=0).train_dataloader()
    for epoch in (0, 1):
        for batches in (loader, expected):
            batches.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for got, wanted in zip(loader, expected, strict=True):
            assert torch.equal(got.images, wanted.images)
            assert torch.equal(got.indices, wanted.indices)


def test_an_iteration_within_another_does_not_disturb_it(two_classes: Path) -> None:
    loader = prepared(two_classes, num_workers=1).train_dataloader()
    undisturbed = [batch.indices.tolist() for batch in loader]
    outer = iter(loader)
    seen = [next(outer).indices.tolist()]
    assert [batch.indices.tolist() for batch, _ in zip(loader, range(2), strict=False)] == undisturbed[:2]
    seen += [batch.indices.tolist() for batch in outer]
    assert seen == undisturbed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_goes_on_at_its_batch_and_the_next_one_starts_at_the_first(
    two_classes: Path, workers: int
) -> None:
    loader = prepared(two_classes, num_workers=workers).train_dataloader()
    whole = list(loader)
    loader.start_at(2)  # type: ignore[union-attr]
    for got, wanted in zip(loader, whole[2:], strict=True):
        assert torch.equal(got.images, wanted.images)
        assert torch.equal(got.indices, wanted.indices)
    assert len(list(loader)) == len(whole)


def test_a_cache_of_answers_sees_other_images_and_other_crops(two_classes: Path) -> None:
    data = prepared(two_classes)
    assert prepared(two_classes).fingerprint() == data.fingerprint()
    assert prepared(two_classes).augmentation_key() == data.augmentation_key()
    for setting in ({"crop_scale": (0.5, 1.0)}, {"image_size": 14}, {"seed": 1}, {"horizontal_flip": False}):
        assert prepared(two_classes, **setting).augmentation_key() != data.augmentation_key()
    path = two_classes / "cat" / "0.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert prepared(two_classes).fingerprint() != data.fingerprint()


def test_loading_leaves_the_global_generator_untouched(two_classes: Path) -> None:
    before = torch.get_rng_state()
    list(prepared(two_classes, num_workers=1).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_uint8_and_channels_last(two_classes: Path) -> None:
    batch = next(iter(prepared(two_classes, num_workers=1).train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_a_damaged_image_of_a_small_set_is_named_before_the_training(two_classes: Path) -> None:
    path = two_classes / "dog" / "7.png"
    os.truncate(path, 100)
    told = f"1 of 30 images are damaged, remove or replace them: {path} cannot be read as an image"
    assert refusal(two_classes).startswith(told)


def test_up_to_ten_damaged_images_are_named_at_once(two_classes: Path) -> None:
    for number in range(12):
        os.truncate(two_classes / "dog" / f"{number}.png", 0)
    message = refusal(two_classes)
    assert message.startswith("12 of 30 images are damaged, remove or replace them: ")
    assert message.count("the file is empty") == 10
    assert message.endswith("; and 2 more.")


def test_a_relative_root_that_does_not_exist_is_told_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(Path("shapes"))
    assert message.startswith(f"root=shapes does not exist in {tmp_path}: give a folder with one folder of images")
    assert "--data.init_args.root" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_later_is_named_in_one_line(two_classes: Path, workers: int) -> None:
    loader = prepared(two_classes, num_workers=workers).train_dataloader()
    for path in two_classes.rglob("*.png"):
        os.truncate(path, 100)
    with pytest.raises(UsageError, match=r"\A/[^\n]*png cannot be read as an image: [^\n]*\Z"):
        list(loader)


def test_classes_of_the_parts_must_be_the_same(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    write_classes(tmp_path / "test", {"cat": 4, "Dog": 4})
    assert refusal(tmp_path).endswith("must hold the same class folders, but only one has: Dog, dog.")


def test_a_class_that_would_not_be_trained_on_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 1, "dog": 15})
    message = refusal(tmp_path, test_fraction=0.5, validation_fraction=0.5)
    assert message.startswith("class 'cat' of root=")


def test_folders_that_are_not_read_are_told(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    for part in ("test", "extra"):
        write_classes(tmp_path / part, {"cat": 1, "dog": 1})
    with pytest.warns(UserWarning, match="left out extra of root=.*: read are train, test"):
        prepared(tmp_path)


def test_a_folder_that_cannot_be_written_is_enough_and_stays_as_it_is(two_classes: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [two_classes, *two_classes.rglob("*")]}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    list(prepared(two_classes).train_dataloader())
    assert {path: path.stat().st_mtime_ns for path in [two_classes, *two_classes.rglob("*")]} == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "has no class folder"),
        (lambda root: write_classes(root, {"cat": 4}), "has one class folder, 'cat': there must be at least two"),
        (lambda root: write_classes(root / "train", {"cat": 4, "dog": 4}), "has train but neither val nor test"),
    ],
)
def test_a_root_that_is_not_understood_is_refused(prepare: Any, message: str, tmp_path: Path) -> None:
    prepare(tmp_path / "root")
    assert message in refusal(tmp_path / "root")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0 .* at least 1"),
        ({"resize_size": 8}, "resize_size=8 .* at least image_size=16"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale=\[0.5, 0.1\] .* smaller first"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale=.* above 0"),
        ({"num_workers": -1}, "num_workers=-1 .* at least 0"),
        ({"test_fraction": 1.0}, "test_fraction=1.0 .* between 0 and 1"),
        ({"test_fraction": 0.001}, "test_fraction=0.001 holds out 0 of 30"),
    ],
)
def test_a_setting_out_of_range_is_refused(two_classes: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepared(two_classes, **settings)


def test_a_second_setup_warns_no_second_time(two_classes: Path) -> None:
    data = prepared(two_classes)
    (two_classes / "lost.jpg").write_bytes(b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("test")
