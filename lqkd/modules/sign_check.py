"""Saying once that a quantizer clips negative values, which its first batch did not have."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from lqkd.data.reading import apart
from lqkd.modules.references import warn
from lqkd.quantization.calibrate import without_compiler
from lqkd.quantization.modes import evaluating
from lqkd.quantization.quantizers import LSQPowerOfTwo
from lqkd.quantization.signs import NegativeWatch

_BATCHES = 8
"""Training batches that are looked at where no validation looks at all of its own."""


class SignCheck:
    """Looks at the first validation of a training or, without one, at some batches at the end of its first epoch.

    Training steps themselves are not watched.
    """

    def __init__(self) -> None:
        self._watch: NegativeWatch | None = None
        self._done = False

    def begin_validation(self, network: nn.Module) -> None:
        """Watch ``network`` until :meth:`end_validation`, unless it is compiled."""
        if not self._done and all(module._compiled_call_impl is None for module in network.modules()):
            self._watch = NegativeWatch(network)

    def end_validation(self, module: Any) -> None:
        """Say what was seen."""
        if self._watch is not None:
            self._tell(module, self._watch)

    def end_epoch(self, module: Any) -> None:
        """Where nothing was watched, look at training batches."""
        if self._done:
            return
        network, trainer = module.product(), module.trainer
        watch = NegativeWatch(network)
        if watch:
            with (
                torch.no_grad(),
                evaluating(network),
                without_compiler(network),
                apart(trainer.train_dataloader) as loader,
                trainer.precision_plugin.forward_context(),
            ):
                for batch in islice(loader, _BATCHES):
                    module.inputs(trainer.strategy.batch_to_device(batch, dataloader_idx=0)).call(network)
        self._tell(module, watch)

    def _tell(self, module: Any, watch: NegativeWatch) -> None:
        self._watch, self._done = None, True
        found = watch.close()
        if not found:
            return
        name, lowest = min(found.items(), key=lambda item: item[1])
        layer, _, kind = name.rpartition(".")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        of_shifts = isinstance(module.product().get_submodule(name), LSQPowerOfTwo)
        family = "lsq_power_of_two" if of_shifts else "lsq"
        setting = (
            f"add a rule with match={layer!r} and activation_quantizer={{name: {family}, signed: true}}"
            if kind == "input_quantizer"
            else f"set quantization.residual_quantizer={{name: {family}, signed: true}}"
        )
        warn(
            module,
            f"quantizer {name!r}{more} turns negative values (down to {lowest:.3g}) into zero, since its first batch "
            f"had none and its grid begins there: {setting}, or begin with a batch that has some",
        )
