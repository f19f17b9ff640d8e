"""Players, taps and ensembles in real trainings on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lqkd.balances import Balance, FixedBalance, GradientBalance, GradNorm, OutputGradientBalance
from lqkd.balances.equalized_at import AtWeights
from lqkd.callbacks.regularizer.monitor import RegularizerMonitor
from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss, Standardized
from lqkd.losses.taps import Taps
from lqkd.modules import DistillModule, Tap
from lqkd.regularizers import (
    Adversarial,
    ConvModulator,
    ElementwiseMLP,
    LearnableTable,
    LookAhead,
    Regularizer,
    SampleWeight,
)
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from tests.conftest import digits, distiller, network, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
TAPS = [Tap("layer1", "layer1"), Tap("layer2", "layer2")]


class Features(DistillationLoss):
    """Squared differences of features."""

    compares = "features"
    kind = "features"

    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return (teacher - student).square()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()


def teacher(seed: int = 0, **arguments: Any) -> FrozenTeacher:
    torch.manual_seed(seed)
    return FrozenTeacher(network(14), **{"minimum_accuracy": 0.0, **arguments})


def ensemble(combination: str, **arguments: Any) -> TeacherEnsemble:
    return TeacherEnsemble([teacher(1), teacher(2, **arguments)], combination, minimum_accuracy=0.0)


def trained(make: MakeTrainer, **arguments: Any) -> tuple[DistillModule, list[float]]:
    """Train seven batches; the module and the loss after each."""
    module = distiller(**arguments)
    recorder = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
    make(callbacks=[recorder]).fit(module, datamodule=digits())
    return module, recorder.seen


# ---- features


@pytest.mark.parametrize(
    "regularizer", [None, LearnableTable(), ConvModulator(), ConvModulator(per="channel"), SampleWeight()]
)
def test_features_at_taps_are_distilled_with_a_regularizer_for_each(
    make_trainer: MakeTrainer, regularizer: Regularizer | None
) -> None:
    module, losses = trained(make_trainer, distillation_loss=Features(), taps=TAPS, regularizer=regularizer)
    assert len(losses) == 7
    assert all(torch.isfinite(torch.tensor(losses)))
    if regularizer is not None:
        first, second = module.distillation.regularizers
        assert parameters_of(first).shape == parameters_of(second).shape or not isinstance(regularizer, SampleWeight)
        assert not torch.equal(parameters_of(first)[:4], parameters_of(second)[:4])


def test_weights_of_places_are_kept_with_the_images_that_the_student_saw(make_trainer: MakeTrainer) -> None:
    monitor = RegularizerMonitor()
    module = distiller(distillation_loss=Features(), taps=TAPS, regularizer=ConvModulator())
    make_trainer(callbacks=[monitor]).fit(module, datamodule=digits())
    kept = monitor.records[""].photographs
    assert kept is not None
    assert [tuple(one.shape) for one in (kept.images, *kept.weights)] == [(4, 1, 8, 8), (4, 8, 8), (4, 4, 4)]


def test_gradients_of_features_reach_the_layers_before_the_tap_only(make_trainer: MakeTrainer) -> None:
    module = distiller(
        distillation_loss=Features(), taps=TAPS[:1], regularizer=None, balance=FixedBalance(task=0.0), student=network()
    )
    before = {name: value.clone() for name, value in module.student.named_parameters()}
    make_trainer().fit(module, datamodule=digits())
    weights = {name: p for name, p in module.student.named_parameters() if "quantizer" not in name}
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"conv1", "bn1", "layer1"}


def test_what_depends_on_shapes_comes_back_from_a_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    arguments = {"distillation_loss": Features(), "taps": TAPS, "regularizer": LearnableTable()}
    module = distiller(**arguments)
    make_trainer(callbacks=[keeper], enable_checkpointing=True).fit(module, datamodule=digits())
    fresh = distiller(distillation_loss=Features(), taps=TAPS, regularizer=LearnableTable())
    checkpoint = torch.load(keeper.last_model_path, weights_only=True)
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(parameters_of(fresh), parameters_of(module))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation_loss": Features()}, "Features compares features: give at least one pair of taps"),
        ({"taps": TAPS}, "taps cannot be used: distillation_loss LogitResidual compares logits"),
        (
            {"distillation_loss": Features(), "taps": TAPS, "regularizer": ElementwiseMLP()},
            "ElementwiseMLP cannot weigh distillation_loss Features, which has a map over features: it weighs classes",
        ),
        (
            {
                "distillation_loss": Features(),
                "taps": TAPS,
                "regularizer": SampleWeight(guard="entropy", player="look_ahead"),
            },
            "player LookAhead cannot look ahead from features",
        ),
        (
            {"distillation_loss": Features(), "taps": TAPS, "regularizer": None, "balance": OutputGradientBalance()},
            "balance OutputGradientBalance measures gradients at the logits",
        ),
        (
            {"distillation_loss": Features(), "taps": TAPS, "regularizer": None, "balance": GradNorm("layer7")},
            "balance shared='layer7' does not exist in the student: near names are layer",
        ),
        (
            {"distillation_loss": Features(), "taps": TAPS, "regularizer": None, "teacher": ensemble("separate")},
            "Features compares features: several teachers are compared by logits only",
        ),
        (
            {"distillation_loss": Features(), "taps": TAPS, "regularizer": None, "teacher": ensemble("mean")},
            "Features compares features: several teachers are compared by logits only",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        distiller(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap("layer9", "layer1"), "tap 'layer9' does not exist in the teacher: near names are layer"),
        (Tap("layer1", "layer1.0.conv9"), "tap 'layer1.0.conv9' does not exist in the student: .*layer1.0.conv1"),
    ],
)
def test_a_tap_that_does_not_exist_is_refused_before_the_first_batch(
    make_trainer: MakeTrainer, tap: Tap, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer().fit(distiller(distillation_loss=Features(), taps=[tap], regularizer=None), datamodule=digits())


def test_a_shared_module_that_a_loss_does_not_reach_is_refused_before_the_first_batch(
    make_trainer: MakeTrainer,
) -> None:
    module = distiller(distillation_loss=Features(), taps=TAPS, regularizer=None, balance=GradientBalance("linear"))
    recorder = Recorder(lambda trainer, module: None)
    with pytest.raises(
        UsageError, match="balance shared='linear' has not got weights that the distill loss depends on"
    ):
        make_trainer(callbacks=[recorder]).fit(module, datamodule=digits())
    assert not recorder.seen


@pytest.mark.parametrize("balance", [GradNorm(), GradientBalance(ratio=3.0)])
def test_gradients_in_weights_before_the_shallowest_tap_balance_features(
    make_trainer: MakeTrainer, balance: Balance
) -> None:
    """In bfloat16, channels_last and groups of batches; the layer is found by itself."""
    module = distiller(
        distillation_loss=Features(),
        taps=TAPS,
        regularizer=None,
        balance=balance,
        channels_last=True,
        accumulate_grad_batches=2,
    )
    recorder = Recorder(lambda trainer, module: float(trainer.callback_metrics["balance/distill"]))
    make_trainer(callbacks=[recorder], precision="bf16-mixed").fit(module, datamodule=digits())
    assert isinstance(balance.equalized_at, AtWeights)
    assert balance.equalized_at.layer == "layer1.0.conv2"
    assert torch.tensor(recorder.seen).isfinite().all()
    assert recorder.seen[-1] != recorder.seen[0]


def test_the_last_layer_is_found_from_the_first_batch_where_no_data_module_tells_a_shape(
    make_trainer: MakeTrainer,
) -> None:
    batch = (torch.randn(4, 1, 8, 8), torch.randint(10, (4,)))
    module = distiller(balance=GradNorm())
    make_trainer().fit(module, train_dataloaders=DataLoader([batch], batch_size=None))
    assert isinstance(module.balance.equalized_at, AtWeights)
    assert module.balance.equalized_at.layer == "linear"


class InPlace(nn.Module):
    """The ReLU after the tap overwrites what the tap has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x)).flatten(1))


