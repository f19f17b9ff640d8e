"""One process of a distributed training: trains a little and saves what it saw."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lqkd.balances import BoundedUncertaintyBalance, GradNorm
from lqkd.callbacks import BitWidthScheduler, OscillationDampening, OscillationFreezing, OscillationMonitor, Stage
from lqkd.data import Augmentation, Batch, Digits
from lqkd.losses import HintonKL, Hints, LogitResidual
from lqkd.models import CifarResNet, load_weights
from lqkd.modules import Tap, Term, compilation
from lqkd.quantization import Recipe, quantizers
from lqkd.regularizers import ElementwiseMLP, ExplainedVariance, HeldOutInterpolation, SampleWeight
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, distiller, network, parameters_of


class UnlabelledRank(Digits):
    """Digits, of which process ``rank`` knows no label in training."""

    rank = -1

    def preprocess(self, batch: Batch, *, train: bool, epoch: int) -> Batch:
        batch = super().preprocess(batch, train=train, epoch=epoch)
        assert self.trainer is not None
        hidden = train and self.trainer.global_rank == self.rank
        return batch._replace(labels=torch.full_like(batch.labels, -1)) if hidden else batch


class Watch(Callback):
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.initial_scales = torch.empty(0)
        self.asked = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.initial_scales = torch.cat([q.scale.detach().flatten() for q in quantizers(pl_module.student).values()])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(parameters_of(pl_module))
        cache = pl_module.passes.cache
        self.asked = 0 if cache is None else cache.asked


def _terms(student: nn.Module) -> dict[str, Any]:
    """Arguments of a module with three terms of two teachers, and a step as long as the task's own."""
    large = FrozenTeacher(network(14), minimum_accuracy=0.0)
    own = FrozenTeacher(copy.deepcopy(student), minimum_accuracy=0.0)
    return {
        "teacher": None,
        "teachers": {"large": large, "own": own},
        "regularizer": None,
        "distillation": {
            "logits": Term(HintonKL(), "large", regularizer=SampleWeight(hidden=8)),
            "features": Term(Hints(), "own", taps=[Tap("1", "1")]),
            "residual": Term(LogitResidual(), "own", regularizer=ElementwiseMLP(hidden=8)),
        },
        "balance": BoundedUncertaintyBalance(gradient_scale="task"),
    }


def _swapping() -> FrozenTeacher:
    """A teacher that knows digits, two of them by each other's name."""
    network = CifarResNet(14, num_classes=10, width=8, in_channels=1)
    load_weights(network, "builtin:digits_teacher")
    with torch.no_grad():
        network.linear.bias[[0, 1]] = network.linear.bias[[1, 0]]
        network.linear.weight[[0, 1]] = network.linear.weight[[1, 0]]
    return FrozenTeacher(network, minimum_accuracy=0.0)


def main(
    output: str,
    processes: int,
    batch_size: int,
    accumulate: int = 1,
    samples: int = 192,
    oscillation: bool = False,
    player: str = "cooperative",
    guard: str = "barrier",
    cache: str | None = None,
    shared: str | None = None,
    unlabelled_rank: int | None = None,
    terms: bool = False,
    trust: bool = False,
    interpolation: str | None = None,
    explained: bool = False,
    compiled: bool = False,
) -> None:
    torch.manual_seed(0)
    # Batch norm sees only its own rank's samples, so a comparison with one process needs a student without it.
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    arguments = {
        "student": student,
        "quantization": Recipe(bits="w2a4" if oscillation else "w4a4", first_layer_bits=None, last_layer_bits=None),
        "regularizer": ElementwiseMLP(hidden=8, player=player, guard=guard),
        # Adam would divide by gradients of rounding size.
        "regularizer_optimizer": lambda p: torch.optim.SGD(p, lr=0.01),
        "balance": BoundedUncertaintyBalance() if shared is None else GradNorm(shared),
        "accumulate_grad_batches": accumulate,
        "teacher_cache": None if cache is None else TeacherCache(cache, dtype="float32"),
        "student_optimizer": lambda p: torch.optim.SGD(p, lr=0.5 if oscillation else 0.05, momentum=0.9),
    }
    if compiled:
        arguments["compile"], compilation.BACKEND = True, "aot_eager"
    if interpolation is not None:
        arguments["regularizer"] = HeldOutInterpolation(of=interpolation, rows=32, every=2)
    if trust:
        arguments |= {
            "teacher": TeacherEnsemble([_swapping(), _swapping()], "trust", own=True),
            "distillation_loss": HintonKL(),
        }
    if explained:
        arguments |= {
            "teacher": FrozenTeacher(copy.deepcopy(student), minimum_accuracy=0.0),
            "distillation_loss": Hints(),
            "taps": [Tap("1", "1")],
            "regularizer": ExplainedVariance(rows=31, every=2),
        }
    module = distiller(**arguments | (_terms(student) if terms else {}))
    data = digits(1, batch_size)
    if unlabelled_rank is not None:
        data = UnlabelledRank(batch_size=batch_size, eval_batch_size=256)
        data.rank = unlabelled_rank
    data.limit_train = samples
    data.trust_fraction = 0.5 if trust or explained else 0.0
    data.augmentation = Augmentation()
    data.validation_fraction = 0.0994  # 143 images, an odd number
    watch = Watch()
    monitor, freezing = OscillationMonitor(), OscillationFreezing(0.005, 0.005)
    scheduler = BitWidthScheduler([Stage("w3a8", until_step=2)], refit="mse")
    extra = [scheduler, OscillationDampening(), monitor, freezing] if oscillation else []
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto",
        max_epochs=4 if oscillation else 1,
        callbacks=[*extra, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    synchronised: list[str] = []
    if processes > 1:
        watch.on_train_end = lambda t, m: synchronised.extend(name for name, _ in t.strategy.model.named_parameters())
    trainer.fit(module, datamodule=data)
    global_step = trainer.global_step
    teacher = module.references["teacher"]
    validation = trainer.validate(module, datamodule=data, verbose=False)[0]
    test = trainer.test(module, datamodule=data, verbose=False)[0]["test/acc"]
    saved = {
        "steps": watch.steps,
        "initial_scales": watch.initial_scales,
        "teacher": teacher,
        "test": test,
        "validation": [validation["val/acc"], validation["val/loss"]],
        "synchronised": synchronised,
        "global_step": global_step,
        "asked": watch.asked,
        "trust": module.trust,
        "explained": getattr(module.regularizer, "explained", None),
        "map": {name: kept for name, kept in module.distillation.state_dict().items() if "combination" in name},
        "oscillating": [row.oscillating for row in monitor.history],
        "flipping": [row.flipping for row in monitor.history],
        "frozen": [state.tensors["frozen"] for state in freezing._states.values()],
    }
    torch.save(saved, f"{output}_{os.environ['RANK']}.pt")
