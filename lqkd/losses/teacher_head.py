"""The classes that a frozen teacher's own head finds in features, its own or a student's."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lqkd.errors import UsageError


class TeacherHead:
    """The rest of a detector behind one of its modules, up to the logits of the classes.

    It holds the network without being a module, so that a loss which has it keeps none of its parameters.

    Args:
        network: a frozen detector with a method ``class_logits_from(tap)``, which gives a function from features
            (B, C, H, W) of the module ``tap`` to logits (B, classes, H, W), such as :class:`lqkd.models.SmallFCOS`.
        tap: name of the module whose output the features are.
        loss: the name of the loss, for messages.

    Raises:
        UsageError: when the network has no such method, or the module is not on the way to the classes of one level.
    """

    def __init__(self, network: nn.Module, tap: str, loss: str) -> None:
        if not hasattr(network, "class_logits_from"):
            raise UsageError(
                f"{loss} asks the head of a detector, which {type(network).__name__} has not: its teacher must be a "
                "SmallFCOS, a TorchvisionDetector, or a network with a method class_logits_from(tap)"
            )
        self.network, self.tap = cast(Any, network), tap
        self.network.class_logits_from(tap)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of features (B, C, H, W), differentiable in them."""
        own = next(self.network.parameters())
        return cast(Tensor, self.network.class_logits_from(self.tap)(features.to(own.device)))
