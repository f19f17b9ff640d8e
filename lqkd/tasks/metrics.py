"""Metrics of classes, of samples or pixels that have a label, and what always giving the same answer reaches."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lqkd.losses.task import task_losses


class SameAnswer(Metric):
    """What a network would reach that always gives the same answer, counted as the task's metrics are."""

    name: str
    """What it does, for a message."""


class CrossEntropy(MeanMetric):
    """The mean cross-entropy of logits (B, C) with those of the labels (B,) that are not negative."""

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        super().update(*task_losses(logits, labels))


class Perplexity(CrossEntropy):
    """The exponential of the mean cross-entropy."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(CrossEntropy):
    """The mean cross-entropy in bits, a byte of text."""

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        return super().compute() / (math.log(2) * self.bytes_per_token)


class Accuracy(MeanMetric):
    """The share of labels (B,), of those that are not negative, that logits (B, C) put first."""

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        super().update((logits.argmax(dim=1) == labels).float(), (labels >= 0).float())


class LargestClass(SameAnswer):
    """The share of the largest class among the labels (B,) that are not negative; NaN without any."""

    counts: Tensor
    name = "always naming the largest class"

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(1), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        counts = torch.zeros(logits.shape[1], device=logits.device)
        self.counts = self.counts + counts.index_add_(0, labels.clamp_min(0), (labels >= 0).float())

    def compute(self) -> Tensor:
        return self.counts.max() / self.counts.sum()


class Frequencies(SameAnswer):
    """The cross-entropy of the labels (B,) that are not negative with their own frequencies; NaN without any."""

    counts: Tensor
    name = "always giving each token the probability that it has"

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        counts = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
        known = (labels >= 0) & (labels < logits.shape[1])
        self.counts = self.counts + counts.index_add_(0, labels.masked_fill(~known, 0), known.double())

    def compute(self) -> Tensor:
        shares = self.counts / self.counts.sum()
        return -torch.special.xlogy(shares, shares).sum()
