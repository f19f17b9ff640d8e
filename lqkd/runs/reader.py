"""A run folder or a config, read back: its networks with their weights, and its data on a device."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.calls import Inputs
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.quantization import quantizers
from lqkd.runs.checkpoint_io import read_checkpoint
from lqkd.runs.folder import BEST, CHECKPOINTS, CONFIG, resume_command, run_within
from lqkd.runs.lightning_cli import LqkdCLI, forget_weights
from lqkd.runs.provenance import check_config_code, check_run_code
from lqkd.utils.progress import track


class RunReader(LqkdCLI):
    """Builds what a config describes and runs nothing: ``model``, ``datamodule`` and a ``trainer`` for one device.

    Args:
        config: a YAML file as ``fit`` takes or keeps it.
        trained: whether the weights come from a checkpoint: then no file of weights that the config names is read,
            neither the student's nor the teacher's, since a run may have been moved away from them.

    Raises:
        UsageError: when a setting is not possible.
        SystemExit: with status 2, after one line, when the file is no such config.
    """

    model: TaskModule

    def __init__(self, config: Path, trained: bool = False) -> None:
        self.trained = trained
        # The run's loggers and callbacks have no part in reading it.
        plain = ["--trainer.logger", "false", "--trainer.callbacks", "null"]
        with _silence():
            super().__init__(["validate", "--config", str(config), *plain])

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if self.trained:
            forget_weights([self._get(self.config, "model"), self.config_dump["model"]])

    def _parse_ckpt_path(self) -> None:
        """The weights are loaded afterwards, by :func:`load_float_weights`."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        asked = self._get(self.config_init, "trainer")
        return Trainer(
            accelerator="cpu" if asked.accelerator == "cpu" else "auto",
            devices=1,
            limit_val_batches=1,
            limit_test_batches=asked.limit_test_batches,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def _run_subcommand(self, subcommand: str) -> None:
        if not isinstance(self.model, TaskModule):
            raise UsageError(f"model={type(self.model).__name__} is not possible here: use a DistillModule or another")
        if self.datamodule is None or not is_overridden("val_dataloader", self.datamodule, LightningDataModule):
            raise UsageError("data has no validation split: name a DataModule that holds one out")


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Lightning from telling of a Trainer and of arguments that are not the user's."""
    loggers = [
        logging.getLogger(f"lightning.{name}") for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def read_run(run: str | Path, allow_code: bool = False) -> tuple[RunReader, Path | None]:
    """Build a run from its folder, with the float weights of its best checkpoint, or from a config alone.

    Args:
        run: a run folder, or a config file: then the networks have the weights that a training would start from.
        allow_code: whether code is imported that this user has never named in a training.

    Returns:
        The run and its checkpoint, None for a config.

    Raises:
        UsageError: when there is no such folder or file, the checkpoint is missing, damaged or of another network, or
            the configuration names code that is not allowed.
    """
    path = Path(run)
    if path.is_file():
        check_config_code(path, allow_code)
        return RunReader(path), None
    config, checkpoint = path / CONFIG, path / CHECKPOINTS / BEST
    if not config.is_file():
        raise UsageError(f"{str(run)!r} is neither a run folder (with {CONFIG}) nor a config file{run_within(path)}")
    if not checkpoint.is_file():
        raise UsageError(
            f"run folder {str(run)!r} has no {CHECKPOINTS}/{BEST}, which its first validation leaves: go on with "
            f"{resume_command(path)}, or rank layers by the weights that it starts from: sensitivity {config}"
        )
    check_run_code(path, allow_code)
    reader = RunReader(config, trained=True)
    held = read_checkpoint(checkpoint)["state_dict"]
    state = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    name = "student" if isinstance(reader.model, DistillModule) else "network"
    load_float_weights(reader.model.product(), {k.removeprefix(f"{name}."): v for k, v in state.items()}, checkpoint)
    return reader, checkpoint


def load_float_weights(network: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load everything of ``state`` into ``network`` but what belongs to its quantizers.

    Raises:
        UsageError: when a tensor is missing or has another shape.
    """
    skipped = tuple(f"{name}." for name in quantizers(network))
    own = {key: value for key, value in network.state_dict().items() if not key.startswith(skipped)}
    for key, value in own.items():
        if key not in state or state[key].shape != value.shape:
            raise UsageError(f"checkpoint {str(source)!r} is of another architecture than its config: see {key!r}")
    network.load_state_dict({key: state[key] for key in own}, strict=False)


class _Batches(TaskModule):
    """Takes batches from a DataModule through a Trainer, preprocessed and on the device, and keeps them."""

    def __init__(self, of: TaskModule, train: int, validation: int) -> None:
        super().__init__(of.task)
        self.network = of.product()
        self.train_batches = train
        self.validation_batches = validation
        self.calibration: list[Inputs] = []
        self.validation: list[Any] = []

    def trained(self) -> nn.Module:
        return self.network

    def on_validation_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        training = islice(data.train_dataloader(), self.train_batches)
        self.calibration = [
            self.inputs(self._on_device(batch))
            for batch in track(training, "reading training images", self.train_batches)
        ]
        loader = data.val_dataloader()
        total = _length(loader)
        chosen = [
            self._on_device(batch)
            for index, batch in enumerate(track(islice(loader, total), "reading validation images", total))
            if _is_chosen(index, self.validation_batches, total)
        ]
        self.validation = [batch for batch in chosen if not self.task.unlabelled(batch)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: all has been taken when validation started."""

    def _on_device(self, batch: Any) -> Any:
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        raise UsageError("data has a validation split of unknown length: batches cannot be spread over it") from None


def _is_chosen(index: int, wanted: int, total: int) -> bool:
    """Whether batch ``index`` is one of ``wanted`` that are spread evenly over ``total``: data may be sorted."""
    return wanted >= total or index * wanted // total != (index - 1) * wanted // total


def take_batches(reader: RunReader, train: int, validation: int) -> tuple[list[Inputs], list[Any]]:
    """The first training inputs, and validation batches spread evenly over the split, as evaluation sees them.

    Batches of which nothing has a label are left out.

    Args:
        reader: the run; its network is moved to the device.
        train: number of training batches.
        validation: number of validation batches; all when there are fewer.
    """
    batches = _Batches(reader.model, train, validation)
    with _silence():
        try:
            reader.trainer.validate(batches, datamodule=reader.datamodule, verbose=False)
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, which would end the command without a word
            raise (stop.__context__ if isinstance(stop.__context__, KeyboardInterrupt) else stop) from None
    if batches.calibration:
        batches.network.to(batches.calibration[0].tensors()[0].device)
    return batches.calibration, batches.validation
