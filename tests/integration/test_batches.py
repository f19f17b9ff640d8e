"""What batches may hold and networks may return, found out before the first step; samples without a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lqkd.balances import FixedBalance
from lqkd.errors import UsageError
from lqkd.losses import DKD, HintonKL
from lqkd.modules import ClassifierModule, DistillModule
from lqkd.quantization import Recipe, Rule
from lqkd.regularizers import ElementwiseMLP, LookAhead
from lqkd.runs import RunSummary
from lqkd.teachers import FrozenTeacher
from tests.conftest import distiller, network
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def loader(
    label: Callable[[int], Any] = lambda i: i % 10,
    image: Callable[[int], Any] = IMAGES.__getitem__,
    samples: int = 24,
    batch_size: int = 8,
) -> DataLoader:
    return DataLoader([(image(i), label(i)) for i in range(samples)], batch_size=batch_size)


class Data(LightningDataModule):
    """The same batches for training, validation and test."""

    class_names = tuple("0123456789")

    def __init__(self, label: Callable[[int], Any]) -> None:
        super().__init__()
        self.label = label

    def train_dataloader(self) -> DataLoader:
        return loader(self.label)

    val_dataloader = test_dataloader = train_dataloader


def train(make_trainer: MakeTrainer, module: Any, data: Any, **settings: Any) -> list[Tensor]:
    """The loss of every step."""
    recorder = Recorder(lambda trainer, module: trainer.callback_metrics["train/loss"].clone())
    make_trainer(callbacks=[recorder], **settings).fit(module, data)
    return recorder.seen


# ---- what is accepted


@pytest.mark.parametrize(
    "data",
    [
        lambda: loader(lambda i: torch.tensor(i % 10, dtype=torch.int32)),
        lambda: loader(lambda i: torch.tensor(i % 10, dtype=torch.uint8)),
        lambda: loader(lambda i: torch.tensor([i % 10])),
        lambda: loader(image=lambda i: IMAGES[i].numpy().astype("float64")),
    ],
    ids=["int32", "uint8", "(B, 1)", "float64 images"],
)
@pytest.mark.parametrize("make", [distiller, lambda: ClassifierModule(network())], ids=["distill", "classifier"])
def test_other_types_of_the_same_numbers_train_alike(
    make_trainer: MakeTrainer, make: Callable[[], Any], data: Callable[[], DataLoader]
) -> None:
    found = []
    for batches in (loader(), data()):
        torch.manual_seed(0)
        found.append(train(make_trainer, make(), batches))
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


# ---- what is refused


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16], ids=str)
def test_images_of_a_type_that_a_network_cannot_take_are_told_in_a_float_training(
    make_trainer: MakeTrainer, dtype: torch.dtype
) -> None:
    data = loader(image=lambda i: IMAGES[i].to(dtype))
    with pytest.raises(UsageError, match=f"the network cannot take {str(dtype)[6:]} images of 1x8x8 from the data"):
        train(make_trainer, ClassifierModule(network()), data)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "float labels": (lambda: loader(lambda i: 1.0), r"labels of a batch of 8 are float64 of shape \(8,\)"),
    "names": (lambda: loader(lambda i: "cat"), "labels of a batch of 8 are a tuple: numbers of classes"),
    "one-hot labels": (lambda: loader(lambda i: torch.zeros(10)), r"are float32 of shape \(8, 10\)"),
    "out of range": (lambda: loader(lambda i: 37), "label 37 is out of range: the network has 10 classes"),
    "dicts": (lambda: DataLoader([{"x": IMAGES[0], "y": 1}] * 8, 4), "a batch of the data is a dict"),
    "paths": (lambda: loader(image=lambda i: "a.png"), "a batch of the data begins with a tuple"),
    "bytes": (lambda: loader(image=lambda i: IMAGES[i].to(torch.uint8)), "cannot take uint8 images of 1x8x8"),
    "nothing": (lambda: DataLoader(TensorDataset(IMAGES[:3], torch.zeros(3)), 4, drop_last=True), "yield no batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_cannot_be_trained_on_is_refused_before_the_first_step(
    make_trainer: MakeTrainer, case: str
) -> None:
    data, message = REFUSED[case]
    trainer = make_trainer()
    with pytest.raises(UsageError, match=message):
        trainer.fit(distiller(), data())
    assert trainer.global_step == 0


@pytest.mark.parametrize("make", [distiller, lambda: ClassifierModule(network())], ids=["distill", "classifier"])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_images_that_are_no_tensors_are_refused_before_the_first_step(
    make_trainer: MakeTrainer, make: Callable[[], Any], split: str
) -> None:
    pictures = loader(image=lambda i: Image.new("L", (8, 8)))
    loaders = (pictures, loader()) if split == "training" else (loader(), pictures)
    trainer = make_trainer()
    with pytest.raises(UsageError, match=f"the {split} DataLoader cannot make a batch: its samples hold images"):
        trainer.fit(make(), *loaders)
    assert trainer.global_step == 0


@pytest.mark.parametrize("split", ["validation", "test"])
def test_images_that_are_no_tensors_are_told_in_an_evaluation_too(make_trainer: MakeTrainer, split: str) -> None:
    trainer = make_trainer(limit_test_batches=1.0)
    evaluate = trainer.validate if split == "validation" else trainer.test
    with pytest.raises(UsageError, match=f"the {split} DataLoader cannot make a batch: its samples hold images"):
        evaluate(ClassifierModule(network()), loader(image=lambda i: Image.new("L", (8, 8))), verbose=False)


def test_looking_at_the_first_batch_takes_none_from_a_loader_with_workers_that_stay(make_trainer: MakeTrainer) -> None:
    workers = DataLoader(list(loader().dataset), batch_size=8, num_workers=1, persistent_workers=True)
    assert len(train(make_trainer, distiller(), workers)) == 3


@pytest.mark.parametrize("make", [distiller, lambda: ClassifierModule(network())], ids=["distill", "classifier"])
def test_a_label_out_of_range_in_a_later_batch_is_named(make_trainer: MakeTrainer, make: Callable[[], Any]) -> None:
    trainer = make_trainer()
    with pytest.raises(UsageError, match="label 10 is out of range"):
        trainer.fit(make(), loader(lambda i: i % 10 if i < 16 else 10))
    assert trainer.global_step == 2


def test_a_label_out_of_range_in_validation_is_named(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match="label 10 is out of range"):
        make_trainer().validate(distiller(), loader(lambda i: 10), verbose=False)


@dataclass
class Answer:
    logits: Tensor


class Wrapped(nn.Module):
    """A network whose answer is something else than logits (B, C)."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.answer = network(), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.network(x))


ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dict": (
        lambda y: {"first": y, "second": y},
        "returns a dict with 'first', 'second': one called 'out'",
    ),
    "nothing": (lambda y: None, "returns a NoneType: a tensor is needed"),
    "map": (lambda y: y[:, :, None, None].expand(-1, -1, 2, 2), "returns a tensor of shape 2x10x2x2 for 2 images"),
}


