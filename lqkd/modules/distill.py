"""Distillation of a low-bit student through a learnable regularizer, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lqkd.balances import Balance, FixedBalance
from lqkd.balances.base import LOSSES
from lqkd.balances.equalized_at import AtWeights
from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss, LogitResidual
from lqkd.losses.ensembles import COMBINATIONS, Combination
from lqkd.losses.taps import Taps
from lqkd.modules.distillation import Distillation, Part, Shapes, Tap
from lqkd.modules.divergence import LossWatch, diverged
from lqkd.modules.hyperparameters import save_plain_hyperparameters
from lqkd.modules.metrics import is_due, send, show
from lqkd.modules.optimization import SharedBackward
from lqkd.modules.optimizer_checks import check_optimizer
from lqkd.modules.optimizers import optimizer_of, regularizer_groups, student_groups
from lqkd.modules.references import REFERENCES, logged, measure, warn
from lqkd.modules.schedules import Constant, Cosine, Schedule
from lqkd.modules.state import check_quantizers, check_state, quantizer_names, start_from
from lqkd.modules.tasks import check_players, task_of
from lqkd.modules.teacher_outputs import indices_of, prepare_teacher
from lqkd.modules.trainer_checks import check_trainer_settings
from lqkd.quantization import Recipe, initialize_quantizers, operation_shares, quantize_model, quantizers
from lqkd.quantization.modes import evaluating
from lqkd.regularizers import LookAhead, Regularizer
from lqkd.tasks import Asked, Inputs, Rows, Task
from lqkd.tasks.trial import enough_samples, leaves_one, try_training
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import OpenCache, TeacherCache, TeacherOutputs
from lqkd.utils.progress import Progress
from lqkd.utils.renames import current_keys


@dataclass
class Losses:
    """What one batch gives: everything that the step minimises and everything that is worth looking at."""

    loss: Tensor
    """0-dim, differentiable: the balanced losses of the student plus its penalties and the regularizer's objective."""
    task: Tensor
    """0-dim loss of the task."""
    distill: Tensor
    """0-dim modulated distillation loss."""
    parts: list[Part]
    """Divergence maps before modulation and the regularizer's weights: one, or one a pair of taps or teacher."""
    teacher: Tensor
    """(N, C) logits that the student's are held against; the first teacher's where several are."""
    rows: Rows
    """The student's logits (N, C), differentiable, and the labels (N,)."""
    outputs: Any
    """What the task makes of the student's outputs: both losses come from it."""
    balance: dict[str, Tensor]
    """Weight of each loss in the student's gradient, 0-dim each."""
    penalties: dict[str, Tensor]
    """Each of the module's penalties, 0-dim."""


