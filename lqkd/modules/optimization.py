"""Several optimizers, one backward pass: the steps of both players under manual optimization."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.modules.base import TaskModule
from lqkd.modules.divergence import LossWatch, diverged
from lqkd.modules.losses import Losses
from lqkd.modules.optimizer_checks import GradientsAreThere
from lqkd.modules.step_length import GradientLength, measured_together
from lqkd.modules.steps import total_steps


class SharedBackward:
    """What manual optimization must do itself when several optimizers share one backward pass.

    Accumulation, the length of the step, clipping, the steps of all optimizers and of their schedules, and how much of
    the training is done. Lightning counts the first optimizer's steps alone.

    Attributes:
        optimizer_names: what a mistake calls each optimizer.
        length: how long the student's step is made.

    Args:
        module: whose optimizers these are.
        gradient_clip_val: largest gradient norm of each optimizer's parameters, without the steps of blocks; None for
            no clipping.
        accumulate_grad_batches: batches whose gradients are averaged for one step, >= 1.

    Raises:
        UsageError: when one of them is out of range.
    """

    def __init__(self, module: TaskModule, gradient_clip_val: float | None, accumulate_grad_batches: int) -> None:
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise UsageError(f"gradient_clip_val={gradient_clip_val!r} is not possible: it must be > 0, or null")
        if accumulate_grad_batches < 1:
            raise UsageError(f"accumulate_grad_batches={accumulate_grad_batches!r} is not possible: it must be >= 1")
        module.automatic_optimization = False
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches
        self.optimizer_names: list[str] = []
        self.length = GradientLength("sum", ())
        self._watch = LossWatch()
        self._module = module
        self._total_steps: int | None = None
        self._samples = 0  # of the group of batches that is accumulated; 1 without accumulation

    def count_steps(self) -> int | None:
        """Steps of the whole training, None when it has no end; :meth:`progress` tells parts of it from then on."""
        self._total_steps = total_steps(self._module.trainer, self.accumulate_grad_batches)
        return self._total_steps

    def progress(self, of: str) -> float:
        """The part of the training's steps that is done, 0 to 1, for ``of``, which needs to know it.

        Raises:
            UsageError: when the training has no end.
        """
        if self._total_steps is None:
            raise UsageError(f"{of} needs to know the end of training: set trainer.max_epochs or max_steps")
        return min(1.0, self._module.global_step / max(1, self._total_steps))

    def take(self, losses: Losses, batch: Any, batch_idx: int) -> None:
        """Everything from the losses of a batch to the step, where the batch is the last of its group.

        Raises:
            DivergenceError: when the loss is not finite on a process.
            UsageError: when an optimizer's step asks for gradients a second time.
        """
        self._watch.ask(losses.loss)
        # Gradients are summed over samples and divided at the end: exact for groups and batches of unequal size.
        samples = len(losses.outputs.inputs) if self.accumulate_grad_batches > 1 else 1
        self.length.add(losses.by_name, samples)
        last_of_group = self._backward(losses.loss, samples, batch_idx)
        if not self._watch.finite():
            self._module.task.check_batch(losses.outputs.student.output, batch)
            named = {"the loss": losses.loss, **losses.by_name, **losses.penalties}
            diverged(self._module, named, self._module.trained(), losses.outputs.inputs)
        if last_of_group:
            self._step()

    def _backward(self, loss: Tensor, samples: int, batch_idx: int) -> bool:
        """Accumulate the gradient of one batch, times ``samples``, and say whether it is the last of a group."""
        trainer = self._module.trainer
        last_of_group = (batch_idx + 1) % self.accumulate_grad_batches == 0 or trainer.is_last_batch
        strategy = trainer.strategy
        waits = not last_of_group and isinstance(strategy, ParallelStrategy)
        with strategy.block_backward_sync() if waits else nullcontext():  # type: ignore[attr-defined]
            self._module.manual_backward(loss * samples if self.accumulate_grad_batches > 1 else loss)
        self._samples += samples
        return last_of_group

    def _step(self) -> None:
        """Step every optimizer and its schedule with the gradient of a group of batches."""
        accumulates = self.accumulate_grad_batches > 1
        # DDP averages gradients over ranks, whose numbers of samples may differ by one: all divide by their mean.
        summed = torch.tensor(float(self._samples), device=self._module.device)
        samples_per_rank = self._module.trainer.strategy.reduce(summed, reduce_op="mean") if accumulates else summed
        counted = self._optimizers(use_pl_optimizer=True)[0]
        plain = self._optimizers(use_pl_optimizer=False)
        closures: list[GradientsAreThere] = []
        for name, optimizer in zip(self.optimizer_names, plain, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if accumulates:
                torch._foreach_div_([p.grad for p in parameters], samples_per_rank)
            if not closures:  # the student's
                self.length.apply(samples_per_rank)
            if self.gradient_clip_val is not None:
                together = measured_together(self._module, parameters)
                nn.utils.clip_grad_norm_(together, self.gradient_clip_val)
            closures.append(GradientsAreThere(name, optimizer, parameters))
        counted.step(closures[0])  # Lightning counts this one: global_step is the number of student steps
        for optimizer, closure in zip(plain[1:], closures[1:], strict=True):
            optimizer.step(closure)
        for optimizer in plain:
            optimizer.zero_grad(set_to_none=True)
        self._samples = 0
        self.step_schedules("step")

    def _optimizers(self, use_pl_optimizer: bool) -> list[Any]:
        optimizers = self._module.optimizers(use_pl_optimizer=use_pl_optimizer)
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def step_schedules(self, interval: str) -> None:
        """Step the schedules that count in ``step`` or in ``epoch``."""
        for config in self._module.trainer.lr_scheduler_configs:
            if config.interval == interval:
                config.scheduler.step()  # type: ignore[call-arg]  # Schedule refuses ReduceLROnPlateau
