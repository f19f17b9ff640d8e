"""Oscillations monitored, dampened and frozen in real trainings."""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lqkd.callbacks import BitWidthScheduler, OscillationDampening, OscillationFreezing, OscillationMonitor, Stage
from lqkd.errors import UsageError
from lqkd.modules import ClassifierModule, Constant, DistillModule
from lqkd.quantization import Recipe, quantizers
from lqkd.quantization.analysis.oscillation import dampening_loss, weight_layers
from lqkd.runs import RunLogger
from tests.conftest import digits, distiller, network, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
LAYER = "layer1.0.conv1"
W2 = Recipe(bits="w2a4")


def codes_of(module: DistillModule, layer: str = LAYER) -> torch.Tensor:
    found = module.student.get_submodule(layer)
    return found.weight_quantizer.codes(found.weight)


def fit(make: MakeTrainer, *callbacks: Callback, batches: int = 6, epochs: int = 2, **arguments: Any) -> DistillModule:
    module = distiller(**({"quantization": W2} | arguments))
    make(max_epochs=epochs, callbacks=list(callbacks)).fit(module, datamodule=digits(batches))
    return module


def low_bit_loss(module: DistillModule) -> float:
    layers = [x for x in weight_layers(module.student).values() if x.weight_quantizer.bits <= 4]
    return sum(dampening_loss(layer).item() for layer in layers)


# ---- monitor


