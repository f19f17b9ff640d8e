"""What Lightning does with two optimizers, and what DistillModule makes of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lqkd.balances import BoundedUncertaintyBalance, FixedBalance
from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.modules import Constant, Cosine, DistillModule, TorchSchedule
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantizers
from lqkd.regularizers import LearnableTable
from lqkd.runs import RunSummary
from lqkd.tasks.classification import lowest_accuracy
from lqkd.teachers import FrozenTeacher
from tests.conftest import digits, distiller, network, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]


# ---- clocks


def test_global_step_counts_batches(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.fit(distiller(), datamodule=digits(7))
    assert trainer.global_step == 7


def test_the_last_logged_step_is_the_last_batch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer().fit(distiller(), datamodule=digits(7))
    with open(tmp_path / "metrics.csv", newline="") as stream:
        assert max(int(row["step"]) for row in csv.DictReader(stream)) == 6


def test_max_steps_stops_after_so_many_batches(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=5, max_epochs=-1)
    recorder = Recorder(lambda t, m: t.global_step)
    trainer.callbacks.append(recorder)
    trainer.fit(distiller(), datamodule=digits(7))
    assert recorder.seen == [1, 2, 3, 4, 5]


def test_a_checkpoint_is_saved_every_so_many_batches(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    make_trainer(callbacks=[saver], enable_checkpointing=True).fit(distiller(), datamodule=digits(7))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]


def test_both_schedules_follow_their_closed_form_to_the_last_batch(make_trainer: MakeTrainer) -> None:
    module = distiller(student_schedule=Cosine(), regularizer_schedule=Cosine(final_fraction=0.5))
    recorder = Recorder(lambda t, m: [optimizer.param_groups[0]["lr"] for optimizer in t.optimizers])
    make_trainer(max_epochs=2, callbacks=[recorder]).fit(module, datamodule=digits(5))
    for done, (student, regularizer) in enumerate(recorder.seen, start=1):
        half = 0.5 * (1 + math.cos(math.pi * done / 10))
        assert student == pytest.approx(0.05 * half, abs=1e-9)
        assert regularizer == pytest.approx(1e-3 * (0.5 + 0.5 * half), abs=1e-9)
    assert recorder.seen[-1][0] == pytest.approx(0.0, abs=1e-9)


def test_a_schedule_by_epoch_steps_once_an_epoch(make_trainer: MakeTrainer) -> None:
    schedule = TorchSchedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1), interval="epoch")
    recorder = Recorder(lambda t, m: t.optimizers[0].param_groups[0]["lr"])
    trainer = make_trainer(max_epochs=2, callbacks=[recorder])
    trainer.fit(distiller(student_schedule=schedule), datamodule=digits(2))
    assert recorder.seen == pytest.approx([0.05, 0.05, 0.005, 0.005])


def test_logarithms_of_weights_learn_faster_than_networks_do(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: {group["name"]: group["lr"] for group in t.optimizers[1].param_groups})
    module = distiller(
        regularizer=LearnableTable(), balance=BoundedUncertaintyBalance(), regularizer_schedule=Constant()
    )
    make_trainer(callbacks=[recorder]).fit(module, datamodule=digits(2))
    assert recorder.seen[0] == pytest.approx({"regularizer": 0.03, "balance": 0.01})


def test_learning_rates_are_logged_under_the_names_of_the_players(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[LearningRateMonitor()])
    trainer.fit(distiller(balance=BoundedUncertaintyBalance()), datamodule=digits(2))
    names = {name.split("/")[-1] for name in trainer.callback_metrics if name.startswith("lr-")}
    assert names == {"student", "student_quantizers", "regularizer", "balance"}


# ---- optimisation


def test_every_player_moves(make_trainer: MakeTrainer) -> None:
    module = distiller(balance=BoundedUncertaintyBalance())
    parts = {"student": module.student, "regularizer": module.regularizer, "balance": module.balance}
    before = {name: parameters_of(part) for name, part in parts.items()}
    scales = [q.scale for q in quantizers(module.student).values()]
    make_trainer(max_epochs=1).fit(module, datamodule=digits(3))
    for name, values in before.items():
        assert not torch.equal(values, parameters_of(parts[name])), name
    in_optimizer = {id(p) for o in [module.optimizers()[0]] for g in o.param_groups for p in g["params"]}
    assert {id(scale) for scale in scales} <= in_optimizer


def test_quantizer_steps_and_balance_get_no_weight_decay(make_trainer: MakeTrainer) -> None:
    module = distiller(
        balance=BoundedUncertaintyBalance(),
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        regularizer_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    )
    trainer = make_trainer()
    trainer.fit(module, datamodule=digits(1))
    decays = {group["name"]: group["weight_decay"] for o in trainer.optimizers for group in o.param_groups}
    assert decays == {"student": 0.1, "student_quantizers": 0.0, "regularizer": 0.1, "balance": 0.0}


def without_batch_norm() -> nn.Module:
    """A student whose gradient is a plain sum over samples, so that batches can be compared with parts of them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize(("samples", "group"), [(64, 2), (80, 3), (77, 3)])
