from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lqkd.data import Augmentation, Batch, ImageDataModule, ImageFolder
from lqkd.data.augment import normalize
from lqkd.data.base import ImageSet
from lqkd.data.loader import EpochShuffle
from lqkd.errors import UsageError
from tests.unit.data.images import write_classes

EVERYTHING = {
    "crop_padding": 2,
    "horizontal_flip": True,
    "rand_augment": 2,
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_probability": 0.9,
}


class Noise(ImageDataModule):
    """60 training images of three classes, and as many for testing."""

    shape = (3, 9, 7)
    default_mean = (0.5, 0.4, 0.3)
    default_std = (0.2, 0.3, 0.4)

    def load(self) -> ImageSet:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (120, *self.shape), dtype=torch.uint8, generator=generator)
        labels = torch.arange(120) % 3
        return ImageSet(images[:60], labels[:60], images[60:], labels[60:], ("a", "b", "c"))


class TwoChannels(Noise):
    shape = (2, 9, 7)
    default_mean = (0.5, 0.4)
    default_std = (0.2, 0.3)


def make_data(**changed: Any) -> Noise:
    data = Noise(**{"batch_size": 16, "seed": 0, **EVERYTHING, **changed})
    data.setup("fit")
    return data


def batch_of(data: Noise, ids: Tensor) -> Batch:
    images = data.load()
    return Batch(images.train_images[ids], images.train_labels[ids], ids)


def same(first: Batch, second: Batch) -> bool:
    assert first.targets is not None
    assert second.targets is not None
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("images", "labels", "targets"))


def one_by_one(data: Noise, batches: list[Batch], epoch: int) -> Batch:
    """All samples of augmented batches, sorted by index."""
    done = [data.preprocess(batch, train=True, epoch=epoch) for batch in batches]
    order = torch.cat([batch.indices for batch in done]).argsort()
    return Batch(*(torch.cat(parts)[order] for parts in zip(*done, strict=True)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 2000), data=st.data())
