"""Checkpoints of distillation: the metric they give back, other configurations, schedules, compilation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lqkd.callbacks import BitWidthScheduler, Stage
from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe, quantizers
from lqkd.regularizers import ElementwiseMLP
from lqkd.teachers import FrozenTeacher
from tests.conftest import digits, distiller, network

MakeTrainer = Callable[..., Trainer]


def players() -> dict[str, Any]:
    return {
        "teacher": FrozenTeacher(network(14), minimum_accuracy=0.0),
        "student": network(),
        "regularizer": ElementwiseMLP(hidden=8),
    }


def saved(make_trainer: MakeTrainer, path: Path, **arguments: Any) -> DistillModule:
    module = distiller(**arguments)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits(3))
    trainer.save_checkpoint(path)
    return module


def test_a_module_loaded_from_a_checkpoint_gives_the_same_metrics(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = saved(make_trainer, tmp_path / "a.ckpt")
    loaded = DistillModule.load_from_checkpoint(tmp_path / "a.ckpt", **players(), weights_only=True)
    expected, got = (make_trainer().validate(m, datamodule=digits(3), verbose=False)[0] for m in (module, loaded))
    assert got == expected
    assert torch.equal(loaded.eval()(images := torch.randn(2, 1, 8, 8)), module.eval()(images))


def test_best_and_last_name_checkpoints_of_the_same_training(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max", save_last=True)
    trainer = make_trainer(max_epochs=3, callbacks=[keeper], enable_checkpointing=True, limit_test_batches=1.0)
    module = distiller()
    trainer.fit(module, datamodule=digits(4))
    best = trainer.validate(ckpt_path="best", datamodule=digits(4), weights_only=True, verbose=False)[0]["val/acc"]
    assert best == pytest.approx(float(keeper.best_model_score))
    assert "test/acc" in trainer.test(ckpt_path="last", datamodule=digits(4), weights_only=True, verbose=False)[0]


# ---- another configuration than the checkpoint's


OTHER = [
    ({"weight_quantizer": "minmax"}, r"has the quantizer LSQ where quantization asks for MinMax \('.*\d+ more\)"),
    ({"activation_quantizer": "lsq_ewgs"}, "has the quantizer LSQ where quantization asks for LSQEWGS"),
    ({"activation_quantizer": "lsq_plus"}, "LSQ where quantization asks for LSQPlus"),
    ({"per_channel": False}, "another architecture .* another shape"),
    ({"bits": "w4a32"}, "another architecture .* it also has"),
    ({"bits": "w3a4"}, "has 4 bits where quantization asks for 3"),
    ({"first_layer_bits": 4}, "has 8 bits where quantization asks for 4"),
]


def test_a_checkpoint_of_other_quantization_settings_is_refused_in_one_sentence(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saved(make_trainer, tmp_path / "a.ckpt")
    given: dict[str, Any] = {"datamodule": digits(3), "ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    for index, (change, message) in enumerate(OTHER):
        module = distiller(quantization=Recipe(**({"bits": "w4a4"} | change)))
        with pytest.raises(UsageError, match=message) as caught:
            getattr(make_trainer(max_epochs=2), ("fit", "validate")[index % 2])(module, **given)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_name_its_quantizers_still_loads(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    saved(make_trainer, tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint.pop("quantizers").values()) == {"LSQ"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    trainer = make_trainer(max_epochs=2)
    trainer.fit(distiller(), datamodule=digits(3), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert trainer.global_step == 6


def test_a_float_checkpoint_is_refused_as_a_checkpoint_and_taken_as_weights(tmp_path: Path) -> None:
    floats = network().state_dict()
    module = distiller()
    others = {key: value for key, value in module.state_dict().items() if not key.startswith("student.")}
    with pytest.raises(UsageError, match=r"it lacks 'student.*quantizer"):
        module.load_state_dict(others | {f"student.{key}": value for key, value in floats.items()})
    torch.save(floats, tmp_path / "float.pt")
    module = distiller(student_weights=str(tmp_path / "float.pt"))
    assert all(torch.equal(module.student.state_dict()[key], value) for key, value in floats.items())


# ---- schedules


@pytest.mark.parametrize("activations", ["pact", "lsq_plus", "n2uq"])
def test_a_training_resumes_across_a_change_of_bits_with_every_learned_range(
    make_trainer: MakeTrainer, tmp_path: Path, activations: str
) -> None:
    def run(folder: str, resume: Path | None = None) -> DistillModule:
        rules = Recipe(bits="w2a2", activation_quantizer=activations, first_layer_bits=32)  # images are signed
        module = distiller(quantization=rules)
        keeper = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        scheduler = BitWidthScheduler([Stage("w8a8", until_epoch=1), Stage("w4a4", until_epoch=2)])
        trainer = make_trainer(max_epochs=3, callbacks=[scheduler, keeper], enable_checkpointing=True)
        trainer.fit(module, datamodule=digits(3), ckpt_path=resume, weights_only=True)
        return module

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / "epoch=1.ckpt")  # saved with 4 bits where a new run has 8
    assert {q.bits for name, q in quantizers(resumed.student).items() if "layer" in name} == {2}
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the student in place", "the module in a wrapper"])
def test_checkpoints_of_compiled_and_plain_trainings_load_into_each_other(
    make_trainer: MakeTrainer, tmp_path: Path, how: str
) -> None:
    def compiled(module: DistillModule) -> Any:
        if how == "the student in place":
            module.student.compile(backend="eager")
            return module
        return torch.compile(module, backend="eager")

    def small() -> DistillModule:
        layers = (nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        return distiller(student=nn.Sequential(*layers), regularizer=None)

    plain = small()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(plain, datamodule=digits(3))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    trainer = make_trainer(max_epochs=2)
    trainer.fit(compiled(small()), datamodule=digits(3), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    keys = list(torch.load(tmp_path / "compiled.ckpt", weights_only=True)["state_dict"])
    assert keys == list(plain.state_dict())
    trainer = make_trainer(max_epochs=3)
    trainer.fit(small(), datamodule=digits(3), ckpt_path=tmp_path / "compiled.ckpt", weights_only=True)
    assert trainer.global_step == 9
