"""What is quick to check of resuming: positions within an epoch, schedules, and what a user brings along."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from lqkd.balances import GradNorm, LearnableRatioBalance, UncertaintyBalance
from lqkd.callbacks import BitWidthScheduler, RegularizerMonitor, Stage
from lqkd.data import Digits, ImageDataModule, ImageFolder
from lqkd.errors import UsageError
from lqkd.losses import HintonKL, Hints
from lqkd.models import CifarResNet
from lqkd.modules import Cosine, DistillModule, Tap, Term
from lqkd.quantization import Recipe
from lqkd.regularizers import LearnableTable, SampleWeight
from lqkd.runs import BestAndLast, RunLogger
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, distiller, network, parameters_of

MakeTrainer = Callable[..., Trainer]


class StopAt(Callback):
    """An end without warning, before batch ``batch`` of epoch ``epoch``; the last checkpoint is a step older."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.when = (epoch, batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.when:
            raise InterruptedError


class Dropping(nn.Module):
    """A student that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.dropout = network(), nn.Dropout(0.3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.dropout(images))


def train(
    make: MakeTrainer,
    folder: Path,
    stop: tuple[int, int] | None = None,
    data: ImageDataModule | None = None,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> DistillModule:
    """Train in ``folder``, from its last checkpoint where there is one."""
    last = folder / "last.ckpt"
    resume = last if last.exists() else None
    rows = torch.load(last, weights_only=True)["resume"]["rows"] if resume else None
    accumulate = settings.pop("accumulate", 1)
    torch.manual_seed(0)
    rules = Recipe(bits="w4a4", weight_quantizer="minmax")  # whose own rule is not that of a refit
    parts = {"student": Dropping(), "accumulate_grad_batches": accumulate, "quantization": rules}
    module = distiller(**(parts | (model or {})))
    stages = [Stage("w8a8", until_step=3), Stage("w6a6", until_epoch=1)]
    callbacks: list[Any] = [RegularizerMonitor(every_n_steps=2), BitWidthScheduler(stages)]
    callbacks += [BestAndLast(folder, every_n_steps=1)] + ([StopAt(*stop)] if stop else [])
    defaults = {"max_epochs": 2, "callbacks": callbacks, "enable_checkpointing": True}
    trainer = make(logger=RunLogger(folder, rows), **(defaults | settings))
    trainer.fit(module, datamodule=data or digits(6), ckpt_path=resume, weights_only=True)
    return module


TABLES = ("metrics.csv", "regularizer/weights.csv", "regularizer/share.csv")


def assert_same(
    module: DistillModule, folder: Path, whole: DistillModule, of_whole: Path, tables: tuple[str, ...] = TABLES
) -> None:
    assert torch.equal(parameters_of(whole), parameters_of(module))
    for table in tables:
        assert (folder / table).read_text() == (of_whole / table).read_text()


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        ((0, 4), {}),  # from before the fourth step, just after a switch of bits, which no batch has followed
        ((1, 1), {}),  # likewise, at the start of an epoch
        ((1, 3), {"val_check_interval": 2}),  # just after a validation within the epoch
        ((1, 1), {"max_epochs": -1, "max_steps": 11}),
        ((1, 3), {"accumulate": 2}),  # within a group
    ],
)
def test_a_training_that_ends_anywhere_resumes_to_the_same_weights_and_metrics(
    make_trainer: MakeTrainer, tmp_path: Path, stop: tuple[int, int], settings: dict[str, Any]
) -> None:
    whole = train(make_trainer, tmp_path / "whole", **settings)
    with pytest.raises(InterruptedError):
        train(make_trainer, tmp_path / "cut", stop, **settings)
    resumed = train(make_trainer, tmp_path / "cut", **settings)
    assert_same(resumed, tmp_path / "cut", whole, tmp_path / "whole")


def test_fused_optimizers_resume_exactly_and_end_where_others_do(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Beside clipping and a schedule."""

    def run(folder: str, stop: tuple[int, int] | None = None, fused: bool = True) -> DistillModule:
        model = {
            "student_optimizer": lambda p: AdamW(p, lr=1e-3, fused=fused),
            "regularizer_optimizer": lambda p: AdamW(p, lr=1e-3, fused=fused),
            "student_schedule": Cosine(warmup_fraction=0.2),
            "gradient_clip_val": 0.5,
        }
        return train(make_trainer, tmp_path / folder, stop, model=model)

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("cut", (1, 3))
    assert_same(run("cut"), tmp_path / "cut", whole, tmp_path / "whole")
    plain = parameters_of(run("plain", fused=False))
    assert not torch.equal(plain, parameters_of(whole))
    torch.testing.assert_close(plain, parameters_of(whole), rtol=1e-2, atol=1e-3)