def test_accumulated_batches_equal_one_large_batch(make_trainer: MakeTrainer, samples: int, group: int) -> None:
    """Also when the last group of the epoch has fewer batches or its last batch fewer samples, and with clipping."""
    images = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(samples) % 10
    results = []
    for batch_size, accumulate in ((16, group), (16 * group, 1)):
        torch.manual_seed(1)
        module = distiller(
            student=without_batch_norm(),
            # Weights only: activations would be fitted to first batches of different sizes.
            quantization=Recipe(bits="w4a32", first_layer_bits=None, last_layer_bits=None),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
        )
        trainer = make_trainer(max_epochs=2)
        trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=batch_size))
        assert trainer.global_step == 2 * math.ceil(samples / (16 * group))
        results.append(parameters_of(module))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_accumulation_scales_the_gradients_of_steps_once(make_trainer: MakeTrainer) -> None:
    """Four batches give the step sizes of weights and activations the gradient of the one batch that they make up."""
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(64) % 10
    results = []
    for batch_size, accumulate in ((16, 4), (64, 1)):
        torch.manual_seed(1)
        module = distiller(
            student=without_batch_norm(),
            quantization=Recipe(bits="w4a4", first_layer_bits=None, last_layer_bits=None),
            student_optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            accumulate_grad_batches=accumulate,
        )
        initialize_quantizers(module.student, images)  # not to first batches of different sizes
        before = {name: q.scale.detach().clone() for name, q in quantizers(module.student).items()}
        make_trainer().fit(module, DataLoader(TensorDataset(images, labels), batch_size=batch_size))
        results.append({name: q.scale.detach() - before[name] for name, q in quantizers(module.student).items()})
    for name, moved in results[0].items():
        assert moved.abs().max() > 1e-5
        torch.testing.assert_close(moved, results[1][name], rtol=1e-3, atol=1e-6)


def test_gradient_clipping_bounds_the_step(make_trainer: MakeTrainer) -> None:
    module = distiller(
        student_optimizer=lambda p: torch.optim.SGD(p, lr=1.0), gradient_clip_val=1e-3, student_schedule=Cosine()
    )
    trainer = make_trainer(max_steps=1)
    moments: list[torch.Tensor] = []
    module.on_train_start = lambda: moments.append(parameters_of(module.student))  # type: ignore[method-assign]
    trainer.fit(module, datamodule=digits(3))
    assert (parameters_of(module.student) - moments[0]).norm() <= 1.001e-3


def test_bfloat16_mixed_precision_trains(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="bf16-mixed")
    trainer.fit(distiller(), datamodule=digits(3))
    assert math.isfinite(trainer.callback_metrics["train/loss"].item())


