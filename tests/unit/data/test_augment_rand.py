from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from lqkd.data.augment_geometry import GEOMETRIC
from lqkd.data.augment_rand import OPERATIONS, amount, apply_operations, choose_operations, rand_augment

IDS = torch.arange(500, 564)
SIGNED = (*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness")


def make_images(count: int = 64, channels: int = 3, height: int = 20, width: int = 17) -> Tensor:
    """Noise, the hardest case for whatever moves pixels, in images of very different contrast."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, channels, height, width, generator=generator)
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    return (255 * (0.3 + (noise - 0.3) * contrast)).to(torch.uint8)


def by_torchvision(image: Tensor, name: str, strength: float) -> Tensor:
    """What torchvision's RandAugment does to one image (C, H, W)."""
    if name in {"ShearX", "ShearY"}:
        degrees = math.degrees(math.atan(strength))
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        return reference.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0])
    if name in {"TranslateX", "TranslateY"}:
        pixels = int(strength)
        translate = [pixels, 0] if name == "TranslateX" else [0, pixels]
        return reference.affine(image, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])
    calls = {
        "Identity": lambda: image,
        "Rotate": lambda: reference.rotate(image, strength),
        "Brightness": lambda: reference.adjust_brightness(image, 1 + strength),
        "Color": lambda: reference.adjust_saturation(image, 1 + strength),
        "Contrast": lambda: reference.adjust_contrast(image, 1 + strength),
        "Sharpness": lambda: reference.adjust_sharpness(image, 1 + strength),
        "Posterize": lambda: reference.posterize(image, int(strength)),
        "Solarize": lambda: reference.solarize(image, strength),
        "AutoContrast": lambda: reference.autocontrast(image),
        "Equalize": lambda: reference.equalize(image),
    }
    return calls[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_torchvision_on_single_images(name: str, magnitude: int, channels: int) -> None:
    images = make_images(16, channels)
    negative = torch.arange(16) % 2 == 1
    result = apply_operations(images, torch.full((16,), OPERATIONS.index(name)), negative, magnitude)
    strength = amount(name, magnitude, 20, 17)
    signs = [-1 if name in SIGNED and minus else 1 for minus in negative]
    expected = torch.stack(
        [by_torchvision(image, name, sign * strength) for image, sign in zip(images, signs, strict=True)]
    )
    assert result.dtype == torch.uint8
    if name in GEOMETRIC:  # where a place lies in the middle between two pixels, rounding chooses
        assert (result != expected).float().mean() < 0.01
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_but_the_identity_changes_images(name: str) -> None:
    images = make_images(8)
    result = apply_operations(images, torch.full((8,), OPERATIONS.index(name)), torch.arange(8) % 2 == 0, 15)
    assert torch.equal(result, images) == (name == "Identity")


@pytest.mark.parametrize("name", OPERATIONS)
def test_magnitudes_are_those_of_torchvision(name: str) -> None:
    magnitudes, signed = v2.RandAugment._AUGMENTATION_SPACE[name]
    assert signed == (name in SIGNED)
    expected = magnitudes(31, 20, 17)
    if expected is not None:
        scale = 255 if name == "Solarize" else 1
        found = torch.tensor([float(amount(name, m, 20, 17)) for m in range(31)])
        torch.testing.assert_close(found, expected.float() * scale, rtol=1e-5, atol=1e-4)


def test_the_operations_are_those_of_torchvision_and_equally_likely_in_every_round() -> None:
    assert tuple(v2.RandAugment._AUGMENTATION_SPACE) == OPERATIONS
    ids = torch.arange(14_000)
    rounds = [choose_operations(draw, seed=0, epoch=0, indices=ids) for draw in (0, 1)]
    for operations, negative in rounds:
        counts = torch.bincount(operations, minlength=14)
        assert len(counts) == 14
        assert ((counts - 1000) ** 2 / 1000).sum() < 34.5  # 13 degrees of freedom, p = 0.001
        assert 6800 < negative.sum() < 7200
    same = (rounds[0][0] == rounds[1][0]).sum()
    assert 880 < same < 1120  # 1 in 14: rounds are independent


def test_two_rounds_are_one_after_the_other() -> None:
    images = make_images()
    expected = images
    for draw in (0, 1):
        expected = apply_operations(expected, *choose_operations(draw, seed=3, epoch=4, indices=IDS), 9)
    assert torch.equal(rand_augment(images, 2, 9, seed=3, epoch=4, indices=IDS), expected)


def test_images_of_one_batch_get_different_operations_and_the_input_stays() -> None:
    images = make_images(1).expand(64, -1, -1, -1).contiguous()
    result = rand_augment(images, 2, 9, seed=0, epoch=0, indices=IDS)
    assert len(result.unique(dim=0)) > 40
    assert torch.equal(images, make_images(1).expand(64, -1, -1, -1))
