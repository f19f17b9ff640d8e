from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lqkd.data import Batch, ImageDataModule
from lqkd.data.augment import normalize
from lqkd.data.base import ImageSet
from lqkd.data.loader import EpochShuffle
from lqkd.errors import UsageError


class Squares(ImageDataModule):
    """100 training images of two classes, three to one, and 11 test images."""

    default_mean = (0.5, 0.4)
    default_std = (0.2, 0.3)

    def load(self) -> ImageSet:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (111, 2, 6, 6), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(111) % 4 == 0).to(torch.int64)
        return ImageSet(images[:100], labels[:100], images[100:], labels[100:], ("round", "square"))


def make_data(**settings: Any) -> Squares:
    data = Squares(**{"batch_size": 16, "crop_padding": 1, "horizontal_flip": True, **settings})
    data.setup("fit")
    return data


def epoch_by_sample(data: Squares, epoch: int) -> dict[int, Tensor]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, EpochShuffle)
    loader.sampler.set_epoch(epoch)
    batches = [data.preprocess(batch, train=True, epoch=epoch) for batch in loader]
    return {int(index): image for batch in batches for index, image in zip(batch.indices, batch.images, strict=True)}


def test_setup_says_what_the_data_are() -> None:
    data = make_data()
    assert (data.num_classes, data.class_names, data.image_shape) == (2, ("round", "square"), (2, 6, 6))
    assert (data.mean, data.std) == ((0.5, 0.4), (0.2, 0.3))


def test_no_validation_image_is_trained_on() -> None:
    data = make_data()
    trained = {int(index) for batch in data.train_dataloader() for index in batch.indices}
    validated = {int(index) for batch in data.val_dataloader() for index in batch.indices}
    assert not trained & validated
    assert torch.equal(torch.cat([data.train_indices, data.val_indices]).sort().values, torch.arange(100))


def test_the_validation_set_has_the_exact_size_and_the_classes_in_proportion() -> None:
    data = make_data(validation_fraction=0.2)
    labels = torch.cat([batch.labels for batch in data.val_dataloader()])
    assert torch.bincount(labels).tolist() == [15, 5]