def test_without_anything_to_learn_the_regularizer_needs_no_optimizer(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.fit(distiller(regularizer=None, balance=FixedBalance()), datamodule=digits(2))
    assert len(trainer.optimizers) == 1
    assert trainer.global_step == 2


def test_a_student_handed_over_in_eval_mode_trains_in_train_mode(make_trainer: MakeTrainer) -> None:
    module = distiller(student=network().eval())
    recorder = Recorder(lambda t, m: all(part.training for part in m.student.modules()))
    make_trainer(callbacks=[recorder], num_sanity_val_steps=1).fit(module, datamodule=digits(2))
    assert recorder.seen == [True, True]


# ---- the teacher stays out


class NoisyTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def test_the_teacher_stays_in_eval_mode_whatever_is_called() -> None:
    module = distiller(teacher=FrozenTeacher(NoisyTeacher()))
    before = {key: value.clone() for key, value in module.teacher.state_dict().items()}
    images = torch.randn(8, 1, 8, 8)
    module.train()
    module.teacher.train()
    assert torch.equal(module.teacher(images), module.teacher(images))
    assert all(torch.equal(before[key], value) for key, value in module.teacher.state_dict().items())


def test_the_teacher_is_in_no_checkpoint_optimizer_or_module_tree(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = distiller()
    trainer = make_trainer()
    trainer.fit(module, datamodule=digits(2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    teacher = {id(p) for p in module.teacher.parameters()}
    assert not [key for key in saved["state_dict"] if key.startswith("teacher")]
    assert not teacher & {id(p) for p in module.parameters()}
    assert not teacher & {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert not any(p.requires_grad for p in module.teacher.parameters())


def test_the_teacher_follows_the_module_to_another_dtype_and_device() -> None:
    module = distiller().double()
    assert module.teacher.network.conv1.weight.dtype == torch.float64
    assert module.to("meta").teacher.network.conv1.weight.device.type == "meta"


def test_a_teacher_with_its_own_normalisation_sees_its_own_inputs() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.mean((2, 3))

    pixels = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    teacher = FrozenTeacher(Spy(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    teacher.convert_from(mean.flatten().tolist(), std.flatten().tolist())
    teacher((pixels - mean) / std)
    torch.testing.assert_close(seen[0], (pixels - 0.5) / 0.25)


# ---- before the first step


def test_references_are_measured_before_the_first_step_without_augmentation(make_trainer: MakeTrainer) -> None:
    data = digits(2)
    student = CifarResNet(8, width=8, in_channels=1)
    module = distiller(student=student, student_weights="builtin:digits_student")
    trainer = make_trainer(max_steps=1, limit_test_batches=1.0)
    data.setup()
    float_state = {key: value.clone() for key, value in student.state_dict().items() if "quantizer" not in key}
    trainer.fit(module, datamodule=data)
    plain = CifarResNet(8, width=8, in_channels=1)
    plain.load_state_dict(float_state)
    plain.eval()
    right = total = 0
    for batch in data.test_dataloader():
        images = data.preprocess(batch, train=False, epoch=0).images
        right += (plain(images).argmax(1) == batch.labels).sum().item()
        total += len(batch.labels)
    assert module.references["student_float"] == pytest.approx(right / total)


def test_a_student_that_starts_at_chance_has_no_accuracy_in_float_even_once_resumed(make_trainer: MakeTrainer) -> None:
    module = distiller()
    make_trainer(max_steps=1, limit_test_batches=1.0).fit(module, datamodule=digits(2))
    assert module.references["student_float"] is None
    known = module.references["student_start"]
    assert known is not None
    module.hparams["student_weights"] = "given.safetensors"  # what is measured now would be kept
    make_trainer(max_steps=1, limit_test_batches=1.0).fit(module, datamodule=digits(2))
    assert module.references["student_float"] is None
    assert module.references["student_start"] == known


def test_quantizers_are_fitted_before_the_first_step_and_untouched_by_evaluation(make_trainer: MakeTrainer) -> None:
    module = distiller()
    trainer = make_trainer(num_sanity_val_steps=2, limit_test_batches=1.0)
    trainer.fit(module, datamodule=digits(2))
    assert all(bool(q.initialized) for q in quantizers(module.student).values())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer.validate(module, datamodule=digits(2), verbose=False)
    trainer.test(module, datamodule=digits(2), verbose=False)
    trainer.predict(module, datamodule=digits(2))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_student_with_a_quantised_layer_that_it_never_calls_is_refused_before_the_first_batch(
    make_trainer: MakeTrainer,
) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x.flatten(1)).relu()
            if y.isfinite().all():  # makes it impossible to trace
                y = torch.nn.functional.linear(y, self.hidden.weight)
            return self.head(y)

    recorder = Recorder(lambda t, m: t.global_step)
    with pytest.raises(UsageError, match=r"layer 'hidden' is quantised but never called, .* add a rule") as caught:
        make_trainer(callbacks=[recorder]).fit(distiller(student=Reader()), datamodule=digits(2))
    assert "\n" not in str(caught.value)
    assert recorder.seen == []
    rules = Recipe(rules=[Rule("hidden", weight_bits=32, activation_bits=32)])
    make_trainer(callbacks=[recorder]).fit(distiller(student=Reader(), quantization=rules), datamodule=digits(2))
    assert recorder.seen == [1, 2]


def test_a_teacher_no_better_than_chance_is_refused(make_trainer: MakeTrainer) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)

    module = distiller(teacher=FrozenTeacher(Constant()))
    with pytest.raises(
        UsageError, match=r"the teacher is right on .* less than teacher.minimum_accuracy=0.15: check its weights"
    ):
        make_trainer().fit(module, datamodule=digits(2))


class Uneven(LightningDataModule):
    """Five validation images of two classes: 0 1 0 1 0."""

    class_names = ("cat", "dog")

    def train_dataloader(self) -> DataLoader:
        torch.manual_seed(0)
        return DataLoader(TensorDataset(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0])), batch_size=2)

    val_dataloader = train_dataloader


class Naming(nn.Module):
    """Names always class 0, or the class of every image of :class:`Uneven` by its first pixel."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pixels = torch.rand(5, 1, 8, 8)[1::2, 0, 0, 0] if knows else torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dog = torch.isin(x[:, 0, 0, 0], self.pixels).float()
        return torch.stack([1 - dog, dog], dim=1)


@pytest.mark.parametrize(("knows", "minimum", "warns"), [(False, None, True), (True, None, False), (False, 0.0, False)])
def test_a_teacher_no_better_than_the_largest_class_is_told_in_the_summary(
    make_trainer: MakeTrainer, knows: bool, minimum: float | None, warns: bool
) -> None:
    summary = RunSummary()
    module = distiller(teacher=FrozenTeacher(Naming(knows), minimum_accuracy=minimum), student=network(classes=2))
    make_trainer(callbacks=[summary]).fit(module, datamodule=Uneven())
    sentences = [
        "the teacher is right on 60.0% of the validation images, no more than always naming the largest class is "
        "(60.0%): check its weights, normalisation (mean, std) and class order"
    ]
    assert summary.values["warnings"] == (sentences if warns else [])


@pytest.mark.parametrize("part", ["teacher", "student"])
def test_another_number_of_classes_is_refused(make_trainer: MakeTrainer, part: str) -> None:
    other = network(14 if part == "teacher" else 8, classes=7)
    module = distiller(**{part: FrozenTeacher(other) if part == "teacher" else other})
    with pytest.raises(UsageError, match=rf"numbers of classes differ \(data 10, .*{part} 7"):
        make_trainer().fit(module, datamodule=digits(2))


def test_a_network_for_other_images_is_refused(make_trainer: MakeTrainer) -> None:
    module = distiller(student=CifarResNet(8, in_channels=3))
    with pytest.raises(UsageError, match="the student cannot take images of 1x8x8"):
        make_trainer().fit(module, datamodule=digits(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "16-mixed"}, r"precision='16-mixed' is not possible .* use bf16-mixed"),
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1.0 has no effect .* use model.gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2 has no effect .* use model.accumulate"),
        ({"gradient_clip_algorithm": "value"}, r"gradient_clip_algorithm='value' has no effect .* bounds the norm"),
        ({"callbacks": [LearningRateFinder()]}, r"LearningRateFinder is not possible .* set the learning rates"),
        ({"callbacks": [BatchSizeFinder()]}, r"BatchSizeFinder is not possible .* set the batch size"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, r"is not possible .* use model.accumulate_grad_batch"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, r"StochasticWeightAveraging is not possible"),
    ],
)
def test_trainer_settings_that_two_optimizers_cannot_honour_are_refused(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
) -> None:
    trainer = make_trainer(**{k: v for k, v in arguments.items() if k != "precision"})
    if "precision" in arguments:  # on a CPU the Trainer itself replaces this value; on a GPU it keeps it
        monkeypatch.setattr(type(trainer), "precision", property(lambda self: arguments["precision"]))
    with pytest.raises(UsageError, match=message):
        trainer.fit(distiller(), datamodule=digits(2))


def test_the_tuner_is_refused_before_it_runs(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match="LearningRateFinder is not possible with two optimizers"):
        Tuner(make_trainer()).lr_find(distiller(), datamodule=digits(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_clip_val": 0.0}, "gradient_clip_val=0.0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distiller(**arguments)


class PlainData(LightningDataModule):
    """A DataModule as others write them: pairs of images and labels, and nothing said about either."""

    def train_dataloader(self) -> DataLoader:
        images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(32) % 10), batch_size=16)

    val_dataloader = train_dataloader


def test_a_plain_data_module_trains(make_trainer: MakeTrainer) -> None:
    module = distiller()
    trainer = make_trainer()
    trainer.fit(module, datamodule=PlainData())
    assert trainer.global_step == 2
    assert module.references["teacher"] is not None


def test_a_teachers_own_normalisation_needs_that_of_the_data(make_trainer: MakeTrainer) -> None:
    teacher = FrozenTeacher(network(14), mean=[0.5], std=[0.5], minimum_accuracy=0.0)
    with pytest.raises(UsageError, match="cannot be honoured: the DataModule has no mean and std"):
        make_trainer().fit(distiller(teacher=teacher), datamodule=PlainData())


def test_without_test_batches_nothing_is_reported_of_the_test_split(make_trainer: MakeTrainer) -> None:
    module = distiller()
    make_trainer(limit_test_batches=0).fit(module, datamodule=digits(2))
    assert set(module.references.values()) == {None}


def test_a_schedule_with_rates_of_its_own_starts_with_them(make_trainer: MakeTrainer) -> None:
    schedule = TorchSchedule(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10), "step")
    rates: list[float] = []
    module = distiller(student_schedule=schedule)
    recorder = Recorder(lambda t, m: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    make_trainer(callbacks=[recorder]).fit(module, datamodule=digits(2))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05, momentum=0.9)
    expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    optimizer.step()
    expected.step()
    assert rates[0] == pytest.approx(expected.get_last_lr()[0])


# ---- checkpoints


def fit_and_save(make_trainer: MakeTrainer, path: Path, **arguments: object) -> DistillModule:
    module = distiller(**arguments)
    trainer = make_trainer()
    trainer.fit(module, datamodule=digits(3))
    trainer.save_checkpoint(path)
    return module


class StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: object) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_resuming_ends_with_the_weights_of_an_uninterrupted_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> DistillModule:
        module = distiller(balance=BoundedUncertaintyBalance(), student_schedule=Cosine(0.2))
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = make_trainer(max_epochs=4, enable_checkpointing=True, callbacks=[saver], limit_test_batches=1)
        if epochs < 4:  # stop early, but with the schedule of the whole training
            trainer.callbacks.insert(0, StopAfter(epochs))
        trainer.fit(module, datamodule=digits(3), ckpt_path=resume, weights_only=True)
        return module

    whole = run(4)
    (tmp_path / "epoch=1.ckpt").unlink()
    run(2)
    resumed = run(4, tmp_path / "epoch=1.ckpt")
    assert torch.equal(parameters_of(whole), parameters_of(resumed))
    assert whole.references == resumed.references


def test_a_checkpoint_of_another_architecture_is_refused_in_one_sentence(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    fit_and_save(make_trainer, tmp_path / "a.ckpt")
    module = distiller(student=network(14))
    with pytest.raises(UsageError, match="the checkpoint is of another architecture") as caught:
        make_trainer(max_epochs=2).fit(module, datamodule=digits(3), ckpt_path=tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_other_bits_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit_and_save(make_trainer, tmp_path / "a.ckpt", quantization=Recipe(bits="w4a4"))
    with pytest.raises(UsageError, match="the checkpoint has 4 bits where quantization asks for 2"):
        make_trainer(max_epochs=2).fit(
            distiller(quantization=Recipe(bits="w2a2")), datamodule=digits(3), ckpt_path=tmp_path / "a.ckpt"
        )


def test_hyperparameters_hold_no_network(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit_and_save(make_trainer, tmp_path / "a.ckpt", label_smoothing=0.25)
    hyperparameters = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert hyperparameters["label_smoothing"] == 0.25
    assert not {"teacher", "student", "regularizer"} & set(hyperparameters)


@pytest.mark.parametrize(("classes", "lowest"), [(0, 0.0), (2, 0.6), (10, 0.15), (1000, 0.0015)])
def test_a_teacher_must_be_better_than_chance_and_of_two_classes_by_ten_points(classes: int, lowest: float) -> None:
    assert lowest_accuracy(classes) == pytest.approx(lowest)


class Foreign(torch.nn.Module):
    """A network whose classifier is of a class that lqkd does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU())
        self.weight = torch.nn.Parameter(torch.randn(32, 10) * 0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images) @ self.weight


def test_a_layer_that_stays_in_float_is_named_once_at_the_start_with_its_shares(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    module = distiller(student=Foreign(), quantization=Recipe(bits="w4a4", last_layer_bits=None))
    with caplog.at_level("INFO"):
        make_trainer(max_epochs=2, limit_val_batches=1).fit(module, datamodule=digits(2))
    told = [text for text in caplog.messages if text.startswith("not quantised: ")]
    share, operations = 320 / (320 + 64 * 32 + 32), 320 / (320 + 64 * 32)
    assert told == [
        f"not quantised: Foreign the network with {share:.1%} of the parameters and {operations:.1%} of the "
        "operations in floating point: no quantised layer of this kind"
    ]
