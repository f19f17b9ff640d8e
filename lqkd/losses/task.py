"""The task's own loss: cross-entropy with labels that some samples may lack."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -1
"""The label of a sample that has none; every negative number means the same."""

_IGNORED = -100  # what the losses of PyTorch leave out


def task_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, 0-dim and differentiable in the logits: the mean over the samples of this process with a label.

    See :func:`mean_of_labelled` for a batch without any, and for labels that are out of range. DDP averages the
    gradients of processes, and accumulation those of batches, however many of their samples have labels: where only a
    part has, a labelled sample counts for more among few of them.

    Args:
        logits: (B, C) float.
        labels: (B,) int64; negative where a sample has none.
        targets: (B, C) float class probabilities, which then say all; None for the labels.
        label_smoothing: share of the probability that is spread over all classes, 0 <= e < 1.
        weights: (C,) float of the classes: the mean is weighted by them; with ``targets`` the sum of the weighted
            losses is divided by B, as PyTorch does. None for 1 each.
    """
    if targets is not None:
        return F.cross_entropy(logits, targets, weights, label_smoothing=label_smoothing)
    return mean_of_labelled(
        lambda known: F.cross_entropy(logits, known, weights, label_smoothing=label_smoothing), labels, logits.shape[1]
    )


def mean_of_labelled(loss: Callable[[Tensor], Tensor], labels: Tensor, classes: int) -> Tensor:
    """A loss of PyTorch, 0-dim, as its mean over the samples that have a label.

    Where no sample has one it is 0, with a gradient of 0: every parameter stays in the graph, as DDP needs. It is NaN
    where a label is out of range, on every device, for the watch over the loss to notice. Nothing waits for the device.

    Args:
        loss: the mean loss as a function of labels (B,), which leaves out those that are -100.
        labels: (B,) int64; negative where a sample has none.
        classes: their number.
    """
    without, beyond = labels < 0, labels >= classes
    value = loss(labels.masked_fill(without | beyond, _IGNORED))
    return value.masked_fill(without.all(), 0.0).masked_fill(beyond.any(), float("nan"))


def task_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sample, (B,), 0 where it has no label, and 1.0 or 0.0 for whether it has one, (B,).

    Args:
        logits: (B, C) float.
        labels: (B,) int64, less than C; negative where a sample has none.
    """
    without = labels < 0
    losses = F.cross_entropy(logits, labels.masked_fill(without, _IGNORED), reduction="none")
    return losses, (~without).to(losses.dtype)