def test_flips_are_counted_layer_by_layer_and_kept_as_a_table(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    codes: list[torch.Tensor] = []
    start = Start(lambda module: codes.append(codes_of(module)))
    recorder = Recorder(lambda t, m: codes.append(codes_of(m)))
    module = distiller(quantization=W2)
    monitor = OscillationMonitor()
    trainer = make_trainer(max_epochs=2, callbacks=[start, recorder, monitor], logger=RunLogger(tmp_path / "run"))
    trainer.fit(module, datamodule=digits(6))
    shares = [(a != b).float().mean().item() for a, b in pairwise(codes)]
    with open(tmp_path / "run" / "oscillation" / "layers.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    own = [row for row in rows if row["layer"] == LAYER]
    assert [row["epoch"] for row in own] == ["0", "1"]
    assert float(own[0]["flipping"]) == pytest.approx(sum(shares[:6]) / 6)
    assert float(own[1]["flipping"]) == pytest.approx(sum(shares[6:]) / 6)
    assert sum(shares) > 0
    assert {row["layer"] for row in rows} == set(weight_layers(module.student))
    last = [row for row in rows if row["epoch"] == "1"]
    weights = sum(int(row["weights"]) for row in last)
    for name in ("flipping", "oscillating"):
        total = sum(float(row[name]) * int(row["weights"]) for row in last) / weights
        assert trainer.callback_metrics[f"oscillation/{name}"].item() == pytest.approx(total)
    assert not list((tmp_path / "run").rglob("*.tmp"))


class Start(Callback):
    def __init__(self, look: Callable[[DistillModule], Any]) -> None:
        self.look = look

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.look(pl_module)


def test_watching_changes_nothing(make_trainer: MakeTrainer) -> None:
    watched, alone = fit(make_trainer, OscillationMonitor()), fit(make_trainer)
    assert torch.equal(parameters_of(watched), parameters_of(alone))


def test_fewer_observations_see_the_change_between_them(make_trainer: MakeTrainer) -> None:
    codes: list[torch.Tensor] = []
    start = Start(lambda module: codes.append(codes_of(module)))
    recorder = Recorder(lambda t, m: codes.append(codes_of(m)))
    monitor = OscillationMonitor(every_n_steps=3)
    fit(make_trainer, start, recorder, monitor, epochs=1)
    seen = codes[::3]
    shares = [(a != b).float().mean().item() for a, b in pairwise(seen)]
    row = next(row for row in monitor.history if row.layer == LAYER)
    assert row.flipping == pytest.approx(sum(shares) / 2)


def test_accumulated_batches_are_one_observation(make_trainer: MakeTrainer) -> None:
    monitor = OscillationMonitor()
    counts = Recorder(lambda t, m: monitor._observations.get(LAYER))
    fit(make_trainer, monitor, counts, epochs=1, batches=5, accumulate_grad_batches=2)
    assert counts.seen == [None, 1, 1, 2, 3]


def test_a_switch_of_bits_is_no_flip(make_trainer: MakeTrainer) -> None:
    monitor = OscillationMonitor()
    scheduler = BitWidthScheduler([Stage("w8a8", until_step=3)])
    fit(make_trainer, scheduler, monitor, epochs=1, student_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert {row.bits for row in monitor.history if row.layer == LAYER} == {2}
    assert all(row.flipping == 0 for row in monitor.history)


@pytest.mark.parametrize("resumed_after", [0, 2])
def test_a_resumed_monitor_ends_with_the_same_history(
    make_trainer: MakeTrainer, tmp_path: Path, resumed_after: int
) -> None:
    def run(monitor: OscillationMonitor, resume: Path | None = None) -> None:
        keeper = ModelCheckpoint(tmp_path / str(resume is None), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = make_trainer(max_epochs=3, callbacks=[monitor, keeper], enable_checkpointing=True)
        trainer.fit(distiller(quantization=W2), datamodule=digits(6), ckpt_path=resume, weights_only=True)

    whole, resumed = OscillationMonitor(), OscillationMonitor()
    run(whole)
    run(resumed, tmp_path / "True" / f"epoch={resumed_after}.ckpt")
    assert any(row.oscillating > 0 for row in whole.history)
    assert resumed.history == whole.history


# ---- dampening


def test_dampened_weights_end_nearer_to_their_levels(make_trainer: MakeTrainer) -> None:
    plain, dampened = fit(make_trainer, epochs=4), fit(make_trainer, OscillationDampening(1.0), epochs=4)
    assert low_bit_loss(dampened) < 0.5 * low_bit_loss(plain)


def test_the_strength_rises_by_half_a_cosine_and_is_part_of_the_loss(make_trainer: MakeTrainer) -> None:
    def look(trainer: Trainer, module: DistillModule) -> tuple[float, float, float]:
        logged = trainer.callback_metrics
        rest = logged["train/loss"] - logged["train/task"] - logged["train/distill"]
        return logged["train/dampening"].item(), rest.item(), low_bit_loss(module)

    recorder = Recorder(look)
    still = {"student_optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "regularizer": None}
    fit(make_trainer, OscillationDampening(0.3), recorder, batches=4, epochs=1, **still)
    for (logged, rest, full), factor in zip(recorder.seen, (0, 0.1464466, 0.5, 0.8535534), strict=True):
        assert logged == pytest.approx(0.3 * factor * full, rel=1e-4)
        assert rest == pytest.approx(logged, abs=1e-4 * full)


def test_dampening_waits_for_four_bits(make_trainer: MakeTrainer) -> None:
    recorder = Recorder(lambda t, m: t.callback_metrics["train/dampening"].item())
    scheduler = BitWidthScheduler([Stage("w8a8", until_step=3)])
    fit(make_trainer, scheduler, OscillationDampening(), recorder, epochs=1)
    assert [value > 0 for value in recorder.seen] == [False] * 3 + [True] * 3


def test_a_training_after_a_dampened_one_is_not_dampened(make_trainer: MakeTrainer) -> None:
    module = fit(make_trainer, OscillationDampening())
    assert module.penalties == {}


def test_dampening_under_accumulation_is_that_of_one_large_batch(make_trainer: MakeTrainer) -> None:
    """The penalty does not grow with the number of batches that are accumulated."""

    def change(accumulate: int) -> torch.Tensor:
        module = distiller(
            quantization=W2,
            student_optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
            accumulate_grad_batches=accumulate,
            regularizer=None,
        )
        module.penalties["only"] = lambda: 1e4 * module.student.conv1.weight.square().sum()
        before = module.student.conv1.weight.detach().clone()
        make_trainer(max_steps=1).fit(module, datamodule=digits(3))
        return module.student.conv1.weight.detach() - before

    torch.testing.assert_close(change(1), change(3), rtol=1e-2, atol=1e-2)


# ---- freezing


def test_weights_that_turn_back_are_frozen_and_never_flip_again(make_trainer: MakeTrainer) -> None:
    freezing = OscillationFreezing(initial_threshold=0.005, final_threshold=0.005)

    def look(trainer: Trainer, module: DistillModule) -> tuple[torch.Tensor, torch.Tensor]:
        return codes_of(module), freezing._states[LAYER].tensors["frozen"].clone()

    # Recorded at the end of each batch, before it is frozen in: what was frozen at the end of the batch before.
    recorder = Recorder(look)
    module = fit(make_trainer, freezing, recorder, epochs=4)
    frozen = recorder.seen[-1][1]
    assert 0 < frozen.float().mean() < 1
    for (codes, mask), (later, now) in pairwise(recorder.seen):
        assert torch.equal(codes[mask], later[mask])
        assert (mask <= now).all()
    quantizer, weight = quantizers(module.student)[f"{LAYER}.weight_quantizer"], module.student.layer1[0].conv1.weight
    on_level = quantizer.dequantize(quantizer.codes(weight))
    assert torch.equal(weight[frozen], on_level[frozen])
    assert not quantizer._forward_hooks


def test_the_share_of_frozen_weights_is_logged_and_first_and_last_layer_are_free(make_trainer: MakeTrainer) -> None:
    freezing = OscillationFreezing(0.005, 0.005)
    recorder = Recorder(lambda t, m: t.callback_metrics.get("oscillation/frozen"))
    fit(make_trainer, freezing, recorder, epochs=3)
    assert 0 < recorder.seen[-1] < 1
    assert not {"conv1", "linear"} & set(freezing._layers)


def test_the_threshold_falls_so_that_freezing_comes_late(make_trainer: MakeTrainer) -> None:
    def frozen(initial: float) -> list[int]:
        freezing = OscillationFreezing(initial, 0.005)
        recorder = Recorder(lambda t, m: sum(int(s.tensors["frozen"].sum()) for s in freezing._states.values()))
        fit(make_trainer, freezing, recorder, epochs=2)
        return recorder.seen

    early, late = frozen(0.005), frozen(0.1)
    assert early[4] > 0
    assert late[4] == 0
    assert late[-1] > 0


def test_a_switch_of_bits_frees_frozen_weights(make_trainer: MakeTrainer) -> None:
    freezing = OscillationFreezing(0.005, 0.005)
    recorder = Recorder(lambda t, m: int(freezing._states[LAYER].tensors["frozen"].sum()))
    scheduler = BitWidthScheduler([Stage("w3a4", until_step=10)])
    fit(make_trainer, scheduler, freezing, recorder)
    assert recorder.seen[9] > 0
    assert recorder.seen[10] == 0


@pytest.mark.parametrize("resumed_after", [0, 2])
def test_dampening_and_freezing_resume_in_the_middle_to_the_same_weights(
    make_trainer: MakeTrainer, tmp_path: Path, resumed_after: int
) -> None:
    def run(resume: Path | None = None) -> DistillModule:
        module = distiller(quantization=W2)
        freezing = OscillationFreezing(0.02, 0.005)
        keeper = ModelCheckpoint(tmp_path / str(resume is None), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        callbacks = [
            BitWidthScheduler([Stage("w3a4", until_step=4)]),
            OscillationDampening(0.01),
            freezing,
            Start(lambda m: frozen.append(int(sum(s.tensors["frozen"].sum() for s in freezing._states.values())))),
            keeper,
        ]
        trainer = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, datamodule=digits(6), ckpt_path=resume, weights_only=True)
        masks.append(torch.cat([state.tensors["frozen"].flatten() for state in freezing._states.values()]))
        return module

    masks: list[torch.Tensor] = []
    frozen: list[int] = []
    whole = run()
    frozen.clear()
    resumed = run(tmp_path / "True" / f"epoch={resumed_after}.ckpt")
    assert frozen[0] > 0 or resumed_after == 0
    assert masks[0].any()
    assert torch.equal(*masks)
    assert torch.equal(parameters_of(whole), parameters_of(resumed))


# ---- mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OscillationMonitor(0), "every_n_steps=0 is not possible"),
        (lambda: OscillationDampening(0.0), "strength=0.0 is not possible"),
        (lambda: OscillationDampening(float("inf")), "strength=inf is not possible"),
        (lambda: OscillationFreezing(1.5), "initial_threshold=1.5 is not possible"),
        (lambda: OscillationFreezing(0.1, 0.2), "final_threshold=0.2 is not possible"),
        (lambda: OscillationFreezing(0.1, 0.0), "final_threshold=0.0 is not possible"),
    ],
)
def test_an_impossible_setting_is_refused(make: Callable[[], Callback], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


REMEDIES = (OscillationDampening, OscillationFreezing)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_student_of_eight_bits_is_refused(make_trainer: MakeTrainer, remedy: type[Callback]) -> None:
    with pytest.raises(UsageError, match="is for weights of at most 4 bits: this student has none"):
        fit(make_trainer, remedy(), quantization=Recipe(bits="w8a8"))


@pytest.mark.parametrize("remedy", REMEDIES)
def test_weights_without_a_fixed_grid_are_refused(make_trainer: MakeTrainer, remedy: type[Callback]) -> None:
    with pytest.raises(UsageError, match=r"cannot work on layer 'layer1.0.conv1' \(DoReFa measures or normalises"):
        fit(make_trainer, remedy(), quantization=Recipe(bits="w2a4", weight_quantizer="dorefa"))


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_training_without_end_is_refused(make_trainer: MakeTrainer, remedy: type[Callback]) -> None:
    with pytest.raises(UsageError, match=f"{remedy.__name__} needs to know the end of training"):
        fit(make_trainer, remedy(), epochs=-1, student_schedule=Constant())


@pytest.mark.parametrize("callback", [OscillationMonitor, *REMEDIES])
def test_a_module_without_quantised_weights_is_refused(make_trainer: MakeTrainer, callback: type[Callback]) -> None:
    with pytest.raises(UsageError, match=f"{callback.__name__} needs a DistillModule"):
        make_trainer(callbacks=[callback()]).fit(ClassifierModule(network()), datamodule=digits(2))
