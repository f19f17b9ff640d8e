"""Cross-entropy with labels that some samples lack."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lqkd.losses.task import task_loss, task_losses

LOGITS = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 2, 1, 1, 3])
SOME = torch.tensor([0, -1, 2, -100, 1, -7])


def loss_and_gradient(labels: torch.Tensor, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    logits = LOGITS.clone().requires_grad_()
    loss = task_loss(logits, labels, label_smoothing=smoothing)
    return loss, torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_where_all_have_labels_it_is_pytorchs_own_bit_for_bit(smoothing: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    expected = F.cross_entropy(logits, LABELS, label_smoothing=smoothing)
    loss, gradient = loss_and_gradient(LABELS, smoothing)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_mean_over_the_samples_with_a_label(smoothing: float) -> None:
    loss, gradient = loss_and_gradient(SOME, smoothing)
    known = SOME >= 0
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS[known], SOME[known], label_smoothing=smoothing))
    assert not gradient[~known].any()
    assert gradient[known].abs().sum(1).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_any_label_it_is_zero_and_so_is_its_gradient(smoothing: float) -> None:
    loss, gradient = loss_and_gradient(torch.full((6,), -1), smoothing)
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(6, 5))


def test_a_label_out_of_range_makes_it_nan_instead_of_an_error_of_the_device() -> None:
    assert loss_and_gradient(torch.tensor([0, 1, 5, 1, 1, -1]))[0].isnan()


def test_the_losses_of_samples_are_zero_and_not_counted_without_a_label() -> None:
    losses, counted = task_losses(LOGITS, SOME)
    torch.testing.assert_close((losses.sum() / counted.sum()), loss_and_gradient(SOME)[0])
    assert counted.tolist() == [1, 0, 1, 0, 1, 0]
