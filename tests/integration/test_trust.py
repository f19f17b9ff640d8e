"""How far teachers can be believed, learned on held-out rows before a training."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lqkd.callbacks import RegularizerMonitor
from lqkd.data import Digits, SegmentationFolder
from lqkd.data.augmentation import Augmentation
from lqkd.errors import UsageError
from lqkd.losses import HintonKL, Hints
from lqkd.models import CifarResNet, load_weights
from lqkd.modules import DistillModule, Tap, Term
from lqkd.quantization import Recipe, quantize_model
from lqkd.regularizers import HeldOutInterpolation
from lqkd.runs import BestAndLast, RunLogger
from lqkd.runs.summary import RunSummary
from lqkd.tasks import Segmentation
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import TeacherCache
from lqkd.teachers.cache.keys import data_key
from tests.conftest import digits, distiller, network, parameters_of
from tests.integration.test_exact_resume import StopAt
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
STUDENT = "builtin:digits_student"
ORDER = [1, 2, 0, 3, 4, 5, 6, 7, 8, 9]


def held_out(kind: type[Digits] = Digits, **settings: Any) -> Digits:
    """Digits with seven batches of 16 an epoch and about 300 rows of trust."""
    data = kind(**{"batch_size": 16, "eval_batch_size": 256, "limit_train": 412, "trust_fraction": 0.727} | settings)
    data.augmentation = Augmentation()
    return data


def trained_teacher(order: list[int] | None = None) -> FrozenTeacher:
    """A network that knows digits, but by other names where there is an order."""
    teacher = CifarResNet(14, num_classes=10, width=8, in_channels=1)
    load_weights(teacher, "builtin:digits_teacher")
    if order is not None:
        with torch.no_grad():
            teacher.linear.weight.copy_(teacher.linear.weight[order])
            teacher.linear.bias.copy_(teacher.linear.bias[order])
    return FrozenTeacher(teacher, minimum_accuracy=0.0)


class Remembering(nn.Module):
    """A network that knows some images by heart, and of others little: it looks at three directions of their pixels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("directions", torch.randn(images[0].numel(), 3, generator=generator))
        self.register_buffer("known", images.flatten(1) @ self.directions)
        self.register_buffer("others", 1e4 * (1 - nn.functional.one_hot(labels, 10).float()))

    def forward(self, images: Tensor) -> Tensor:
        distances = torch.cdist(images.flatten(1) @ self.directions, self.known)
        return -(distances.unsqueeze(2) + self.others).amin(1)


def remembering_teacher() -> FrozenTeacher:
    """One that knows the held-out rows by heart."""
    data = held_out(eval_batch_size=300)
    data.setup("fit")
    (rows,) = tuple(data.trust_batches(torch.device("cpu")))
    return FrozenTeacher(Remembering(rows.images, rows.labels), minimum_accuracy=0.0, precision="fp32")


def trusting(
    combination: str = "trust", weights: str | None = None, own: bool | None = None, **teachers: FrozenTeacher
) -> DistillModule:
    """A module with one term, ``logits``, of all the teachers; its student knows digits where it has weights."""
    torch.manual_seed(0)
    teachers = teachers or {"large": trained_teacher(ORDER)}
    return DistillModule(
        student=network() if weights is None else CifarResNet(8, num_classes=10, width=8, in_channels=1),
        student_weights=weights,
        quantization=Recipe(bits="w4a4"),
        teachers=teachers,
        distillation={"logits": Term(HintonKL(), [*teachers], combination, own=own)},
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    )


