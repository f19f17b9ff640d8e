"""What features of held-out rows teach during a training: what of a teacher's channels the student can predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lqkd.modules.distillation import Distillation
from lqkd.modules.held_out import WINDOW, Learning, kept_batch, part_of
from lqkd.modules.term import DistillationTerm
from lqkd.quantization.modes import evaluating
from lqkd.regularizers import ExplainedVariance
from lqkd.regularizers.explained import Asked

_WHAT = "to say what of features can be predicted"


class HeldOutFeatures:
    """The held-out rows of one term: asks its teacher and the student about some of them now and then.

    All processes hold the same of them, ask about a part each, and count together.

    Args:
        module: attached to a Trainer, before its first step.
        term: with a regularizer :class:`~lqkd.regularizers.ExplainedVariance` for every pair of taps.
        batch: what the task takes, of these rows, on the device.
    """

    def __init__(self, module: Learning, term: DistillationTerm, batch: Any) -> None:
        self._module, self._term, self._batch = module, term, batch
        self._size = len(module.inputs(batch))

    @property
    def regularizers(self) -> list[ExplainedVariance]:
        """Of every pair of taps."""
        return [cast(ExplainedVariance, one) for one in self._term.regularizers]

    def before_batch(self) -> None:
        """Ask both networks, where it is time."""
        first = self.regularizers[0]  # which keeps the time for all
        asked = first.asked
        if asked.batches % first.every == 0:
            count = min(first.rows if asked.rows else WINDOW, self._size)
            self._ask(torch.arange(asked.rows, asked.rows + count) % self._size)
            asked.rows += count
        asked.batches += 1

    @torch.no_grad()
    def _ask(self, rows: Tensor) -> None:
        trainer, regularizers = self._module.trainer, self.regularizers
        device = self._module.device
        sums = [torch.zeros_like(regularizer.counts, device=device) for regularizer in regularizers]
        with evaluating(self._module.student), evaluating(self._term):
            for some in rows.split(regularizers[0].rows):
                mine = some[trainer.global_rank :: trainer.world_size]
                if len(mine):
                    pairs = zip(regularizers, self._pairs(mine), strict=True)
                    counted = [regularizer.counted(*pair, mine % 2) for regularizer, pair in pairs]
                    sums = [total + of_part for total, of_part in zip(sums, counted, strict=True)]
        for regularizer, total in zip(regularizers, sums, strict=True):
            regularizer.take(cast(Tensor, trainer.strategy.reduce(total, reduce_op="sum")))

    def _pairs(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is compared of some rows, of every pair of taps."""
        module, teacher = self._module, self._term.teachers[0]
        batch = part_of(self._batch, rows, self._size)
        inputs = module.inputs(batch)
        with module.trainer.precision_plugin.forward_context():
            student = module.passes.of_student(inputs)
            of_teacher = module.passes.ask_teachers(module.passes.teacher_inputs(batch, inputs), {teacher})[teacher]
            return self._term.compared(of_teacher, student)


def explained(distillation: Distillation) -> dict[str, DistillationTerm]:
    """By name, the terms whose features held-out rows judge."""
    return {name: term for name, term in distillation.terms() if isinstance(term.regularizer, ExplainedVariance)}


def kept_features(module: Learning) -> dict[str, HeldOutFeatures]:
    """The held-out rows of every such term, kept on the device of a module that is before its first step.

    Raises:
        UsageError: when samples of the batches cannot be told apart.
    """
    found = {}
    for name, term in explained(module.distillation).items():
        with isolate_rng(), module.distillation.told(name):
            found[name] = HeldOutFeatures(module, term, kept_batch(module, _WHAT))
    return found


def asked_of(distillation: Distillation) -> dict[str, dict[str, Any]]:
    """By term, how far it has come and what it has counted, for a checkpoint."""
    return {
        name: vars(cast(ExplainedVariance, term.regularizer).asked)
        | {"counts": [one.counts.cpu() for one in _of(term)]}
        for name, term in explained(distillation).items()
        if all(one.channels is not None for one in _of(term))
    }


def _of(term: DistillationTerm) -> list[ExplainedVariance]:
    return [cast(ExplainedVariance, one) for one in term.regularizers]


def restore_asked(distillation: Distillation, asked: Mapping[str, Mapping[str, Any]]) -> None:
    """Go on where a checkpoint was, which :func:`asked_of` has told."""
    for name, term in explained(distillation).items():
        known = dict(asked.get(name, {}))
        for one, counts in zip(_of(term), known.pop("counts", []), strict=False):
            one.counts = counts
        cast(ExplainedVariance, term.regularizer).asked = Asked(**known)