def test_a_tap_keeps_what_the_module_returned_where_the_next_one_works_in_place() -> None:
    net = InPlace()
    x = torch.randn(2, 1, 8, 8)
    taps = Taps(net, ["conv"], "network")
    with taps.recording() as seen:
        net(x)
    assert torch.equal(seen[0], net.conv(x))
    assert seen[0].min() < 0


def test_without_a_data_module_the_shapes_come_from_the_checkpoint_or_the_first_batch(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)

    def module() -> DistillModule:
        return distiller(distillation_loss=Features(), taps=TAPS, regularizer=LearnableTable())

    make_trainer(callbacks=[keeper], enable_checkpointing=True).fit(module(), datamodule=digits())
    batches = DataLoader([(torch.randn(1, 8, 8), 1)] * 8, batch_size=4)
    make_trainer(max_epochs=2, logger=False).fit(module(), batches, ckpt_path=keeper.last_model_path, weights_only=True)
    alone = module()
    make_trainer(logger=False).fit(alone, batches)
    kept = torch.load(keeper.last_model_path, weights_only=True)["distillation_shapes"]
    assert {name: [[tuple(x[1:]) for x in of] for of in both] for name, both in alone.distillation.shapes.items()} == {
        name: [[tuple(x[1:]) for x in of] for of in both] for name, both in kept.items()
    }


def test_a_loss_on_logits_needs_no_data_module(make_trainer: MakeTrainer) -> None:
    batches = DataLoader([(torch.randn(1, 8, 8), 1)] * 8, batch_size=4)
    for regularizer in (ElementwiseMLP(), SampleWeight(), LearnableTable()):
        module = distiller(distillation_loss=Standardized(), regularizer=regularizer)
        make_trainer(logger=False).fit(module, batches)


# ---- players


