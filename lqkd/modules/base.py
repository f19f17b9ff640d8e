"""What every training here has in common: evaluation of the task, and schedules that resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from lqkd.data.reading import check_collates, only_loader
from lqkd.errors import UsageError
from lqkd.modules.beginning import Beginning, steps_taken
from lqkd.modules.callback_checks import check_averages, check_callbacks, check_monitors
from lqkd.modules.compilation import Compilation, Compile
from lqkd.modules.schedules import Schedule, TorchSchedule
from lqkd.modules.stages import in_stage
from lqkd.modules.state import check_state
from lqkd.modules.steps import total_epochs, total_steps
from lqkd.modules.trainer_checks import check_trainer_numbers
from lqkd.tasks import Asked, Classification, Inputs, Task
from lqkd.tasks.trial import try_network
from lqkd.utils.renames import moved_from

TRAINED = "trained_weights"
"""Where a checkpoint keeps the state of the network that is trained, when its average is in ``state_dict``."""
AVERAGED = "averaged_weights"
"""Where callbacks find the state of the average when training goes on from such a checkpoint."""
UNFINISHED = "unfinished"
"""Where a checkpoint keeps those tensors that training goes on from in place of what ``state_dict`` has of them."""

Finish = Callable[..., Mapping[str, Tensor]]
"""Makes tensors of a module's product, by their names, for a file; called with the module, and ``untrained=True`` for
what is asked of it before the first step."""


class TaskModule(LightningModule):
    """Validates, tests and predicts with the network that :meth:`product` names, as its task says.

    Logs ``val/NAME`` and ``test/NAME`` of every metric of the task, exact over all ranks.

    Attributes:
        task: what the network is trained for.
        averaged: the average of the trained network's weights while a callback keeps one; None for none. It is held
            outside the module tree, and takes the network's place in evaluations and, under its names, in checkpoints.
        samples_in_batch: of the last training batch.
        warnings: what was noticed in a training, for ``summary.json``.
        compilation: the networks whose training passes are compiled.

    Args:
        task: what the network is trained for; None for the classification of images.
        compile: whether the training passes of networks are compiled, and how; none but those that a module starts.

    Raises:
        UsageError: when the task monitors what it does not measure.
    """

    averaged: nn.Module | None

    def __init__(self, task: Task | None = None, compile: Compile = False) -> None:
        super().__init__()
        self.compilation = Compilation(compile)
        self.task = Classification() if task is None else task
        self.val_metrics = self.task.metrics().clone(prefix="val/")
        self.test_metrics = self.task.metrics().clone(prefix="test/")
        if self.task.monitor not in self.val_metrics.keys():  # noqa: SIM118  (iterating gives names without the prefix)
            raise UsageError(
                f"monitor={self.task.monitor!r} of task {type(self.task).__name__} is not possible: it measures "
                f"{', '.join(map(str, self.val_metrics.keys()))}"
            )
        self.warnings: list[str] = []
        self.samples_in_batch = 0
        self.__dict__["averaged"] = None
        self._finish_saved: Finish | None = None
        self._beginnings: list[Beginning] = []  # of every optimizer
        self._resumed = False  # from a checkpoint

    def trained(self) -> nn.Module:
        """The network that training changes."""
        raise NotImplementedError

    def product(self) -> nn.Module:
        """The network that training makes, which is evaluated and kept: the trained one, or the average of it."""
        return self.trained() if self.averaged is None else self.averaged

    def keep_average(self, network: nn.Module | None) -> None:
        """Let a network like the trained one take its place as the product; None for the trained one itself."""
        self.__dict__["averaged"] = network  # past nn.Module's registration

    def finish_saved(self, finish: Finish | None) -> None:
        """Let every file that is saved have what ``finish`` returns in place of tensors of the product.

        Args:
            finish: called with this module, on all processes, when a checkpoint is saved, for tensors by their names in
                the product, which it leaves as it is. None for none.
        """
        self._finish_saved = finish

    @property
    def finishes_saved(self) -> bool:
        """Whether that takes more time than saving itself."""
        return self._finish_saved is not None

    @contextmanager
    def saved_at_once(self) -> Iterator[None]:
        """Inside the block files are saved as the network is."""
        finish, self._finish_saved = self._finish_saved, None
        try:
            yield
        finally:
            self._finish_saved = finish

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Inside the block, before the first step, the product is finished as all that a training evaluates is."""
        made = {} if self._finish_saved is None else self._finish_saved(self, untrained=True)
        state = self.product().state_dict()
        before = {name: state[name].clone() for name in made}
        try:
            for name, value in made.items():
                state[name].copy_(value)
            yield
        finally:
            for name, value in before.items():
                state[name].copy_(value)

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and network of all that must fit the data and the task."""
        yield "network", self.product()

    def configure_callbacks(self) -> list[Any]:
        """Refuse impossible settings of the Trainer here: it is the first hook, before Lightning's checks.

        Raises:
            UsageError: when a setting or a callback is not possible.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer_numbers(self.trainer)
            check_averages(self.trainer.callbacks)  # type: ignore[attr-defined]
            check_callbacks(self.trainer, self)
        return []

    def metric_names(self) -> set[str]:
        """Names of what this module logs in a training, which a callback may go by; callbacks log more."""
        return {"train/loss", *(str(name) for name in self.val_metrics.keys())}  # noqa: SIM118

    def setup(self, stage: str) -> None:
        """Refuse networks that do not fit the data, before the first batch.

        Raises:
            UsageError: when a network cannot take the images or returns no logits, numbers of classes differ, or a
                callback waits for a metric that nothing logs.
        """
        if stage == "fit":
            check_monitors(self.trainer, self, self.metric_names())
            self.compilation.check(self.trained(), self.trainer.strategy.root_device)
        data: Any = getattr(self.trainer, "datamodule", None)
        example = self.task.example(data, self.device)
        outputs = {} if example is None else self.try_networks(self.inputs(example))
        self.task.check(outputs, data)

    def try_networks(self, inputs: Inputs) -> dict[str, Any]:
        """The task's outputs of every network for inputs, by its name.

        Raises:
            UsageError: when a network cannot take them, or returns nothing for the task.
        """
        return {name: try_network(network, name, inputs, self.task) for name, network in self.networks()}

    def example_inputs(self) -> Inputs | None:
        """What the trained network is called with for one sample of zeros; None where the data do not tell."""
        example = self.task.example(getattr(self.trainer, "datamodule", None), self.device)
        return None if example is None else self.inputs(example)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """What the product returns for its inputs: logits (B, C) of images (B, channels, H, W), say."""
        return self.product()(*args, **keywords)

    def inputs(self, batch: Any) -> Inputs:
        """What the trained network is called with for a batch on the device."""
        return Inputs.of(self.task.inputs(batch)).fit(self.product())

    def accumulated_batches(self) -> int:
        """Batches whose gradients make one step."""
        return self.trainer.accumulate_grad_batches

    def start_schedule(self, optimizer: Optimizer, schedule: Schedule, setting: str) -> dict[str, Any]:
        """Lightning's scheduler configuration of an optimizer, whose settings are kept for a resumed training.

        Raises:
            UsageError: when the schedule of ``setting`` ends before the training.
        """
        steps = total_steps(self.trainer, self.accumulated_batches())
        made = schedule.configure(optimizer, steps)
        beginning = Beginning.of(optimizer, made["scheduler"])
        if isinstance(schedule, TorchSchedule):
            by_step = schedule.interval == "step"
            length = steps if by_step else total_epochs(self.trainer, self.accumulated_batches())
            if length is not None:
                beginning.check_lasts(optimizer, made["scheduler"], length, schedule.interval, setting)
        self._beginnings.append(beginning)
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the finished product under the names of the trained network, whose own state goes beside it."""
        state, prefix = checkpoint["state_dict"], self._prefix()
        if self.averaged is not None:
            average = {prefix + key: value for key, value in self.averaged.state_dict().items()}
            checkpoint[TRAINED] = {key: state[key] for key in average}
            state.update(average)
        finish = self._finish_saved
        finished = {} if finish is None else {prefix + key: value for key, value in finish(self).items()}
        if finished:
            checkpoint[UNFINISHED] = {key: state[key] for key in finished}
            state.update(finished)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the trained network's own state where a training goes on, and with the product elsewhere."""
        self._resumed = True
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        state, prefix = checkpoint["state_dict"], self._prefix()
        state.update(checkpoint.get(UNFINISHED, {}))
        if TRAINED in checkpoint:
            checkpoint[AVERAGED] = {key.removeprefix(prefix): state[key] for key in checkpoint[TRAINED]}
            state.update(checkpoint[TRAINED])

    def _prefix(self) -> str:
        """What names in the trained network begin with in this module."""
        return next(f"{name}." for name, module in self.named_modules() if module is self.trained())

    def on_fit_start(self) -> None:
        """Refuse validation data of several loaders, or of which no batch can be made, before the first step.

        Raises:
            UsageError: then.
        """
        self.compilation.begin()
        self.warnings = []
        if self.trainer.enable_validation:
            with in_stage(self.trainer, RunningStage.VALIDATING):
                self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
            check_collates(only_loader(self.trainer.val_dataloaders, "validation"), "validation")

    def on_train_end(self) -> None:
        verdict = self.compilation.verdict()
        if verdict is not None:
            self.warnings.append(verdict)
            rank_zero_warn(verdict)

    def teardown(self, stage: str) -> None:
        self.compilation.stop()

    def on_train_start(self) -> None:
        if (
            self._resumed and self._beginnings
        ):  # the checkpoint's optimizers have brought the settings of an earlier run
            parts = zip(self._beginnings, self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True)
            for beginning, optimizer, config in parts:
                beginning.advance(optimizer, config.scheduler, steps_taken(config.scheduler))
        self._tell_global_batch()

    def _tell_global_batch(self) -> None:
        """Tell the global batch, for which the learning rate is meant: lqkd never changes one for the other."""
        size, processes = (
            getattr(getattr(self.trainer, "datamodule", None), "batch_size", None),
            self.trainer.world_size,
        )
        accumulated = self.accumulated_batches()
        if size is not None and processes * accumulated > 1:
            parts = [f"{processes} processes", f"{size} images"] + [f"{accumulated} batches"] * (accumulated > 1)
            rank_zero_info(f"global batch {processes * size * accumulated} = {' x '.join(parts)}")

    def on_validation_start(self) -> None:
        # What an evaluation in inference mode left behind cannot be updated by one outside of it, as within a training.
        self.val_metrics.reset()
        if self.trainer.state.fn == TrainerFn.VALIDATING:  # a training has looked at them before its first step
            check_collates(only_loader(self.trainer.val_dataloaders, "validation"), "validation")

    def on_test_start(self) -> None:
        self.test_metrics.reset()
        check_collates(only_loader(self.trainer.test_dataloaders, "test"), "test")

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._tell_unlabelled("validation", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._tell_unlabelled("test", self.test_metrics)

    def _tell_unlabelled(self, split: str, metrics: MetricCollection) -> None:
        metric = metrics[self.task.metric]
        if metric.update_called and bool(metric.compute().isnan()):  # a mean over nothing
            names = " and ".join(str(name) for name in metrics.keys())  # noqa: SIM118
            rank_zero_warn(f"no sample of the {split} split has a label: {names} are not measured (nan)")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Any, metrics: MetricCollection) -> Any:
        """The task's outputs of the network that is evaluated, once they are counted."""
        inputs = self.inputs(batch)
        outputs = self._answer(inputs)
        self.task.check_batch(outputs, batch)
        self.task.update(metrics, outputs, batch)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(inputs))
        return outputs

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """What the task predicts: class probabilities (B, C), say."""
        inputs = self.inputs(batch)
        return self.task.predictions(self._answer(inputs), batch)

    def _answer(self, inputs: Inputs) -> Any:
        """The task's outputs of the network that is evaluated."""
        try:
            returned = inputs.call(self)
        except (RuntimeError, ValueError):
            try_network(self.product(), "network", inputs, self.task)  # says so in one sentence if it is the inputs
            raise
        return self.task.outputs(returned, Asked("network", len(inputs)))

    def check_state(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse a state that does not belong to this module; see :func:`lqkd.modules.state.check_state`."""
        check_state(self, state_dict)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's state.

        Raises:
            UsageError: when it is that of another architecture or of other bits.
        """
        self.check_state(state_dict)
        return super().load_state_dict(state_dict, strict, assign)


__getattr__ = moved_from(__name__)
