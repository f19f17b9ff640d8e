"""A run as a DistillModule: the recipe that won on the CPU, and what it is compared with (results/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from benchmarks.gpu.data import CLASSES
from benchmarks.gpu.plan import Run
from lqkd.balances import FixedBalance
from lqkd.losses import HintonKL, Hints
from lqkd.losses.taps import Seen
from lqkd.models import CifarResNet, load_weights
from lqkd.modules import DistillModule, Tap
from lqkd.modules.terms import TEACHER
from lqkd.quantization import Recipe
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherOutputs

STAGES = ("layer1", "layer2", "layer3")
BALANCES = {"hints": (0.1, 100.0), "kl": (0.5, 0.5), "task": (1.0, 0.0)}
RATES = {True: 0.1, False: 0.01}
"""Of the optimizer, by whether a network starts from random weights."""


def weights_of(run: Run, data: Path, out: Path) -> Path | None:
    """The float weights that a run starts from; None for random ones."""
    if run.bits == "float":
        return None
    if run.needs is not None:
        return out / "weights" / f"{run.needs.name}.safetensors"
    return data / "weights" / "cifar10_resnet20.safetensors"


def teacher_of(run: Run, data: Path, out: Path) -> tuple[int, Path | None]:
    """Depth and weights of the ResNet that ``run`` learns from.

    Features are those of the student's own float network; logits those of ResNet-56 where its weights are brought
    along, which is on CIFAR-10.
    """
    if run.method == "kl" and run.data == "cifar10":
        return 56, data / "weights" / "cifar10_resnet56.safetensors"
    return 20, weights_of(run, data, out)


def module_of(run: Run, data: Path, out: Path, *, fused: bool = False, precision: str = "auto") -> DistillModule:
    """The run's module, whose quantizers have seen nothing yet.

    Args:
        run: which.
        data: folder of the weights that were brought along.
        out: folder of the weights that were trained here.
        fused: whether the optimizer updates all parameters in one kernel, as GPUs like it.
        precision: of the teacher.
    """
    weights = weights_of(run, data, out)
    torch.manual_seed(run.seed)
    classes = CLASSES[run.data]
    student = CifarResNet(20, num_classes=classes)
    if weights is not None:
        load_weights(student, str(weights))
    depth, of_teacher = teacher_of(run, data, out)
    network = CifarResNet(depth, num_classes=classes)
    task, distill = BALANCES[run.method]
    features = run.method == "hints"
    floating: dict[str, Any] = {"bits": "w32a32", "first_layer_bits": None, "last_layer_bits": None}
    return DistillModule(
        FrozenTeacher(network, None if of_teacher is None else str(of_teacher), precision=precision),
        student,
        quantization=Recipe(**floating) if run.bits == "float" else Recipe(bits=run.bits),
        distillation_loss=Hints() if features else HintonKL(),
        taps=[Tap(stage, stage) for stage in STAGES] if features else None,
        balance=FixedBalance(task=task, distill=distill),
        student_optimizer=lambda p: SGD(p, lr=RATES[weights is None], momentum=0.9, weight_decay=1e-4, fused=fused),
        channels_last=True,
    )


def connect(module: DistillModule, run: Run) -> None:
    """Tell the distillation what shapes it compares, as a DataModule's images would."""
    maps = [(1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    shapes: list[tuple[int, ...]] = [*maps] if run.method == "hints" else [(1, CLASSES[run.data])]
    module.distillation.connect({"distill": (shapes, shapes)})


class GivenLogits:
    """Stands where a module has its cache, and answers what it is told to.

    Attributes:
        logits: (B, C) of the batch that is asked about.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def answers(self, *_: Any) -> TeacherOutputs:
        """Logits of the one teacher, and no features."""
        return {TEACHER: Seen(self.logits, {})}
