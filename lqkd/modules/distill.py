"""Distillation of a low-bit student through a learnable regularizer, as a LightningModule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lqkd.balances import Balance, FixedBalance
from lqkd.balances.base import TASK
from lqkd.balances.equalized_at import AtWeights
from lqkd.data.reading import first_batch
from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss
from lqkd.losses.settings import check
from lqkd.modules.agreement import Top1Agreement
from lqkd.modules.base import TaskModule
from lqkd.modules.checkpointed import bring_back, kept
from lqkd.modules.compilation import Compile
from lqkd.modules.distillation import Distillation
from lqkd.modules.held_out import HeldOutRows, Known, numbers
from lqkd.modules.held_out_features import HeldOutFeatures, kept_features
from lqkd.modules.held_out_task import HeldOutTask, kept_task
from lqkd.modules.hyperparameters import save_plain_hyperparameters
from lqkd.modules.losses import Losses
from lqkd.modules.memory_format import faster_in_channels_last
from lqkd.modules.metrics import is_due, send, show
from lqkd.modules.optimization import SharedBackward
from lqkd.modules.optimizer_checks import check_optimizer
from lqkd.modules.optimizers import learning_rate_factors, optimizer_of, regularizer_groups, student_groups
from lqkd.modules.own import join_own
from lqkd.modules.passes import Passes
from lqkd.modules.recomputing import recompute
from lqkd.modules.references import REFERENCES, in_a_line, logged, measure, warn
from lqkd.modules.schedules import Constant, Cosine, Schedule
from lqkd.modules.sign_check import SignCheck
from lqkd.modules.state import check_state, start_from
from lqkd.modules.step_length import GradientLength, gradient_norms, measured_together
from lqkd.modules.step_report import gradients_at_outputs, step_numbers, step_report
from lqkd.modules.tasks import check_teacher, task_of
from lqkd.modules.teacher_outputs import prepare_teacher
from lqkd.modules.term import Shapes
from lqkd.modules.terms import Tap, Term, named_teachers, named_terms, teacher_label
from lqkd.modules.trainer_checks import check_trainer_settings
from lqkd.modules.trust import check_held_out, fit_trust, leave_memorised, matrices, report_held_out, tables
from lqkd.quantization import Recipe, initialize_quantizers, operation_shares, quantize_model, quantizers
from lqkd.quantization.batchnorm import folded_into, has_fresh_statistics
from lqkd.quantization.modes import evaluating
from lqkd.quantization.recipe import folds_batch_norm
from lqkd.regularizers import LearnableTable, Regularizer
from lqkd.tasks import Inputs, Task
from lqkd.tasks.trial import leaves_one, try_training
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import TeacherCache
from lqkd.utils.progress import Progress
from lqkd.utils.renames import current_terms

_STEP_LENGTH_EVERY = 100
"""Batches of an epoch from one to the next in which, if they are watched, gradients are measured in parameters."""


class DistillModule(TaskModule):
    """Frozen teachers, quantised student and learnable regularizers, trained by two optimizers in one backward pass.

    Each step minimises ``balance(task, term, ...)`` over the student and, in the same backward pass, the regularizers'
    objectives over the regularizers. A teacher answers once a batch, whatever number of terms it serves. Teachers are
    held outside the module tree: no checkpoint, optimizer, DDP synchronisation, SyncBatchNorm conversion or averaged
    copy sees them, and no ``train()`` reaches them.

    There are two ways to say what is distilled. The short form is one ``teacher`` (or an ensemble) with
    ``distillation_loss``, ``taps`` and ``regularizer``: a single term, which is called ``distill``. The long form names
    ``teachers`` and the terms of ``distillation``.

    Only the student's optimizer counts as a step, so that ``global_step``, ``max_steps`` and the schedules count
    optimizer steps of the student: batches, when no gradients are accumulated.

    Before each step everything that follows the training (IR-Net's estimator, an adversarial player, a balance with a
    ramp) learns how much of it is done.

    Attributes:
        penalties: functions by name whose results, 0-dim, are added to each batch's loss and logged as
            ``train/NAME``; callbacks put them there. They depend on the student alone, the same on every process.
        trust: how far the teachers of every term with ``combination: trust`` are believed, by its name, likewise.
        own: what the student's own float network is called among the teachers, where held-out rows judge one of them.
        own_joined: by name of such a term, what the student's own float network is called among its teachers, where it
            was added to them.
        own_added: whether it is none of the user's teachers.
        quantization: the recipe of the student, with what the task has made of it.
        completed: whether that is another one than was given.

    Args:
        teacher: the frozen teacher, or an ensemble of them; null where ``teachers`` names them.
        student: the network to quantise and train, still in floating point.
        student_weights: ``builtin:NAME`` or a file with the student's float weights; null keeps its own.
        quantization: which layers get which quantizers and bits; the task adds what it leaves open.
        regularizer: the learnable regularizer; null distils with the plain distillation loss.
        distillation_loss: divergence between teacher and student: of logits, or of the features at ``taps``.
        taps: pairs of modules whose outputs a loss on features compares, each pair with a connector and a regularizer
            of its own.
        balance: weighs the task loss and every distillation loss, in this order.
        student_optimizer: optimizer of the student; its quantizers' parameters get no weight decay.
        regularizer_optimizer: optimizer of the regularizer and of a learnable balance, which gets no weight decay.
        student_schedule: learning rate of the student's optimizer over the training.
        regularizer_schedule: likewise for the regularizer's.
        label_smoothing: of the cross-entropy of a classification, 0 <= e < 1.
        gradient_clip_val: largest gradient norm of each player; null for no clipping.
        accumulate_grad_batches: batches whose gradients are averaged for one step.
        channels_last: whether the student's convolutions work in channels_last, which is faster on CPUs; results differ
            by rounding, and a network that views activations as if they were contiguous cannot. Null lets a
            measurement decide before the first step of a training, which a checkpoint keeps: two runs may then differ
            by rounding.
        replace_head: whether student_weights for another number of classes are accepted: the student's last layer then
            starts anew.
        teacher_cache: stores what the teacher answers and replays it in later runs; null asks the teacher every time.
        task: what the networks are trained for; null for the classification of images.
        teachers: frozen teachers by name, for ``distillation``.
        distillation: distillation losses by name, each with its teacher; null for the short form.
        compile: whether training passes of the student and of all teachers run through ``torch.compile``, each as one
            graph without breaks; ``cuda_graphs`` also lets a GPU record them. Results differ from eager ones by
            rounding. On a GPU so does the augmentation of an :class:`lqkd.data.ImageDataModule` without RandAugment.
            Evaluations, batches of another size than the first (the last of an epoch), losses and optimizers stay
            eager.
        gptq_batches: training batches on which GPTQ calibrates the quantised student before the first step, as a
            reference that a training should beat (:func:`lqkd.quantization.gptq`): the student runs over them once for
            each of its linear layers, and the test split is measured once more; it is then what it was. 0 for none.
        gradient_checkpointing: whether blocks of the student compute their activations again in the backward pass, in
            place of keeping them, for the same numbers (:func:`lqkd.models.recompute_activations`).

    Raises:
        UsageError: when a setting is not possible.
    """

    teacher: FrozenTeacher | TeacherEnsemble | None
    """The teacher of the short form; None where :attr:`named_teachers` has names of the user's."""
    named_teachers: dict[str, FrozenTeacher]

    def __init__(
        self,
        teacher: FrozenTeacher | TeacherEnsemble | None = None,
        student: nn.Module | None = None,
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
        channels_last: bool | None = False,
        replace_head: bool = False,
        teacher_cache: TeacherCache | None = None,
        task: Task | None = None,
        teachers: dict[str, FrozenTeacher] | None = None,
        distillation: dict[str, Term] | None = None,
        compile: Compile = False,
        gptq_batches: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(task_of(task, label_smoothing), compile)
        save_plain_hyperparameters(self)
        check("it must be at least 0", lambda n: n >= 0, gptq_batches=gptq_batches)
        self.gptq_batches = gptq_batches
        if student is None:
            raise UsageError("there is no student: give the network to quantise and train")
        short = {"distillation_loss": distillation_loss, "taps": taps or None, "regularizer": regularizer}
        self.named_teachers = named_teachers(teacher, teachers)  # a plain dict: no submodules, see the class docstring
        terms = named_terms(distillation, teacher, [*self.named_teachers], short)
        start_from(student, student_weights, replace_head)
        starts = student_weights is not None and not replace_head
        given = len(self.named_teachers)
        terms, self.named_teachers, self.own, self.own_joined = join_own(terms, self.named_teachers, student, starts)
        self.own_added = len(self.named_teachers) > given
        for one in (*self.named_teachers.values(), teacher):
            check_teacher(self.task, one)
        self.distillation = Distillation(terms, named=distillation is not None)
        self.distillation.serve(self.task, terms)
        self.__dict__["teacher"] = teacher  # past nn.Module's registration
        if isinstance(teacher, TeacherEnsemble):
            teacher.class_axis = self.task.class_axis
        self.quantization = self.task.recipe(quantization, student)
        self.completed = self.quantization is not quantization
        self._quantize(student)
        recompute(gradient_checkpointing, self.student, self.compilation, terms)
        self._channels_last = channels_last  # None until it is measured
        self._lay_out()
        self.scheduled_layers: set[str] = set()  # names of layers of the student whose bits a schedule changes
        taps_of_teachers = self.distillation.taps_of_teachers(self.named_teachers)
        taps_of_student = self.distillation.taps_of_student(self.student)
        self.passes = Passes(
            self.task, self.named_teachers, self.student, taps_of_teachers, taps_of_student, self.compilation
        )
        self.distillation.bind(self.student, self.named_teachers)
        self.watch_gradients = False  # whether training_step also returns gradients at the logits
        self.balance = balance or FixedBalance()
        self.optimization = SharedBackward(self, gradient_clip_val, accumulate_grad_batches)
        self._connect_balance(terms)
        self.student_optimizer = student_optimizer
        self.regularizer_optimizer = regularizer_optimizer
        self.student_schedule = student_schedule or Cosine()
        self.regularizer_schedule = regularizer_schedule or Constant()
        self.teacher_cache = teacher_cache
        self.references: dict[str, float | None] = dict.fromkeys(REFERENCES)
        self.penalties: dict[str, Callable[[], Tensor]] = {}
        self._hold_nothing()
        self._followers: list[Any] = []
        self._signs = SignCheck()
        self.top1_agreement = Top1Agreement(self.task, self._judged())
        self._logged: dict[str, Tensor] = {}  # metrics of the last batch

    def _quantize(self, student: nn.Module) -> None:
        """And remember what becomes of batch norms that are folded before."""
        folds = folds_batch_norm(self.quantization)
        self._without_statistics = folds and has_fresh_statistics(student)
        tapped = {tap.student for _, term in self.distillation.terms() for tap in term.taps}
        self._folded_taps = folded_into(student, tapped) if folds else {}
        self.student, self.coverage = quantize_model(student, self.quantization)

    def _hold_nothing(self) -> None:
        """What is kept of held-out rows, by the name of the term."""
        self.trust: dict[str, dict[str, Any]] = {}
        self.reliability: dict[str, dict[str, dict[str, list[float]]]] = {}  # for pictures
        self.held_out: dict[str, HeldOutRows] = {}  # in a training, of the terms whose regularizer learns from them
        self.known_of_held_out: dict[str, Known] = {}  # before a training, of a checkpoint, and after it
        self.held_out_features: dict[str, HeldOutFeatures] = {}  # likewise, of terms of features
        self.held_out_task: dict[str, HeldOutTask] = {}  # likewise, of terms whose player looks ahead to them

    def _lay_out(self) -> None:
        """Weights decide: the first convolution turns images of any format into theirs."""
        self.student.to(memory_format=torch.channels_last if self._channels_last else torch.preserve_format)

    def _connect_balance(self, terms: Mapping[str, Term]) -> None:
        self.balance.connect((TASK, *terms))
        others = [type(term.loss).__name__ for term in terms.values() if term.loss.compares != "logits"]
        if self.balance.needs_output and others:
            raise UsageError(
                f"balance {type(self.balance).__name__} measures gradients at the logits: it needs a distillation_loss "
                f"that compares logits, which {others[0]} does not; GradientBalance and GradNorm measure in weights"
            )
        if isinstance(self.balance.equalized_at, AtWeights):
            self.balance.equalized_at.bind(self.student)

    # ---- before the first batch

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer, the first of them where every term, pair of taps or teacher has its own."""
        return next((term.regularizer for _, term in self.distillation.terms() if term.regularizer is not None), None)

    def configure_callbacks(self) -> list[Any]:
        """Also refuse settings of the Trainer that two optimizers cannot follow."""
        check_trainer_settings(self.trainer)
        return super().configure_callbacks()

    def metric_names(self) -> set[str]:
        names = {f"train/{name}" for name in (*self.balance.names, *self.penalties, *self.distillation.learned())}
        logged = (*self.balance.names, *self.balance.learned())
        names |= {f"balance/{name}" for name in logged} | {*self.top1_agreement.logged_as()}
        return super().metric_names() | names

    def trained(self) -> nn.Module:
        return self.student

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches whose gradients are averaged for one step."""
        return self.optimization.accumulate_grad_batches

    def accumulated_batches(self) -> int:
        return self.accumulate_grad_batches

    def progress(self, of: str) -> float:
        """The part of the training's steps that is done; see :meth:`SharedBackward.progress`."""
        return self.optimization.progress(of)

    def teachers(self) -> list[FrozenTeacher]:
        """All teachers, in the order of their names."""
        return list(self.named_teachers.values())

    @property
    def judged(self) -> dict[str, FrozenTeacher | TeacherEnsemble]:
        """What must be better than chance, by what messages call it: every teacher, or an ensemble as one."""
        named = self._judged()
        return named if self.teacher is not None else {teacher_label(name, named): one for name, one in named.items()}

    def _judged(self) -> dict[str, FrozenTeacher | TeacherEnsemble]:
        """The same by their names."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        added = self.own_joined.values() if self.own_added else ()  # it need not be good, and is measured by itself
        return {name: one for name, one in self.named_teachers.items() if name not in added}

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        for name, teacher in self.named_teachers.items():
            yield teacher_label(name, self.named_teachers), teacher
        yield "student", self.student

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for teacher in self.teachers():
            teacher.convert_from(getattr(data, "mean", None), getattr(data, "std", None))
            if data is not None and hasattr(data, "class_names"):
                teacher.check_classes(data.class_names)
        if not hasattr(data, "class_names") and any(teacher.class_names is not None for teacher in self.teachers()):
            rank_zero_warn("teacher class_names were not compared with the data's: there is no DataModule with any")
        super().setup(stage)
        example = self.task.example(data, self.device)
        if example is not None:
            self._connect(example)
            self._settle_balance(self.inputs(example))
        if stage == "fit":
            check_held_out(self)
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
        if self.distillation.shapes is not None:
            return
        with evaluating(self.student):
            inputs = self.inputs(batch)
            teachers = self.passes.ask_teachers(self.passes.teacher_inputs(batch, inputs))
            student = self.passes.of_student(inputs)
        rows = self.task.rows(student.output, batch)
        shapes = {}
        for name, term in self.distillation.terms():
            teacher = teachers[term.teachers[0]]
            of_both = term.seen(teacher, student, (self.task.rows(teacher.output, batch), rows))
            of_teacher, of_student = ([tuple(x.shape) for x in seen] for seen in of_both)
            count = max(1, len(term.losses) // len(of_student)) if term.compares == "logits" else 1
            shapes[name] = (of_teacher * count, of_student * count)
        self.distillation.connect(shapes)

    def _settle_balance(self, inputs: Inputs) -> None:
        """Let a balance that measures gradients in weights find them, or see that both losses reach them."""
        place = self.balance.equalized_at
        if not isinstance(place, AtWeights) or place.settled:
            return

        def run() -> tuple[Tensor, list[Tensor]]:
            student = self.passes.of_student(inputs)
            compared = [
                tensor
                for _, term in self.distillation.terms()
                for tensor in ([student.features[tap.student] for tap in term.taps] or [student.output])
            ]
            return student.output, compared

        place.settle(run)
        rank_zero_info(f"balance {type(self.balance).__name__} measures gradients in the weights of {place.layer}")

    def _connect_unseen(self) -> None:
        """Let the first batch tell shapes that neither a DataModule nor a checkpoint has; most on logits do without."""
        if self.distillation.shapes is not None:
            return
        if any(term.taps or isinstance(term.regularizer, LearnableTable) for _, term in self.distillation.terms()):
            self.trainer.fit_loop.setup_data()
            self._connect(self._first_batch())
            return
        unseen: dict[str, Shapes] = {name: [(1, 0)] * len(term.losses) for name, term in self.distillation.terms()}
        self.distillation.connect({name: (shapes, shapes) for name, shapes in unseen.items()})

    def configure_optimizers(self) -> Any:
        self._connect_unseen()
        self.optimization.count_steps()
        self.optimization.length = GradientLength(self.balance.gradient_scale, self._student_parameters())
        self._beginnings.clear()
        self.optimization.optimizer_names.clear()
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
                regularizer_groups(self.distillation, self.balance),
            ),
        ):
            if not groups:  # a fixed balance without a regularizer has nothing to learn
                continue
            setting = f"{player}_optimizer"
            optimizer = optimizer_of(make, setting, groups)
            check_optimizer(optimizer, setting, groups)
            factors = learning_rate_factors(self.distillation, self.balance)
            for group in optimizer.param_groups:
                group["lr"] *= factors.get(group["name"], 1.0)
            optimizers.append(optimizer)
            schedulers.append(self.start_schedule(optimizer, schedule, f"{player}_schedule"))
            self.optimization.optimizer_names.append(setting)
        return optimizers, schedulers

    def _tell_progress(self) -> None:
        """Tell everything that follows the training how much of it is done: quantizers, players, balances."""
        for follower in self._followers:
            follower.progress = self.progress(type(follower).__name__)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._without_statistics and not self._resumed:
            raise UsageError(
                "quantization folds the student's batch norms into its layers before training, and they have never "
                "seen data: give student_weights of a trained student"
            )
        for layer, norm in self._folded_taps.items():
            rank_zero_warn(
                f"the tap on the student's {layer!r} is behind batch norm, since quantization folds {norm!r} into it "
                "before training: let the teacher's tap be behind its batch norm, too"
            )
        self.passes.release()  # after a training that has failed
        self.top1_agreement.forget()
        self._followers = [
            module
            for module in (*quantizers(self.student).values(), *self.distillation.modules(), self.balance)
            if getattr(module, "progress", None) is not None
        ]
        self._tell_progress()
        self._signs = SignCheck()
        unsettled = (
            isinstance(self.balance.equalized_at, AtWeights) and not self.balance.equalized_at.settled
        )  # no shape was told
        if unsettled or not self._resumed:
            inputs = self._check_first(self._first_batch())
            if unsettled:
                self._settle_balance(inputs.part(slice(1)))
            if not self._resumed:  # a checkpoint says of every quantizer whether it has seen data
                self._choose_format(inputs)
                self._fit_quantizers(inputs)
        if not self._resumed:
            leave_memorised(self)  # before a cache is opened for it
        self.passes.cache, of_teacher = prepare_teacher(self)
        fit_trust(self, known=self._resumed)
        self.held_out_features = kept_features(self)
        self.held_out_task = kept_task(self)
        self.references = measure(self, self.references, of_teacher.values)
        of_teacher.save()
        self._report_references()
        self._compile()

    def _compile(self) -> None:
        """Compile what is to be compiled, each in its first training pass."""
        for name, network in self.networks():
            if self.compilation.setting or (isinstance(network, FrozenTeacher) and network.compiled):
                self.compilation.start(name, network)
        self.compilation.start_augmentation(self.trainer.datamodule, self.device)  # type: ignore[attr-defined]

    def _first_batch(self) -> Any:
        """The first batch, on the device."""
        batch = first_batch(self.trainer.train_dataloader, "training")
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
        places = self.task.places(batch)
        if places is not None and not bool(places.all()):
            for name, term in self.distillation.terms():
                if term.compares_padding():
                    loss = type(term.losses[0]).__name__
                    warn(self, f"{name}: {loss} compares features of padding too: Hints and others leave it out")
        return inputs

    def _fit_quantizers(self, inputs: Inputs) -> None:
        """Fit every quantizer to the first batch."""
        with Progress("fitting quantizers") as bar, self.trainer.precision_plugin.forward_context():
            progress = bar.update if self.trainer.is_global_zero else None
            initialize_quantizers(
                self.student, *inputs.args, keywords=inputs.keywords, batch_statistics=True, progress=progress
            )

    def _choose_format(self, inputs: Inputs) -> None:
        """Measure which memory format is faster, where that is to decide."""
        if self._channels_last is None:
            if self.trainer.world_size > 1:  # which have laid out their gradients by now
                raise UsageError(
                    f"channels_last=null is not possible with {self.trainer.world_size} processes: measure it with "
                    "one, and give true or false"
                )
            with self.trainer.precision_plugin.forward_context():
                faster = faster_in_channels_last(self.student, inputs)
            self._channels_last = faster
            self._lay_out()

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        on_cpu = {name: rows.known.to(torch.device("cpu")) for name, rows in self.held_out.items()}
        self.known_of_held_out |= on_cpu  # for a checkpoint that is saved after the training
        self.held_out, self.held_out_features, self.held_out_task = {}, {}, {}
        for teacher in self.teachers():
            teacher.restore()
        self.passes.release()
        self.passes.cache = None

    def trust_tables(self) -> dict[str, dict[str, tuple[list[Any], dict[str, list[float]]]]]:
        """By term of which held-out rows tell, what there is to draw of it; see :func:`lqkd.modules.trust.tables`."""
        return {name: tables(self, name) for name in self.trust}

    def trust_maps(self) -> dict[str, dict[str, Tensor]]:
        """By term and teacher, what held-out rows have made of its logits, (C, C); see :class:`TrustMap.matrices`."""
        return {name: matrices(self, name) for name in self.trust}

    def _report_references(self) -> None:
        known = logged(self.references, self.task)
        if known:
            rank_zero_info(in_a_line(self.references, self.task))
        for logger in self.trainer.loggers:
            logger.log_metrics(known, step=0)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.student.train()  # a network that was handed over in eval mode would keep it
        self.distillation.train()
        self.balance.train()

    # ---- the path of a batch

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        started = time.perf_counter()
        self._tell_progress()
        for rows in self.held_out.values():
            rows.before_batch()
        for features in self.held_out_features.values():
            features.before_batch()
        losses = self.losses(batch, cached=True)
        report = self._report(losses, batch, batch_idx)
        self.optimization.take(losses, batch, batch_idx)
        self.compilation.end_step(time.perf_counter() - started)
        self._logged = step_numbers(losses, self.distillation, self.balance)
        show(self.trainer, self._logged)
        return report

    def losses(self, batch: Any, cached: bool = False) -> Losses:
        """All losses of one batch.

        Args:
            batch: what the task takes, on the device: (images, labels), say.
            cached: whether teachers' outputs come from the cache where there is one.
        """
        inputs = self.inputs(batch)
        self.samples_in_batch = len(inputs)
        outputs = self.passes.run(batch, inputs, self.current_epoch, cached)
        losses = {TASK: self.task.loss(outputs.student.output, batch)}
        held_out = {name: rows.at(self.global_step) for name, rows in self.held_out_task.items()}
        divergences = self.distillation(outputs, losses[TASK], batch, self.task, self.student, held_out)
        losses |= self.distillation.reduce(divergences)
        loss, balance = self.balance(losses, outputs.student.output)
        penalties = {name: penalty() for name, penalty in self.penalties.items()}
        learned = [of_rows for rows in self.held_out.values() if (of_rows := rows.objective()) is not None]
        for further in (*self.distillation.objectives(divergences), *learned, *penalties.values()):
            loss = loss + further
        return Losses(loss, losses, divergences, outputs, balance, penalties)

    def _student_parameters(self) -> list[nn.Parameter]:
        """Those that are trained, for what measures gradients in them."""
        return measured_together(self.student, (p for p in self.student.parameters() if p.requires_grad))

    def _report(self, losses: Losses, batch: Any, batch_idx: int) -> dict[str, Any]:
        """What a step gives to callbacks; that of named terms is under ``terms``, by name."""
        report = step_report(losses, self.distillation, self.task, batch, positions=self.watch_gradients)
        if self.watch_gradients:
            report["gradients"] = gradients_at_outputs(losses, self.distillation)
            if batch_idx % _STEP_LENGTH_EVERY == 0:  # which takes a backward pass for each loss
                report["gradient_norms"] = gradient_norms(
                    losses.by_name | losses.penalties, losses.balance, self._student_parameters()
                )
        return report

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(self.trainer):  # after the callbacks, one of which may stop the training here
            send(self.trainer, self._logged)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.top1_agreement.reset()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._signs.begin_validation(self.product())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self._evaluate(batch, self.val_metrics)
        agreement = self.top1_agreement.logged_as()
        if agreement and self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            inputs = self.inputs(batch)
            self.top1_agreement.update(outputs, batch, self.passes.teacher_inputs(batch, inputs))
            self.log_dict(agreement, on_step=False, on_epoch=True, batch_size=len(inputs))

    def on_validation_end(self) -> None:
        self._signs.end_validation(self)

    def on_train_epoch_end(self) -> None:
        self._signs.end_epoch(self)
        self.balance.on_epoch_end()
        self.optimization.step_schedules("epoch")
        if self.held_out:
            send(self.trainer, numbers(self.held_out, self.distillation.named))

    def on_train_end(self) -> None:
        super().on_train_end()
        report_held_out(self)

    # ---- state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillModule:
        super()._apply(fn, recurse)
        for teacher in self.teachers():
            teacher._apply(fn, recurse)  # outside the module tree, but on the same device
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's state, of an earlier version too.

        Raises:
            UsageError: when it is that of another architecture or of other bits.
        """
        return super().load_state_dict(current_terms(state_dict), strict, assign)

    def check_state(self, state_dict: Mapping[str, Tensor]) -> None:
        check_state(self, state_dict, any_bits={f"student.{name}" for name in self.scheduled_layers})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["channels_last"] = self._channels_last
        checkpoint |= kept(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._channels_last is None:
            self._channels_last = checkpoint.get("channels_last")
            self._lay_out()
        bring_back(self, checkpoint)
