"""Several trainings side by side in one process: each on a stream of its own, its steps replayed as a CUDA graph.

A step of ResNet-20 is some thousand kernels of microseconds each, whose launches cost more than they do. A graph
launches them at once, and streams let those of several trainings overlap. The step itself is DistillModule's, without
Lightning around it: losses, backward, optimizer, schedule, in the order of ``training_step``.

``torch.func.vmap`` over stacked states would make the kernels larger instead; quantizers are autograd functions of
their own that have no rule for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.data import CLASSES, Feed, image_root
from benchmarks.gpu.plan import Run, Settings
from benchmarks.gpu.recipes import GivenLogits, connect, module_of, teacher_of
from benchmarks.gpu.results import Clock, synchronize, why
from lqkd.data import Batch
from lqkd.modules.optimizers import student_groups
from lqkd.modules.terms import TEACHER
from lqkd.quantization import initialize_quantizers, quantizers, reestimate_batchnorm
from lqkd.teachers.cache import OpenCache
from lqkd.utils.files import atomic_path

EAGER_STEPS = 3
"""Before a graph is captured, so that kernels are compiled and memory is allocated."""
CHUNK = {"cuda": 64, "cpu": 2}
"""Steps whose batches are prepared at once."""
REESTIMATED = 50
"""Batches whose statistics batch norm has in an evaluation."""


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU. Nothing is cached: a graph must not read what a step before it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class Training:
    """One run: module, optimizer, schedule, and the step.

    Args:
        run: which.
        data: folder of the weights that were brought along.
        out: folder of the weights that were trained here.
        total_steps: of the whole training.
        first: a batch that quantizers are fitted to.
        graph: whether steps are captured and replayed, on a GPU.
    """

    def __init__(self, run: Run, data: Path, out: Path, total_steps: int, first: Batch, graph: bool = True) -> None:
        self.run = run
        self.device = first.images.device
        self.total_steps = total_steps
        on_gpu = self.device.type == "cuda"
        self.module = module_of(run, data, out, fused=on_gpu, precision="auto" if on_gpu else "fp32").to(self.device)
        self.student = self.module.student
        (self._teacher,) = self.module.teachers()
        taps = self.module.passes.taps_of_teachers.get(TEACHER)
        paths = () if taps is None else taps.paths
        self._teacher.accelerate(bf16=self._teacher.wants_bf16(self.device), untouched=paths)
        self._given: GivenLogits | None = None
        if taps is None:
            self._given = GivenLogits(first.images.new_zeros(len(first.images), CLASSES[run.data]))
            self.module.passes.cache = cast(OpenCache, self._given)
        connect(self.module, run)
        with autocast(self.device):
            initialize_quantizers(self.student, first.images, batch_statistics=True)
        groups = student_groups(self.student, self.module.distillation.losses)
        self.optimizer = self.module.student_optimizer(groups)
        self.scheduler = self.module.student_schedule.configure(self.optimizer, total_steps)["scheduler"]
        self._followers = [q for q in quantizers(self.student).values() if q.progress is not None]
        self.module.train()
        self.steps = 0
        self.loss = torch.zeros((), device=self.device)
        self.curve: list[tuple[int, float]] = []
        """Epoch and accuracy on the validation images."""
        self.seconds = 0.0
        self.note = ""
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[Tensor, ...] = ()
        self._wants_graph = graph and on_gpu
        self._eager_steps = 0

    @torch.no_grad()
    def ask(self, images: Tensor) -> Tensor | None:
        """The logits (N, C) that the run learns from; None where it learns from none."""
        if self.run.method != "kl":
            return None
        return torch.cat([self._teacher(part) for part in images.split(2048)])

    @property
    def done(self) -> bool:
        return self.steps >= self.total_steps

    @property
    def diverged(self) -> bool:
        """Whether the last loss was no number; waits for the device."""
        return not bool(self.loss.isfinite())

    def step(self, batch: Batch, logits: Tensor | None) -> None:
        """One optimizer step; returns before a GPU has done it.

        Args:
            batch: images, normalised, and labels.
            logits: (B, C) of the teacher, where the run learns from logits.
        """
        given = [*batch[:3], *([logits] if logits is not None else [])]
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._wants_graph and self._graph is None and self._eager_steps >= EAGER_STEPS:
                self._capture(given)
            if self._graph is None:
                self.optimizer.zero_grad(set_to_none=True)
                self._forward_backward(given)
                self._eager_steps += 1
            else:
                for static, tensor in zip(self._static, given, strict=True):
                    static.copy_(tensor, non_blocking=True)
                self._graph.replay()
            self.optimizer.step()
            self.scheduler.step()
        self.steps += 1

    def follow(self, progress: float) -> None:
        """Tell estimators that follow the training how much of it is done; a graph has the number within it.

        Args:
            progress: 0 to 1; that of the epoch's beginning, as papers count, so that a graph serves an epoch.
        """
        if any(quantizer.progress != progress for quantizer in self._followers):
            self._graph = None
            # One eager step first: a new constant cannot come to the device while a graph is captured.
            self._eager_steps = min(self._eager_steps, EAGER_STEPS - 1)
        for quantizer in self._followers:
            quantizer.progress = progress

    def _forward_backward(self, given: list[Tensor]) -> None:
        images, labels, indices, *logits = given
        if self._given is not None and logits:
            self._given.logits = logits[0]
        with autocast(self.device):
            loss = self.module.losses(Batch(images, labels, indices), cached=True).loss
        loss.backward()
        self.loss = loss.detach()

    def _capture(self, given: list[Tensor]) -> None:
        self._static = tuple(tensor.clone() for tensor in given)
        self.optimizer.zero_grad(set_to_none=True)  # the graph owns the memory of gradients, and writes them anew
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._forward_backward(list(self._static))
        except Exception as error:
            self._wants_graph = False
            self.note = f"no CUDA graph ({why(error)})"
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            return
        self._graph = graph

    # ---- evaluation

    def accuracy(self, feed: Feed, split: str, epoch: int) -> float:
        """Percent of the images of ``val`` or ``test`` that are named right, batch norm re-estimated."""
        images = feed.parts(feed.batches(epoch, 0, min(REESTIMATED, feed.steps)))
        with autocast(self.device):
            reestimate_batchnorm(self.student, (batch.images for batch in images))
            self.student.eval()
            right = total = 0
            with torch.no_grad():
                for x, labels in feed.evaluation(split):
                    right += int((self.student(x).argmax(1) == labels).sum())
                    total += len(labels)
        self.student.train()
        return 100.0 * right / total

    # ---- between visits

    def save(self, path: Path) -> None:
        """Keep everything that the training goes on from."""
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps": self.steps,
            "curve": self.curve,
            "seconds": self.seconds,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` kept."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps, self.curve, self.seconds = state["steps"], state["curve"], state["seconds"]


@dataclass
class Place:
    """Where trainings find what they need and keep what they have."""

    data: Path
    """Images and float weights that were brought along."""
    out: Path
    """Results, states and weights."""
    settings: Settings
    device: torch.device

    def __post_init__(self) -> None:
        self._feeds: dict[tuple[str, int], Feed] = {}

    def feed(self, run: Run) -> Feed:
        """The batches of a run, the same for all of one data set and seed."""
        key = (run.data, run.seed)
        if key not in self._feeds:
            root = image_root(run.data, self.data)
            self._feeds[key] = Feed(run.data, run.seed, root, self.settings, self.device)
        return self._feeds[key]

    def state(self, run: Run) -> Path:
        return self.out / "states" / f"{run.name}.pt"

    def training(self, run: Run, graph: bool = True) -> Training:
        """The training of a run, where the last visit left it."""
        feed = self.feed(run)
        total = self.settings.scaled_epochs * feed.steps
        training = Training(run, self.data, self.out, total, feed.batches(0, 0, 1), graph)
        if self.state(run).exists():
            training.load(self.state(run))
        return training


def train(
    trainings: Iterable[Training], place: Place, clock: Clock, at_chunk: Callable[[list[Training]], None] | None = None
) -> None:
    """Train side by side until all are done or the time is over, at the end of a chunk of steps.

    Trainings of one data set and seed see the same batches, which are prepared once; so are the logits of a teacher.

    Args:
        trainings: that are not done.
        place: of their data.
        clock: of the stage.
        at_chunk: called with those that have just trained a chunk of steps.
    """
    running = [training for training in trainings if not training.done]
    while running and clock.left() > 0:
        started = time.monotonic()
        plans = [_Chunk(training, place) for training in running]
        synchronize()  # what was prepared on one stream is read on others
        prepared: dict[Any, Any] = {}
        work = [(plan.training, plan.prepare(prepared)) for plan in plans]
        synchronize()
        for position in range(max(len(steps) for _, steps in work)):
            for training, steps in work:
                if position < len(steps):
                    training.step(*steps[position])
        synchronize()
        for training in running:
            training.seconds += (time.monotonic() - started) / len(running)
        if at_chunk is not None:
            at_chunk(running)
        running = [training for training in running if not training.done and not training.diverged]


class _Chunk:
    """The next steps of a training, at most to the end of an epoch."""

    def __init__(self, training: Training, place: Place) -> None:
        self.training = training
        self._place = place
        self._feed = place.feed(training.run)
        self._epoch, self._first = divmod(training.steps, self._feed.steps)
        self._count = min(CHUNK[place.device.type], self._feed.steps - self._first)
        training.follow(self._epoch * self._feed.steps / training.total_steps)

    def prepare(self, prepared: dict[Any, Any]) -> list[tuple[Batch, Tensor | None]]:
        """Batch and logits of each step; ``prepared`` has what other trainings have asked for."""
        run = self.training.run
        key = (run.data, run.seed, self._epoch, self._first)
        if key not in prepared:
            whole = self._feed.batches(self._epoch, self._first, self._count)
            prepared[key] = whole, self._feed.parts(whole)
        whole, batches = prepared[key]
        of_teacher = (*key, run.method, teacher_of(run, self._place.data, self._place.out))
        if of_teacher not in prepared:
            prepared[of_teacher] = self.training.ask(whole.images)
        logits = prepared[of_teacher]
        answers = [None] * len(batches) if logits is None else logits.split([len(b.labels) for b in batches])
        return list(zip(batches, answers, strict=True))
