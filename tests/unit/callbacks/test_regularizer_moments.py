"""Moments of many batches that are taken together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lqkd.callbacks.regularizer.moments import Moments


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Weights (B, 1) and divergence maps (B, 5)."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 1, generator=generator) + 0.5, torch.rand(size, 5, generator=generator)) for size in sizes
    ]


def test_moments_are_those_of_each_batch_whatever_waits_together() -> None:
    together, one_by_one = Moments(), Moments()
    parts = batches(8, 8, 8, 3)
    for weights, divergence in parts:
        together.add(0, weights, divergence, lambda: 1.4)
        one_by_one.add(0, weights, divergence, lambda: 1.4)
        one_by_one.by_tap()
    (found,), (alone,) = together.by_tap(), one_by_one.by_tap()
    assert torch.equal(found, alone), "a training that is cut and resumed takes them in other groups"
    for row, (weights, divergence) in zip(found.double(), parts, strict=True):
        w, d = weights.double().expand(-1, 5), divergence.double()
        squares, at_bound = (w - w.mean()).square().sum(), (w >= 0.98 * 1.4).sum()
        numbers = [w.numel(), w.mean(), squares, w.min(), w.max(), (w * d).sum(), d.sum(), at_bound]
        torch.testing.assert_close(
            row, torch.tensor([float(number) for number in numbers]).double(), rtol=1e-5, atol=1e-5
        )


def test_taps_are_kept_apart_and_go_on_from_what_was_saved() -> None:
    first, second = batches(4, 2)
    moments = Moments()
    moments.add(0, *first, lambda: None)
    moments.add(1, *second, lambda: None)
    again = Moments(moments.by_tap())
    again.add(1, *second, lambda: None)
    assert [rows[:, 0].tolist() for rows in again.by_tap()] == [[20.0], [10.0, 10.0]]


@pytest.mark.parametrize(("elements", "kept"), [(2**16, False), (2**14, True)])
def test_a_large_map_does_not_wait(elements: int, kept: bool) -> None:
    moments = Moments()
    divergence = torch.ones(elements)
    moments.add(0, torch.ones(()), divergence, lambda: None)
    held = any(divergence.data_ptr() == d.data_ptr() for waiting in moments._waiting.values() for _, d in waiting)
    assert held == kept
