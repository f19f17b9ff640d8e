"""What a learnable regularizer adds to a fixed distillation weight at two bits, over several seeds.

    python -m benchmarks.regularizer_study --csv FILE --data digits|DIR [--seeds N] [--images N] [--epochs N]

Variants of one seed see the same batches, augmentation, initial weights and teacher outputs. Accuracy is on validation
images that are held out of the training set; the test split is not looked at. DIR holds CIFAR-10, and the teacher's and
student's weights come from the folder $LQKD_DATA. Every finished run is a row at once, so that a run can be cut short.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lqkd.balances import (
    BoundedUncertaintyBalance,
    FixedBalance,
    ImpartialBalance,
    LearnableRatioBalance,
    OutputGradientBalance,
    UncertaintyBalance,
)
from lqkd.data import CIFAR10, Digits
from lqkd.losses import HintonKL, LogitResidual
from lqkd.models import CifarResNet, load_weights
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe, reestimate_batchnorm
from lqkd.regularizers import Adversarial, ElementwiseMLP, Entropy, LearnableTable, LookAhead, SampleWeight
from lqkd.teachers import FrozenTeacher
from lqkd.utils.files import atomic_path

Arguments = Callable[[], dict[str, Any]]


def fixed(loss: Callable[[], nn.Module], task: float, distill: float) -> Arguments:
    return lambda: {"distillation_loss": loss(), "balance": FixedBalance(task, distill), "regularizer": None}


def learned(
    regularizer: Callable[[], nn.Module], loss: Callable[[], nn.Module], task: float, distill: float
) -> Arguments:
    return lambda: {
        "distillation_loss": loss(),
        "balance": FixedBalance(task, distill),
        "regularizer": regularizer(),
    }


def scalars(balance: Callable[[], nn.Module]) -> Arguments:
    """A balance whose scalars learn three times as fast as by default, since trainings here are short."""
    return lambda: {
        "distillation_loss": HintonKL(),
        "balance": balance(),
        "regularizer": None,
        "regularizer_optimizer": lambda p: torch.optim.Adam(p, lr=3e-3),
    }


VARIANTS: dict[str, Arguments] = {
    "task only": fixed(HintonKL, 1.0, 0.0),
    "fixed KL 0.5:0.5": fixed(HintonKL, 0.5, 0.5),
    "fixed KL 0.7:0.3": fixed(HintonKL, 0.7, 0.3),
    "fixed KL 0.1:0.9": fixed(HintonKL, 0.1, 0.9),
    "fixed KL 0:1": fixed(HintonKL, 0.0, 1.0),
    "fixed MSE 1:0.1": fixed(LogitResidual, 1.0, 0.1),
    "fixed MSE 1:1": fixed(LogitResidual, 1.0, 1.0),
    "literal R_phi, MSE 1:1": learned(lambda: ElementwiseMLP(guard="none"), LogitResidual, 1.0, 1.0),
    "barrier R_phi, MSE 1:1": learned(lambda: ElementwiseMLP(guard="barrier"), LogitResidual, 1.0, 1.0),
    "fixed KL 0.9:0.1": fixed(HintonKL, 0.9, 0.1),
    "two scalars, KL": lambda: {
        "distillation_loss": HintonKL(),
        "balance": BoundedUncertaintyBalance(),
        "regularizer": None,
    },
    "two fast scalars, KL": scalars(BoundedUncertaintyBalance),
    "two fast scalars of Kendall, KL": scalars(UncertaintyBalance),
    "two fast scalars of IMTL, KL": scalars(ImpartialBalance),
    "two fast scalars of Kendall, led by the teacher, KL": scalars(
        lambda: UncertaintyBalance(teacher_share=0.5, hold=0.2, release=0.8)
    ),
    "gradient balance, KL": lambda: {
        "distillation_loss": HintonKL(),
        "balance": OutputGradientBalance(),
        "regularizer": None,
    },
    "gradient balance with a learnable ratio, KL": lambda: {
        "distillation_loss": HintonKL(),
        "balance": LearnableRatioBalance(),
        "regularizer": None,
        "regularizer_optimizer": lambda p: torch.optim.Adam(p, lr=3e-3),
    },
    "adversarial elements, KL 0.5:0.5": learned(
        lambda: ElementwiseMLP(guard=Entropy(2.0), player=Adversarial()), HintonKL, 0.5, 0.5
    ),
    "look-ahead elements, KL 0.5:0.5": learned(
        lambda: ElementwiseMLP(guard=Entropy(1.0), player=LookAhead()), HintonKL, 0.5, 0.5
    ),
    "adversarial samples, KL 0.5:0.5": learned(
        lambda: SampleWeight(guard=Entropy(2.0), player=Adversarial()), HintonKL, 0.5, 0.5
    ),
    "look-ahead samples near one, KL 0.7:0.3": learned(
        lambda: SampleWeight(guard=Entropy(4.0), player=LookAhead()), HintonKL, 0.7, 0.3
    ),
    "look-ahead classes, KL 0.7:0.3": learned(
        lambda: LearnableTable(guard=Entropy(1.0), player=LookAhead()), HintonKL, 0.7, 0.3
    ),
    "look-ahead samples, KL 0.7:0.3": learned(
        lambda: SampleWeight(guard=Entropy(1.0), player=LookAhead()), HintonKL, 0.7, 0.3
    ),
    "look-ahead samples, KL 0.5:0.5": learned(
        lambda: SampleWeight(guard=Entropy(1.0), player=LookAhead()), HintonKL, 0.5, 0.5
    ),
    "adversarial classes, KL 0.5:0.5": learned(
        lambda: LearnableTable(guard=Entropy(2.0), player=Adversarial()), HintonKL, 0.5, 0.5
    ),
}


def key(images: Tensor) -> bytes:
    """What a batch is known by, whatever the layout of its memory."""
    return images[:4].contiguous().numpy().tobytes()


class Replay(nn.Module):
    """Gives again what a teacher said about batches that it has seen."""

    def __init__(self, answers: dict[bytes, Tensor]) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: Tensor) -> Tensor:
        return self.answers[key(images)][: len(images)]


class Material(NamedTuple):
    """What the variants of one seed share."""

    student: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    validation: list[tuple[Tensor, Tensor]]
    answers: dict[bytes, Tensor]


def material(source: str, seed: int, images: int, epochs: int) -> Material:
    seed_everything(seed, verbose=False)
    if source == "digits":
        data: Any = Digits(batch_size=64, limit_train=images)
        teacher, student = CifarResNet(14, width=8, in_channels=1), CifarResNet(8, width=8, in_channels=1)
        load_weights(teacher, "builtin:digits_teacher")
        load_weights(student, "builtin:digits_student")
    else:
        weights = Path(os.environ["LQKD_DATA"]) / "weights"
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        data = CIFAR10(root=source, batch_size=128, limit_train=images, mean=mean, std=std)
        teacher, student = CifarResNet(56), CifarResNet(20)
        load_weights(teacher, str(weights / "cifar10_resnet56.safetensors"))
        load_weights(student, str(weights / "cifar10_resnet20.safetensors"))
    data.setup()
    frozen = FrozenTeacher(teacher)
    batches: list[tuple[Tensor, Tensor]] = []
    for epoch in range(epochs):
        loader = data.train_dataloader()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batches += [(p.images, p.labels) for p in (data.preprocess(b, train=True, epoch=epoch) for b in loader)]
    validation = [
        (p.images, p.labels) for p in (data.preprocess(b, train=False, epoch=0) for b in data.val_dataloader())
    ]
    return Material(student, batches, validation, {key(x): frozen(x) for x, _ in batches})


@torch.no_grad()
def accuracy(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    network.eval()
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def run(arguments: dict[str, Any], shared: Material, seed: int, bits: str, rate: float) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    classes = next(iter(shared.answers.values())).shape[1]
    module = DistillModule(
        FrozenTeacher(Replay(shared.answers), minimum_accuracy=0.0, precision="fp32"),
        copy.deepcopy(shared.student),
        quantization=Recipe(bits=bits),
        student_optimizer=lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=1e-4),
        **arguments,
    )
    module.distillation.connect({"distill": ([(1, classes)], [(1, classes)])})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    batches: Any = shared.batches  # a sequence is a Dataset
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    seconds = time.perf_counter() - started
    reestimate_batchnorm(module.student, [x for x, _ in shared.batches[-20:]])
    weights: Tensor | None = None
    if module.regularizer is not None:
        images, labels = shared.batches[-1]
        with torch.no_grad():
            weights = module.regularizer(shared.answers[key(images)], module.student(images), labels)
    return {
        "validation_accuracy": round(accuracy(module.student, shared.validation), 4),
        "weight_mean": "" if weights is None else round(float(weights.mean()), 4),
        "weight_spread": "" if weights is None else round(float(weights.std()), 4),
        "seconds": round(seconds, 1),
    }


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_path(file) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the results; rows that it has are kept")
    parser.add_argument("--data", default="digits", help="digits, or a folder with CIFAR-10")
    parser.add_argument("--bits", default="w2a2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="training images an epoch")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of the student")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="variants to run; default: all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    if options.csv.exists():
        with open(options.csv, newline="") as stream:
            rows = list(csv.DictReader(stream))
    done = {(row["variant"], int(row["seed"])) for row in rows}
    for seed in range(options.seeds):
        missing = [name for name in options.only if (name, seed) not in done]
        shared = material(options.data, seed, options.images, options.epochs) if missing else None
        for name in missing:
            assert shared is not None
            row = {"variant": name, "seed": seed, "bits": options.bits, "steps": len(shared.batches)}
            rows.append(row | run(VARIANTS[name](), shared, seed, options.bits, options.rate))
            print(rows[-1], flush=True)
            write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
