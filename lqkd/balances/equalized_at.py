"""Where a balance measures the gradients of the losses: at the student's logits, or in the weights of a layer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.balances.norms import (
    LossGradients,
    any_of,
    gradients_or_none,
    not_shared,
    output_gradients,
    weight_gradients,
)
from lqkd.errors import UsageError
from lqkd.quantization import quantizers
from lqkd.quantization.layers import QUANTIZED_LAYERS
from lqkd.quantization.modes import evaluating
from lqkd.quantization.quantizers import Quantizer

_LAYERS: tuple[Any, ...] = tuple(QUANTIZED_LAYERS)


class AtLogits:
    """The student's logits: no pass through the network, and only for losses that compare logits."""

    def measure(self, losses: dict[str, Tensor], output: Tensor | None) -> LossGradients:
        """See :func:`~lqkd.balances.norms.output_gradients`."""
        assert output is not None, "Balance asks for it"
        return output_gradients(losses, output)


class AtWeights:
    """The weights of a module of the student, without its quantizers' parameters unless it is a part of a quantizer.

    The student is held outside the module tree, and the module is looked up by its name at every step: whatever takes
    its place, as SyncBatchNorm does, is what is measured.

    Args:
        layer: name of the module, as :meth:`torch.nn.Module.named_modules` gives it; None for the last layer with
            weights, in the order in which the student runs them, that every compared tensor depends on.
    """

    def __init__(self, layer: str | None) -> None:
        self.layer = layer
        self.settled = False  # whether all losses are known to reach it
        self._student: nn.Module | None = None

    def bind(self, student: nn.Module) -> None:
        """Remember the student that is trained, its quantizers in place.

        Raises:
            UsageError: when the module does not exist, with names that are near, or has no weights to train.
        """
        self._student = student
        if self.layer is None:
            return
        names = [name for name, _ in student.named_modules(remove_duplicate=False) if name]
        if self.layer not in names:
            near = difflib.get_close_matches(self.layer, names, n=3, cutoff=0.4) or names[:3]
            raise UsageError(
                f"balance shared={self.layer!r} does not exist in the student: near names are {', '.join(near)}"
            )
        if not self._weights():
            raise UsageError(
                f"balance shared={self.layer!r} has no weights to train: choose a module of the student that has some"
            )

    @torch.enable_grad()
    def settle(self, run: Callable[[], tuple[Tensor, Sequence[Tensor]]]) -> None:
        """Find the layer where none was named, and refuse one that a loss does not reach, before the first batch.

        Args:
            run: passes images through the student, and returns its logits and the tensors that distillation compares.
                Only what depends on what is looked at.

        Raises:
            UsageError: when a loss does not reach the module, or there is no layer that every compared tensor needs.
        """
        assert self._student is not None, "bind comes first"
        weights = {
            name: module.weight
            for name, module in self._student.named_modules()
            if isinstance(module, _LAYERS) and isinstance(getattr(module, "weight", None), nn.Parameter)
        }
        order: list[str] = []
        handles = [
            self._student.get_submodule(name).register_forward_hook(lambda *call, name=name: order.append(name))
            for name in weights
        ]
        try:
            with evaluating(self._student):
                logits, compared = run()
        finally:
            for handle in handles:
                handle.remove()
        if self.layer is None:
            self.layer = _last({name: weights[name] for name in order}, logits, compared)
        else:
            self._check(logits, compared)
        self.settled = True

    def measure(self, losses: dict[str, Tensor], output: Tensor | None) -> LossGradients:
        """See :func:`~lqkd.balances.norms.weight_gradients`."""
        if self._student is None or self.layer is None:
            raise UsageError("a balance that measures gradients in weights needs to be shown the student: call bind")
        return weight_gradients(losses, self._weights(), self.layer)

    def _weights(self) -> list[nn.Parameter]:
        assert self._student is not None
        assert self.layer is not None
        module = self._student.get_submodule(self.layer)
        inside = [] if isinstance(module, Quantizer) else quantizers(module)
        others = {id(p) for name in inside for p in module.get_submodule(name).parameters()}
        return [p for p in module.parameters() if p.requires_grad and id(p) not in others]

    def _check(self, logits: Tensor, compared: Sequence[Tensor]) -> None:
        assert self.layer is not None
        weights = self._weights()
        task = gradients_or_none(logits.sum(), weights)
        distill = [gradients_or_none(tensor.sum(), weights) for tensor in compared]
        if not any(t is not None and any_of(ds) for t, *ds in zip(task, *distill, strict=True)):
            reaches = {"task": any_of(task), "distill": any(any_of(found) for found in distill)}
            raise not_shared(self.layer, reaches)


def _last(weights: dict[str, Tensor], logits: Tensor, compared: Sequence[Tensor]) -> str:
    """The name of the last of these weights that all these tensors depend on."""
    reached = [gradients_or_none(tensor.sum(), [*weights.values()]) for tensor in (logits, *compared)]
    shared = [name for name, *found in zip(weights, *reached, strict=True) if all(g is not None for g in found)]
    if not shared:
        raise UsageError(
            "balance shared=null finds no layer of the student that the task loss and everything that is compared "
            "depend on: name one (shared), choose deeper taps, or another balance"
        )
    return shared[-1]
