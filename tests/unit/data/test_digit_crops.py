from __future__ import annotations

import pytest
import torch

from lqkd.data import DigitCrops, Digits
from lqkd.data.digit_drawing import load_material


@pytest.fixture(scope="module")
def crops() -> DigitCrops:
    data = DigitCrops(seed=3)
    data.setup("fit")
    return data


def test_every_run_draws_the_same_images(crops: DigitCrops) -> None:
    again = DigitCrops(seed=4).load()
    assert crops.load().train_images.equal(again.train_images)
    assert crops.image_shape == (3, 20, 20) == tuple(again.test_images.shape[1:])
    assert (len(again.train_images), len(again.test_images)) == (4000, 1795)


def test_no_digit_that_is_tested_with_is_one_of_training(crops: DigitCrops) -> None:
    material = load_material()
    assert not set(material.train.tolist()) & set(material.test.tolist())
    images, digits = crops.load(), Digits().load()
    assert torch.equal(images.test_labels.bincount(), 5 * digits.test_labels.bincount())
    assert torch.equal(images.test_labels[:359], digits.test_labels)
    assert torch.equal(images.train_labels[:1438], digits.train_labels)


def test_mean_and_std_are_those_of_the_images_outside_the_test_part(crops: DigitCrops) -> None:
    channels = (crops.load().train_images.double() / 255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(crops.mean, dtype=torch.float64), channels.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(crops.std, dtype=torch.float64), channels.std(1), atol=1e-4, rtol=0)


def test_a_digit_can_be_seen_before_what_is_behind_it(crops: DigitCrops) -> None:
    from lqkd.data.digit_crops import _image

    ink = torch.zeros(8, 8)
    ink[1:7, 3:5] = 1.0
    grey = [torch.full((3, 40, 40), 100, dtype=torch.uint8)]
    faint, strong = (_image([0.0] * 7 + [contrast], ink, grey) for contrast in (0.0, 0.999))
    assert (int(faint.max()) - 100, int(strong.max()) - 100) == (60, 155)  # 255 is as bright as it gets
    assert int(faint.min()) == 100
