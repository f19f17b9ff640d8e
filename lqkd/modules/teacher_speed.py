"""Making the teacher of a training fast, as far as its answers stay what they are."""

from __future__ import annotations

from collections.abc import Collection

import torch
from lightning.pytorch.utilities import rank_zero_info

from lqkd.errors import first_line
from lqkd.modules.distilling import Distilling
from lqkd.modules.references import validation_of, value_of
from lqkd.modules.terms import teacher_label
from lqkd.tasks.values import shown
from lqkd.teachers import FrozenTeacher

LARGEST_LOSS = 0.001
"""bfloat16 must move the metric on the validation images by less than this: 0.1 points, or this part of an error."""


@torch.no_grad()
def accelerate(module: Distilling, known: list[bool] | None) -> list[bool]:
    """Let every teacher of ``module`` answer through a faster copy of its network.

    Args:
        module: the module, attached to a Trainer, before its first step.
        known: which teachers compute in bfloat16, where an earlier run has found that out; None to find out.

    Returns:
        Which teachers compute in bfloat16, the same on all ranks.
    """
    chosen: list[bool] = []
    for name, teacher in module.named_teachers.items():
        taps = module.passes.taps_of_teachers.get(name)
        untouched = () if taps is None else taps.paths  # their outputs are compared with the student's
        label = teacher_label(name, module.named_teachers)
        bf16 = _bf16(module, teacher, untouched, label) if known is None else known[len(chosen)]
        teacher.accelerate(bf16=bf16, untouched=untouched)
        chosen.append(bf16)
    return chosen


def _bf16(module: Distilling, teacher: FrozenTeacher, untouched: Collection[str], name: str) -> bool:
    """Whether ``teacher`` is to answer in bfloat16."""
    wanted = bool(module.trainer.strategy.broadcast(teacher.wants_bf16(module.device)))
    if not wanted or teacher.precision == "bf16":
        return wanted
    limit = module.trainer.limit_val_batches
    loader = validation_of(module)
    if loader is None or getattr(module.trainer, "fast_dev_run", False) or limit == 0:
        rank_zero_info(f"the {name} stays in fp32: there are no validation images to check bf16 with")
        return False
    teacher.accelerate(bf16=False, untouched=untouched)
    before, _ = value_of(module, teacher, loader, limit)
    teacher.accelerate(bf16=True, untouched=untouched)
    try:
        after, _ = value_of(module, teacher, validation_of(module), limit)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a network that converts to float32 within, say
        rank_zero_info(f"the {name} stays in fp32: in bf16 it cannot answer ({first_line(error)})")
        return False
    if before is None or after is None:  # no sample has a label, which measure() refuses
        return False
    moved, metric = abs(after - before), module.task.monitor
    if module.task.mode == "min":  # an error, on a scale of its own
        moved /= max(abs(before), torch.finfo(torch.float32).tiny)
    if moved < LARGEST_LOSS:
        rank_zero_info(f"the {name} computes in bf16: its {metric} moves by {moved:.2%} only")
        return True
    rank_zero_info(
        f"the {name} stays in fp32: in bf16 its {metric} would move from {shown(metric, before, 2)} to "
        f"{shown(metric, after, 2)}"
    )
    return False
