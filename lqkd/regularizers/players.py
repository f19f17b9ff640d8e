"""Players: what the regularizer wants. Each puts a price on every element of the divergence map.

phi minimises ``mean(w * price) + guard(w)``. The price of a cooperative player is the divergence itself: it shares the
student's aim. An adversarial one pays the negative divergence. One that looks ahead pays for what the distillation
gradient does to the task.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.settings import positive, share
from lqkd.utils.reduction import mean_over_batch


class Player(nn.Module, ABC):
    """``price(divergence, alignment)`` for every element of the map, and the mean size of what is priced.

    Examples:
        >>> class Relative(Player):
        ...     def price(self, divergence, alignment):
        ...         return divergence / divergence.mean(), torch.ones(())
        >>> Relative().price(torch.tensor([1.0, 3.0]), None)
        (tensor([0.5000, 1.5000]), tensor(1.))
    """

    maximises: ClassVar[bool] = False
    """Whether it may want weights without limit, so that the guard must limit them."""
    needs_alignment: ClassVar[bool] = False
    """Whether it needs to know, for each element, how its gradient agrees with the task's."""
    progress: float | None = None
    """The part of the training that is done, 0 to 1, for a player that depends on it; None for others."""

    @abstractmethod
    def price(self, divergence: Tensor, alignment: Tensor | None) -> tuple[Tensor, Tensor]:
        """Price, in the shape of the map, and its scale, 0-dim; no gradients.

        Args:
            divergence: the map, >= 0, detached, float32.
            alignment: directional derivative of each element of the map along the task's gradient, detached; only for
                a player that needs it. See :func:`alignment`.
        """


class Cooperative(Player):
    """Shares the student's aim: ``price = D``.

    Examples:
        >>> Cooperative().price(torch.tensor([1.0, 3.0]), None)
        (tensor([1., 3.]), tensor(2.))
    """

    def price(self, divergence: Tensor, alignment: Tensor | None) -> tuple[Tensor, Tensor]:
        return divergence, divergence.mean()


class Adversarial(Player):
    """Plays against the student: ``price = -strength * D``, so that weight goes where the student is worst.

    What could shrink the loss is the player that wants it large, which is why it cannot collapse; what could blow it
    up is held by the guard. The strength rises from 0 to 1 along half a cosine, as the gradient reversal of CTKD (Li
    et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, section 3.3) does; here it multiplies the
    price and not the gradient, because Adam would undo a factor on the gradient.

    Args:
        ramp: the part of the training in which the strength rises, 0 to 1.

    Raises:
        UsageError: when the ramp is outside of 0 to 1.

    Examples:
        >>> player = Adversarial(ramp=0.1)
        >>> player.progress = 0.05  # half of the ramp
        >>> player.price(torch.tensor([1.0, 3.0]), None)
        (tensor([-0.5000, -1.5000]), tensor(2.))
    """

    maximises = True

    def __init__(self, ramp: float = 0.1) -> None:
        super().__init__()
        self.ramp = share("ramp", ramp, "player ")
        self.progress = 0.0

    @property
    def strength(self) -> float:
        """0 at the beginning, 1 once the ramp is over."""
        assert self.progress is not None
        if self.progress >= self.ramp:
            return 1.0
        return 0.5 - 0.5 * math.cos(math.pi * self.progress / self.ramp)

    def price(self, divergence: Tensor, alignment: Tensor | None) -> tuple[Tensor, Tensor]:
        return -self.strength * divergence, divergence.mean()


class LookAhead(Player):
    """Weighs up what helps the task: ``price = -a / rms(a)``, a the alignment of each element with the task's gradient.

    A step along the negative gradient of ``sum w_i D_i`` at the student's logits changes the task loss by ``-sum w_i
    a_i`` to first order, with ``a_i = <grad D_i, grad task>``. This is the meta-gradient of learning to reweight (Ren
    et al., arXiv 1803.09050) taken at the logits, where it costs no further pass through the network. The exact form
    takes the step in the student's parameters and differentiates the task loss after it, which costs two more forward
    and backward passes: for small networks. With several processes each looks at its own part of the batch there.

    Args:
        exact: whether to take the step in the parameters instead of at the logits.
        step_size: learning rate of the exact form's step.
        held_out: whether the exact form measures the task on the other half of the batch, if that has two samples at
            least.
        rows: on how many rows of no training batch (``data.init_args.trust_fraction``) the exact form measures the
            task, other ones at each step, as Shu et al. do (arXiv 1902.07379); 0 for the batch.

    Raises:
        UsageError: when an argument is not possible.

    Examples:
        >>> LookAhead().price(torch.tensor([1.0, 3.0]), alignment=torch.tensor([2.0, -2.0]))
        (tensor([-1.,  1.]), tensor(1.))
    """

    maximises = True
    needs_alignment = True

    def __init__(self, exact: bool = False, step_size: float = 0.01, held_out: bool = False, rows: int = 0) -> None:
        super().__init__()
        self.step_size = positive("step_size", step_size, "player ")
        if held_out and not exact:
            raise UsageError(
                "player held_out=true is not possible with exact=false, which looks at each sample's own task"
            )
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise UsageError(f"player rows={rows!r} is not possible: it must be a whole number >= 0")
        if rows and (held_out or not exact):
            raise UsageError(
                f"player rows={rows} is not possible with exact={exact}, held_out={held_out}: the exact form alone "
                "measures the task on other rows, and those of a batch are then not needed"
            )
        self.exact, self.held_out, self.rows = exact, held_out, rows

    def price(self, divergence: Tensor, alignment: Tensor | None) -> tuple[Tensor, Tensor]:
        assert alignment is not None
        size = mean_over_batch(alignment.square()).sqrt().clamp_min(torch.finfo(alignment.dtype).tiny)
        return -alignment / size, torch.ones_like(size)


class HeldOut(Player):
    """Asks what labels of held-out rows say, and pays for no element of a batch: the module trains phi on those rows.

    No short name chooses it, since it is for a regularizer whose place between teacher and student is a prediction:
    :class:`~lqkd.regularizers.HeldOutInterpolation`.

    Examples:
        >>> HeldOut().price(torch.tensor([1.0, 3.0]), None)
        (tensor([0., 0.]), tensor(0.))
    """

    def price(self, divergence: Tensor, alignment: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(divergence), divergence.new_zeros(())


PLAYERS: dict[str, type[Player]] = {
    "cooperative": Cooperative,
    "adversarial": Adversarial,
    "look_ahead": LookAhead,
}
"""Short names accepted where a player is asked for."""


def alignment(divergence: Callable[[Tensor], Tensor], student: Tensor, task_gradient: Tensor) -> Tensor:
    """How each element of a divergence map changes along the task's gradient, in the shape of the map, detached.

    Args:
        divergence: the map as a function of the student's logits.
        student: logits (B, C).
        task_gradient: gradient of the task loss at the logits, (B, C), of each sample on its own scale.

    Examples:
        >>> student = torch.tensor([[1.0, 2.0]])
        >>> alignment(lambda s: (s - 0.5).square(), student, task_gradient=torch.tensor([[1.0, -1.0]]))
        tensor([[ 1., -3.]])
    """
    # The derivative of u -> J^T u along the direction is J times the direction; u is only a place to differentiate at.
    with torch.enable_grad():
        point = student.detach().requires_grad_()
        values = divergence(point)
        anything = torch.zeros_like(values, requires_grad=True)
        (pulled,) = torch.autograd.grad(values, point, anything, create_graph=True)
        (derivative,) = torch.autograd.grad(pulled, anything, task_gradient.detach())
    return derivative
