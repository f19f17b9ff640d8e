from __future__ import annotations

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from lqkd.data.resized_crop import ATTEMPTS, crop_draws, random_window

SAMPLES = 4000


def windows(height: int, width: int, scale: tuple[float, float] = (0.08, 1.0), epoch: int = 0) -> torch.Tensor:
    """(SAMPLES, 4) float: top, left, height, width."""
    draws = crop_draws(seed=0, epoch=epoch, indices=torch.arange(SAMPLES)).tolist()
    return torch.tensor([random_window(height, width, scale, draw) for draw in draws], dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (3, 400), (900, 7), (30, 30)])
def test_every_window_lies_within_the_image(height: int, width: int) -> None:
    top, left, window_height, window_width = windows(height, width).T
    assert min(top.min(), left.min()) >= 0
    assert min(window_height.min(), window_width.min()) >= 1
    assert (top + window_height).max() <= height
    assert (left + window_width).max() <= width


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6), (1.0, 1.0)])
def test_windows_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    image = torch.empty(3, 375, 500)
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(SAMPLES)]
    reference = torch.tensor(drawn, dtype=torch.float64)
    ours = windows(375, 500, scale)
    spread = reference.std(dim=0)
    assert ((ours.mean(dim=0) - reference.mean(dim=0)).abs() <= 0.08 * spread + 0.5).all()
    assert ((ours.std(dim=0) - spread).abs() <= 0.08 * spread + 0.5).all()


def test_the_numbers_of_a_sample_are_its_own_and_the_epochs() -> None:
    together = crop_draws(seed=0, epoch=1, indices=torch.arange(10))
    assert together.shape == (10, ATTEMPTS, 4)
    assert torch.equal(crop_draws(seed=0, epoch=1, indices=torch.tensor([7])), together[7:8])
    assert not torch.equal(crop_draws(seed=0, epoch=2, indices=torch.arange(10)), together)
    assert not torch.equal(crop_draws(seed=1, epoch=1, indices=torch.arange(10)), together)
    assert len(together.flatten().unique()) == together.numel()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (50, 400), (400, 50)])
def test_windows_have_the_shape_of_what_they_become_give_or_take_a_third(height: int, width: int) -> None:
    draws = crop_draws(seed=0, epoch=0, indices=torch.arange(SAMPLES)).tolist()
    drawn = [random_window(height, width, (0.3, 0.9), draw, aspect=2.0) for draw in draws]
    ratios = torch.tensor([window[3] / window[2] for window in drawn], dtype=torch.float64) / 2.0
    assert 0.73 < ratios.min() <= ratios.max() < 1.37
    assert all(top >= 0 and left >= 0 and top + h <= height and left + w <= width for top, left, h, w in drawn)