@pytest.mark.parametrize("player", ["teacher", "student"])
@pytest.mark.parametrize("case", ANSWERS)
def test_a_network_that_returns_no_logits_is_named(make_trainer: MakeTrainer, case: str, player: str) -> None:
    answer, message = ANSWERS[case]
    other = Wrapped(answer)
    module = distiller(**{player: FrozenTeacher(other) if player == "teacher" else other})
    with pytest.raises(UsageError, match=f"the {player} {message}"):
        make_trainer().fit(module, loader())


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"hidden": y[:, :2], "logits": y},
    "tuple": lambda y: (y, y[:, :2]),
    "dataclass": Answer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_that_return_logits_among_others_train_as_alone(make_trainer: MakeTrainer, kind: str) -> None:
    losses = []
    for answer in (KINDS[kind], lambda y: y):
        torch.manual_seed(0)
        module = distiller(teacher=FrozenTeacher(Wrapped(answer)), student=Wrapped(answer))
        losses.append(torch.stack(train(make_trainer, module, loader())))
    assert torch.equal(*losses)


def test_a_map_of_logits_from_both_networks_is_refused(make_trainer: MakeTrainer) -> None:
    answer, message = ANSWERS["map"]
    module = distiller(teacher=FrozenTeacher(Wrapped(answer)), student=Wrapped(answer), distillation_loss=HintonKL())
    with pytest.raises(UsageError, match=message):
        make_trainer().fit(module, loader())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x + y)


