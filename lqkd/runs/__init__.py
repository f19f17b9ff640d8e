"""The folder of a run: its settings, checkpoints, tables and summary; reading, resuming and stopping it.

Imported when first used: what tells a mistake about a folder at once needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqkd.utils.lazy import offers

if TYPE_CHECKING:  # what __getattr__ imports, for type checkers
    from lqkd.runs.checkpoint import BestAndLast as BestAndLast
    from lqkd.runs.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from lqkd.runs.logger import RunLogger as RunLogger
    from lqkd.runs.student import from_pretrained as from_pretrained
    from lqkd.runs.student import load_student as load_student
    from lqkd.runs.summary import RunSummary as RunSummary

_WHERE = {
    "AtomicCheckpointIO": "lqkd.runs.checkpoint_io",
    "BestAndLast": "lqkd.runs.checkpoint",
    "RunLogger": "lqkd.runs.logger",
    "RunSummary": "lqkd.runs.summary",
    "from_pretrained": "lqkd.runs.student",
    "load_student": "lqkd.runs.student",
}

__all__ = [*_WHERE]  # noqa: PLE0604
__getattr__, __dir__ = offers(__name__, _WHERE)
