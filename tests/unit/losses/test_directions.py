"""Vectors without their length."""

from __future__ import annotations

import pytest
import torch

from lqkd.losses.directions import deviation, rescaled, unit


def vectors() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_unit_vector_and_its_gradient_survive_any_scale(scale: float) -> None:
    x, weights = (scale * vectors()).requires_grad_(), torch.linspace(-1, 1, 5)
    direction = unit(x, 1)
    torch.testing.assert_close(direction, torch.nn.functional.normalize(vectors(), dim=1))
    (direction * weights).sum().backward()
    plain = vectors().double().requires_grad_()
    (plain / plain.norm(dim=1, keepdim=True) * weights).sum().backward()
    torch.testing.assert_close(x.grad.double() * scale, plain.grad, rtol=1e-4, atol=1e-6)


def test_a_zero_vector_has_no_direction_and_no_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    direction = unit(x, 1)
    direction.sum().backward()
    assert (direction == 0).all()
    assert (x.grad == 0).all()


def test_products_of_deviations_are_correlations() -> None:
    x = vectors().double()
    found = deviation(x, 1) @ deviation(x, 1).t()
    torch.testing.assert_close(found, torch.corrcoef(x))


def test_rounding_errors_are_no_deviation() -> None:
    noise = 6.2e-5 * torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])  # the distance of neighbours of 1000 in float32
    x = (1000 + noise).requires_grad_()
    assert x.unique().numel() == 2
    found = deviation(x, 1)
    (found * torch.arange(5)).sum().backward()
    assert (found == 0).all()
    assert (x.grad == 0).all()


def test_the_largest_of_the_rescaled_is_one_along_the_axes() -> None:
    torch.testing.assert_close(rescaled(vectors(), 1).abs().amax(1), torch.ones(4))
    torch.testing.assert_close(rescaled(vectors()).abs().max(), torch.tensor(1.0))
