"""Distillation in named terms: several losses from several teachers in one training."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lqkd.balances import FixedBalance, UncertaintyBalance
from lqkd.callbacks import RegularizerMonitor
from lqkd.errors import UsageError
from lqkd.losses import RKD, HintonKL, Hints, LogitResidual
from lqkd.modules import DistillModule, Tap, Term
from lqkd.quantization import Recipe
from lqkd.regularizers import ElementwiseMLP, LearnableTable, SampleWeight
from lqkd.runs.logger import RunLogger
from lqkd.runs.verdicts import verdicts
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, distiller, network, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
LOSSES = ("task", "logits", "features", "relations")


def teachers() -> dict[str, FrozenTeacher]:
    torch.manual_seed(1)
    return {name: FrozenTeacher(network(depth), minimum_accuracy=0.0) for name, depth in (("large", 14), ("own", 8))}


def three_terms() -> dict[str, Term]:
    return {
        "logits": Term(HintonKL(), "large", regularizer=SampleWeight()),
        "features": Term(
            Hints(), "own", taps=[Tap("layer1", "layer1"), Tap("layer2", "layer2")], regularizer=LearnableTable()
        ),
        "relations": Term(RKD(), "large", taps=[Tap("layer3", "layer3")]),
    }


def of_terms(terms: dict[str, Term] | None = None, **arguments: Any) -> DistillModule:
    """A module with three terms of two teachers, but for what the arguments replace."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "student": network(),
        "quantization": Recipe(bits="w4a4"),
        "teachers": teachers(),
        "distillation": terms or three_terms(),
        "balance": UncertaintyBalance(),
        "student_optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    }
    return DistillModule(**(defaults | arguments))


def losses_of(make: MakeTrainer, module: DistillModule, **settings: Any) -> list[float]:
    """The loss after each of seven batches."""
    recorder = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
    make(callbacks=[recorder], **settings).fit(module, datamodule=digits())
    return recorder.seen


def test_a_teacher_answers_once_a_batch_for_all_of_its_terms_and_every_loss_is_logged(
    make_trainer: MakeTrainer,
) -> None:
    module = of_terms()
    calls = dict.fromkeys(module.named_teachers, 0)

    def counting(name: str) -> Callable[..., None]:
        def count(*call: Any) -> None:
            calls[name] += 1

        return count

    for name, teacher in module.named_teachers.items():
        teacher.register_forward_hook(counting(name))
    seen = Recorder(lambda trainer, module: dict(trainer.callback_metrics))
    counts = Recorder(lambda trainer, module: dict(calls))
    make_trainer(callbacks=[seen, counts]).fit(module, datamodule=digits())
    first, *_, last = counts.seen  # the first batch comes after what is measured of teachers
    assert {name: last[name] - first[name] for name in calls} == {"large": 6, "own": 6}
    assert {f"{kind}/{name}" for kind in ("train", "balance") for name in LOSSES} <= set(seen.seen[-1])
    weighted = sum(seen.seen[0][f"balance/{name}"] * seen.seen[0][f"train/{name}"] for name in LOSSES)
    assert float(seen.seen[0]["train/loss"]) > float(weighted)  # which has the objectives as well


def test_one_named_term_gives_the_numbers_of_the_short_form(make_trainer: MakeTrainer) -> None:
    parts = {"quantization": Recipe(bits="w4a4")}
    torch.manual_seed(3)
    teacher = FrozenTeacher(network(14), minimum_accuracy=0.0)
    short = distiller(teacher=teacher, regularizer=ElementwiseMLP(hidden=8), **parts)
    named = distiller(
        teacher=None,
        regularizer=None,
        teachers={"one": FrozenTeacher(teacher.network, minimum_accuracy=0.0)},
        distillation={"logits": Term(LogitResidual(), "one", regularizer=ElementwiseMLP(hidden=8))},
        **parts,
    )
    named.distillation["logits"].regularizers.load_state_dict(short.distillation["distill"].regularizers.state_dict())
    assert losses_of(make_trainer, named) == losses_of(make_trainer, short)
    assert torch.equal(parameters_of(named), parameters_of(short))


def test_a_weight_multiplies_its_term_alone(make_trainer: MakeTrainer) -> None:
    def first(weight: float) -> dict[str, float]:
        terms = three_terms()
        terms["features"] = Term(Hints(), "own", taps=[Tap("layer1", "layer1")], weight=weight)
        seen = Recorder(lambda trainer, module: {n: float(trainer.callback_metrics[f"train/{n}"]) for n in LOSSES})
        make_trainer(callbacks=[seen], max_steps=1).fit(of_terms(terms), datamodule=digits())
        return seen.seen[0]

    one, ten = first(1.0), first(10.0)
    assert ten.pop("features") == pytest.approx(10 * one.pop("features"), rel=1e-6)
    assert ten == one


