"""Fresh batch norm statistics for the low-bit student that is validated and saved."""

from __future__ import annotations

from itertools import islice

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.callbacks.finishing import Finisher
from lqkd.callbacks.progress import below_the_bar
from lqkd.data.reading import apart
from lqkd.errors import UsageError
from lqkd.modules.base import TaskModule
from lqkd.modules.stages import in_stage
from lqkd.quantization.batchnorm import reestimate_batchnorm


class BatchNormReestimation(Finisher):
    """Replaces the running statistics by their average over training batches at the end of each epoch.

    At few bits weights flip between grid points from step to step, and the exponential averages of training describe a
    network that is no longer there (Nagel et al., arXiv 2203.11086, section 4.1). The validation of the epoch, where
    there is one, and every file that is saved have the new statistics; so does an epoch that ``trainer.max_steps`` cuts
    short. What is saved within an epoch costs ``batches`` forward passes more for it; training goes on with its own
    statistics, which the file holds beside the new ones.

    Args:
        batches: number of training batches, augmented as in training; at most an epoch's.

    Raises:
        UsageError: when batches is less than 1, at construction, or validation runs within an epoch.
    """

    turn = 1

    def __init__(self, batches: int = 50) -> None:
        if batches < 1:
            raise UsageError(f"batches={batches} is not possible: batch norm is re-estimated from at least one batch")
        self.batches = batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_validation_within_epochs(trainer, type(self).__name__)

    def finish(self, trainer: Trainer, module: TaskModule) -> None:
        network = module.product()
        if not any(isinstance(norm, _BatchNorm) for norm in network.modules()):  # they may have been folded
            return
        with apart(trainer.train_dataloader) as loader, in_stage(trainer, RunningStage.TRAINING):
            total = int(min(self.batches, trainer.num_training_batches))  # which may be infinite
            batches = below_the_bar(trainer, islice(loader, self.batches), "re-estimating batch norm", total)
            on_device = (trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in batches)
            inputs = (module.inputs(batch) for batch in on_device)
            reestimate_batchnorm(network, inputs, lambda model, given: given.call(model))
        for norm in (m for m in network.modules() if isinstance(m, _BatchNorm)):
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:
                    mean = trainer.strategy.reduce(statistic, reduce_op="mean")
                    assert isinstance(mean, Tensor)
                    statistic.copy_(mean)


def refuse_validation_within_epochs(trainer: Trainer, callback: str) -> None:
    """Refuse settings with which ``callback`` would have to read training batches while an epoch is being read.

    Raises:
        UsageError: when validation runs within epochs.
    """
    if trainer.val_check_interval != 1.0:
        raise UsageError(
            f"trainer.val_check_interval={trainer.val_check_interval} is not possible with {callback}, which reads "
            "training batches before a validation: use 1.0"
        )
