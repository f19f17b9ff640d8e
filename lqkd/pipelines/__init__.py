"""From networks and data to a low-bit student that can be taken away, in one call.

Imported when first used: ``import lqkd`` needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqkd.utils.lazy import offers

if TYPE_CHECKING:  # what __getattr__ imports, for type checkers
    from lqkd.pipelines.distillation import distill as distill
    from lqkd.pipelines.distilled import Distilled as Distilled
    from lqkd.pipelines.from_folder import distill_folder as distill_folder
    from lqkd.pipelines.task import guess_task as guess_task

_WHERE = {
    "Distilled": "lqkd.pipelines.distilled",
    "distill": "lqkd.pipelines.distillation",
    "distill_folder": "lqkd.pipelines.from_folder",
    "guess_task": "lqkd.pipelines.task",
}

__all__ = [*_WHERE]  # noqa: PLE0604
__getattr__, __dir__ = offers(__name__, _WHERE)