def test_answers_from_the_cache_give_the_numbers_of_live_teachers(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
    live = losses_of(make_trainer, of_terms())
    assert losses_of(make_trainer, of_terms(teacher_cache=cache)) == live
    replay = of_terms(teacher_cache=cache)
    asked = Recorder(lambda trainer, module: module.passes.cache.asked)
    make_trainer(callbacks=[asked]).fit(replay, datamodule=digits())
    assert asked.seen[-1] == 0


def test_every_table_and_verdict_is_by_term(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = RegularizerMonitor()
    make_trainer(callbacks=[monitor], logger=RunLogger(tmp_path)).fit(of_terms(), datamodule=digits())
    folder = tmp_path / "regularizer"
    assert {path.parent.name for path in folder.rglob("weights.csv")} == {"logits", "features"}
    with open(folder / "step_length.csv", newline="") as stream:
        rows = {row["bin"]: float(row["value"]) for row in csv.DictReader(stream)}
    assert set(rows) == {*LOSSES, "total"}
    assert rows["total"] <= sum(rows[name] for name in LOSSES) * (1 + 1e-6)
    summary = monitor.summary()
    told = verdicts({"regularizer": summary})
    assert set(told) == {"logits", "features"}
    assert all(of_term.sentence.startswith(f"{name}: ") for name, of_term in told.items())
    resumed = RegularizerMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.summary() == summary


@pytest.mark.parametrize("scale", ["task", "unit"])
def test_the_students_gradient_gets_the_length_that_the_balance_asks_for(make_trainer: MakeTrainer, scale: str) -> None:
    def lengths(balance: FixedBalance) -> list[float]:
        found: list[float] = []

        class Measuring(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                found.append(float(torch.cat([p.grad.flatten() for p in student if p.grad is not None]).norm()))
                return super().step(closure)

        module = of_terms(balance=balance, student_optimizer=lambda p: Measuring(p, lr=1e-8), accumulate_grad_batches=2)
        student = [*module.student.parameters()]
        make_trainer().fit(module, datamodule=digits())
        return found

    scaled = lengths(FixedBalance(distill=3.0, gradient_scale=scale))  # type: ignore[arg-type]
    wanted = lengths(FixedBalance(distill=0.0)) if scale == "task" else [1.0] * 4
    assert scaled == pytest.approx(wanted, rel=1e-3)


def test_a_checkpoint_from_before_terms_had_names_loads() -> None:
    module = distiller(
        teacher=TeacherEnsemble([*teachers().values()], "learned"),
    )
    state = module.state_dict()
    earlier = {key.replace("distillation.distill.combination", "combination"): value for key, value in state.items()}
    earlier = {key.replace("distillation.distill.", "distillation."): value for key, value in earlier.items()}
    assert "combination.scores" in earlier
    module.load_state_dict(earlier)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teachers": None}, "there is no teacher"),
        ({"student": None}, "there is no student"),
        ({"teacher": FrozenTeacher(network())}, "teacher and teachers cannot both be given"),
        ({"distillation": None}, r"teachers \(large, own\) need terms"),
        ({"distillation": {}}, "distillation names no term"),
        ({"regularizer": SampleWeight()}, "regularizer is not possible beside distillation"),
        ({"distillation": {"a": Term(HintonKL())}}, "distillation.a has no teacher: name one of large, own"),
        ({"distillation": {"a": Term(HintonKL(), "lrage")}}, "'lrage' is not among the teachers: there are large, own"),
        ({"distillation": {"a": Term(HintonKL(), "large")}}, "teachers.own serves no term"),
        ({"distillation": {"task": Term(HintonKL(), ["large", "own"])}}, "distillation.task is not possible"),
        ({"distillation": {"total": Term(HintonKL(), ["large", "own"])}}, "distillation.total is not possible"),
        ({"distillation": {1: Term(HintonKL(), ["large", "own"])}}, "distillation.1 is not possible"),
        ({"distillation": {"a.b": Term(HintonKL(), ["large", "own"])}}, "distillation.a.b is not possible"),
        ({"distillation": {"items": Term(HintonKL(), ["large", "own"])}}, "distillation.items is not possible"),
        ({"distillation": {"a": Term(HintonKL(), ["own", "own"])}}, "names a teacher twice"),
        ({"distillation": {"a": Term(HintonKL(), "own", "learned")}}, "combination='learned' is of several teachers"),
        ({"distillation": {"a": Term(Hints(), ["large", "own"])}}, "distillation.a: .* several teachers"),
        ({"balance": FixedBalance(terms={"hints": 2.0})}, "terms.hints is the weight of no distillation loss"),
    ],
)
def test_terms_and_teachers_that_do_not_go_together_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        of_terms(**arguments) if "distillation" not in arguments else DistillModule(
            student=network(), teachers=teachers(), **arguments
        )


def test_a_term_of_an_ensemble_hears_its_teachers_as_the_ensemble_says() -> None:
    ensemble = TeacherEnsemble([*teachers().values()], "learned")
    terms = {"own": Term(HintonKL(), combination="separate"), "its": Term(HintonKL())}
    module = distiller(teacher=ensemble, regularizer=None, distillation=terms)
    of = {name: type(term.combination).__name__ for name, term in module.distillation.terms()}
    assert of == {"own": "SeparateTeachers", "its": "LearnedMixture"}


def test_a_term_has_a_weight_above_zero() -> None:
    with pytest.raises(UsageError, match=r"weight=0.0 of a distillation term"):
        Term(HintonKL(), weight=0.0)
