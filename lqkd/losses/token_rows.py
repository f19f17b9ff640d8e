"""Divergences of predictions over many classes, as of the tokens of a vocabulary, a few rows at a time."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.probabilities import log_sum_exp, times_log
from lqkd.losses.settings import check, positive
from lqkd.utils.pieces import rows_at_once


class RowDivergence(DistillationLoss):
    """A divergence of ``softmax(z / tau)``, row by row, times ``tau**2``, averaged over rows.

    The map is (N,), one number a row, since there is no memory for several maps of the size of logits (N, V) of a large
    vocabulary. Rows are taken a few at a time, together with the student's gradient, the only tensor of that size that
    is kept; :class:`lqkd.losses.HintonKL` and all that has a map (N, V) keep several. How many rows are taken at once
    changes values by rounding alone. The gradient can be differentiated by what it is weighed with, as looking ahead
    does, and not by the student once more.

    Args:
        temperature: tau > 0.
        top_k: the divergence is that of the k classes that the teacher puts first, and of all others as one class; null
            for all classes. It is never more than that of all classes.

    Raises:
        UsageError: when an argument is out of range; in training when logits are no rows, or have no more classes than
            ``top_k``.
    """

    kind: MapKind = "samples"
    compares_predictions = True

    def __init__(self, temperature: float = 1.0, top_k: int | None = None) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise UsageError(f"top_k={top_k!r} is not possible: it must be at least 1, or null")
        self.top_k = top_k

    @abstractmethod
    def rows(self, log_p: Tensor, log_q: Tensor, target: Tensor | None) -> Tensor:
        """(n,) divergences, differentiable in ``log_q``.

        Args:
            log_p, log_q: (n, K) logarithms of the predictions of teacher and student.
            target: (n,) probability that the teacher gives to the label; None without labels.
        """

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        if student.ndim != 2:
            raise UsageError(
                f"logits of shape {tuple(student.shape)} are not possible with {type(self).__name__}: rows (N, V) are "
                "needed"
            )
        if self.top_k is not None and student.shape[-1] <= self.top_k:
            raise UsageError(
                f"top_k={self.top_k} is not possible with {student.shape[-1]} classes: less, or null for all of them"
            )
        if labels is None and self.needs_labels:
            raise UsageError(f"labels=None is not possible with {type(self).__name__}: it looks at the true class")
        student = student if torch.is_grad_enabled() else student.detach()
        value: Tensor = _InPieces.apply(self, teacher.detach(), student, labels)
        return value

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()

    def piece(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        """(n,) of logits (n, V) in float32 or float64."""
        log_p = (teacher / self.temperature).log_softmax(dim=-1)
        log_q = (student / self.temperature).log_softmax(dim=-1)
        target = None
        if labels is not None:
            target = log_p.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1).exp()
            target = torch.where(labels < 0, log_p.amax(dim=1).exp(), target)
        if self.top_k is not None:
            first = log_p.topk(self.top_k, dim=1).indices
            log_p, log_q = _with_rest(log_p, first), _with_rest(log_q, first)
        return self.rows(log_p, log_q, target) * self.temperature**2


class ForwardKL(RowDivergence):
    """``tau**2 * KL(p_T || p_S)``, row by row: :class:`lqkd.losses.HintonKL` for large vocabularies.

    Hinton et al. (arXiv 1503.02531), section 2. Logits (N, V), map (N,).

    Args:
        temperature: tau > 0.
        top_k: how many of the teacher's first classes are told apart; null for all, see :class:`RowDivergence`.

    Raises:
        UsageError: when an argument is out of range; in training when there are no more classes than ``top_k``.

    Examples:
        >>> import torch
        >>> loss = ForwardKL(temperature=4.0)
        >>> divergence = loss(torch.tensor([[4.0, 0.0, 0.0]]), torch.zeros(1, 3))
        >>> divergence.shape, loss.reduce(divergence)
        (torch.Size([1]), tensor(1.9726))
    """

    def rows(self, log_p: Tensor, log_q: Tensor, target: Tensor | None) -> Tensor:
        return _kl(log_p, log_q)


class ReverseKL(RowDivergence):
    """``tau**2 * KL(p_S || p_T)``, row by row: it keeps the student from what the teacher thinks impossible.

    Gu et al., "MiniLLM" (arXiv 2306.08543), eq. 1, token by token on given text and not on text of the student's.
    Logits (N, V), map (N,). It is infinite where the teacher alone rules a class out by a logit of -inf: use
    :class:`ForwardKL` or :class:`JensenShannon` there.

    Args:
        temperature: tau > 0.
        top_k: how many of the teacher's first classes are told apart; null for all, see :class:`RowDivergence`.

    Raises:
        UsageError: when an argument is out of range; in training when there are no more classes than ``top_k``.

    Examples:
        >>> import torch
        >>> ReverseKL()(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
        tensor([0.4338])
    """

    def rows(self, log_p: Tensor, log_q: Tensor, target: Tensor | None) -> Tensor:
        return _kl(log_q, log_p)


class JensenShannon(RowDivergence):
    """``tau**2 * (beta * KL(p_T || m) + (1 - beta) * KL(p_S || m))`` with ``m = beta * p_T + (1 - beta) * p_S``.

    The generalised Jensen-Shannon divergence of Agarwal et al. (arXiv 2306.13649), eq. 1, on given text. It is bounded,
    by log 2 at beta 0.5 and temperature 1. Logits (N, V), map (N,).

    Args:
        beta: between 0 and 1, without these; small values have the gradient of the forward, large ones that of the
            reverse Kullback-Leibler divergence.
        temperature: tau > 0.
        top_k: how many of the teacher's first classes are told apart; null for all, see :class:`RowDivergence`.

    Raises:
        UsageError: when an argument is out of range; in training when there are no more classes than ``top_k``.

    Examples:
        >>> import torch
        >>> JensenShannon()(torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 20.0]]))
        tensor([0.6931])
    """

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, top_k: int | None = None) -> None:
        super().__init__(temperature, top_k)
        check("it lies between 0 and 1, and is neither", lambda x: 0 < x < 1, beta=beta)
        self.beta = beta

    def rows(self, log_p: Tensor, log_q: Tensor, target: Tensor | None) -> Tensor:
        own = torch.tensor([self.beta, 1 - self.beta], dtype=log_p.dtype, device=log_p.device).log()
        nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)
        least = torch.finfo(log_p.dtype).min / 2  # in place of infinity, whose gradient is none
        log_m = torch.logaddexp(log_p.masked_fill(nowhere, least) + own[0], log_q.masked_fill(nowhere, least) + own[1])
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)


class CAKLD(RowDivergence):
    """``tau**2 * (gamma * KL(p_S || p_T) + (1 - gamma) * KL(p_T || p_S))``: reverse where the teacher is sure.

    The confidence-aware Kullback-Leibler divergence of Du et al., "BitDistiller" (arXiv 2402.10631), made for language
    models of 2 and 3 bits. There gamma is one number: the probability that the teacher gives to the token that follows,
    on average over the training text. Without a number each row has its own. Logits (N, V), map (N,). It is infinite
    where the teacher alone rules a class out by a logit of -inf: use :class:`ForwardKL` or :class:`JensenShannon`.

    Args:
        confidence: gamma, between 0 and 1; null for the probability that the teacher, softened, gives to the label of
            each row, or to its own first class where a row has none.
        temperature: tau > 0.
        top_k: how many of the teacher's first classes are told apart; null for all, see :class:`RowDivergence`.

    Raises:
        UsageError: when an argument is out of range; in training when there are no more classes than ``top_k``,
            or no labels and no ``confidence``.

    Examples:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> CAKLD(confidence=1.0)(teacher, torch.zeros(1, 2)), CAKLD(confidence=0.0)(teacher, torch.zeros(1, 2))
        (tensor([0.4338]), tensor([0.3278]))
    """

    def __init__(self, confidence: float | None = None, temperature: float = 1.0, top_k: int | None = None) -> None:
        super().__init__(temperature, top_k)
        if confidence is not None:
            check("it lies between 0 and 1, or is null", lambda x: 0 <= x <= 1, confidence=confidence)
        self.confidence = confidence
        self.needs_labels = confidence is None

    def rows(self, log_p: Tensor, log_q: Tensor, target: Tensor | None) -> Tensor:
        gamma = target if self.confidence is None else self.confidence
        assert gamma is not None, "forward has seen to it"
        return gamma * _kl(log_q, log_p) + (1 - gamma) * _kl(log_p, log_q)


class _InPieces(torch.autograd.Function):
    """The divergences of rows and, where the student is trained, their gradient at its logits."""

    @staticmethod
    def forward(ctx: Any, loss: RowDivergence, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        trained = ctx.needs_input_grad[2]
        kept = torch.empty_like(student) if trained else None
        values = []
        step = rows_at_once(student)
        for start in range(0, max(1, len(student)), step):
            here = slice(start, start + step)
            with torch.autocast(student.device.type, enabled=False), torch.set_grad_enabled(trained):
                logits = _wide(student[here]).detach().requires_grad_(trained)
                value = loss.piece(_wide(teacher[here]), logits, None if labels is None else labels[here])
                if kept is not None:
                    kept[here] = torch.autograd.grad(value.sum(), logits)[0]
            values.append(value.detach())
        if kept is not None:
            ctx.save_for_backward(kept)
        return torch.cat(values).clamp_min(0.0)  # rounding can leave -1e-9

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, None]:
        (kept,) = ctx.saved_tensors
        weight = gradients[0].unsqueeze(1)
        narrow = kept.dtype == torch.float16  # in which a loss that is scaled up would overflow before the product
        return None, None, (weight * kept.float()).to(kept.dtype) if narrow else weight.to(kept.dtype) * kept, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row of (n, K), (n,); what p thinks impossible, as padding of a vocabulary, counts nothing."""
    return times_log(log_p.exp(), log_p - log_q).sum(dim=1)


def _with_rest(log_p: Tensor, first: Tensor) -> Tensor:
    """Logarithms (n, k + 1) of the probabilities of the classes ``first``, (n, k), and of all others together."""
    rest = log_sum_exp(log_p.scatter(1, first, -torch.inf), dim=1)
    return torch.cat((log_p.gather(1, first), rest), dim=1)