def test_the_split_is_a_function_of_the_seed() -> None:
    first, again, other = (make_data(seed=seed).val_indices for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_seed_the_run_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(make_data().val_indices, make_data(seed=7).val_indices)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert torch.equal(make_data().val_indices, make_data(seed=0).val_indices)


def test_a_later_stage_keeps_the_split_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()
    before = data.val_indices
    monkeypatch.setenv("PL_GLOBAL_SEED", "99")
    data.setup("test")
    assert torch.equal(data.val_indices, before)


def test_the_test_loader_yields_the_test_images_in_order() -> None:
    data = make_data(eval_batch_size=4)
    images = torch.cat([batch.images for batch in data.test_dataloader()])
    assert torch.equal(images, data.load().test_images)


def test_limit_train_takes_that_many_training_images_of_all_classes_and_no_validation_image() -> None:
    limited = make_data(limit_train=20)
    assert torch.bincount(limited.load().train_labels[limited.train_indices]).tolist() == [15, 5]
    assert torch.isin(limited.train_indices, make_data().train_indices).all()
    assert torch.equal(limited.val_indices, make_data().val_indices)


def test_rows_of_trust_are_of_all_classes_and_in_no_training_or_validation_batch() -> None:
    data, plain = make_data(trust_fraction=0.2), make_data()
    trusted = data.trust_indices
    labels = data.load().train_labels
    assert torch.bincount(labels[trusted]).tolist() == [13, 5]
    assert torch.equal(data.val_indices, plain.val_indices)
    assert torch.equal(torch.cat([data.train_indices, trusted]).sort().values, plain.train_indices)
    trained = {int(index) for batch in data.train_dataloader() for index in batch.indices}
    assert not trained & set(trusted.tolist())
    assert torch.equal(trusted, make_data(trust_fraction=0.2).trust_indices)
    assert not torch.equal(trusted, make_data(trust_fraction=0.2, seed=1).trust_indices)
    assert not len(plain.trust_indices)


def test_rows_of_trust_come_augmented_as_in_the_first_epoch_but_not_mixed() -> None:
    data, mixing = (
        make_data(trust_fraction=0.2, eval_batch_size=7),
        make_data(trust_fraction=0.2, cutmix=1.0, eval_batch_size=99),
    )
    batches = list(data.trust_batches(torch.device("cpu")))
    indices = torch.cat([batch.indices for batch in batches])
    assert torch.equal(indices, data.trust_indices)
    images = torch.cat([batch.images for batch in batches])
    raw = Batch(data.load().train_images[indices], data.load().train_labels[indices], indices)
    assert torch.equal(images, data.preprocess(raw, train=True, epoch=0).images)
    assert not torch.equal(images, data.preprocess(raw, train=False, epoch=0).images)
    (unmixed,) = mixing.trust_batches(torch.device("cpu"))
    assert unmixed.targets is None
    assert torch.equal(unmixed.images, images)


def test_a_training_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [len(batch.labels) for batch in make_data(batch_size=500).train_dataloader()] == [90]


def test_augmented_images_do_not_depend_on_the_batch_size() -> None:
    small, large = epoch_by_sample(make_data(batch_size=5), 1), epoch_by_sample(make_data(batch_size=45), 1)
    assert len(small) == len(large) == 90
    assert all(torch.equal(small[index], large[index]) for index in small)


def test_two_epochs_augment_differently() -> None:
    data = make_data(batch_size=45)
    first, second = epoch_by_sample(data, 0), epoch_by_sample(data, 1)
    assert sum(torch.equal(first[index], second[index]) for index in first) < 30  # 1 in 18 expected


def test_evaluation_only_normalises() -> None:
    data = make_data()
    batch = next(iter(data.val_dataloader()))
    expected = normalize(batch.images, data.mean, data.std)
    assert torch.equal(data.preprocess(batch, train=False, epoch=3).images, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 .* between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 .* between 0 and 1"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan .* between 0 and 1"),
        ({"batch_size": 0}, "batch_size=0 .* at least 1"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1 .* at least 1"),
        ({"limit_train": 0}, "limit_train=0 .* at least 1"),
        ({"crop_padding": -2}, "crop_padding=-2 .* at least 0"),
        ({"mean": (0.5,)}, r"mean=\[0.5\] .* 2 number"),
        ({"std": (0.5, 0.5, 0.5)}, r"std=\[0.5, 0.5, 0.5\] .* 2 number"),
        ({"std": (0.5, 0.0)}, r"std=\[0.5, 0.0\] .* above 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Squares(**settings)


def test_a_limit_above_what_is_available_is_refused() -> None:
    with pytest.raises(UsageError, match="limit_train=91 is not accepted: 90 training images"):
        make_data(limit_train=91)


def test_a_fraction_that_holds_out_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"validation_fraction=0.001 holds out 0 of 100"):
        make_data(validation_fraction=0.001)


def test_a_setting_of_the_augmentation_that_is_assigned_afterwards_is_refused() -> None:
    with pytest.raises(UsageError, match="crop_padding is set when the data module is made: pass crop_padding=2"):
        make_data().crop_padding = 2


def test_the_command_line_reads_the_settings() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    path = "lqkd.data.CIFAR10"
    arguments = [f"--data={path}", "--data.root=/nowhere", "--data.batch_size=32", "--data.mean=[0.1, 0.2, 0.3]"]
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert (data.batch_size, data.mean, data.augmentation.crop_padding, str(data.root)) == (
        32,
        (0.1, 0.2, 0.3),
        4,
        "/nowhere",
    )


class Watcher(pl.LightningModule):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, Batch]] = []
        self.validated: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.append((self.current_epoch, batch))
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: Squares, tmp_path: Path, **settings: Any) -> Watcher:
    module = Watcher()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(module, datamodule=data)
    return module


def test_lightning_trains_on_augmented_images_and_validates_on_plain_ones(tmp_path: Path) -> None:
    data = make_data(seed=1)
    module = fit(data, tmp_path)
    plain = data.load().train_images
    expected = {epoch: epoch_by_sample(data, epoch) for epoch in (0, 1)}
    assert [epoch for epoch, _ in module.trained] == [0] * 5 + [1] * 5
    for epoch, batch in module.trained:
        assert isinstance(batch, Batch)
        for index, image in zip(batch.indices, batch.images, strict=True):
            assert torch.equal(image, expected[epoch][int(index)])
    for batch in module.validated:
        assert torch.equal(batch.images, normalize(plain[batch.indices], data.mean, data.std))


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    module = fit(make_data(), tmp_path, overfit_batches=2)
    first, second = ([b.indices.tolist() for e, b in module.trained if e == epoch] for epoch in (0, 1))
    assert len(first) == 2
    assert first == second


class PartlyLabelled(Squares):
    def load(self) -> ImageSet:
        images = super().load()
        labels = images.train_labels.clone()
        labels[::2] = -1
        return images._replace(train_labels=labels)


def test_images_without_a_label_are_split_and_trained_on() -> None:
    data = PartlyLabelled(batch_size=10, validation_fraction=0.2, seed=0)
    data.setup()
    labels = torch.cat([batch.labels for batch in data.train_dataloader()])
    assert (labels < 0).sum() == 40


def test_images_without_a_label_cannot_be_mixed() -> None:
    with pytest.raises(UsageError, match="mixup and cutmix need the labels of all training images"):
        PartlyLabelled(batch_size=10, seed=0, mixup=0.2).setup()
