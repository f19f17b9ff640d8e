"""Any loss of logits, on standardised ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss
from lqkd.losses.directions import deviation
from lqkd.losses.logits import HintonKL
from lqkd.losses.precision import in_full_precision


class Standardized(DistillationLoss):
    """Another loss of logits, on the z-scores ``(z - mean(z)) / std(z)`` of every sample, of teacher and student.

    Sun et al., "Logit Standardization in Knowledge Distillation", arXiv 2403.01427. The student is then free in the
    mean and the scale of its logits. Mean and (population) standard deviation are those of the sample's C logits;
    equal logits have z-scores 0 and get no gradient. Logits of -inf, of classes that are impossible, stay what they are
    and do not count. The temperature is that of the inner loss; the paper's is 2, with
    a weight of 9. Map, kind and reduction are the inner loss'; so a regularizer looks at the z-scores.

    Args:
        loss: a loss that compares logits; null for ``HintonKL(temperature=2)``.

    Raises:
        UsageError: when the loss does not compare logits.

    Examples:
        >>> import torch
        >>> loss = Standardized(HintonKL(temperature=2.0))
        >>> teacher = torch.tensor([[4.0, 2.0, 0.0]])
        >>> loss.reduce(loss(teacher, 3 * teacher - 1)) < 1e-6  # mean and scale of the logits do not count
        tensor(True)
    """

    def __init__(self, loss: DistillationLoss | None = None) -> None:
        super().__init__()
        self.loss = HintonKL(temperature=2.0) if loss is None else loss
        if self.loss.compares != "logits":
            raise UsageError(
                f"loss={type(self.loss).__name__} is not possible in Standardized: it compares {self.loss.compares}, "
                "but must compare logits"
            )
        self.kind, self.needs_labels = self.loss.kind, self.loss.needs_labels
        self.compares_predictions, self.temperature = self.loss.compares_predictions, self.loss.temperature

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.loss(_z_scores(teacher), _z_scores(student), labels)  # type: ignore[no-any-return]

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.pair(_z_scores(teacher), _z_scores(student))

    def reduce(self, divergence: Tensor) -> Tensor:
        return self.loss.reduce(divergence)


def _z_scores(logits: Tensor) -> Tensor:
    impossible = logits == -torch.inf
    possible = (~impossible).sum(-1, keepdim=True).clamp_min(1)
    mean = logits.masked_fill(impossible, 0.0).sum(-1, keepdim=True) / possible
    z = deviation(torch.where(impossible, mean, logits), -1) * possible.to(logits.dtype).sqrt()
    return z.masked_fill(impossible, -torch.inf)