def test_a_network_with_two_inputs_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=r"the student cannot take images .*missing 1 required positional argument"):
        make_trainer().fit(distiller(student=TwoInputs()), loader())


class Auxiliary(nn.Module):
    """A second head in training alone, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.aux = network(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        return (self.network(x), self.aux(x.flatten(1))) if self.training else self.network(x)


@pytest.mark.parametrize("rules", [[], [Rule("aux", 32, 32)]], ids=["quantised", "left in float"])
def test_auxiliary_heads_are_called_what_they_are(make_trainer: MakeTrainer, rules: list[Rule]) -> None:
    module = distiller(student=Auxiliary(), quantization=Recipe(bits="w4a4", rules=rules))
    with pytest.raises(UsageError, match=r"returns a tuple while it trains.*auxiliary heads.*aux_logits=False"):
        make_trainer().fit(module, loader())


class Normalised(nn.Sequential):
    """Batch norm over features."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 10)
        )


@pytest.mark.parametrize(("samples", "batch_size"), [(4, 1), (9, 4)])
def test_a_batch_of_one_that_batch_norm_cannot_take_is_told_before_the_first_step(
    make_trainer: MakeTrainer, samples: int, batch_size: int
) -> None:
    trainer = make_trainer()
    with pytest.raises(UsageError, match=r"the student cannot train on a batch of 1, .* drop_last=True"):
        trainer.fit(distiller(student=Normalised()), loader(samples=samples, batch_size=batch_size))
    assert trainer.global_step == 0


def test_a_last_batch_of_one_trains_where_batch_norm_has_more_values(make_trainer: MakeTrainer) -> None:
    assert len(train(make_trainer, distiller(), loader(samples=9, batch_size=4))) == 3


def test_a_last_batch_of_one_that_is_not_reached_is_no_mistake(make_trainer: MakeTrainer) -> None:
    module = distiller(student=Normalised())
    assert len(train(make_trainer, module, loader(samples=9, batch_size=4), limit_train_batches=2)) == 2


def test_finding_out_what_a_student_returns_leaves_it_as_it_was(make_trainer: MakeTrainer) -> None:
    module = distiller(student=Normalised())
    before = {key: value.clone() for key, value in module.student.state_dict().items() if "running" in key}
    random = torch.get_rng_state()
    module._connect_unseen()
    module.trainer = make_trainer()
    module._check_first((IMAGES[:8], torch.arange(8)))
    assert all(torch.equal(value, module.student.state_dict()[key]) for key, value in before.items())
    assert torch.equal(random, torch.get_rng_state())


# ---- samples without a label


def test_without_any_label_the_student_learns_from_the_teacher_alone(make_trainer: MakeTrainer) -> None:
    module = distiller(balance=FixedBalance(task=0.0, distill=1.0))
    losses = train(make_trainer, module, loader(lambda i: -100))
    torch.manual_seed(0)
    expected = train(make_trainer, distiller(balance=FixedBalance(task=0.0, distill=1.0)), loader())
    assert torch.equal(torch.stack(losses), torch.stack(expected))


def test_batches_of_images_alone_have_no_labels(make_trainer: MakeTrainer) -> None:
    module = distiller(balance=FixedBalance(task=0.0, distill=1.0))
    with pytest.warns(UserWarning, match="the first batch has no labels"):
        losses = train(make_trainer, module, DataLoader(IMAGES, batch_size=8))
    assert torch.stack(losses).isfinite().all()


