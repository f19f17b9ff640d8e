from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lqkd.data.augment_mix import choose_partners, cut_boxes, mix, quantiles, shares
from lqkd.utils.counter_rng import STREAM_CUTMIX_X, STREAM_CUTMIX_Y, integers

IDS = torch.arange(3000)


def pair(count: int = 3000, height: int = 10, width: int = 7) -> tuple[Tensor, Tensor]:
    """Images of ones and partners of zeros: a mixed pixel is the image's own share."""
    return torch.ones(count, 2, height, width), torch.zeros(count, 2, height, width)


def mixed(mixup: float, cutmix: float, probability: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return mix(*pair(), mixup=mixup, cutmix=cutmix, probability=probability, seed=seed, epoch=0, indices=IDS)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    found = shares(quantiles((alpha,), IDS.device)[0], seed=0, epoch=0, indices=IDS).numpy()
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_mixup_is_the_equation_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    images, partners = (torch.randn(64, 3, 5, 6, generator=generator) for _ in range(2))
    share = shares(quantiles((0.4,), IDS.device)[0], seed=7, epoch=1, indices=IDS[:64])[:, None, None, None]
    expected = share * images + (1 - share) * partners
    result, found = mix(images, partners, mixup=0.4, cutmix=0, probability=1, seed=7, epoch=1, indices=IDS[:64])
    torch.testing.assert_close(result, expected)
    assert torch.equal(found, share.flatten())


def test_the_share_of_cutmix_is_counted_in_pixels() -> None:
    result, share = mixed(0, 1)
    assert set(result.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(share, result[:, 0].sum(dim=(1, 2)) / 70)
    assert torch.equal(result[:, 0], result[:, 1])


def test_the_boxes_of_cutmix_are_those_of_torchvision() -> None:
    share = shares(quantiles((1.0,), IDS.device)[0], seed=0, epoch=0, indices=IDS[:200])
    centre_y = integers(0, 0, IDS[:200], STREAM_CUTMIX_Y, 10).tolist()
    centre_x = integers(0, 0, IDS[:200], STREAM_CUTMIX_X, 7).tolist()
    found = cut_boxes(share, 10, 7, seed=0, epoch=0, indices=IDS[:200])
    for row, (own, y, x) in enumerate(zip(share.tolist(), centre_y, centre_x, strict=True)):
        half = 0.5 * math.sqrt(1 - own)  # as torchvision.transforms.v2.CutMix computes them
        tall, wide = int(half * 10), int(half * 7)
        expected = torch.zeros(10, 7)
        expected[max(0, y - tall) : min(10, y + tall), max(0, x - wide) : min(7, x + wide)] = 1
        assert torch.equal(found[row, 0], expected)


def test_with_both_each_has_half_of_the_images() -> None:
    result, share = mixed(1, 1)
    cut = ((result == 0) | (result == 1)).all(dim=(1, 2, 3))
    assert 1380 < cut.sum() < 1620
    torch.testing.assert_close(share, result[:, 0].mean(dim=(1, 2)))


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_the_given_share_of_images_is_mixed_and_the_others_stay(mixup: float, cutmix: float) -> None:
    result, share = mixed(mixup, cutmix, probability=0.25)
    touched = (result != 1).any(dim=(1, 2, 3))
    assert 600 < touched.sum() < 850  # CutMix has rectangles without a pixel, too
    assert bool((share[~touched] == 1).all())


def test_partners_are_all_others_equally_often_and_never_the_sample_itself() -> None:
    candidates = torch.arange(0, 40, 2)
    ids = torch.full((19_000,), 6)
    drawn = torch.cat([choose_partners(candidates, seed=0, epoch=epoch, indices=ids[:1]) for epoch in range(1900)])
    counts = torch.bincount(drawn, minlength=40)[candidates]
    assert counts[3] == 0
    others = counts[torch.arange(20) != 3]
    assert ((others - 100) ** 2 / 100).sum() < 42.3  # 18 degrees of freedom, p = 0.001
    assert torch.isin(drawn, candidates).all()


def test_an_only_sample_is_its_own_partner() -> None:
    assert choose_partners(torch.tensor([5]), seed=0, epoch=0, indices=torch.tensor([5])).tolist() == [5]