def test_another_order_of_classes_is_found_told_and_in_the_summary(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.manual_seed(5)
    module = trusting(large=trained_teacher(ORDER), random=FrozenTeacher(network(), minimum_accuracy=0.0))
    targets: list[tuple[Tensor, Tensor]] = []

    class Watch(Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            targets.append((outputs["terms"]["logits"]["teacher"].argmax(1), batch.labels))

    callbacks = [RunSummary(), RegularizerMonitor(), Watch(lambda *_: None)]
    trainer = make_trainer(callbacks=callbacks, logger=RunLogger(tmp_path))
    trainer.fit(module, datamodule=held_out())
    found = module.trust["logits"]
    assert found["read_as"] == {"teacher large": {"0": "1", "1": "2", "2": "0"}, "teacher random": {}}
    assert 0.8 < found["believed"]["teacher large"] < 1.2
    assert found["believed"]["teacher random"] < 0.05
    assert not found["memorised"]
    right = torch.cat([answers == labels for answers, labels in targets]).double().mean()
    assert right > 0.9
    assert json.loads((tmp_path / "summary.json").read_text())["trust"]["logits"] == found
    maps = module.trust_maps()["logits"]
    assert maps["teacher large"].argmax(0).tolist() == ORDER
    assert float(maps["teacher random"].abs().max()) < 0.3 * float(maps["teacher large"].max())
    with open(tmp_path / "regularizer" / "logits" / "reliability.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    right = {
        who: sum(float(row["value"]) * float(row["count"]) for row in rows if row["bin"].startswith(who)) / 300
        for who in ("teacher large", "what is believed of them")
    }
    assert right["what is believed of them"] > 0.95
    assert right["teacher large"] < 0.75
    assert {row["epoch"] for row in rows} == {"0"}  # it is known before the first step


def test_without_validation_it_is_said_that_nobody_knows_who_has_learned_rows_by_heart(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    for batches, told in ((0, True), (1.0, False)):
        caplog.clear()
        with caplog.at_level("INFO"):
            make_trainer(limit_val_batches=batches, limit_train_batches=1).fit(trusting(), datamodule=held_out())
        assert ("whether teachers know held-out rows by heart is not known" in caplog.text) == told


class Marked(Digits):
    """Held-out rows have a white corner, all others a black one."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        images = self._loaded().train_images
        assert isinstance(images, Tensor)
        images[..., 0, 0] = 0
        images[self.trust_indices, :, 0, 0] = 255


def test_held_out_rows_are_in_no_gradient_of_the_student(make_trainer: MakeTrainer) -> None:
    """They have a white corner, which the student never sees while it has a gradient, and teachers see."""
    data = held_out(Marked)
    module = trusting()
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    def watch(name: str, needs_gradient: bool) -> Callable[..., None]:
        def hook(network: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad == needs_gradient:
                seen[name].append(arguments[0][:, 0, 0, 0])

        return hook

    module.student.register_forward_hook(watch("student", True))
    module.named_teachers["large"].network.register_forward_hook(watch("teacher", False))
    make_trainer().fit(module, datamodule=data)
    student, teacher = torch.cat(seen["student"]), torch.cat(seen["teacher"])
    assert len(student) >= 7 * 16
    assert student.unique().numel() == 1
    assert int((teacher == teacher.max()).sum()) == len(data.trust_indices)


def test_a_resumed_training_keeps_what_was_fitted_and_ends_the_same(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(folder: Path, stop: tuple[int, int] | None = None, data: Digits | None = None) -> DistillModule:
        module = trusting(weights=STUDENT, large=trained_teacher(ORDER), known=remembering_teacher())
        last = folder / "last.ckpt"
        resume = last if last.exists() else None
        callbacks: list[Any] = [BestAndLast(folder, every_n_steps=1)] + ([StopAt(*stop)] if stop else [])
        trainer = make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True, logger=RunLogger(folder))
        trainer.fit(module, datamodule=data or held_out(), ckpt_path=resume, weights_only=True)
        return module

    class NotAgain(Digits):
        def trust_batches(self, device: torch.device) -> Any:
            raise AssertionError("it is fitted once")

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", (1, 1))
    resumed = run(tmp_path / "cut", data=held_out(NotAgain))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert resumed.trust == whole.trust
    assert resumed.warnings == whole.warnings
    assert "teacher known knows its training rows by heart" in whole.warnings[0]
    for name, kept in whole.distillation.state_dict().items():
        assert torch.equal(kept, resumed.distillation.state_dict()[name]), name


def test_answers_from_the_cache_train_the_same_and_its_key_knows_the_held_out_rows(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    live, cached = trusting(weights=STUDENT), trusting(weights=STUDENT)
    cached.teacher_cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    for module in (live, cached):
        make_trainer().fit(module, datamodule=held_out())
    assert torch.equal(parameters_of(live), parameters_of(cached))
    with_trust, other = held_out(), held_out(trust_fraction=0.5)
    for data in (with_trust, other):
        data.setup("fit")
    assert data_key(with_trust) != data_key(other)


def test_the_float_network_of_the_student_is_believed_beside_a_weak_teacher(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    module = trusting(weights=STUDENT, weak=FrozenTeacher(network(), minimum_accuracy=0.0))
    trainer = make_trainer(max_steps=1, callbacks=[RunSummary()], logger=RunLogger(tmp_path))
    with caplog.at_level("INFO"):
        trainer.fit(module, datamodule=held_out())
    assert "distillation.logits: student_float, the float network that the student starts from, is among" in caplog.text
    believed = module.trust["logits"]["believed"]
    assert believed["student_float"] > 0.8
    assert believed["teacher weak"] < 0.05
    assert [*module.judged] == ["teacher weak"]  # it is no teacher of the user's that has to be good
    assert not [name for name in module.state_dict() if "student_float" in name]
    assert load_file(tmp_path / "student.safetensors").keys() == module.student.state_dict().keys()


@pytest.mark.parametrize("own", [None, False])
def test_a_teacher_that_is_too_sure_says_what_is_believed_of_it_in_logits_of_the_students_size(
    make_trainer: MakeTrainer, own: bool | None
) -> None:
    """Without such a network it keeps that of the teacher."""
    sure = trained_teacher(ORDER)
    with torch.no_grad():
        for parameter in sure.network.linear.parameters():
            parameter.mul_(10)
    module = trusting(weights=STUDENT, own=own, sure=sure)
    make_trainer(max_steps=1).fit(module, datamodule=held_out())
    data = held_out()
    data.setup("fit")
    (images, _, *_), *_ = data.trust_batches(torch.device("cpu"))
    with torch.no_grad():
        said = torch.stack([teacher(images) for teacher in module.named_teachers.values()])
        believed = module.distillation["logits"].combination.map(said)
    size = (believed.std(1).mean() / said.std(2).mean(1)).tolist()  # of its logits, over that of each
    assert size == pytest.approx([0.1, 1.0] if own is None else [1.0], rel=0.2)


def test_the_float_network_is_one_for_all_terms_and_a_teacher_that_is_it_already_serves() -> None:
    student = CifarResNet(8, num_classes=10, width=8, in_channels=1)
    load_weights(student, STUDENT)
    twice = {name: Term(HintonKL(), "large", "trust") for name in ("a", "b")}
    for further, called in (({}, "student_float"), ({"same": FrozenTeacher(student)}, "same")):
        terms = twice | ({"c": Term(HintonKL(), "same")} if further else {})
        module = DistillModule(
            student=CifarResNet(8, num_classes=10, width=8, in_channels=1),
            student_weights=STUDENT,
            teachers={"large": trained_teacher()} | further,
            distillation=terms,
        )
        assert module.own_joined == {"a": called, "b": called}
        assert [*module.named_teachers] == ["large", called]
        assert module.named_teachers[called].network is not module.student


@pytest.mark.parametrize(
    ("weights", "own", "joins"),
    [(STUDENT, None, True), (STUDENT, False, False), (None, None, False), (None, True, True)],
)
def test_the_float_network_joins_where_it_has_weights_or_is_asked_to(
    weights: str | None, own: bool | None, joins: bool
) -> None:
    assert ("student_float" in trusting(weights=weights, own=own).distillation["logits"].teachers) == joins


def test_a_term_that_no_held_out_rows_judge_cannot_ask_for_the_float_network() -> None:
    with pytest.raises(UsageError, match=r"own=True of distillation logits .* combination='mean'"):
        trusting("mean", own=True, a=trained_teacher(), b=trained_teacher())


def test_an_ensemble_asks_for_the_float_network_in_terms_that_held_out_rows_judge_alone() -> None:
    def make(**terms: Term) -> DistillModule:
        pair = TeacherEnsemble([trained_teacher(), trained_teacher(ORDER)], "mean", own=True)
        return DistillModule(student=network(), teacher=pair, distillation=terms)

    assert [*make(a=Term(HintonKL()), b=Term(HintonKL(), combination="trust")).own_joined] == ["b"]
    with pytest.raises(UsageError, match="own=True of the ensemble is not possible with combination='mean': it is of"):
        make(a=Term(HintonKL()))


def test_a_student_without_a_float_network_and_a_taken_name_are_refused() -> None:
    quantised, _ = quantize_model(network(), Recipe(bits="w4a4"))
    term = Term(HintonKL(), "large", "trust", own=True)
    with pytest.raises(UsageError, match="own=True of distillation a is not possible: the student was given quantised"):
        DistillModule(student=quantised, teachers={"large": trained_teacher()}, distillation={"a": term})
    with pytest.raises(UsageError, match=r"teachers.student_float is not possible: .* give the teacher another"):
        trusting(weights=STUDENT, student_float=trained_teacher())


def test_a_teacher_of_the_users_that_is_the_float_network_must_be_good_whatever_it_is_called() -> None:
    student = CifarResNet(8, num_classes=10, width=8, in_channels=1)
    load_weights(student, STUDENT)
    module = DistillModule(
        student=CifarResNet(8, num_classes=10, width=8, in_channels=1),
        student_weights=STUDENT,
        teachers={"large": trained_teacher(), "student_float": FrozenTeacher(student, minimum_accuracy=0.5)},
        distillation={"a": Term(HintonKL(), "large", "trust"), "b": Term(HintonKL(), "student_float")},
    )
    assert module.own_joined == {"a": "student_float"}
    assert len(module.judged) == 2


def test_a_checkpoint_without_the_float_network_among_the_teachers_goes_on_without_it(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """As all had that are older than it; it is taken away on the way to the checkpoint's own map."""
    before, after = trusting(weights=STUDENT, own=False), trusting(weights=STUDENT)
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(before, datamodule=held_out())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    trainer = make_trainer(limit_train_batches=1, max_epochs=2)
    trainer.fit(after, datamodule=held_out(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [*after.named_teachers] == ["large"]
    assert after.trust == before.trust
    assert trainer.global_step == 2


def test_what_was_learned_of_the_float_network_is_not_taken_for_another_teacher(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """A checkpoint of a teacher and the float network, for two teachers and it: as many as without it, but others."""
    before = trusting(weights=STUDENT, large=trained_teacher())
    after = trusting(weights=STUDENT, large=trained_teacher(), new=trained_teacher(ORDER))
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(before, datamodule=held_out())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    with pytest.raises(UsageError, match=r"distillation\.logits\.combination\.map"):
        make_trainer(max_epochs=2).fit(
            after, datamodule=held_out(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


@pytest.mark.parametrize("own", [None, True])
def test_a_float_network_that_knows_held_out_rows_by_heart_does_not_take_over_from_a_better_teacher(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, tmp_path: Path, own: bool | None
) -> None:
    def make() -> DistillModule:
        student = nn.Sequential(remembering_teacher().network, nn.Linear(10, 10, bias=False))
        with torch.no_grad():
            student[1].weight.copy_(torch.eye(10))
        torch.save(student.state_dict(), tmp_path / "student.pt")
        large = trained_teacher()
        with torch.no_grad():
            cast(CifarResNet, large.network).linear.bias[0] += 4.5  # errs on more than one of a hundred rows
        return DistillModule(
            student=student,
            student_weights=str(tmp_path / "student.pt"),
            quantization=Recipe(bits="w8a8", first_layer_bits=None, last_layer_bits=None),
            teachers={"large": large},
            distillation={"logits": Term(HintonKL(), "large", "trust", own=own)},
            teacher_cache=TeacherCache(str(tmp_path / "cache"), dtype="float32"),
        )

    module, resumed = make(), make()
    trainer = make_trainer(limit_train_batches=1)
    with caplog.at_level("INFO"):
        trainer.fit(module, datamodule=held_out())
    told = "logits: student_float knows its training rows by heart (right on 100.0% of held-out rows"
    assert (told in caplog.text and "it is left out (own: true keeps it)" in caplog.text) == (own is None)
    found = module.trust["logits"]
    assert set(found["believed"]) == {"teacher large"} | ({"student_float"} if own else set())
    assert found["memorised"] == bool(own)  # an honest teacher keeps its temperature and forms
    assert [*module.named_teachers] == ["large"] + ["student_float"] * bool(own)
    assert (found["believed"]["teacher large"] > 0.8) == (own is None)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    trainer = make_trainer(limit_train_batches=1, max_epochs=2)
    trainer.fit(resumed, datamodule=held_out(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.trust == module.trust


def test_a_teacher_that_knows_its_rows_by_heart_keeps_its_temperature_and_is_told(make_trainer: MakeTrainer) -> None:
    module = trusting("calibrated", large=remembering_teacher())
    make_trainer(max_steps=1).fit(module, datamodule=held_out())
    assert any("teacher large knows its training rows by heart" in warning for warning in module.warnings)
    assert module.trust["logits"]["memorised"]
    assert "these rows do not say how sure teachers may be" in module.trust["logits"]["sentence"]


def test_teachers_that_hardly_err_on_held_out_and_validation_rows_keep_their_temperature_and_are_told(
    make_trainer: MakeTrainer,
) -> None:
    data = held_out(eval_batch_size=300)
    data.setup("fit")
    unseen = (data.preprocess(batch, train=False, epoch=0) for batch in data.val_dataloader())
    every = [*data.trust_batches(torch.device("cpu")), *unseen]
    images, labels = (torch.cat([getattr(batch, what) for batch in every]) for what in ("images", "labels"))
    public = FrozenTeacher(Remembering(images, labels), minimum_accuracy=0.0, precision="fp32")
    module = trusting("calibrated", large=public)
    make_trainer(max_steps=1).fit(module, datamodule=data)
    assert "teacher large is right on 100.0% of held-out rows" in module.warnings[0]
    assert module.trust["logits"]["memorised"]


def test_an_ensemble_of_the_short_form_can_be_trusted(make_trainer: MakeTrainer) -> None:
    pair = [trained_teacher(), trained_teacher(ORDER)]
    module = distiller(teacher=TeacherEnsemble(pair, "calibrated"), distillation_loss=HintonKL())
    make_trainer(max_steps=1).fit(module, datamodule=held_out())
    assert set(module.trust["distill"]["believed"]) == {"teacher 1", "teacher 2"}
    assert module.trust["distill"]["worth"] > 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (digits(), r"distillation.logits: .* set data.init_args.trust_fraction"),
        (held_out(trust_fraction=0.01), r"distillation.logits: 4 held-out rows with a label are too few"),
        (held_out(trust_fraction=0.0001), r"trust_fraction=0.0001 holds out 0 of 412"),
    ],
)
def test_too_few_held_out_rows_are_refused_before_the_first_batch(
    make_trainer: MakeTrainer, data: Digits, message: str
) -> None:
    steps = Recorder(lambda *_: None)
    with pytest.raises(UsageError, match=message):
        make_trainer(callbacks=[steps]).fit(trusting(), datamodule=data)
    assert not steps.seen


def test_features_cannot_be_trusted_by_labels() -> None:
    with pytest.raises(UsageError, match="combination='trust' is not possible with distillation_loss Hints"):
        Term(Hints(), "own", "trust", [Tap("layer1", "layer1")])


def write_squares(folder: Path, count: int = 64) -> None:
    """Pictures of 16 x 16 pixels: a square of one class on a ground of another, red, green or blue, and noise."""
    draw = np.random.default_rng(0)
    for number in range(count):
        mask = np.full((16, 16), number % 3, dtype=np.uint8)
        mask[4:12, 4:12] = (number // 3) % 3
        pixels = 60 + 120 * np.eye(3)[mask] + 20 * draw.standard_normal((16, 16, 3))
        for kind, values in (("images", pixels.clip(0, 255).astype(np.uint8)), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / kind / f"{number}.png")


@pytest.mark.parametrize(
    ("order", "read_as"),
    [([2, 0, 1], {"red": "blue", "green": "red", "blue": "green"}), ([0, 1, 2], {})],
)
def test_pixels_of_one_image_are_left_out_together_and_tell_what_classes_are_called(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    order: list[int],
    read_as: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        import_module("lqkd.losses.trust.memorised"), "_SELDOM", 0.1
    )  # of the pixels of an identity 4 % are wrong
    write_squares(tmp_path / "pairs")
    data = SegmentationFolder(
        root=str(tmp_path / "pairs"),
        classes=("red", "green", "blue"),
        image_size=(16, 16),
        batch_size=5,
        num_workers=0,
        trust_fraction=0.6,
    )
    knows = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        knows.weight.copy_(2 * torch.eye(3)[order].view(3, 3, 1, 1))
    student = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    module = DistillModule(
        student=student,
        quantization=Recipe(bits="w4a4"),
        teachers={"large": FrozenTeacher(knows, minimum_accuracy=0.0)},
        distillation={"pixels": Term(HintonKL(), "large", "calibrated")},
        task=Segmentation(3),
    )
    make_trainer(max_steps=2).fit(module, datamodule=data)
    found = module.trust["pixels"]
    images = len(data.trust_indices)
    assert images >= 20
    assert found["rows"] == 64 * images
    assert found["read_as"]["teacher large"] == read_as
    assert not found["memorised"]  # of pixels nearly all are easy, and still many are wrong
    data.write_split(tmp_path / "split.csv")
    assert (tmp_path / "split.csv").read_text().count("trust,") == images


def test_single_pixels_are_not_asked_about() -> None:
    term = Term(HintonKL(), "large", "trust", regularizer=HeldOutInterpolation())
    with pytest.raises(UsageError, match=r"distillation.a: .* of which task Segmentation has several a sample"):
        DistillModule(
            student=network(),
            teachers={"large": FrozenTeacher(network())},
            distillation={"a": term},
            task=Segmentation(10),
        )


def test_a_share_of_all_rows_is_refused() -> None:
    with pytest.raises(UsageError, match=r"trust_fraction=1.0 is not accepted"):
        Digits(trust_fraction=1.0)