def test_a_learnable_ratio_resumes_exactly_and_is_logged(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(folder: str, stop: tuple[int, int] | None = None) -> DistillModule:
        model = {"regularizer": None, "distillation_loss": HintonKL(), "balance": LearnableRatioBalance()}
        return train(make_trainer, tmp_path / folder, stop, model=model)

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("cut", (1, 3))
    assert_same(run("cut"), tmp_path / "cut", whole, tmp_path / "whole", ("metrics.csv", "regularizer/share.csv"))
    with open(tmp_path / "whole" / "metrics.csv", newline="") as stream:
        logged = [float(row["balance/ratio"]) for row in csv.DictReader(stream) if row["balance/ratio"]]
    assert logged[-1] != pytest.approx(1.0)


def test_gradients_measured_in_weights_resume_exactly(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """With batches of a group that are measured one by one, and features, whose layer is found at each start."""

    def run(folder: str, stop: tuple[int, int] | None = None) -> DistillModule:
        taps = [Tap("layer1", "network.layer1"), Tap("layer2", "network.layer2")]
        model = {"regularizer": None, "distillation_loss": Hints(), "taps": taps, "balance": GradNorm()}
        return train(make_trainer, tmp_path / folder, stop, model=model, accumulate=2)

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("cut", (1, 3))
    assert_same(run("cut"), tmp_path / "cut", whole, tmp_path / "whole", ("metrics.csv",))
    assert abs(whole.balance.v.detach()).max() > 0.01


def test_mixed_images_and_a_cache_that_is_half_written_resume_exactly(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The cache of the uninterrupted training is another one, which is then replayed by a third."""

    def run(folder: str, cache: str, stop: tuple[int, int] | None = None) -> DistillModule:
        every = {"crop_padding": 1, "rand_augment": 1, "random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}
        data = Digits(batch_size=16, limit_train=96, eval_batch_size=256, **every)  # type: ignore[arg-type]
        model = {"teacher_cache": TeacherCache(str(tmp_path / cache))}
        return train(make_trainer, tmp_path / folder, stop, data, model)

    whole = run("whole", "cache of whole")
    with pytest.raises(InterruptedError):
        run("cut", "cache", (1, 3))
    assert_same(run("cut", "cache"), tmp_path / "cut", whole, tmp_path / "whole")
    assert_same(run("replaying", "cache"), tmp_path / "replaying", whole, tmp_path / "whole")


def test_images_that_workers_decode_resume_exactly_within_an_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (12 + number % 5, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")

    def run(folder: str, stop: tuple[int, int] | None = None) -> DistillModule:
        torch.manual_seed(0)
        networks = [CifarResNet(8, num_classes=2, width=4) for _ in range(2)]
        model = {"student": networks[0], "teacher": FrozenTeacher(networks[1], minimum_accuracy=0.0)}
        model["teacher_cache"] = TeacherCache(str(tmp_path / f"cache of {folder}"))
        data = ImageFolder(root=str(tmp_path / "images"), image_size=8, batch_size=8, num_workers=2)
        return train(make_trainer, tmp_path / folder, stop, data, model)

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("cut", (1, 3))
    assert_same(run("cut"), tmp_path / "cut", whole, tmp_path / "whole")


def test_a_training_that_had_ended_goes_on_at_the_rate_of_a_longer_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    seen: list[float] = []
    for epochs, resume in ((1, None), (2, tmp_path / "last.ckpt")):
        trainer = make_trainer(
            max_epochs=epochs, callbacks=[Rates(), BestAndLast(tmp_path)], enable_checkpointing=True, logger=False
        )
        trainer.fit(distiller(), datamodule=digits(3), ckpt_path=resume, weights_only=True)
    assert seen[3:] == pytest.approx([0.05 * Cosine().factor(step, 6) for step in range(3, 6)])


def test_a_global_batch_cannot_change_within_an_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def fit(batch_size: int, resume: Path | None = None) -> None:
        callbacks = [BestAndLast(tmp_path, every_n_steps=1), StopAt(0, 3)]
        trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, logger=False)
        trainer.fit(distiller(), datamodule=digits(4, batch_size), ckpt_path=resume, weights_only=True)

    with pytest.raises(InterruptedError):
        fit(16)
    with pytest.raises(UsageError, match="with a global batch of 16 images, which is now 8"):
        fit(8, tmp_path / "last.ckpt")


def test_any_other_loader_is_read_up_to_its_place(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """One in a fixed order ends with the same weights; a warning says what that depends on."""
    torch.manual_seed(1)
    samples = TensorDataset(torch.randn(48, 1, 8, 8), torch.arange(48) % 10)

    def run(stop: bool, resume: Path | None = None) -> torch.Tensor:
        module = distiller()
        callbacks = [BestAndLast(tmp_path, validates=False, every_n_steps=1), *([StopAt(0, 3)] if stop else [])]
        trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
        trainer.fit(module, DataLoader(samples, batch_size=12), ckpt_path=resume, weights_only=True)
        return parameters_of(module)

    whole = run(False)
    with pytest.raises(InterruptedError):
        run(True)
    with pytest.warns(UserWarning, match="the first 2 batches of the epoch are read and left out"):
        assert torch.equal(run(False, tmp_path / "last.ckpt"), whole)


def test_several_terms_resume_exactly(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """With a learned balance, a regularizer of its own for each term, and teachers that are combined."""

    def run(folder: str, stop: tuple[int, int] | None = None) -> DistillModule:
        torch.manual_seed(1)
        teachers = {name: FrozenTeacher(network(depth), minimum_accuracy=0.0) for name, depth in (("a", 14), ("b", 8))}
        terms = {
            "logits": Term(HintonKL(), ["a", "b"], "learned", regularizer=SampleWeight(hidden=8)),
            "features": Term(Hints(), "b", taps=[Tap("layer1", "network.layer1")], regularizer=LearnableTable()),
        }
        parts = {"teacher": None, "regularizer": None, "teachers": teachers, "distillation": terms}
        return train(
            make_trainer, tmp_path / folder, stop, model={**parts, "balance": UncertaintyBalance()}, accumulate=2
        )

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("cut", (1, 3))
    tables = ("metrics.csv", "regularizer/step_length.csv", "regularizer/features/weights.csv")
    assert_same(run("cut"), tmp_path / "cut", whole, tmp_path / "whole", tables)
