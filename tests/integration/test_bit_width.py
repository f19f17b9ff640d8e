"""Bit-width schedules in real trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchvision.models import VisionTransformer

from lqkd.callbacks import BitWidthScheduler, Stage
from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe, quantizers
from lqkd.runs import BestAndLast
from tests.conftest import digits, distiller, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
LAYER = "layer1.0.conv1.weight_quantizer"


def bits_of(module: DistillModule, name: str = LAYER) -> int:
    return quantizers(module.student)[name].bits


def fit(
    make: MakeTrainer,
    *schedulers: BitWidthScheduler,
    epochs: int = 3,
    bits: str = "w2a2",
    resume: Path | None = None,
    look: Callable[[Trainer, DistillModule], Any] = lambda t, m: bits_of(m),
    **arguments: Any,
) -> tuple[DistillModule, list[Any]]:
    """Train three batches an epoch and return the module and what ``look`` saw after each."""
    module = distiller(**{"quantization": Recipe(bits=bits), **arguments})
    recorder = Recorder(look)
    trainer = make(max_epochs=epochs, callbacks=[*schedulers, recorder])
    trainer.fit(module, datamodule=digits(3), ckpt_path=resume)
    return module, recorder.seen


def test_bits_fall_by_epoch_to_those_of_the_recipe(make_trainer: MakeTrainer) -> None:
    stages = [Stage("w8a8", until_epoch=1), Stage("w4a4", until_epoch=2)]
    _, seen = fit(make_trainer, BitWidthScheduler(stages))
    assert seen == [8, 8, 8, 4, 4, 4, 2, 2, 2]


def test_bits_fall_at_a_step_within_an_epoch(make_trainer: MakeTrainer) -> None:
    _, seen = fit(make_trainer, BitWidthScheduler([Stage("w8a8", until_step=2)]), epochs=1)
    assert seen == [8, 8, 2]


def test_steps_are_those_of_the_student_under_accumulation(make_trainer: MakeTrainer) -> None:
    scheduler = BitWidthScheduler([Stage("w8a8", until_step=1)])
    _, seen = fit(make_trainer, scheduler, epochs=1, accumulate_grad_batches=2)
    assert seen == [8, 8, 2]


def test_bits_fall_when_validation_stalls(make_trainer: MakeTrainer) -> None:
    module = distiller(quantization=Recipe(bits="w2a2"), student_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    module.distillation["distill"].regularizers = torch.nn.ModuleList()
    recorder = Recorder(lambda t, m: bits_of(m))
    scheduler = BitWidthScheduler([Stage("w8a8", patience=2)])
    # With a learning rate of zero only batch norm moves: soon no validation is better than the ones before.
    trainer = make_trainer(max_epochs=12, callbacks=[scheduler, recorder])
    trainer.fit(module, datamodule=digits(2))
    assert recorder.seen[0] == 8
    assert recorder.seen[-1] == 2


def test_first_and_last_layer_keep_their_bits(make_trainer: MakeTrainer) -> None:
    def look(trainer: Trainer, module: DistillModule) -> set[int]:
        return {bits_of(module, f"{layer}.weight_quantizer") for layer in ("conv1", "linear")}

    _, seen = fit(make_trainer, BitWidthScheduler([Stage("w4a4", until_epoch=1)]), epochs=2, look=look)
    assert seen == [{8}] * 6


def test_a_switch_keeps_the_range_that_is_clipped_to(make_trainer: MakeTrainer) -> None:
    ranges: list[float] = []

    def look(trainer: Trainer, module: DistillModule) -> None:
        ranges.append(quantizers(module.student)[LAYER].levels().max().item())

    still = {"student_optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=1)], refit="clip")
    fit(make_trainer, scheduler, epochs=2, look=look, **still)
    assert ranges == pytest.approx([ranges[0]] * 6)


def published(bits: str) -> Recipe:
    """LSQ with the initial step of its paper, whose range at 8 bits is several times too wide for 4."""
    lsq = {"name": "lsq", "initial": "mean"}
    return Recipe(bits=bits, weight_quantizer=lsq, activation_quantizer=lsq)


def test_a_switch_can_fit_the_grid_by_the_quantizers_own_rule(make_trainer: MakeTrainer) -> None:
    still = {"student_optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=1)], refit="data")
    module, _ = fit(make_trainer, scheduler, epochs=2, quantization=published("w2a2"), **still)
    quantizer = quantizers(module.student)[LAYER]
    weight = module.student.layer1[0].conv1.weight.detach()
    torch.testing.assert_close(quantizer.scale.detach(), 2 * weight.flatten(1).abs().mean(1))  # LSQ: Q_P is 1


def weight_error(module: DistillModule) -> float:
    layer = module.student.layer1[0].conv1
    return (layer.weight_quantizer(layer.weight) - layer.weight).square().sum().item()


def test_a_switch_can_search_the_least_squared_error(make_trainer: MakeTrainer) -> None:
    still = {"student_optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=1)], refit="mse")
    module, _ = fit(make_trainer, scheduler, epochs=2, **still)
    assert {q.bits for q in quantizers(module.student).values()} == {2, 8}
    quantizer = quantizers(module.student)[LAYER]
    least = weight_error(module)
    for factor in (0.9, 1.1):
        with torch.no_grad():
            quantizer.scale.mul_(factor)
        assert weight_error(module) > 0.999 * least
        with torch.no_grad():
            quantizer.scale.div_(factor)


def test_the_loss_jumps_least_when_the_error_is_least(make_trainer: MakeTrainer) -> None:
    """The batch before the switch and the batch after it, of a student that knows the digits."""
    losses = {}
    for refit in ("clip", "mse"):
        student = CifarResNet(8, width=8, in_channels=1)
        arguments: dict[str, Any] = {"student_weights": "builtin:digits_student", "regularizer": None}
        still = {"student_optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
        scheduler = BitWidthScheduler([Stage("w8a8", until_step=1)], refit=refit)
        look = {"look": lambda t, m: t.callback_metrics["train/task"].item()}
        arguments |= {"quantization": published("w4a4"), "student": student}
        _, seen = fit(make_trainer, scheduler, epochs=1, **look, **arguments, **still)
        losses[refit] = seen
    before, *after = losses["mse"]
    assert max(after) < before + 0.3
    assert min(losses["clip"][1:]) > 2 * max(after)


@pytest.mark.parametrize("refit", ["clip", "mse", "data"])
def test_a_switch_forgets_the_moments_of_what_was_refitted(make_trainer: MakeTrainer, refit: str) -> None:
    def look(trainer: Trainer, module: DistillModule) -> list[int]:
        state = trainer.optimizers[0].state
        own = quantizers(module.student)
        scales = own[LAYER].scale, own["layer1.0.conv1.input_quantizer"].scale, own["conv1.weight_quantizer"].scale
        return [int(state[scale]["step"]) for scale in scales]

    adam = {"student_optimizer": lambda p: torch.optim.Adam(p, lr=1e-3)}
    scheduler = BitWidthScheduler([Stage("w8a8", until_step=2)], refit=refit)
    _, seen = fit(make_trainer, scheduler, epochs=1, look=look, **adam)
    assert seen == [[1, 1, 1], [2, 2, 2], [1, 1, 3]]


def test_a_switch_forgets_the_optimizer_state_of_what_changed_and_of_nothing_else(make_trainer: MakeTrainer) -> None:
    def look(trainer: Trainer, module: DistillModule) -> tuple[bool, bool]:
        state = trainer.optimizers[0].state
        changed = quantizers(module.student)[LAYER].scale
        return "exp_avg" in state[changed] and state[changed]["step"] == trainer.global_step, (
            state[module.student.conv1.weight]["step"] == trainer.global_step
        )

    adam = {"student_optimizer": lambda p: torch.optim.Adam(p, lr=1e-3)}
    _, seen = fit(make_trainer, BitWidthScheduler([Stage("w8a8", until_epoch=1)]), epochs=2, look=look, **adam)
    assert seen == [(True, True)] * 3 + [(False, True)] * 3


def test_the_best_checkpoint_is_one_of_the_last_stage(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = distiller(quantization=Recipe(bits="w2a2"))
    scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=2)])
    trainer = make_trainer(max_epochs=3, callbacks=[scheduler, BestAndLast(tmp_path)], enable_checkpointing=True)
    trainer.fit(module, datamodule=digits(3))
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["epoch"] == 2
    assert saved["state_dict"][f"student.{LAYER}.format"][0] == 2


@pytest.mark.parametrize(("refit", "resumed_after"), [("clip", 1), ("mse", 2), ("data", 1)])
def test_a_resumed_schedule_ends_like_an_uninterrupted_one(
    make_trainer: MakeTrainer, tmp_path: Path, resumed_after: int, refit: Any
) -> None:
    def run(resume: Path | None = None) -> DistillModule:
        module = distiller(quantization=Recipe(bits="w2a2"))
        scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=1), Stage("w4a4", until_step=8)], refit=refit)
        trainer = make_trainer(max_epochs=4, callbacks=[scheduler, keeper], enable_checkpointing=True)
        trainer.fit(module, datamodule=digits(3), ckpt_path=resume)
        return module

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run()
    keeper = ModelCheckpoint(tmp_path / "again", filename="{epoch}")
    resumed = run(tmp_path / f"epoch={resumed_after}.ckpt")
    assert bits_of(resumed) == 2
    assert torch.equal(parameters_of(whole), parameters_of(resumed))


def test_two_schedules_of_different_layers_run_side_by_side(make_trainer: MakeTrainer) -> None:
    def look(trainer: Trainer, module: DistillModule) -> tuple[int, int]:
        return bits_of(module), bits_of(module, "layer2.0.conv1.weight_quantizer")

    first = BitWidthScheduler([Stage("w8a8", until_epoch=1)], match="layer1.*")
    second = BitWidthScheduler([Stage("w4a4", until_epoch=2)], match="layer2.*")
    _, seen = fit(make_trainer, first, second, look=look)
    assert seen[::3] == [(8, 4), (2, 4), (2, 2)]


@pytest.mark.parametrize(("bits", "expected"), [(2, [8, 2]), (4, [4, 4])])
def test_products_of_attention_follow_where_the_recipe_gives_them_the_activations_bits(
    make_trainer: MakeTrainer, bits: int, expected: list[int]
) -> None:
    student = VisionTransformer(8, 4, 1, 2, 16, 16, num_classes=10)
    student.conv_proj = nn.Conv2d(1, 16, 4, stride=4)
    name = "encoder.layers.encoder_layer_0.self_attention.products.weights_quantizer"
    _, seen = fit(
        make_trainer,
        BitWidthScheduler([Stage("w8a8", until_epoch=1)]),
        epochs=2,
        look=lambda trainer, module: bits_of(module, name),
        student=student,
        quantization=Recipe("w2a2", attention_bits=bits),
    )
    assert seen[::3] == expected


def test_a_training_that_ends_before_the_last_stage_says_so(make_trainer: MakeTrainer) -> None:
    scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=5)])
    with pytest.warns(UserWarning, match="Training ended in stage w8a8 of the bit-width schedule"):
        fit(make_trainer, scheduler, epochs=1)
    assert not scheduler.finished
    assert len(scheduler.warnings) == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"stages=\[\] is not possible"),
        ([Stage("w8a8")], "has no end: give exactly one of"),
        ([Stage("w8a8", until_epoch=1, patience=2)], "has until_epoch, patience: give exactly one of"),
        ([Stage("w8a8", until_epoch=0)], "until_epoch=0: it must be at least 1"),
        ([Stage("w9a8", until_epoch=1)], "bits are 1 to 8"),
        ([Stage("w8a32", until_epoch=1)], "a stage has 1 to 8 bits"),
    ],
)
def test_an_impossible_stage_is_refused(stages: list[Stage], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BitWidthScheduler(stages)


def test_an_unknown_rule_of_refitting_is_refused() -> None:
    with pytest.raises(UsageError, match="refit='best' is not possible: it is clip, mse or data"):
        BitWidthScheduler([Stage("w8a8", until_epoch=1)], refit="best")


def test_a_schedule_that_matches_no_layer_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=r"match='layer9.\*' of the bit-width schedule matches no quantised layer"):
        fit(make_trainer, BitWidthScheduler([Stage("w8a8", until_epoch=1)], match="layer9.*"))


def test_two_schedules_of_one_layer_are_refused(make_trainer: MakeTrainer) -> None:
    schedulers = [BitWidthScheduler([Stage(bits, until_epoch=1)]) for bits in ("w8a8", "w4a4")]
    with pytest.raises(UsageError, match="two bit-width schedules change layer"):
        fit(make_trainer, *schedulers)


def test_a_schedule_that_ended_early_in_another_process_says_so_still() -> None:
    scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=1), Stage("w4a4", until_epoch=2)])
    scheduler.load_state_dict({"current": 1, "best": 0.5, "stalled": 0})
    assert scheduler.warnings == ["Training ended in stage w4a4 of the bit-width schedule, before its last."]
    scheduler.load_state_dict({"current": 2, "best": 0.5, "stalled": 0})
    assert scheduler.warnings == []
