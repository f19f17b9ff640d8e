"""What ``export`` would refuse, told before hours of training instead of after them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lqkd.errors import first_line
from lqkd.export import MISSING
from lqkd.export.deploy import check_deployable
from lqkd.export.gguf_file import check_gguf_grids, of_gguf
from lqkd.models.calls import Inputs
from lqkd.modules.base import TaskModule
from lqkd.quantization.wrappers import unwrapped


class ExportCheck(Callback):
    """Tells before a training what ``export`` would refuse after it, where its packages are installed."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        inputs = pl_module.example_inputs() if isinstance(pl_module, TaskModule) else None
        if inputs is None or MISSING is not None:
            return
        from lqkd.export.nbits import check_nbits_grids, of_nbits  # which need onnx

        try:
            student = unwrapped(pl_module.product())
            if of_gguf(student):
                check_gguf_grids(student)
            elif of_nbits(student):
                check_nbits_grids(student)
            else:
                check_deployable(pl_module.product(), Inputs.joined([inputs, inputs]))
        except Exception as error:  # of any type: a look ahead must not end the training
            rank_zero_warn(f"export will refuse this student: {first_line(error)}")