def test_the_task_is_that_of_the_samples_with_a_label(make_trainer: MakeTrainer) -> None:
    seen: list[tuple[Any, Tensor]] = []

    class Outputs(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append((outputs, trainer.callback_metrics["train/task"].clone()))

    make_trainer(callbacks=[Outputs()]).fit(distiller(), loader(lambda i: i % 10 if i % 3 else -1))
    assert len(seen) == 3
    for output, task in seen:
        known = output["labels"] >= 0
        torch.testing.assert_close(task, F.cross_entropy(output["student"][known], output["labels"][known]))


@pytest.mark.parametrize("exact", [False, True])
def test_everything_that_asks_for_labels_takes_samples_without(make_trainer: MakeTrainer, exact: bool) -> None:
    regularizer = ElementwiseMLP(hidden=8, label=True, guard="mean_one", player=LookAhead(exact=exact, held_out=exact))
    module = distiller(distillation_loss=DKD(), regularizer=regularizer)
    losses = train(make_trainer, module, loader(lambda i: i % 10 if i > 12 else -1))
    assert torch.stack(losses).isfinite().all()


def test_accuracies_count_the_samples_with_a_label_alone(make_trainer: MakeTrainer) -> None:
    found = []
    for label in (lambda i: 3 if i % 2 else -1, lambda i: 3):
        module, trainer = distiller(), make_trainer(max_steps=0, limit_test_batches=1.0)
        data = Data(label)
        trainer.fit(module, datamodule=data)
        logged = trainer.validate(module, datamodule=data, verbose=False)[0]
        with torch.no_grad():
            logits = module.eval()(IMAGES)
        known = torch.tensor([label(i) for i in range(24)]) >= 0
        assert logged["val/acc"] == pytest.approx((logits.argmax(1) == 3)[known].float().mean().item())
        expected = F.cross_entropy(logits[known], torch.full((int(known.sum()),), 3))
        assert logged["val/loss"] == pytest.approx(expected.item(), rel=1e-5)
        teacher = module.teacher(IMAGES).argmax(1) == 3
        found.append((module.references["teacher"], teacher[known].float().mean().item()))
    for measured, expected in found:
        assert measured == pytest.approx(expected)


def test_a_validation_split_without_labels_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match="no sample of the validation split has a label"):
        make_trainer().fit(distiller(), datamodule=Data(lambda i: -1))


def test_an_evaluation_without_labels_says_that_it_measures_nothing(make_trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="no sample of the test split has a label"):
        make_trainer(limit_test_batches=1.0).test(distiller(), loader(lambda i: -1), verbose=False)


# ---- one task loss everywhere


def test_looking_ahead_exactly_heeds_label_smoothing() -> None:
    found = []
    for smoothing in (0.0, 0.5):
        regularizer = ElementwiseMLP(hidden=8, guard="mean_one", player=LookAhead(exact=True))
        module = distiller(regularizer=regularizer, label_smoothing=smoothing)
        module._connect_unseen()
        found.append(module.losses((IMAGES[:8], torch.arange(8))).divergences["distill"].maps[0].alignment)
    assert not torch.allclose(*found)


def test_looking_ahead_at_few_labels_is_looking_at_their_samples() -> None:
    """Each sample's own task is on its own scale, however many others have labels."""
    labels = torch.arange(8)
    found = []
    for given in (labels, torch.where(labels < 4, labels, -1)):
        module: DistillModule = distiller(regularizer=ElementwiseMLP(hidden=8, guard="mean_one", player="look_ahead"))
        module._connect_unseen()
        module.student.eval()
        found.append(module.losses((IMAGES[:8], given)).divergences["distill"].maps[0].alignment)
    torch.testing.assert_close(found[0][:4], found[1][:4])
    assert not found[1][4:].any()


# ---- what is not done is said