def test_a_sample_does_not_depend_on_its_batch(seed: int, epoch: int, data: st.DataObject) -> None:
    module = make_data(seed=seed)
    order = module.train_indices[torch.tensor(data.draw(st.permutations(range(len(module.train_indices)))))]
    parts = order.tensor_split(data.draw(st.integers(1, 20)))
    together = one_by_one(module, [batch_of(module, module.train_indices)], epoch)
    assert same(one_by_one(module, [batch_of(module, part) for part in parts], epoch), together)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_what_one_sees(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def epoch_of(rank: int, processes: int) -> list[Batch]:
        data = make_data(batch_size=18 // processes)
        monkeypatch.setattr(data, "_place", lambda: (rank, processes))
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, EpochShuffle)
        loader.sampler.set_epoch(2)
        return list(loader)

    data = make_data()
    alone = one_by_one(data, epoch_of(0, 1), 2)
    ranks = [batch for rank in range(world_size) for batch in epoch_of(rank, world_size)]
    assert same(one_by_one(data, ranks, 2), alone)


def test_two_epochs_and_two_seeds_differ_and_two_runs_agree() -> None:
    data = make_data()
    batch = batch_of(data, data.train_indices)
    first = data.preprocess(batch, train=True, epoch=1)
    assert same(first, make_data().preprocess(batch, train=True, epoch=1))
    other = data.preprocess(batch, train=True, epoch=2).images
    assert (first.images != other).any(dim=(1, 2, 3)).all()
    data.run_seed = 1
    other = data.preprocess(batch, train=True, epoch=1).images
    assert (first.images != other).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("name", ["rand_augment", "random_erasing", "mixup", "cutmix"])
def test_every_setting_does_something_by_itself(name: str) -> None:
    data = Noise(seed=0, **{name: EVERYTHING[name]})
    data.setup("fit")
    batch = batch_of(data, data.train_indices)
    plain = normalize(batch.images, data.mean, data.std)
    assert not torch.equal(data.preprocess(batch, train=True, epoch=0).images, plain)
    assert torch.equal(data.preprocess(batch, train=False, epoch=0).images, plain)


def test_preprocessing_leaves_the_data_set_and_the_global_generator_alone() -> None:
    data, before = make_data(), torch.get_rng_state()
    batch = batch_of(data, data.train_indices)
    data.preprocess(batch, train=True, epoch=0)
    assert torch.equal(batch.images, batch_of(data, data.train_indices).images)
    assert torch.equal(data._loaded().train_images, data.load().train_images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mixed_image_is_two_training_images_by_their_targets() -> None:
    data = Noise(seed=0, mixup=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    data.setup("fit")
    plain = data.load().train_images.float() / 255
    batch = batch_of(data, data.train_indices)
    mixed = data.preprocess(batch, train=True, epoch=0)
    assert mixed.targets is not None
    torch.testing.assert_close(mixed.targets.sum(dim=1), torch.ones(len(batch.labels)))
    for row, (image, index) in enumerate(zip(mixed.images, batch.indices, strict=True)):
        own = plain[index]
        others = plain[data.train_indices[data.train_indices != index]]
        # the share with which each candidate would explain the image best, and what is then left
        share = ((image - others) * (own - others)).sum((1, 2, 3)) / (own - others).square().sum((1, 2, 3))
        left = (others + share[:, None, None, None] * (own - others) - image).abs().amax((1, 2, 3))
        partner = int(left.argmin())
        assert left[partner] < 1e-5
        expected = torch.zeros(3)
        expected[batch.labels[row]] += share[partner]
        other_label = data.load().train_labels[data.train_indices[data.train_indices != index]][partner]
        expected[other_label] += 1 - share[partner]
        torch.testing.assert_close(mixed.targets[row], expected, atol=1e-4, rtol=0)


def test_the_hard_label_is_the_class_with_the_larger_share() -> None:
    data = make_data()
    mixed = data.preprocess(batch_of(data, data.train_indices), train=True, epoch=0)
    assert mixed.targets is not None
    assert torch.equal(mixed.targets.gather(1, mixed.labels[:, None])[:, 0], mixed.targets.max(dim=1).values)
    assert (mixed.labels != data.load().train_labels[data.train_indices]).any()


def test_without_mixing_there_are_no_targets() -> None:
    data = make_data(mixup=0, cutmix=0, mix_probability=None)
    assert data.preprocess(batch_of(data, data.train_indices), train=True, epoch=0).targets is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_padding": -2}, "crop_padding=-2 .* at least 0"),
        ({"rand_augment": -1}, "rand_augment=-1 .* between 0 and 14"),
        ({"mixup": -0.1}, "mixup=-0.1 .* between 0 and 1000"),
        ({"cutmix": float("nan")}, "cutmix=nan .* between 0 and 1000"),
        ({"mixup": float("inf")}, "mixup=inf .* between 0 and 1000"),
        ({"random_erasing": 1.5}, "random_erasing=1.5 .* between 0 and 1"),
        ({"rand_augment": 2, "rand_augment_magnitude": 31}, "rand_augment_magnitude=31 .* between 0 and 30"),
        ({"mixup": 1.0, "mix_probability": -0.5}, "mix_probability=-0.5 .* between 0 and 1"),
        ({"rand_augment_magnitude": 9}, "rand_augment_magnitude=9 has no effect: set rand_augment"),
        ({"mix_probability": 0.5}, "mix_probability=0.5 has no effect: set mixup or cutmix"),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augmentation(**arguments)
    with pytest.raises(UsageError, match=message):
        Noise(**arguments)


def test_rand_augment_on_two_channels_is_refused_before_the_first_batch() -> None:
    with pytest.raises(UsageError, match="rand_augment=2 is not accepted for images of 2 channels"):
        TwoChannels(rand_augment=2).setup("fit")


def test_mixing_is_refused_where_images_are_not_in_memory(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5})
    with pytest.raises(UsageError, match=r"mixup and cutmix above 0 need the training images in memory.*ImageFolder"):
        ImageFolder(root=str(tmp_path), image_size=16, mixup=0.2, cutmix=1.0).setup("fit")


def test_everything_but_mixing_works_on_decoded_images_in_any_memory_format(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 10, "b": 10})
    data = ImageFolder(
        root=str(tmp_path), image_size=16, num_workers=0, crop_padding=2, rand_augment=2, random_erasing=0.5
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    standard = batch._replace(images=batch.images.contiguous())
    results = [data.preprocess(given, train=True, epoch=0).images for given in (batch, standard)]
    assert torch.equal(*results)
    assert results[0].is_contiguous()
