"""Which of the batch's samples the other network is looking at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.directions import unit
from lqkd.losses.matching import channels, check_layout, only_pair, pooled
from lqkd.losses.precision import in_full_precision
from lqkd.losses.settings import check, positive


class ContrastiveRepresentation(DistillationLoss):
    """InfoNCE between both networks' embeddings, with the other samples of the batch as negatives, both ways.

    ``-(log softmax_j(u_i . v_j / tau)[i] + log softmax_j(v_i . u_j / tau)[i]) / 2``, averaged over samples i,
    where ``u = W_S f_S / ||W_S f_S||`` and ``v = W_T f_T / ||W_T f_T||`` are embeddings of the features, averaged over
    positions or tokens, or of the logits, by two trained linear layers.

    The objective is that of contrastive representation distillation (Tian et al., arXiv 1910.10699), a bound on the
    mutual information of the two representations, but not its estimator: that one discriminates noise-contrastively
    against thousands of negatives from a memory bank, for which it needs the index of each sample, and leaves out
    samples of the same class. Here the estimator is InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) within the
    batch, all other samples being negatives.

    The map (B,) is non-negative, but not zero where teacher and student agree; it is 0 for a batch of one.
    The batch is that of one process.

    Args:
        dimension: length of the embeddings, >= 1.
        temperature: tau > 0.

    Raises:
        UsageError: when an argument is out of range, features are no vectors, token sequences or feature maps, or
            :meth:`connect` has not been called.

    Examples:
        >>> loss = ContrastiveRepresentation(dimension=8)
        >>> teacher, student = torch.rand(4, 16, 8, 8), torch.rand(4, 6, 8, 8)
        >>> loss.connect([teacher.shape], [student.shape])
        >>> loss(teacher, student).shape
        torch.Size([4])
    """

    compares = "features"
    kind: MapKind = "samples"

    def __init__(self, dimension: int = 128, temperature: float = 0.07) -> None:
        super().__init__()
        check("it must be 1 or greater", lambda x: x >= 1, dimension=dimension)
        self.dimension = dimension
        self.temperature = positive("temperature", temperature)
        self.embed_teacher: nn.Linear | None = None
        self.embed_student: nn.Linear | None = None

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        t, s = only_pair("ContrastiveRepresentation", teacher, student)
        for shape in (t, s):
            check_layout("ContrastiveRepresentation", shape)
        self.embed_teacher = nn.Linear(channels(t), self.dimension)
        self.embed_student = nn.Linear(channels(s), self.dimension)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embed_teacher is None or self.embed_student is None:
            raise UsageError("ContrastiveRepresentation has no layers yet: call connect with the shapes first")
        v = unit(self.embed_teacher(pooled("ContrastiveRepresentation", teacher)), 1)
        u = unit(self.embed_student(pooled("ContrastiveRepresentation", student)), 1)
        scores = u @ v.t() / self.temperature  # (B, B): student's sample, teacher's sample
        return -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()) / 2

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
