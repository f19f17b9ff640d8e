"""How good a network is, for a ranking of its layers: for a classifier here, for any other task from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Judge(ABC):
    """Says how good a network is on batches, and how far it is from the float network."""

    metric: str
    """The name of what is measured, ``acc`` say."""
    distance: str
    """The name of what lies between two networks, ``KL`` say."""

    @abstractmethod
    def answer(self, network: nn.Module, batch: Any) -> Any:
        """What a network says to a batch, on its device."""

    @abstractmethod
    def samples(self, batch: Any, answer: Any) -> int:
        """How many samples of a batch count, of which the float network says ``answer``."""

    @abstractmethod
    def judge(self, answers: Iterable[tuple[Any, Any, Any]]) -> tuple[float, float, float]:
        """Loss, distance and metric, over all samples of (batch, answer, answer of the float network)."""


class Classifier(Judge):
    """Cross-entropy, KL(float || network) in nats and top-1 accuracy on batches (inputs, labels (B,) int64).

    Examples:
        >>> judge, batch = Classifier(), (torch.eye(2), torch.tensor([0, 1]))
        >>> answer = judge.answer(nn.Identity(), batch)
        >>> judge.judge([(batch, answer, answer)])[1:]
        (0.0, 1.0)
    """

    metric, distance = "acc", "KL"

    def answer(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The logarithm of the class probabilities (B, C)."""
        logits: Tensor = network(batch[0])
        return logits.float().log_softmax(dim=-1)

    def samples(self, batch: tuple[Tensor, Tensor], answer: Tensor) -> int:
        return len(batch[1])

    def judge(self, answers: Iterable[tuple[Any, Any, Any]]) -> tuple[float, float, float]:
        sums, samples = torch.zeros(3, dtype=torch.float64), 0
        for (_, labels), found, expected in answers:
            loss = F.nll_loss(found, labels, reduction="sum")
            kl = F.kl_div(found, expected, reduction="sum", log_target=True)
            right = (found.argmax(dim=-1) == labels).sum()
            sums += torch.stack([loss.double(), kl.double(), right.double()]).cpu()
            samples += len(labels)
        loss_mean, kl_mean, accuracy = (sums / samples).tolist()
        return loss_mean, kl_mean, accuracy