class DistillModule(SharedBackward):
    """Frozen teacher, quantised student and learnable regularizer, trained by two optimizers in one backward pass.

    Each step minimises ``balance(task, distill)`` over the student and, in the same backward pass, the regularizer's
    objective over the regularizer. The teacher is held outside the module tree: no checkpoint, optimizer, DDP
    synchronisation, SyncBatchNorm conversion or averaged copy sees it, and no ``train()`` reaches it.

    Only the student's optimizer counts as a step, so that ``global_step``, ``max_steps`` and the schedules count
    optimizer steps of the student: batches, when no gradients are accumulated.

    Before each step everything that follows the training (IR-Net's estimator, an adversarial player, a balance with a
    ramp) learns how much of it is done.

    Attributes:
        penalties: functions by name whose results, 0-dim, are added to each batch's loss and logged as
            ``train/NAME``; callbacks put them there. They depend on the student alone, the same on every process.
        warnings: what was noticed before the first step, for ``summary.json``.

    Args:
        teacher: the frozen teacher, or an ensemble of them.
        student: the network to quantise and train, still in floating point.
        student_weights: ``builtin:NAME`` or a file with the student's float weights; null keeps its own.
        quantization: which layers get which quantizers and bits.
        regularizer: the learnable regularizer; null distils with the plain distillation loss.
        distillation_loss: divergence between teacher and student: of logits, or of the features at ``taps``.
        taps: pairs of modules whose outputs a loss on features compares, each pair with a connector and a regularizer
            of its own.
        balance: weighs the task loss against the distillation loss.
        student_optimizer: optimizer of the student; its quantizers' parameters get no weight decay.
        regularizer_optimizer: optimizer of the regularizer and of a learnable balance, which gets no weight decay.
        student_schedule: learning rate of the student's optimizer over the training.
        regularizer_schedule: likewise for the regularizer's.
        label_smoothing: of the cross-entropy of a classification, 0 <= e < 1.
        gradient_clip_val: largest gradient norm of each player; null for no clipping.
        accumulate_grad_batches: batches whose gradients are averaged for one step.
        channels_last: whether the student's convolutions work in channels_last, which is faster on CPUs; results differ
            by rounding, and a network that views activations as if they were contiguous cannot.
        replace_head: whether student_weights for another number of classes are accepted: the student's last layer then
            starts anew.
        teacher_cache: stores what the teacher answers and replays it in later runs; null asks the teacher every time.
        task: what the networks are trained for; null for the classification of images.

    Raises:
        UsageError: when a setting is not possible.
    """

    teacher: FrozenTeacher | TeacherEnsemble

    def __init__(
        self,
        teacher: FrozenTeacher | TeacherEnsemble,
        student: nn.Module,
        student_weights: str | None = None,
        quantization: Recipe = Recipe(),  # noqa: B008  (a plain default that the CLI can print)
        regularizer: Regularizer | None = None,
        distillation_loss: DistillationLoss | None = None,
        taps: list[Tap] | None = None,
        balance: Balance | None = None,
        student_optimizer: OptimizerCallable = lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
        regularizer_optimizer: OptimizerCallable = lambda p: Adam(p, lr=1e-3),
        student_schedule: Schedule | None = None,
        regularizer_schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        channels_last: bool = False,
        replace_head: bool = False,
        teacher_cache: TeacherCache | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__(gradient_clip_val, accumulate_grad_batches, task_of(task, label_smoothing))
        save_plain_hyperparameters(self)
        check_players(self.task, teacher, distillation_loss, regularizer)
        start_from(student, student_weights, replace_head)
        self.__dict__["teacher"] = teacher  # past nn.Module's registration: see the class docstring
        self.student, self.coverage = quantize_model(student, quantization)
        # Weights decide: the first convolution turns images of any format into theirs.
        self.student.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
        self.quantization = quantization
        self.scheduled_layers: set[str] = set()  # names of layers of the student whose bits a schedule changes
        loss = distillation_loss or LogitResidual()
        self.combination: Combination | None = None
        if isinstance(teacher, TeacherEnsemble):
            self.combination = COMBINATIONS[teacher.combination](len(teacher.teachers))
        separate = self.combination is not None and self.combination.separate
        count = self.combination.count if self.combination is not None and separate else 1
        self.distillation = Distillation(loss, regularizer, taps or (), count, self.combination is not None)
        self.taps: tuple[Taps, Taps] | None = None  # of the teacher and of the student
        if taps:
            assert isinstance(teacher, FrozenTeacher), "Distillation refuses taps of several teachers"
            if teacher.compiled:
                raise UsageError("teacher compile=True cannot be used with taps, which look into the running network")
            self.taps = (
                Taps(teacher.network, [tap.teacher for tap in taps], "teacher"),
                Taps(self.student, [tap.student for tap in taps], "student"),
            )
        self.distillation.bind(self.student)
        self.watch_gradients = False  # whether training_step also returns gradients at the logits
        self.balance = balance or FixedBalance()
        if self.balance.needs_output and loss.compares != "logits":
            raise UsageError(
                f"balance {type(self.balance).__name__} measures gradients at the logits: it needs a distillation_loss "
                f"that compares logits, which {type(loss).__name__} does not; GradientBalance and GradNorm measure in "
                "weights"
            )
        if isinstance(self.balance.equalized_at, AtWeights):
            self.balance.equalized_at.bind(self.student)
        self.student_optimizer = student_optimizer
        self.regularizer_optimizer = regularizer_optimizer
        self.student_schedule = student_schedule or Cosine()
        self.regularizer_schedule = regularizer_schedule or Constant()
        self.teacher_cache = teacher_cache
        self.opened_cache: OpenCache | None = None  # in a training with a cache
        self.references: dict[str, float | None] = dict.fromkeys(REFERENCES)
        self.penalties: dict[str, Callable[[], Tensor]] = {}
        self.warnings: list[str] = []
        self._followers: list[Any] = []
        self._watch = LossWatch()
        self._logged: dict[str, Tensor] = {}  # metrics of the last batch

    # ---- before the first batch

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer, the first of them where every pair of taps or teacher has its own."""
        return cast(Regularizer, self.distillation.regularizers[0]) if self.distillation.regularizers else None

    def configure_callbacks(self) -> list[Any]:
        """Also refuse settings of the Trainer that two optimizers cannot follow."""
        check_trainer_settings(self.trainer)
        return super().configure_callbacks()

    def metric_names(self) -> set[str]:
        names = {"train/task", "train/distill", *(f"train/{name}" for name in self.penalties)}
        return super().metric_names() | names | {f"balance/{name}" for name in (*LOSSES, *self.balance.learned())}

    def trained(self) -> nn.Module:
        return self.student

    def teachers(self) -> list[FrozenTeacher]:
        """The teacher, or all of an ensemble."""
        return self.teacher.members() if isinstance(self.teacher, TeacherEnsemble) else [self.teacher]

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        teachers = self.teachers()
        for number, teacher in enumerate(teachers, 1):
            yield f"teacher {number}" if len(teachers) > 1 else "teacher", teacher
        yield "student", self.student

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.teacher.convert_from(getattr(data, "mean", None), getattr(data, "std", None))
        if data is not None and hasattr(data, "class_names"):
            self.teacher.check_classes(data.class_names)
        elif any(teacher.class_names is not None for teacher in self.teachers()):
            rank_zero_warn("teacher class_names were not compared with the data's: there is no DataModule with any")
        super().setup(stage)
        example = self.task.example(data, self.device)
        if example is not None:
            self._connect(example)
            self._settle_balance(self.inputs(example))
        if stage == "fit":
            self._tell_passed_over(self.example_inputs())

    def _tell_passed_over(self, inputs: Inputs | None) -> None:
        """Name the layers with weights that stay in floating point although the recipe has bits for them."""
        if inputs is not None and not inputs.keywords and self.coverage.passed_over():
            self.coverage = self.coverage.with_operations(operation_shares(self.student, *inputs.args))
        for sentence in self.coverage.passed_over():
            rank_zero_info(f"not quantised: {sentence}")

    @torch.no_grad()
    def _connect(self, batch: Any) -> None:
        """Make the connectors and tables of the distillation loss, which depend on shapes."""
        distillation = self.distillation
        if distillation.shapes is not None:
            return
        with evaluating(self.student):
            inputs = self.inputs(batch)
            teachers, student, (features_t, features_s) = self._outputs(inputs, self.teacher_inputs(batch, inputs))
        if distillation.compares == "logits":
            rows_t, rows_s = self.task.rows(teachers[0], batch).logits, self.task.rows(student, batch).logits
            features_t, features_s = [rows_t] * len(distillation.losses), [rows_s] * len(distillation.losses)
        distillation.connect([tuple(x.shape) for x in features_t], [tuple(x.shape) for x in features_s])

    def _settle_balance(self, inputs: Inputs) -> None:
        """Let a balance that measures gradients in weights find them, or see that both losses reach them."""
        place = self.balance.equalized_at
        if not isinstance(place, AtWeights) or place.settled:
            return

        def run() -> tuple[Tensor, list[Tensor]]:
            outputs, features = self._student_outputs(inputs)
            return outputs, features or [outputs]

        place.settle(run)
        rank_zero_info(f"balance {type(self.balance).__name__} measures gradients in the weights of {place.layer}")

    def _connect_unseen(self) -> None:
        """Do without the shape of images, where that is possible: neither a DataModule nor a checkpoint has told it."""
        if self.distillation.shapes is not None:
            return
        if self.distillation.compares != "logits":
            raise UsageError("taps need to know the shape of images: use a DataModule that tells its image_shape")
        shapes: Shapes = [(1, 0)] * len(self.distillation.losses)
        self.distillation.connect(shapes, shapes)

    def configure_optimizers(self) -> Any:
        self._connect_unseen()
        self.count_steps()
        self._beginnings.clear()
        self.optimizer_names.clear()
        optimizers: list[Optimizer] = []
        schedulers: list[dict[str, Any]] = []
        for player, make, schedule, groups in (
            (
                "student",
                self.student_optimizer,
                self.student_schedule,
                student_groups(self.student, self.distillation.losses),
            ),
            (
                "regularizer",
                self.regularizer_optimizer,
                self.regularizer_schedule,
                regularizer_groups(self.distillation.regularizers, self.balance, self.combination),
            ),
        ):
            if not groups:  # a fixed balance without a regularizer has nothing to learn
                continue
            setting = f"{player}_optimizer"
            optimizer = optimizer_of(make, setting, groups)
            check_optimizer(optimizer, setting, groups)
            factors = {"balance": self.balance.learning_rate_factor}
            if self.regularizer is not None:
                factors["regularizer"] = self.regularizer.learning_rate_factor
            for group in optimizer.param_groups:
                group["lr"] *= factors.get(group["name"], 1.0)
            optimizers.append(optimizer)
            schedulers.append(self.start_schedule(optimizer, schedule, f"{player}_schedule"))
            self.optimizer_names.append(setting)
        return optimizers, schedulers

    def _tell_progress(self) -> None:
        """Tell everything that follows the training how much of it is done: quantizers, players, balances."""
        for follower in self._followers:
            follower.progress = self.progress(type(follower).__name__)

    def on_fit_start(self) -> None:
        self._followers = [
            module
            for module in (*quantizers(self.student).values(), *self.distillation.modules(), self.balance)
            if getattr(module, "progress", None) is not None
        ]
        self._tell_progress()
        self.warnings = []
        unsettled = (
            isinstance(self.balance.equalized_at, AtWeights) and not self.balance.equalized_at.settled
        )  # no shape was told
        if unsettled or not self._resumed:
            inputs = self._check_first(self._first_batch())
            if unsettled:
                self._settle_balance(inputs.part(slice(1)))
            if not self._resumed:  # a checkpoint says of every quantizer whether it has seen data
                self._fit_quantizers(inputs)
        self.opened_cache, of_teacher = prepare_teacher(self)
        self.references = measure(self, self.references, of_teacher.values)
        of_teacher.save()
        self._report_references()

    def _first_batch(self) -> Any:
        """The first batch, on the device."""
        with isolate_rng():  # peeking at a batch must not move the random numbers of the training
            loader = self.trainer.train_dataloader
            assert loader is not None, "the fit loop has set up the data"
            batch = next(iter(loader), None)
        if batch is None:
            raise UsageError("the training data yield no batch: there is nothing to train on")
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _check_first(self, batch: Any) -> Inputs:
        """The first batch's inputs, once the networks take them, the student in training too, and it suits the task.

        Raises:
            UsageError: when they do not.
        """
        inputs = self.inputs(batch)
        few = inputs.part(slice(2)).map(torch.clone)  # a network may work in place
        with self.trainer.precision_plugin.forward_context():
            for outputs in self.try_networks(few).values():
                self.task.check_batch(outputs, batch)
            alone = leaves_one(self.trainer.train_dataloader, self.trainer.num_training_batches)
            try_training(self.student, "student", few.part(slice(1)) if alone else few, self.task)
        if self.task.unlabelled(batch):
            warn(self, "the first batch has no labels: samples without a label take part in distillation alone")
        return inputs

    def _fit_quantizers(self, inputs: Inputs) -> None:
        """Fit every quantizer to the first batch."""
        with Progress("fitting quantizers") as bar, self.trainer.precision_plugin.forward_context():
            progress = bar.update if self.trainer.is_global_zero else None
            initialize_quantizers(
                self.student, *inputs.args, keywords=inputs.keywords, batch_statistics=True, progress=progress
            )

    def teardown(self, stage: str) -> None:
        for teacher in self.teachers():
            teacher.restore()
        self.opened_cache = None

    def _report_references(self) -> None:
        known = logged(self.references, self.task)
        for name, value in known.items():
            rank_zero_info(f"{name}: {value:.4f}")
        for logger in self.trainer.loggers:
            logger.log_metrics(known, step=0)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.student.train()  # a network that was handed over in eval mode would keep it
        self.distillation.train()
        self.balance.train()

    # ---- the path of a batch

    def teacher_inputs(self, batch: Any, inputs: Inputs) -> Inputs:
        """What teachers are called with for a batch of which the student is called with ``inputs``."""
        given = self.task.teacher_inputs(batch, inputs)
        return inputs if given is inputs else Inputs.of(given).fit(self.student)

    def ask_teacher(self, inputs: Inputs) -> TeacherOutputs:
        """The task's outputs of every teacher, logits (B, C) say, and what the taps see of it."""
        task, samples = self.task, len(inputs)
        if isinstance(self.teacher, TeacherEnsemble):
            answers = enumerate(self.teacher.answers(*inputs.args, **inputs.keywords), 1)
            return [task.outputs(answer, Asked(f"teacher {i}", samples)) for i, answer in answers], []
        if self.taps is None:
            return [task.outputs(inputs.call(self.teacher), Asked("teacher", samples))], []
        with self.taps[0].recording(self.teacher.running(inputs)) as features:
            outputs = task.outputs(inputs.call(self.teacher), Asked("teacher", samples))
        return [outputs], [feature.float().contiguous() for feature in features]

    def _outputs(
        self, inputs: Inputs, given: Inputs, indices: Tensor | None = None
    ) -> tuple[list[Any], Any, tuple[list[Tensor], list[Tensor]]]:
        """The task's outputs of every teacher, called with ``given``, and of the student, and what the taps see."""
        image = given.alone()
        if self.opened_cache is None or indices is None or image is None:
            answers, features_t = self.ask_teacher(given)
        else:
            answers, features_t = self.opened_cache.answers(
                image, indices, self.current_epoch, lambda: self.ask_teacher(given)
            )
        outputs, features_s = self._student_outputs(inputs)
        return answers, outputs, (features_t, features_s)

    def _student_outputs(self, inputs: Inputs) -> tuple[Any, list[Tensor]]:
        """The task's outputs of the student, and what the taps see of it."""
        features: list[Tensor] = []
        with enough_samples("student", len(inputs)):
            if self.taps is None:
                returned = inputs.call(self.student)
            else:
                with self.taps[1].recording() as features:
                    returned = inputs.call(self.student)
        return self.task.outputs(returned, Asked("student", len(inputs), self.student.training)), features

    def losses(self, batch: Any, indices: Tensor | None = None, inputs: Inputs | None = None) -> Losses:
        """All losses of one batch.

        Args:
            batch: what the task takes, on the device: (images, labels), say.
            indices: (B,) int64, the samples to look up in a training with a cache of the teacher's answers; None asks
                the teacher.
            inputs: what the student is called with for the batch; None to ask the task.
        """
        task = self.task
        inputs = self.inputs(batch) if inputs is None else inputs
        answers, outputs, features = self._outputs(inputs, self.teacher_inputs(batch, inputs), indices)
        rows = task.rows(outputs, batch)
        teachers = [task.rows(answer, batch).logits for answer in answers]
        if teachers[0].shape != rows.logits.shape:
            of_teacher, of_student = teachers[0].shape, rows.logits.shape
            raise UsageError(
                f"numbers of classes differ (teacher {of_teacher[1]}, student {of_student[1]}): they must agree"
                if of_teacher[0] == of_student[0]
                else f"task {type(task).__name__} makes {of_teacher[0]} rows of the teacher's outputs and "
                f"{of_student[0]} of the student's: rows() must make the same of both"
            )
        task_loss = task.loss(outputs, batch)
        combined: Tensor | None = None
        if self.combination is not None:
            assert rows.labels is not None, "check_players has seen to it"
            teachers, combined = self.combination(torch.stack(teachers), rows.labels)
        labels = rows.labels if self._sees_rows else None
        parts = self.distillation(teachers, rows.logits, labels, features)
        self._look_ahead(parts, teachers, rows, task_loss, batch, inputs)
        distill = self.distillation.reduce(parts)
        loss, balance = self.balance({"task": task_loss, "distill": distill}, outputs)
        penalties = {name: penalty() for name, penalty in self.penalties.items()}
        for term in (self.distillation.objective(parts), combined, *penalties.values()):
            loss = loss if term is None else loss + term
        return Losses(loss, task_loss, distill, parts, teachers[0], rows, outputs, balance, penalties)

    @property
    def _sees_rows(self) -> bool:
        """Whether the elements of divergence maps belong to the rows of the task."""
        return self.task.one_row_a_sample or self.distillation.compares == "logits"

    def _look_ahead(
        self, parts: list[Part], teachers: list[Tensor], rows: Rows, task_loss: Tensor, batch: Any, inputs: Inputs
    ) -> None:
        """Tell the parts how they agree with the task, where a player asks."""
        player = None if self.regularizer is None else self.regularizer.player
        if not isinstance(player, LookAhead):
            return
        if player.exact:
            image = inputs.alone()
            if image is None:
                raise UsageError("player LookAhead(exact=True) needs networks that are called with one tensor alone")

            def loss_of(logits: Tensor, part: slice) -> Tensor:
                return self.task.loss(logits, self.task.part(batch, part))

            self.distillation.look_ahead_exactly(parts, self.student, teachers, image, rows.labels, loss_of)
        else:
            (gradient,) = torch.autograd.grad(task_loss, rows.logits, retain_graph=True)
            counted = self.task.counted(rows, batch)
            self.distillation.look_ahead(parts, teachers, rows.logits, rows.labels, gradient * counted)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        inputs = self.inputs(batch)
        self.samples_in_batch = len(inputs)
        self._tell_progress()
        indices = None if self.opened_cache is None else indices_of(batch)
        losses = self.losses(batch, indices, inputs)
        self._watch.ask(losses.loss)
        gradients = self._gradients(losses) if self.watch_gradients else None
        last_of_group = self.backward_of_batch(losses.loss, len(inputs), batch_idx)
        if not self._watch.finite():
            self.task.check_batch(losses.outputs, batch)
            parts = {"task": losses.task, "distill": losses.distill, **losses.penalties}
            diverged(self, {"the loss": losses.loss, **parts}, self.student, inputs)
        if last_of_group:
            self.step_optimizers()
        logged = {"train/loss": losses.loss, "train/task": losses.task, "train/distill": losses.distill}
        logged |= {f"balance/{name}": value for name, value in (losses.balance | self.balance.learned()).items()}
        logged |= {f"train/{name}": penalty for name, penalty in losses.penalties.items()}
        self._logged = {name: value.detach().clone() for name, value in logged.items()}  # some are parameters
        show(self.trainer, self._logged)
        outputs: dict[str, Any] = {
            "loss": losses.loss.detach(),
            "balance": losses.balance,
            "divergence": [part.divergence.detach() for part in losses.parts],
        }
        if self._sees_rows:
            rows = {"teacher": losses.teacher, "student": losses.rows.logits.detach(), "labels": losses.rows.labels}
            outputs |= {name: value for name, value in rows.items() if value is not None}
        if self.regularizer is not None:
            outputs["weights"] = [part.weights.detach() for part in losses.parts if part.weights is not None]
        for name in ("divergence", "weights"):
            if name in outputs and len(outputs[name]) == 1:
                outputs[name] = outputs[name][0]
        if gradients is not None:
            outputs["gradients"] = gradients
        return outputs

    def _gradients(self, losses: Losses) -> dict[str, Tensor]:
        """Gradients at the student's outputs of the task and of distillation with and without modulation.

        Distillation by features does not pass the outputs and has none; nor has a task whose outputs are no tensor.
        """
        if not isinstance(losses.outputs, Tensor):
            return {}
        plain = self.distillation.reduce(losses.parts, weighted=False)
        wanted = {"task": losses.task, "distill": losses.distill, "plain": plain}
        found = {
            name: torch.autograd.grad(loss, losses.outputs, retain_graph=True, allow_unused=True)[0]
            for name, loss in wanted.items()
        }
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(self.trainer):  # after the callbacks, one of which may stop the training here
            send(self.trainer, self._logged)

    def on_train_epoch_end(self) -> None:
        self.balance.on_epoch_end()
        self.step_schedules("epoch")

    # ---- state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillModule:
        super()._apply(fn, recurse)
        self.teacher._apply(fn, recurse)  # outside the module tree, but on the same device
        return self

    def check_state(self, state_dict: Mapping[str, Tensor]) -> None:
        check_state(self, state_dict, any_bits={f"student.{name}" for name in self.scheduled_layers})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["references"] = self.references
        checkpoint["distillation_shapes"] = self.distillation.shapes
        checkpoint["quantizers"] = quantizer_names(self.student)
        # A switch of bits that no batch has followed yet.
        checkpoint["fit_by_mse"] = [name for name, q in quantizers(self.student).items() if q.wants_mse]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        check_quantizers(self.student, checkpoint.get("quantizers", {}))
        self.references = current_keys(checkpoint.get("references", self.references))
        for name, quantizer in quantizers(self.student).items():
            quantizer.wants_mse = name in checkpoint.get("fit_by_mse", ())
        if checkpoint.get("distillation_shapes") is not None:
            self.distillation.connect(*checkpoint["distillation_shapes"])
