"""A regularizer that labels of held-out rows teach how far teachers are believed against the student."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from lqkd.callbacks import RegularizerMonitor
from lqkd.data import Batch, Digits
from lqkd.errors import UsageError
from lqkd.losses import HintonKL, Hints, LogitResidual
from lqkd.losses.base import MapKind
from lqkd.losses.trust import TrustMap
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule, Tap, Term
from lqkd.modules.term import DistillationTerm
from lqkd.quantization import Recipe
from lqkd.regularizers import ElementwiseMLP, HeldOut, HeldOutInterpolation
from lqkd.runs import BestAndLast, RunLogger
from lqkd.runs.summary import RunSummary
from lqkd.tasks import Classification, Rows
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache
from tests.conftest import network, parameters_of
from tests.integration.test_exact_resume import StopAt
from tests.integration.test_trust import ORDER, STUDENT, Marked, held_out, trained_teacher
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]


def believing(
    teacher: FrozenTeacher | None = None, weights: str | None = None, lr: float = 1e-3, **settings: Any
) -> DistillModule:
    """A module whose student, which knows digits where it has weights, is taught as far as held-out rows say."""
    torch.manual_seed(0)
    regularizer = HeldOutInterpolation(**{"rows": 32, "every": 3} | settings)
    return DistillModule(
        student=CifarResNet(8, num_classes=10, width=8, in_channels=1),
        student_weights=weights,
        quantization=Recipe(bits="w4a4"),
        teachers={"large": teacher or trained_teacher(ORDER)},
        distillation={"logits": Term(HintonKL(), "large", "calibrated", regularizer=regularizer, own=False)},
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        regularizer_optimizer=lambda p: torch.optim.Adam(p, lr=lr),
    )


@pytest.mark.parametrize("of", ["sample", "auto"])
def test_held_out_rows_are_seen_without_a_gradient_and_leave_no_trace_in_the_student(
    make_trainer: MakeTrainer, of: str
) -> None:
    module = believing(of=of)
    seen: list[tuple[Tensor, bool, bool]] = []

    def look(student: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((arguments[0][:, 0, 0, 0], output.requires_grad, student.training))

    module.student.register_forward_hook(look)
    make_trainer(max_epochs=2).fit(module, datamodule=held_out(Marked))
    white = torch.cat([corner for corner, *_ in seen]).max()
    assert all(bool((corner < white).all()) for corner, trained, _ in seen if trained)
    asked = [(corner, training) for corner, trained, training in seen if bool((corner == white).any())]
    assert (
        sum(len(corner) for corner, _ in asked)
        == 300 + 300 + 4 * 32 + 2 * 60 + 300  # check, first, every third of 14 batches, ...
    )  # first, every third of 14 batches, epochs, last
    assert not any(training for _, training in asked)


@pytest.mark.parametrize("of", ["sample", "auto"])
def test_a_resumed_training_learns_on_where_it_was(make_trainer: MakeTrainer, tmp_path: Path, of: str) -> None:
    def run(folder: Path, stop: tuple[int, int] | None = None) -> DistillModule:
        module = believing(of=of)
        last = folder / "last.ckpt"
        callbacks: list[Any] = [BestAndLast(folder, every_n_steps=1)] + ([StopAt(*stop)] if stop else [])
        trainer = make_trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True, logger=RunLogger(folder))
        trainer.fit(module, datamodule=held_out(), ckpt_path=last if last.exists() else None, weights_only=True)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", (1, 1))  # between two times that the student is asked
    resumed = run(tmp_path / "cut")
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert resumed.trust == whole.trust


def test_a_checkpoint_that_is_saved_after_a_training_is_resumed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module, resumed = believing(), believing()
    trainer = make_trainer(limit_train_batches=1)
    trainer.fit(module, datamodule=held_out())
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    trainer = make_trainer(limit_train_batches=1, max_epochs=2)
    trainer.fit(resumed, datamodule=held_out(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 2
    assert resumed.known_of_held_out["logits"].batches == 2


def test_answers_of_teachers_from_the_cache_teach_the_same(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    live, cached = believing(), believing()
    cached.teacher_cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    for module in (live, cached):
        torch.manual_seed(0)
        make_trainer().fit(module, datamodule=held_out())
    assert torch.equal(parameters_of(live), parameters_of(cached))
    assert live.trust == cached.trust


@pytest.mark.parametrize(("of", "most", "worse"), [("sample", 0.5, 0.02), ("auto", 0.02, 0.002)])
def test_trust_falls_where_the_student_knows_more_than_its_teacher_and_the_summary_says_so(
    make_trainer: MakeTrainer, tmp_path: Path, of: str, most: float, worse: float
) -> None:
    torch.manual_seed(5)
    module = believing(FrozenTeacher(network(), minimum_accuracy=0.0, precision="fp32"), STUDENT, lr=0.05, of=of)
    callbacks = [RegularizerMonitor(), RunSummary()]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, logger=RunLogger(tmp_path))
    trainer.fit(module, datamodule=held_out())
    found = module.trust["logits"]["interpolation"]
    assert found.get("weight_of") == ("all" if of == "auto" else None)
    assert found["believed"] < most
    assert found["loss"] < found["loss_of_teachers"] - 0.1
    assert found["loss"] < found["loss_of_student"] + worse
    assert found["accuracy"] > found["accuracy_of_teachers"] + 0.3
    assert f"{100 * (found['accuracy'] - found['accuracy_of_teachers']):+.1f} over the teachers" in found["sentence"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    told = f"logits: {found['sentence']}."
    assert summary["regularizer"]["logits"]["verdict"] == "believed"
    assert summary["regularizer"]["logits"]["sentence"] == told
    assert "over the student alone" in told
    assert not [warning for warning in summary["warnings"] if "regularizer" in warning]
    tables = tmp_path / "regularizer" / "logits"
    (*_, last) = (line.split(",") for line in (tables / "trust.csv").read_text().splitlines() if "believed" in line)
    assert last[0] == "2"  # of every epoch
    assert float(last[2]) < 0.6
    assert "student 0.9" in (tables / "reliability.csv").read_text()
    logged = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "trust/logits/believed" in logged
    assert "trust/logits/loss_of_student" in logged


def test_what_is_told_and_learned_is_of_the_student_as_it_is(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """As it is now for what is told; for what is learned from, of the last four times that it was asked."""
    module, data = believing(rows=16, every=1, lr=0.05), held_out(limit_train=900, eval_batch_size=1024)
    expected: list[float] = []
    learned: list[int] = []

    class Ask(Recorder):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            rows = pl_module.held_out.get("logits")
            if rows is not None and rows.known.batches:
                known = rows.known.part(slice(None, None, 5))
                at = {position: place for place, position in enumerate(known.positions.tolist())}
                (batch,) = data.trust_batches(pl_module.device)
                pl_module.student.eval()
                with torch.no_grad():
                    said = pl_module.student(batch.images[[*at]])
                pl_module.student.train()
                expected.append(float(F.cross_entropy(said, known.labels)))
                learned.append(len(rows._window[1]))

    trainer = make_trainer(max_epochs=2, callbacks=[Ask(lambda *_: None)], logger=RunLogger(tmp_path))
    trainer.fit(module, datamodule=data)
    with open(tmp_path / "metrics.csv", newline="") as stream:
        told = [row["trust/logits/loss_of_student"] for row in csv.DictReader(stream)]
    assert [float(value) for value in told if value] == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[1]) > 0.05
    assert max(learned) <= 4 * 16
    held = len(data.trust_indices)
    assert held > 512  # more than are asked about at first
    assert module.trust["logits"]["interpolation"]["rows"] == -(-held // 5)


def test_a_good_teacher_is_believed(make_trainer: MakeTrainer) -> None:
    module = believing(lr=0.02)
    make_trainer(max_epochs=2).fit(module, datamodule=held_out())
    found = module.trust["logits"]["interpolation"]
    assert found["believed"] > 0.88
    assert found["loss"] < found["loss_of_student"] - 0.3
    assert found["rows"] == 60


def test_a_fifth_of_the_rows_is_never_learned_from_and_no_target_knows_its_label(make_trainer: MakeTrainer) -> None:
    found: list[dict[str, float]] = []

    def look(trainer: Trainer, module: DistillModule) -> None:
        rows = module.held_out["logits"]
        known, losses = rows.known, {"all": float(rows.objective())}
        for name, some in (("a judged one", 0), ("another", 1)):
            known.labels[some::5] = (known.labels[some::5] + 1) % 10
            rows._look()
            losses[name] = float(rows.objective())
            known.labels[some::5] = (known.labels[some::5] - 1) % 10
        loss_of_target = float(F.nll_loss(known.target, known.labels))
        found.append(losses | {"target": loss_of_target, "expected": module.trust["logits"]["cross_entropy"]})

    make_trainer(max_steps=1, callbacks=[Recorder(look)]).fit(believing(), datamodule=held_out())
    (losses,) = found
    assert losses["a judged one"] == losses["all"]
    assert losses["another"] > losses["all"] + 0.1
    assert losses["target"] == pytest.approx(losses["expected"], rel=1e-3)  # by cross-validation


def test_rows_whose_label_is_rather_wrong_than_right_teach_nothing(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrustMap, "doubted", lambda self, teachers, labels: labels == 3)
    known: list[Tensor] = []
    look = Recorder(lambda trainer, module: known.append(module.held_out["logits"].known.labels))
    make_trainer(max_steps=1, callbacks=[look]).fit(believing(), datamodule=held_out())
    assert sorted(set(known[0].tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("kind", ["samples", "scalar"])
def test_trust_is_told_of_maps_without_classes_too(kind: MapKind) -> None:
    class Squares(LogitResidual):
        def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
            squares = super().forward(teacher, student, labels)
            return squares.mean(1) if kind == "samples" else squares.mean()

    Squares.kind = kind
    term = DistillationTerm(Term(Squares(), "a", "trust", regularizer=HeldOutInterpolation(of="class")))
    term.connect([(1, 10)], [(1, 10)])
    divergences = term([torch.randn(8, 10)], Rows(torch.randn(8, 10), torch.arange(8)), ({}, {}))
    (of_map,) = divergences.maps
    assert of_map.weights is not None
    assert of_map.weights.shape == of_map.divergence.shape
    torch.testing.assert_close(of_map.weights, torch.full_like(of_map.weights, 0.88))


def test_the_student_is_compared_with_what_lies_between_and_weights_are_no_factor(make_trainer: MakeTrainer) -> None:
    module = believing(of="all")
    make_trainer(max_steps=1).fit(module, datamodule=held_out())
    term = module.distillation["logits"]
    student, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    teacher = torch.randn(8, 10)
    divergences = term([teacher], Rows(student, labels), ({}, {}))
    believed = term.combination(teacher[None], labels)[0][0]
    target, weights = term.interpolation.between(believed, student)
    expected = HintonKL()(target, student, labels)
    assert torch.equal(divergences.maps[0].divergence, expected)
    assert torch.equal(term.reduce(divergences.maps), HintonKL().reduce(expected))
    assert 0 < float(weights.mean()) < 1
    assert term.objective(divergences.maps) is None


def test_distillation_ends_where_the_student_is_believed_also_of_a_loss_that_sees_a_shift_of_logits() -> None:
    loss = LogitResidual()
    term = DistillationTerm(Term(loss, "a", "trust", regularizer=HeldOutInterpolation(of="all", start=1e-7)))
    term.connect([(1, 10)], [(1, 10)])
    student = (5 + torch.randn(8, 10)).requires_grad_()
    divergences = term([torch.randn(8, 10)], Rows(student, torch.arange(8)), ({}, {}))
    term.reduce(divergences.maps).backward()
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: believing(rows=0), "rows=0 of HeldOutInterpolation is not possible: it must be a whole number"),
        (lambda: believing(every=2.5), "every=2.5 of HeldOutInterpolation is not possible: it must be a whole number"),
        (
            lambda: believing(of="auto", hidden=8),
            "hidden=8 of HeldOutInterpolation is not possible with of='auto', which",
        ),
        (lambda: believing(strength=float("inf")), "strength=inf is not possible: it must be a finite number"),
        (
            lambda: DistillModule(
                student=network(),
                teachers={"a": FrozenTeacher(network())},
                distillation={"x": Term(HintonKL(), "a", "trust", regularizer=ElementwiseMLP(player=HeldOut()))},
            ),
            "distillation.x: player HeldOut is not possible with regularizer ElementwiseMLP: it belongs to Held",
        ),
        (lambda: believing(of="teacher"), "of='teacher' of HeldOutInterpolation is unknown: use all, class, sample, a"),
        (
            lambda: DistillModule(
                student=network(),
                teachers={"a": FrozenTeacher(network())},
                distillation={"x": Term(HintonKL(), "a", regularizer=HeldOutInterpolation())},
            ),
            "distillation.x: regularizer HeldOutInterpolation is not possible with combination='mean'",
        ),
        (
            lambda: DistillModule(
                student=network(),
                teachers={"a": FrozenTeacher(network())},
                distillation={
                    "x": Term(Hints(), "a", taps=[Tap("layer1", "layer1")], regularizer=HeldOutInterpolation())
                },
            ),
            "distillation.x: regularizer HeldOutInterpolation is not possible",
        ),
    ],
)
def test_what_cannot_be_learned_from_held_out_rows_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


class Opaque:
    """A batch into which nobody can look."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


