"""Fewer bits step by step: a bit-width schedule that runs during training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization import QuantizedLayer, Quantizer
from lqkd.quantization.products import OPERANDS, AttentionProducts
from lqkd.quantization.recipe import FLOAT_BITS, parse_bits


@dataclass
class Stage:
    """A number of bits and when to leave it; exactly one of the three conditions is set.

    Attributes:
        bits: weight and activation bits, e.g. ``w8a8``.
        until_epoch: leave at the start of this epoch, counted from 0.
        until_step: leave before this step of the student, counted from 0.
        patience: leave after so many validations without a better value of the task's metric than before in this stage.
    """

    bits: str
    until_epoch: int | None = None
    until_step: int | None = None
    patience: int | None = None


class BitWidthScheduler(Callback):
    """Trains with the bits of each stage in turn and ends with those of the recipe, e.g. 8 -> 4 -> 2.

    The recipe says what the student is to become; the stages come before it. A switch re-fits every quantizer that
    changes, forgets its optimizer state, which belongs to another grid, and forgets the best checkpoint, whose accuracy
    was reached with more bits. The event is logged as ``bits/weight`` and ``bits/activation``.

    Args:
        stages: the stages in order.
        match: names of the layers that follow the schedule, as a glob; null for all whose bits the recipe's ``bits``
            decides, which leaves out the first and last layer and layers with rules of their own. The products of an
            attention, ``NAME.products``, follow in their activation bits.
        refit: how a quantizer gets its grid at a switch. ``clip`` keeps the range that it clips to (as PACT and APoT do
            by learning the range). ``mse`` searches the range with the least squared error on the weights and, for
            activations, on the next batch. ``data`` fits it to the same as at the start, by its family's own rule.

    Raises:
        UsageError: when a stage is not possible, at construction, or does not fit the recipe, before the first batch.
    """

    def __init__(
        self, stages: list[Stage], match: str | None = None, refit: Literal["clip", "mse", "data"] = "mse"
    ) -> None:
        if not stages:
            raise UsageError(
                "stages=[] is not possible: a bit-width schedule has at least one stage before the recipe's"
            )
        if refit not in ("clip", "mse", "data"):
            raise UsageError(f"refit={refit!r} is not possible: it is clip, mse or data")
        for stage in stages:
            _check(stage)
        self.stages = stages
        self.match = match
        self.refit = refit
        self.current = 0
        self._target: dict[str, tuple[int, int]] = {}
        self._best = float("-inf")
        self._stalled = 0

    @property
    def state_key(self) -> str:
        """Differs between schedulers, several of which may run side by side."""
        return self._generate_state_key(stages=[asdict(stage) for stage in self.stages], match=self.match)

    def state_dict(self) -> dict[str, Any]:
        return {"current": self.current, "best": self._best, "stalled": self._stalled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.current, self._best, self._stalled = (state_dict[key] for key in ("current", "best", "stalled"))

    @property
    def finished(self) -> bool:
        """Whether the student has the recipe's bits."""
        return self.current == len(self.stages)

    @property
    def warnings(self) -> list[str]:
        """What there is to say of a training that has ended, also of one that ended in an earlier process."""
        if self.finished:
            return []
        return [f"Training ended in stage {self.stages[self.current].bits} of the bit-width schedule, before its last."]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, DistillModule):
            raise UsageError(f"BitWidthScheduler needs a DistillModule: {type(pl_module).__name__} has no bits")
        waiting = next((each for each in self.stages if each.patience is not None), None)
        if stage == "fit" and waiting is not None and not trainer.enable_validation:
            raise UsageError(
                f"stage {waiting.bits!r} has patience={waiting.patience}, but there is no validation to wait for: use "
                "until_epoch or until_step"
            )
        if self._target:
            return
        self._target = self._layers(pl_module)
        pl_module.scheduled_layers |= set(self._target)
        if stage == "fit":
            # Before a checkpoint is loaded, which brings its own bits.
            self._apply(pl_module, fresh=True)

    def _layers(self, module: DistillModule) -> dict[str, tuple[int, int]]:
        """Name of each layer that follows the schedule, with the bits that the recipe gives it."""
        own = parse_bits(module.quantization.bits)
        layers = {x.name: (x.weight_bits, x.activation_bits) for x in module.coverage.layers if not x.is_float}
        layers |= {f"{x.where}.products".lstrip("."): (own[0], x.bits) for x in module.coverage.products}
        chosen = {
            name: bits
            for name, bits in layers.items()
            if (bits == own if self.match is None else fnmatchcase(name, self.match))
        }
        if not chosen:
            raise UsageError(f"match={self.match!r} of the bit-width schedule matches no quantised layer")
        taken = sorted(set(chosen) & module.scheduled_layers)
        if taken:
            raise UsageError(f"two bit-width schedules change layer {taken[0]!r}: give them disjoint match patterns")
        return chosen

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = self._stage()
        while stage is not None and (
            (stage.until_epoch is not None and trainer.current_epoch >= stage.until_epoch)
            or (stage.patience is not None and self._stalled >= stage.patience)
        ):
            self._advance(trainer, pl_module)
            stage = self._stage()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        stage = self._stage()
        while stage is not None and stage.until_step is not None and trainer.global_step >= stage.until_step:
            self._advance(trainer, pl_module)
            stage = self._stage()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillModule), "setup refuses others"
        measured = trainer.callback_metrics.get(pl_module.task.monitor)
        if trainer.sanity_checking or measured is None:
            return
        value = float(measured)
        improved = not math.isnan(value) and (math.isinf(self._best) or pl_module.task.better(value, self._best))
        self._best = value if improved else self._best
        self._stalled = 0 if improved else self._stalled + 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for warning in self.warnings:
            rank_zero_warn(warning)

    def _stage(self) -> Stage | None:
        return None if self.finished else self.stages[self.current]

    def _advance(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DistillModule)
        self.current += 1
        self._best, self._stalled = float("-inf"), 0
        changed = self._apply(module, fresh=False)
        for optimizer in trainer.optimizers:
            for quantizer in changed:
                for parameter in quantizer.parameters():
                    optimizer.state.pop(parameter, None)
        for checkpoint in trainer.checkpoint_callbacks:
            forget = getattr(checkpoint, "forget_best", None)  # as of lqkd.runs.BestAndLast
            if forget is not None:
                forget()
        bits = self.stages[self.current].bits if not self.finished else module.quantization.bits
        rank_zero_info(f"bit-width schedule: {bits} from step {trainer.global_step}, epoch {trainer.current_epoch}")
        weight, activation = parse_bits(bits)
        for logger in trainer.loggers:
            logger.log_metrics({"bits/weight": weight, "bits/activation": activation}, step=trainer.global_step)

    @torch.no_grad()
    def _apply(self, module: DistillModule, fresh: bool) -> list[Quantizer]:
        """Give every scheduled quantizer the bits of the current stage; return those that changed."""
        layers = dict(module.student.named_modules())
        changed = []
        for name, target in self._target.items():
            bits = target if self.finished else parse_bits(self.stages[self.current].bits)
            for quantizer, wanted in _with_bits(layers[name], bits):
                if quantizer is None or quantizer.bits == wanted:
                    continue
                quantizer.set_bits(wanted)
                if self.refit != "clip" and not fresh:
                    quantizer.forget(mse=self.refit == "mse")
                changed.append(quantizer)
        return changed


def _with_bits(part: nn.Module, bits: tuple[int, int]) -> Iterable[tuple[Quantizer | None, int]]:
    """The quantizers of a layer or of attention's products, each with its own of weight and activation bits."""
    if isinstance(part, AttentionProducts):
        return [(getattr(part, name), bits[1]) for name in OPERANDS]
    assert isinstance(part, QuantizedLayer)
    return zip((part.weight_quantizer, part.input_quantizer), bits, strict=True)


def _check(stage: Stage) -> None:
    if FLOAT_BITS in parse_bits(stage.bits):
        raise UsageError(f"stage bits={stage.bits!r} is not possible: a stage has 1 to 8 bits")
    given = {k: v for k, v in asdict(stage).items() if k != "bits" and v is not None}
    if len(given) != 1:
        raise UsageError(
            f"stage {stage.bits!r} has {', '.join(given) or 'no end'}: give exactly one of until_epoch, until_step or "
            "patience"
        )
    ((name, value),) = given.items()
    if value < 1:
        raise UsageError(f"stage {stage.bits!r} has {name}={value}: it must be at least 1")
