"""Trainings that store and replay what the teacher answers, on digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lqkd.cli import main
from lqkd.data import Batch, Digits
from lqkd.errors import UsageError
from lqkd.losses import AttentionTransfer
from lqkd.modules import Tap
from lqkd.regularizers import ElementwiseMLP
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, distiller, network
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
EPOCHS = 2


class Counted(nn.Module):
    """A network that counts the batches it answered for, copies included; 8 images are compared with a copy."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.inner = network(14)

    def forward(self, images: Tensor) -> Tensor:
        Counted.calls += len(images) > 8
        return self.inner(images)


def counted(**arguments: Any) -> FrozenTeacher:
    return FrozenTeacher(Counted(), **{"minimum_accuracy": 0.0, "precision": "fp32", **arguments})


def train(make: MakeTrainer, data: Digits | None = None, epochs: int = EPOCHS, **arguments: Any) -> list[float]:
    """Train and return the loss of each step."""
    recorder = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
    module = distiller(**({"teacher": counted()} | arguments))
    make(callbacks=[recorder], max_epochs=epochs).fit(module, datamodule=data or digits(5))
    return recorder.seen


def forwards(run: Callable[[], Any]) -> int:
    Counted.calls = 0
    run()
    return Counted.calls


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def test_a_float32_cache_gives_the_loss_curve_of_a_live_teacher_exactly(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    live = train(make_trainer)
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    writing = train(make_trainer, teacher_cache=cache)
    replaying = train(make_trainer, teacher_cache=cache)
    assert len(live) == 5 * EPOCHS
    assert writing == live
    assert replaying == live


def test_a_float16_cache_gives_the_loss_curve_of_a_live_teacher_nearly(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    cache = TeacherCache(str(tmp_path / "cache"))
    live, writing, replaying = (
        train(make_trainer, teacher_cache=used, student_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        for used in (None, cache, cache)
    )
    assert writing == pytest.approx(live, rel=2e-3)
    assert writing != live
    assert replaying == writing


def test_a_replaying_run_does_not_ask_the_teacher(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Not even for its accuracy on both splits."""
    cache, make = TeacherCache(str(tmp_path / "cache")), partial(make_trainer, limit_test_batches=1.0)
    assert forwards(lambda: train(make, teacher_cache=cache)) >= 5 * EPOCHS
    assert forwards(lambda: train(make, teacher_cache=cache)) == 0


def test_another_method_and_batch_size_replay_the_same_answers(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    train(make_trainer, Digits(batch_size=16, limit_train=80), teacher_cache=cache)

    def replay() -> list[float]:
        return train(make_trainer, Digits(batch_size=40, limit_train=80), teacher_cache=cache, regularizer=None)

    assert forwards(replay) == 0
    live = train(make_trainer, Digits(batch_size=40, limit_train=80), regularizer=None)
    assert replay() == pytest.approx(live, rel=1e-3)


def test_later_epochs_than_the_cached_ask_the_teacher_live(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32", epochs=1)
    train(make_trainer, teacher_cache=cache)
    assert forwards(lambda: train(make_trainer, teacher_cache=cache)) == 5
    assert train(make_trainer, teacher_cache=cache) == train(make_trainer)


def test_without_augmentation_one_epoch_serves_all(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")

    def data() -> Digits:
        return Digits(batch_size=16, limit_train=80, crop_padding=0)

    train(make_trainer, data(), teacher_cache=cache, epochs=1)
    assert forwards(lambda: train(make_trainer, data(), teacher_cache=cache, epochs=4)) == 0
    assert [path.name for path in folders(tmp_path / "cache")[0].glob("epoch_*")] == ["epoch_00000.records"]


def test_a_change_of_what_answers_depend_on_makes_another_cache(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    train(make_trainer, teacher_cache=TeacherCache(str(root)), epochs=1)
    changes = ("weights", "normalisation", "augmentation", "seed", "data", "precision", "dtype")
    for caches, change in enumerate(changes, start=2):
        teacher, data, dtype = counted(), digits(5), "float16"
        if change == "weights":
            teacher.network.inner.linear.bias[3] += 1e-3
        elif change == "normalisation":
            teacher = counted(mean=[0.5], std=[0.25])
        elif change == "augmentation":
            data = Digits(batch_size=16, limit_train=80, eval_batch_size=256, crop_padding=2)
        elif change == "seed":
            data.seed = 1
        elif change == "data":
            whole = data.load()
            whole.test_images[0, 0, 0, 0] += 1
            monkeypatch.setattr(data, "load", lambda whole=whole: whole)
        elif change == "precision":
            teacher = counted(precision="bf16")
        else:
            dtype = "float32"
        given: dict[str, Any] = {"teacher": teacher, "teacher_cache": TeacherCache(str(root), dtype=dtype)}
        assert forwards(lambda data=data, given=given: train(make_trainer, data, **given, epochs=1)) > 0, change
        assert len(folders(root)) == caches, change


@pytest.mark.parametrize(
    ("one", "other", "precision"),
    [
        ({"resize_size": 8}, {"resize_size": 9}, "fp32"),
        ({"eval_batch_size": 16}, {"eval_batch_size": 20}, "auto"),
    ],
)
def test_what_is_known_of_a_teacher_is_not_used_for_another_evaluation(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one: dict[str, int],
    other: dict[str, int],
    precision: str,
) -> None:
    monkeypatch.setattr("lqkd.teachers.frozen.computes_bf16", lambda device: True)
    cache = TeacherCache(str(tmp_path / "cache"))

    def run(settings: dict[str, int]) -> int:
        data = digits(5)
        vars(data).update(settings)  # digits have no resize_size of their own
        trainer = make_trainer(max_epochs=1, limit_val_batches=1, limit_test_batches=1)
        module = distiller(teacher=counted(precision=precision), teacher_cache=cache)
        return forwards(lambda: trainer.fit(module, datamodule=data))

    run(one)
    assert run(one) == 0
    assert run(other) >= 2  # on the validation and on the test split
    assert len(folders(tmp_path / "cache")) == (1 if precision == "fp32" else 2)


def test_an_interrupted_write_is_continued(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")

    class Stop(Exception):
        pass

    def stop(trainer: Trainer, module: Any) -> None:
        if trainer.global_step == 7:
            raise Stop

    with pytest.raises(Stop):
        make_trainer(callbacks=[Recorder(stop)], max_epochs=EPOCHS).fit(
            distiller(teacher=counted(), teacher_cache=cache), datamodule=digits(5)
        )
    continued: list[list[float]] = []
    assert forwards(lambda: continued.append(train(make_trainer, teacher_cache=cache))) == 3
    assert continued[0] == train(make_trainer)


def test_damaged_answers_are_computed_again(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    live = train(make_trainer, teacher_cache=cache)
    records, cut = sorted(folders(tmp_path / "cache")[0].glob("epoch_*"))
    with open(records, "r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff")
    with open(cut, "r+b") as stream:
        stream.truncate(100)
    with pytest.warns(UserWarning, match="computed again"):
        assert train(make_trainer, teacher_cache=cache) == live
    assert forwards(lambda: train(make_trainer, teacher_cache=cache)) == 0


@pytest.mark.parametrize("text", ["{", "{}", '{"key": {}}'])
def test_a_damaged_or_foreign_header_is_never_used(make_trainer: MakeTrainer, tmp_path: Path, text: str) -> None:
    cache = TeacherCache(str(tmp_path / "cache"))
    train(make_trainer, teacher_cache=cache, epochs=1)
    (folder,) = folders(tmp_path / "cache")
    (folder / "header.json").write_text(text)
    with pytest.warns(UserWarning, match="damaged header"):
        train(make_trainer, teacher_cache=cache, epochs=1)
    assert (folder / "header.json").read_text() == text
    assert [path.name for path in folders(tmp_path / "cache")] == [folder.name, f"{folder.name}-2"]


def test_top_k_logits_and_the_mass_of_the_rest_train_as_well(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), top_k=9, dtype="float32")
    live = train(make_trainer)
    assert train(make_trainer, teacher_cache=cache) == pytest.approx(live, rel=1e-3)  # one class left: nothing is lost
    few = TeacherCache(str(tmp_path / "cache"), top_k=3)
    writing, replaying = (train(make_trainer, teacher_cache=few) for _ in range(2))
    assert writing == replaying != live


def test_tapped_features_are_stored_and_replayed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "distillation_loss": AttentionTransfer(),
        "taps": [Tap("inner.layer1.0.conv1", "layer1"), Tap("inner.layer3.0.bn2", "layer3")],
        "regularizer": None,
    }
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    live = train(make_trainer, **arguments)
    assert train(make_trainer, teacher_cache=cache, **arguments) == live
    replayed: list[list[float]] = []
    assert forwards(lambda: replayed.append(train(make_trainer, teacher_cache=cache, **arguments))) == 0
    assert replayed[0] == live


def test_every_teacher_of_an_ensemble_is_stored(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def teachers() -> TeacherEnsemble:
        return TeacherEnsemble([counted(), counted(mean=[0.5], std=[0.25])], "confidence", minimum_accuracy=0.0)

    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    live = train(make_trainer, teacher=teachers())
    assert train(make_trainer, teacher=teachers(), teacher_cache=cache) == live
    assert forwards(lambda: train(make_trainer, teacher=teachers(), teacher_cache=cache)) == 0


def test_a_cache_that_would_be_too_large_is_refused_with_its_size(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), max_bytes=4000)
    with pytest.raises(UsageError, match=r"4\.4 KiB \(80 samples x 2 epochs x 28 bytes\).*max_bytes=4000"):
        train(make_trainer, teacher_cache=cache)
    assert not (tmp_path / "cache").exists()


def test_a_training_without_an_end_cannot_be_cached(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_epochs"):
        train(make_trainer, teacher_cache=TeacherCache(str(tmp_path)), epochs=-1)


@pytest.mark.parametrize(("setting", "value"), [("dtype", "int8"), ("top_k", 0), ("epochs", 0), ("max_bytes", -1)])
def test_an_impossible_setting_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"teacher_cache.{setting}"):
        TeacherCache(**{setting: value})


def test_as_many_logits_as_classes_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"top_k=10.*is 10"):
        train(make_trainer, teacher_cache=TeacherCache(str(tmp_path), top_k=10))


class Inverted(Digits):
    """Changes images by what its parent's key does not know."""

    def preprocess(self, batch: Batch, *, train: bool, epoch: int) -> Batch:
        batch = super().preprocess(batch, train=train, epoch=epoch)
        return batch._replace(images=-batch.images)


class Keyed(Inverted):
    def augmentation_key(self) -> dict[str, Any]:
        return {**super().augmentation_key(), "inverted": True}


class Forgetful(Digits):
    """Tells a key that lacks a setting."""

    def augmentation_key(self) -> dict[str, Any]:
        return {"seed": self.run_seed}


def test_data_that_change_images_need_a_key_of_their_own(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"Inverted\.preprocess"):
        train(make_trainer, Inverted(limit_train=80, batch_size=16), teacher_cache=cache)
    train(make_trainer, Keyed(limit_train=80, batch_size=16), teacher_cache=cache, epochs=1)


def test_answers_for_other_images_are_never_replayed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"))
    train(make_trainer, Forgetful(limit_train=80, batch_size=16, crop_padding=1), teacher_cache=cache, epochs=1)
    with pytest.raises(UsageError, match="answers for another image of sample"):
        train(make_trainer, Forgetful(limit_train=80, batch_size=16, crop_padding=2), teacher_cache=cache, epochs=1)


def test_data_that_cannot_tell_what_they_are_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = distiller(teacher=counted(), teacher_cache=TeacherCache(str(tmp_path)))
    batches = [Batch(torch.rand(16, 1, 8, 8), torch.arange(16) % 10, torch.arange(16))] * 2
    with pytest.raises(UsageError, match=r"lacks fingerprint .* augmentation_key .* train_indices"):
        make_trainer().fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def test_the_size_and_what_is_there_are_reported(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        train(make_trainer, teacher_cache=TeacherCache(str(tmp_path / "cache")))
    assert "4.4 KiB (80 samples x 2 epochs x 28 bytes), of which 0 bytes are there" in caplog.text
    header = json.loads((folders(tmp_path / "cache")[0] / "header.json").read_text())
    augmentation = header["key"]["data"]["augmentation"]
    assert (augmentation["seed"], augmentation["crop_padding"]) == (0, 1)


def test_an_adversarial_regularizer_learns_the_same_from_a_cache(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(cache: TeacherCache | None) -> list[float]:
        regularizer = ElementwiseMLP(hidden=8, player="adversarial", guard="entropy")
        return train(make_trainer, regularizer=regularizer, teacher_cache=cache)

    run(None)  # the first training of a process compiles, and may sum in another order
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    live = run(None)
    assert [run(cache), run(cache)] == [live, live]


def test_the_command_line_reaches_the_cache_and_the_precision_of_the_teacher(tmp_path: Path) -> None:
    command = ["fit", "--config", str(Path(__file__).parents[2] / "configs" / "regularizer.yaml")]
    command += ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "128", "--run.root", str(tmp_path)]
    command += ["--model.init_args.teacher_cache.folder", str(tmp_path / "cache")]
    command += ["--model.init_args.teacher_cache.dtype", "float32"]
    command += ["--model.init_args.teacher.init_args.precision", "fp32"]
    assert main(command) == 0
    header = json.loads((folders(tmp_path / "cache")[0] / "header.json").read_text())
    assert header["key"]["dtype"] == "float32"
    assert header["key"]["teachers"][0]["precision"].startswith("fp32")
    assert main([*command, "--model.init_args.teacher_cache.top_k", "10"]) == 2
    again = ["fit", "--config", str(tmp_path / "regularizer" / "version_0" / "config.yaml")]
    assert main([*again, "--run.root", str(tmp_path)]) == 0
    assert len(folders(tmp_path / "cache")) == 1