class Looking(Classification):
    def samples(self, batch: Any) -> Any:
        if isinstance(batch, Opaque):
            batch = batch.batch
        if type(batch) is tuple:
            batch = (torch.stack(batch[0]) if isinstance(batch[0], list) else batch[0], batch[1])
        return super().samples(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda batch, time: batch._replace(labels=batch.labels.roll(time)),
            "trust_batches gave other rows, or another",
        ),
        (lambda batch, time: Opaque(batch), "batches of trust_batches must be tensors with the samples in front"),
        (lambda batch, time: (batch.images, batch.labels, [str(i) for i in batch.indices]), "must be tensors"),
        (
            lambda batch, time: ([*batch.images], batch.labels),
            r"must be tensors .* \(the labels of a batch of 100 are",
        ),
    ],
)
def test_rows_that_are_not_those_that_teachers_answered_are_refused_before_the_first_step(
    make_trainer: MakeTrainer, change: Callable[[Batch, int], Any], message: str
) -> None:
    times: list[int] = []

    class Changed(Digits):
        def trust_batches(self, device: torch.device) -> Any:
            times.append(len(times))
            return (change(batch, len(times)) for batch in super().trust_batches(device))

    module, steps = believing(), Recorder(lambda *_: None)
    module.task = module.passes._task = Looking()
    with pytest.raises(UsageError, match=f"distillation.logits: .*{message}"):
        make_trainer(callbacks=[steps]).fit(module, datamodule=held_out(Changed, eval_batch_size=128))
    assert not steps.seen


def test_held_out_rows_without_labels_are_refused_before_the_first_batch(make_trainer: MakeTrainer) -> None:
    class Unlabelled(Digits):
        def setup(self, stage: str | None = None) -> None:
            super().setup(stage)
            self._loaded().train_labels[self.trust_indices] = -1

    with pytest.raises(UsageError, match=r"distillation.logits: 0 held-out rows with a label are too few"):
        make_trainer().fit(believing(), datamodule=held_out(Unlabelled))