def test_an_untrained_teacher_is_refused_with_loaders_alone(make_trainer: MakeTrainer) -> None:
    module = distiller(teacher=FrozenTeacher(network(14)))
    with pytest.raises(UsageError, match=r"the teacher is right on .*minimum_accuracy=0.15"):
        make_trainer().fit(module, loader(), loader())


def test_validation_data_without_a_length_check_the_teacher_too(make_trainer: MakeTrainer) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader().dataset)

    with pytest.raises(UsageError, match=r"the teacher is right on .*minimum_accuracy=0.15"):
        make_trainer().fit(distiller(teacher=FrozenTeacher(network(14))), loader(), DataLoader(Stream(), batch_size=16))


def test_several_validation_loaders_are_refused(make_trainer: MakeTrainer) -> None:
    make_trainer(max_steps=1).fit(distiller(), loader(), [loader()])
    with pytest.raises(UsageError, match="there are 2 validation DataLoaders: give one"):
        make_trainer().fit(distiller(), loader(), {"one": loader(), "two": loader()})


def test_loaders_alone_give_the_references_of_their_validation_data(make_trainer: MakeTrainer) -> None:
    """And reading them before the training draws no random number of it."""
    seen = []
    for validation in (loader(), None):
        module, recorder = distiller(), Recorder(lambda trainer, module: torch.rand(()).item())
        make_trainer(callbacks=[recorder], limit_val_batches=None if validation else 0).fit(
            module, loader(), validation
        )
        seen.append((module.references["teacher"] is not None, recorder.seen))
    assert [known for known, _ in seen] == [True, False]
    assert seen[0][1] == seen[1][1]


def test_without_a_validation_loader_it_is_said_that_the_teacher_was_not_checked(make_trainer: MakeTrainer) -> None:
    module = distiller()
    with pytest.warns(UserWarning, match="the teacher was not checked, and nothing .* there is no validation data"):
        make_trainer().fit(module, loader())
    assert ["the teacher was not checked" in sentence for sentence in module.warnings] == [True]


def test_without_validation_it_is_said_that_the_teacher_was_not_checked(make_trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="the teacher was not checked: there is no validation data"):
        make_trainer(limit_val_batches=0).fit(distiller(), datamodule=Data(lambda i: i % 10))


def test_class_names_that_cannot_be_compared_are_told(make_trainer: MakeTrainer) -> None:
    teacher = FrozenTeacher(network(14), minimum_accuracy=0.0, class_names=tuple("0123456789"))
    with pytest.warns(UserWarning, match="class_names were not compared"):
        make_trainer().fit(distiller(teacher=teacher), loader())


class TrainingOnly(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()


def test_a_data_module_without_a_validation_split_trains(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    with pytest.warns(UserWarning, match="the teacher was not checked"):
        trainer.fit(distiller(), datamodule=TrainingOnly())
    assert trainer.global_step == 3


def test_a_test_split_without_labels_has_no_accuracy_in_the_summary(make_trainer: MakeTrainer) -> None:
    summary, module = RunSummary(), distiller()
    trainer = make_trainer(callbacks=[summary], limit_test_batches=1.0)
    trainer.fit(module, loader())
    with pytest.warns(UserWarning, match="no sample of the test split has a label"):
        trainer.test(module, loader(lambda i: -1), verbose=False)
    assert summary.values["test"] is None


def test_a_float_training_without_labels_says_that_it_learns_nothing(make_trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="the first batch has no labels"):
        make_trainer(max_steps=1, limit_val_batches=0).fit(ClassifierModule(network()), loader(lambda i: -1))


@pytest.mark.parametrize("ask", ["validate", "predict"])
def test_images_of_a_type_that_a_network_cannot_take_are_told_in_an_evaluation(
    make_trainer: MakeTrainer, ask: str
) -> None:
    data = loader(image=lambda i: IMAGES[i].to(torch.uint8))
    with pytest.raises(UsageError, match="the network cannot take uint8 images of 1x8x8 from the data"):
        getattr(make_trainer(), ask)(ClassifierModule(network()), data)
