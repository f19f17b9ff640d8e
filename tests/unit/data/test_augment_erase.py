from __future__ import annotations

import torch
from torchvision.transforms.v2 import functional as reference

from lqkd.data.augment_erase import erased_boxes, random_erasing

IDS = torch.arange(20_000)


def test_an_erased_image_equals_torchvision_with_the_same_rectangle() -> None:
    images = torch.randn(64, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    boxes = torch.stack(erased_boxes(12, 9, seed=1, epoch=2, indices=IDS[:64]), dim=1).tolist()
    expected = torch.stack(
        [
            reference.erase(image, *box, v=torch.zeros(3, 1, 1))  # top, left, height, width
            for image, box in zip(images, boxes, strict=True)
        ]
    )
    assert torch.equal(random_erasing(images, 1.0, seed=1, epoch=2, indices=IDS[:64]), expected)


def test_areas_and_ratios_lie_in_the_range_of_the_paper_and_rectangles_within_the_image() -> None:
    top, left, tall, wide = erased_boxes(200, 200, seed=0, epoch=0, indices=IDS)
    share = tall * wide / 200**2
    assert 0.018 < share.min() < 0.025  # 0.02, but for rounded sides
    assert 0.32 < share.max() < 0.334
    assert abs(share.mean() - 0.175) < 0.005
    ratio = tall / wide
    assert 0.29 < ratio.min() < 0.31
    assert 3.2 < ratio.max() < 3.4
    assert abs(ratio.log().mean()) < 0.02  # log(0.3) and log(3.3) are almost opposite
    assert min(top.min(), left.min()) == 0
    assert max((top + tall).max(), (left + wide).max()) == 200
    assert max(tall.max(), wide.max()) < 200


def test_the_given_share_of_images_is_erased_and_the_others_stay() -> None:
    images = torch.ones(2000, 1, 16, 16)
    erased = random_erasing(images.clone(), 0.25, seed=0, epoch=0, indices=IDS[:2000])
    changed = (erased != images).any(dim=(1, 2, 3))
    assert 420 < changed.sum() < 580
    assert torch.equal(random_erasing(images.clone(), 0.0, seed=0, epoch=0, indices=IDS[:2000]), images)
