from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from lqkd.data.augment import crop_offsets, normalize, random_crop, random_flip


def make_images(count: int = 64, height: int = 9, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


IDS = torch.arange(1000, 1064)


def augmented(images: Tensor, indices: Tensor, seed: int = 5, epoch: int = 2) -> Tensor:
    cropped = random_crop(images, 2, seed=seed, epoch=epoch, indices=indices)
    return random_flip(cropped, seed=seed, epoch=epoch, indices=indices)


def test_crop_equals_a_reference_that_pads_and_cuts_image_by_image() -> None:
    images, padding = make_images(), 3
    expected = torch.zeros_like(images)
    top, left = crop_offsets(padding, seed=1, epoch=2, indices=IDS)
    for row, image in enumerate(images):
        canvas = torch.zeros(3, 9 + 2 * padding, 7 + 2 * padding, dtype=torch.uint8)
        canvas[:, padding : padding + 9, padding : padding + 7] = image
        expected[row] = canvas[:, top[row] : top[row] + 9, left[row] : left[row] + 7]
    cropped = random_crop(images, padding, seed=1, epoch=2, indices=IDS)
    assert torch.equal(cropped, expected)
    assert cropped.is_contiguous()


def test_crop_uses_every_offset_about_equally_often() -> None:
    ids = torch.arange(8100)
    top, left = crop_offsets(4, seed=0, epoch=0, indices=ids)
    counts = torch.bincount(top * 9 + left, minlength=81)
    assert len(counts) == 81
    assert counts.min() > 60  # 100 expected, four standard deviations
    assert counts.max() < 140


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    images = make_images(1000)
    flipped = random_flip(images, seed=0, epoch=0, indices=torch.arange(1000))
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    kept = (flipped == images).all(dim=(1, 2, 3))
    assert torch.equal(mirrored, ~kept)
    assert 440 < mirrored.sum() < 560


def test_augmentation_does_not_depend_on_batch_size_or_order() -> None:
    images = make_images()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    apart = torch.cat([augmented(images[part], IDS[part]) for part in torch.tensor_split(order, 7)])
    assert torch.equal(apart, augmented(images, IDS)[order])


def test_two_epochs_differ_and_the_same_epoch_repeats() -> None:
    images = make_images()
    assert torch.equal(augmented(images, IDS, epoch=2), augmented(images, IDS, epoch=2))
    assert not torch.equal(augmented(images, IDS, epoch=2), augmented(images, IDS, epoch=3))


def test_augmentation_leaves_its_input_and_the_global_generator_alone() -> None:
    images, before = make_images(), torch.get_rng_state()
    augmented(images, IDS)
    assert torch.equal(images, make_images())
    assert torch.equal(torch.get_rng_state(), before)


def test_normalize_gives_the_bits_of_torchvision() -> None:
    images = make_images()
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected = reference.normalize(images.to(torch.float32) / 255, list(mean), list(std))
    result = normalize(images, mean, std)
    assert torch.equal(result, expected)
    assert result.dtype == torch.float32


def test_normalize_makes_channels_first_contiguous_images() -> None:
    images = make_images().to(memory_format=torch.channels_last)
    assert normalize(images, (0.5,) * 3, (0.5,) * 3).is_contiguous()