@pytest.mark.parametrize("player", [Adversarial(), LookAhead(), LookAhead(exact=True), LookAhead(True, 0.1, True)])
@pytest.mark.parametrize("regularizer", [ElementwiseMLP, SampleWeight, LearnableTable])
def test_players_train_the_regularizer_and_the_student(
    make_trainer: MakeTrainer, player: Any, regularizer: type[Regularizer]
) -> None:
    module, losses = trained(make_trainer, regularizer=regularizer(guard="entropy", player=player))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert module.regularizer is not None
    weights = module.regularizer(3 * torch.randn(32, 10), torch.randn(32, 10))
    assert weights.std() > 0


def test_an_adversary_knows_how_much_of_the_training_is_done(make_trainer: MakeTrainer) -> None:
    module = distiller(regularizer=ElementwiseMLP(guard="entropy", player=Adversarial(ramp=1.0)))
    recorder = Recorder(lambda trainer, module: module.regularizer.player.progress)
    make_trainer(callbacks=[recorder]).fit(module, datamodule=digits())
    assert recorder.seen == pytest.approx([step / 7 for step in range(7)])


def test_looking_ahead_exactly_leaves_the_student_as_it_found_it(make_trainer: MakeTrainer) -> None:
    """With nothing to distil, the student trains as without a regularizer, batch norm statistics included."""
    states = []
    for regularizer in (None, ElementwiseMLP(guard="entropy", player=LookAhead(exact=True))):
        module, _ = trained(make_trainer, regularizer=regularizer, balance=FixedBalance(distill=0.0))
        states.append(module.student.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_looking_ahead_to_a_held_out_half_takes_a_last_batch_of_any_size(make_trainer: MakeTrainer) -> None:
    player = LookAhead(exact=True, held_out=True)
    module = distiller(regularizer=ElementwiseMLP(guard="entropy", player=player))
    make_trainer(logger=False).fit(module, DataLoader([(torch.randn(1, 8, 8), 1)] * 7, batch_size=4))


# ---- ensembles


@pytest.mark.parametrize("combination", ["mean", "learned", "confidence", "separate"])
def test_ensembles_of_teachers_train_a_student(make_trainer: MakeTrainer, combination: str) -> None:
    module, losses = trained(make_trainer, teacher=ensemble(combination))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert len(module.distillation.regularizers) == (2 if combination == "separate" else 1)
    assert not [name for name in module.state_dict() if "teacher" in name]


def test_learned_shares_of_teachers_move_and_get_no_weight_decay(make_trainer: MakeTrainer) -> None:
    module = distiller(
        teacher=ensemble("learned"), regularizer_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)
    )
    trainer = make_trainer()
    trainer.fit(module, datamodule=digits())
    assert module.distillation["distill"].combination is not None
    assert module.distillation["distill"].combination.scores.abs().min() > 0
    assert trainer.optimizers[1].param_groups[-1]["name"] == "teachers"
    assert trainer.optimizers[1].param_groups[-1]["weight_decay"] == 0


def test_a_teacher_of_another_input_size_sees_resized_images() -> None:
    seen: list[torch.Size] = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    FrozenTeacher(net, image_size=16)(torch.zeros(2, 1, 8, 8))
    assert seen == [torch.Size([2, 1, 16, 16])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherEnsemble([teacher()]), "an ensemble of 1 is not possible: give at least two teachers"),
        (lambda: ensemble("median"), "combination='median' is unknown: use mean, learned, confidence, separate"),
        (lambda: teacher(image_size=0), "teacher image_size=0 is not possible"),
    ],
)
def test_an_impossible_ensemble_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_teachers_that_disagree_on_the_number_of_classes_are_refused(make_trainer: MakeTrainer) -> None:
    odd = TeacherEnsemble([teacher(), FrozenTeacher(network(8, classes=7))], minimum_accuracy=0.0)
    with pytest.raises(
        UsageError, match=r"numbers of classes differ \(data 10, teacher 1 10, teacher 2 7, student 10\)"
    ):
        make_trainer().fit(distiller(teacher=odd), datamodule=digits())


def test_teachers_with_another_order_of_classes_are_refused(make_trainer: MakeTrainer) -> None:
    names = [str(digit) for digit in (1, 0, 2, 3, 4, 5, 6, 7, 8, 9)]
    module = distiller(teacher=ensemble("mean", class_names=names))
    with pytest.raises(UsageError, match="class 0 is '1' for the teacher and '0' in the data"):
        make_trainer().fit(module, datamodule=digits())


# ---- configurations that are not code


def student_gradient(module: DistillModule, labels: Tensor) -> Tensor:
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    module._connect(torch.zeros(1, 1, 8, 8))
    module.losses((images, labels)).loss.backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None])


def test_without_a_task_no_label_is_learned_from() -> None:
    gradients = [
        student_gradient(distiller(regularizer=None, balance=FixedBalance(task=0.0)), labels)
        for labels in (torch.zeros(8, dtype=torch.long), torch.arange(8))
    ]
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_without_distillation_no_teacher_is_learned_from() -> None:
    gradients = [
        student_gradient(distiller(balance=FixedBalance(distill=0.0), teacher=teacher(seed)), torch.arange(8))
        for seed in (1, 2)
    ]
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
