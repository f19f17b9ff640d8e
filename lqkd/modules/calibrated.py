"""The student as GPTQ alone makes it, for as long as it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lqkd.data.reading import apart
from lqkd.errors import UsageError
from lqkd.modules.distilling import Distilling
from lqkd.modules.stages import in_stage
from lqkd.quantization import gptq
from lqkd.quantization.layers import QuantizedLayer


@contextmanager
def calibrated(module: Distilling) -> Iterator[None]:
    """Inside the block the student has the codes of GPTQ, calibrated on ``module.gptq_batches`` training batches.

    It is then what it was, to the last bit. Processes calibrate together, each on its own batches.

    A line says how many layers have such codes, and how many batches an epoch has where that is fewer.

    Raises:
        UsageError: when there is nothing that GPTQ can calibrate.
    """
    trainer, student = module.trainer, module.student
    state = {name: tensor.clone() for name, tensor in student.state_dict().items() if isinstance(tensor, Tensor)}
    try:
        with (
            apart(trainer.train_dataloader) as loader,
            in_stage(trainer, RunningStage.TRAINING),
            trainer.precision_plugin.forward_context(),
        ):
            few = islice(loader, module.gptq_batches)
            on_device = (trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in few)
            inputs = [module.inputs(batch) for batch in on_device]
            try:
                changed = gptq(student, inputs, lambda network, given: given.call(network))
            except UsageError as error:
                raise UsageError(f"gptq_batches={module.gptq_batches} is not possible: {error}") from None
        rank_zero_info(_told(len(changed), student, len(inputs), module.gptq_batches))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in student.state_dict().items():
                if name in state:
                    tensor.copy_(state[name])


def _told(changed: int, student: nn.Module, taken: int, wanted: int) -> str:
    layers = [layer for layer in student.modules() if isinstance(layer, QuantizedLayer) and layer.weight_quantizer]
    batches = f"{taken} training batches" + (
        f", all that an epoch has, of gptq_batches={wanted}" if taken < wanted else ""
    )
    rest = "" if changed == len(layers) else "; the others, which are not linear or share a weight, are rounded"
    return f"GPTQ calibrates {changed} of {len(layers)} quantised layers on {batches}{rest}"
