"""How far teachers can be believed, against scipy in float64, closed forms and teachers of known worth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.ensembles import MeanPrediction
from lqkd.losses.trust import Answers, TrustMap, forms, memorised
from lqkd.losses.trust import map as trust_map
from lqkd.losses.trust.forms import FORMS, FULL_CLASSES, RANK, Problem, directions, simplest_of_the_best, telling
from tests import found_once


@pytest.fixture(autouse=True, scope="module")
def _trust_is_found_once() -> Iterator[None]:
    """Several maps are fitted to the same rows."""
    with found_once.trust():
        yield


ORDER = torch.tensor([1, 2, 0, 3, 4, 5, 6, 7, 8, 9])


def rows(count: int, classes: int = 10, seed: int = 0, sharp: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of a teacher that knows all that can be known, and labels drawn from its predictions."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def noise(count: int, classes: int = 10, seed: int = 99) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(trusted: TrustMap, teachers: Tensor, labels: Tensor) -> float:
    return float(F.nll_loss(trusted(teachers).double(), labels))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_scipy_finds_from_the_formula(form: str) -> None:
    logits, labels = rows(150, 4)
    teachers, strength = torch.stack([logits[:, [1, 0, 2, 3]], 2 * logits + noise(150, 4)]), 2.0
    problem = Problem.of(teachers, labels, directions(teachers))
    found = problem.minimise(problem.start(form), strength)

    seen = teachers.numpy() - teachers.numpy().mean(2, keepdims=True)
    unit = math.sqrt((seen**2).mean())
    seen, parts = seen / unit, tuple(part for part in FORMS[form] if part != "order")
    sizes = {"scale": 2, "bias": 4, "diagonal": 8, "linear": 32, "gate": 12, "wrong": 4}
    p_ = np.exp(log_softmax(teachers.numpy(), axis=2))
    if (
        "order" in FORMS[form]
    ):  # of all 24 assignments, with the standard errors of the classes' counts for their own names
        called = np.stack([p_[:, labels == c].sum(1) for c in range(4)], 1) + np.diag(np.sqrt(np.bincount(labels)))
        every = [list(order) for order in permutations(range(4))]
        orders = [max(every, key=lambda order: of[range(4), order].sum()) for of in called]
        assert orders == [[1, 0, 2, 3], [0, 1, 2, 3]] == found["order"].tolist()
        seen = np.stack([of[:, order] for of, order in zip(seen, orders, strict=True)])
    top = np.sort(p_, 2)
    entropy, margin = -(p_ * np.log(p_)).sum(2) / math.log(4), top[:, :, 3] - top[:, :, 2]
    told = np.concatenate([entropy, margin, np.abs(p_[0] - p_[1]).sum(1)[None] / 4]).T
    told = np.concatenate([np.ones((150, 1)), (told - told.mean(0)) / told.std(0)], 1)

    def unpacked(flat: np.ndarray) -> dict[str, np.ndarray]:
        pieces = np.split(flat, np.cumsum([sizes[part] for part in parts])[:-1])
        return {part: pieces[parts.index(part)] if part in parts else np.zeros(sizes[part]) for part in sizes}

    def objective(flat: np.ndarray) -> float:
        p = unpacked(flat)
        if form == "gate":
            shares = log_softmax(told @ p["gate"].reshape(2, 6).T, axis=1)
            each = log_softmax((unit + p["scale"])[:, None, None] * seen, axis=2)
            z = logsumexp(each + shares.T[:, :, None], axis=0)
            return float(-z[np.arange(150), labels.numpy()].sum() + strength / 2 * (flat**2).sum())
        z = np.zeros((150, 4)) + p["bias"]
        for k in range(2):
            a = np.diag(unit / 2 + p["scale"][k] + p["diagonal"].reshape(2, 4)[k]) + p["linear"].reshape(2, 4, 4)[k]
            z = z + seen[k] @ a.T
        said = log_softmax(z, axis=1)
        if "wrong" in parts:
            rates = 0.5 / (1 + np.exp(6 - 6 * p["wrong"]))
            confusion = np.diag(1 - rates) + rates[:, None] * (1 - np.eye(4)) / 3
            said = np.log(np.exp(said) @ confusion)
        chosen = said[np.arange(150), labels.numpy()]
        return float(-chosen.sum() + strength / 2 * (flat**2).sum())

    count = sum(sizes[part] for part in parts)
    expected = minimize(objective, np.zeros(count), method="BFGS", options={"gtol": 1e-4, "maxiter": 2000}).x
    ours = torch.cat([found[part].flatten() for part in parts]).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_two_teachers_of_whom_one_is_right_with_known_probability_get_the_factors_of_the_closed_form() -> None:
    """Answers always differ. A class outside of both is right with 1 - p - q: a d = ln(p (C - 2) / (1 - p - q))."""
    classes, (p, q), margin = 5, (0.6, 0.3), 2.0
    answers, labels = [], []
    for first in range(classes):
        for second in range(classes):
            others = [c for c in range(classes) if c not in (first, second)]
            right = [first] * 18 + [second] * 9 + others if first != second else []  # 0.6, 0.3 and 0.1 of thirty
            answers += [(first, second)] * len(right)
            labels += right
    teachers = margin * F.one_hot(torch.tensor(answers).T, classes).double()
    problem = Problem.of(teachers, torch.tensor(labels), directions(teachers))
    scale = problem.minimise(problem.start("temperature"), 1e-9)["scale"] / problem.unit + 0.5
    expected = [math.log(share * (classes - 2) / (1 - p - q)) / margin for share in (p, q)]
    assert scale.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_known_temperature_is_recovered_and_as_fitted_targets_are_calibrated() -> None:
    logits, labels = rows(2000)
    trusted = TrustMap(1, 10, spread="fitted")
    report = trusted.fit(2.5 * logits[None], labels)
    assert report.form == "temperature"
    assert float(trusted.scale) == pytest.approx(1 / 2.5, rel=0.05)
    assert (trusted(2.5 * logits[None]).exp() - logits.softmax(-1)).abs().sum(1).mean() / 2 < 0.02
    assert report.worth == pytest.approx(report.of_mean - float(F.cross_entropy(logits, labels)), abs=0.02)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("count", [200, 1000])
def test_a_teacher_that_is_right_about_everything_is_left_as_it_is_within_a_percent(count: int, seed: int) -> None:
    logits, labels = rows(count, seed=seed)
    trusted = TrustMap(1, 10)
    report = trusted.fit(logits[None], labels)
    assert (trusted(logits[None]).exp() - logits.softmax(-1)).abs().sum(1).mean() / 2 < 0.01
    assert report.believed == pytest.approx([1.0], abs=0.01)


def test_another_order_of_classes_is_found_from_500_rows_and_told() -> None:
    logits, labels = rows(500, sharp=6.0)
    trusted = TrustMap(1, 10)
    report = trusted.fit(logits[:, ORDER][None], labels)
    assert report.read_as == [{0: 1, 1: 2, 2: 0}]
    assert "what large calls a is b, b is c, c is a" in report.sentence(["large"], "abcdefghij")
    fresh, its_labels = rows(2000, seed=1, sharp=6.0)
    mapped = trusted(fresh[:, ORDER][None]).argmax(1)
    best, right, as_given = (
        float((answers == its_labels).double().mean())
        for answers in (fresh.argmax(1), mapped, fresh[:, ORDER].argmax(1))
    )
    assert right > best - 0.06
    assert as_given < best - 0.2
    left_out = trusted.left_out(logits[:, ORDER][None], labels).argmax(1)
    gained = (left_out == labels).double() - (logits[:, ORDER].argmax(1) == labels).double()
    assert report.points == pytest.approx(100 * float(gained.mean()))


def test_another_order_of_classes_is_found_whole_from_100_rows_and_is_that_of_the_fit_when_a_row_is_left_out() -> None:
    logits, labels = rows(100, sharp=6.0)
    teachers = torch.stack([logits[:, ORDER], noise(100)])
    trusted = TrustMap(2, 10, spread="fitted")
    report = trusted.fit(teachers, labels)
    assert report.form == "order"
    assert report.read_as == [{0: 1, 1: 2, 2: 0}, {}]
    fresh, its_labels = rows(2000, seed=1, sharp=6.0)
    right = float((trusted(torch.stack([fresh[:, ORDER], noise(2000)])).argmax(1) == its_labels).double().mean())
    assert right > float((fresh.argmax(1) == its_labels).double().mean()) - 0.02
    said = trusted.left_out(teachers, labels)
    assert float(F.nll_loss(said, labels)) == pytest.approx(report.cross_entropy, rel=1e-4)
    matrices = trusted.matrices()
    assert matrices is not None
    assert torch.equal(matrices[0].argmax(0), ORDER)


def test_classes_that_a_teacher_has_never_seen_keep_their_names_and_of_many_classes_no_order_is_looked_for() -> None:
    logits, labels = specialists(400, 0)
    assert torch.equal(Problem.of(logits, labels, directions(logits)).order(), torch.arange(10).expand(2, 10))
    many = torch.arange(FULL_CLASSES + 1).repeat(3)
    renamed = 30 * F.one_hot(many, FULL_CLASSES + 1).double().flip(1) + noise(len(many), FULL_CLASSES + 1)
    assert "order" not in TrustMap(1, FULL_CLASSES + 1).fit(renamed[None], many).form


def test_an_order_that_is_found_in_rows_is_judged_on_others() -> None:
    """Of a teacher that knows nothing some order is right more often than by chance on the rows it was found in."""
    teacher, labels = 10 * noise(20, seed=9)[None], torch.arange(10).repeat(2)
    problem = Problem.of(teacher, labels, directions(teacher))
    assert int((problem.logits(problem.start("order")).argmax(1) == labels).sum()) == 7
    found = trust_map._cross_validated(problem, teacher, trust_map._folds(labels, 5, 0, None), ["order"])
    assert all(judged[1].sum() <= 3 for (form, _), judged in found.items() if form == "order")


def specialists(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two teachers that know one half of the classes each, say little of rows of the others, and never name those."""
    logits, labels = rows(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(count, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    of_first = (labels < 5)[:, None]
    first, second = torch.where(of_first, logits, first), torch.where(of_first, second, logits)
    first[:, 5:] -= 4
    second[:, :5] -= 4
    return torch.stack([first, second]), labels


def test_of_two_specialists_the_one_that_knows_the_sample_is_heard() -> None:
    """The mixture is the one of its formula in float64, and better on new rows than every form without a gate."""
    teachers, labels = specialists(500, seed=0)
    trusted = TrustMap(2, 10, spread="fitted")
    assert trusted.fit(teachers, labels).form == "gate"
    fresh, its_labels = specialists(4000, seed=100)
    scores = torch.cat([torch.ones(4000, 1).double(), telling(fresh)], 1) @ trusted.gate.double().T
    expected = (scores.softmax(1).T[:, :, None] * (trusted.scale[:, None, None] * fresh).softmax(2)).sum(0).log()
    torch.testing.assert_close(trusted(fresh), expected.float(), rtol=1e-4, atol=1e-4)
    resumed = TrustMap(2, 10, spread="fitted")
    resumed(fresh)  # before it is told of a gate
    resumed.load_state_dict(trusted.state_dict())
    assert torch.equal(resumed(fresh), trusted(fresh))
    problem = Problem.of(teachers, labels, directions(teachers))
    new = replace(Problem.of(fresh, its_labels, directions(teachers)), unit=problem.unit)
    new.seen, new.reduced = (forms.centred_logits(fresh) / problem.unit for _ in range(2))
    others = [
        float(F.cross_entropy(new.logits(problem.minimise(problem.start(form), strength)), its_labels))
        for form in ("temperature", "bias", "diagonal", "linear")
        for strength in (10.0, 1.0, 0.1)
    ]
    assert cross_entropy(trusted, fresh, its_labels) < min(others) - 0.01
    assert trusted.matrices() is None  # it is no matrix of logits


def test_a_teacher_of_random_outputs_gets_next_to_no_weight_beside_a_good_one() -> None:
    logits, labels = rows(500)
    teachers = torch.stack([noise(500), logits])
    trusted = TrustMap(2, 10)
    report = trusted.fit(teachers, labels)
    random, good = report.believed
    assert random < 0.01
    assert 0.9 < good < 1.1
    alone = TrustMap(1, 10)
    assert alone.fit(noise(500)[None], labels).believed[0] < 0.1
    assert alone(noise(500)[None]).std() < 0.5  # as sure as it is believed, also with its spread kept


@pytest.mark.parametrize("seed", range(2))
def test_two_hundred_rows_are_never_worse_than_the_mean_by_more_than_noise(seed: int) -> None:
    logits, labels = rows(200, seed=seed)
    fresh, its_labels = rows(4000, seed=100 + seed)
    for kind in ("good", "good and noisy"):
        make = [lambda x: x, lambda x: x + 0.5 * noise(len(x))][: 1 if kind == "good" else 2]
        trusted = TrustMap(len(make), 10, spread="fitted")
        trusted.fit(torch.stack([f(logits) for f in make]), labels)
        teachers = torch.stack([f(fresh) for f in make])
        as_given = cross_entropy(TrustMap(len(make), 10), teachers, its_labels)
        assert cross_entropy(trusted, teachers, its_labels) < as_given + 0.02


def test_before_a_fit_it_is_the_mean_of_predictions() -> None:
    teachers = torch.stack([rows(6)[0], noise(6)]).float()
    (expected,), _ = MeanPrediction(2)(teachers, torch.zeros(6))
    torch.testing.assert_close(TrustMap(2, 10)(teachers), expected)


def spread_of(logits: Tensor) -> float:
    return float(logits.double().var(-1, correction=0).mean().sqrt())


@pytest.mark.parametrize("sharper", [10.0, 1.0, 0.1])
def test_how_sure_a_teacher_is_does_not_count_where_the_student_has_logits_of_its_own(sharper: float) -> None:
    """The stretch is the temperature of the student's own float network, which scipy finds in float64."""
    logits, labels = rows(1000)
    own = 2.0 * (logits + 0.5 * noise(1000))
    trusted, as_fitted = TrustMap(2, 10), TrustMap(2, 10, spread="fitted")
    teachers = torch.stack([sharper * logits, own])
    report = trusted.fit(teachers, labels, own=1, temperature=4.0)
    as_fitted.fit(teachers, labels)

    def loss(factor: float) -> float:
        return -float(log_softmax(factor * own.numpy(), axis=1)[np.arange(1000), labels.numpy()].mean())

    expected = 1 / minimize_scalar(loss, bounds=(0.01, 2.0), method="bounded", options={"xatol": 1e-9}).x
    assert report.form == "temperature"
    assert 2.0 < expected < 4.0
    assert float(trusted.stretch) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(
        as_fitted(teachers).mul(trusted.stretch).log_softmax(-1), trusted(teachers), rtol=1e-4, atol=1e-4
    )
    trusted.fit(teachers, labels, own=1, temperature=1.5)
    assert float(trusted.stretch) == 1.5


@pytest.mark.parametrize(("sharper", "temperature"), [(10.0, 4.0), (2.5, 4.0), (2.5, None)])
def test_without_a_network_of_the_students_the_stretch_takes_no_more_than_the_temperature_takes(
    sharper: float, temperature: float | None
) -> None:
    """Within that it gives back the spread of the teachers as far as they are believed."""
    logits, labels = rows(1000)
    trusted, as_fitted = TrustMap(1, 10), TrustMap(1, 10, spread="fitted")
    teachers = sharper * logits[None]
    believed = trusted.fit(teachers, labels, temperature=temperature).believed[0]
    as_fitted.fit(teachers, labels)
    wanted = believed * spread_of(teachers) / spread_of(as_fitted(teachers))
    assert float(trusted.stretch) == pytest.approx(min(wanted, temperature or 1.0), rel=1e-3)
    assert wanted > 1.5


def test_of_logits_that_are_compared_as_they_are_none_is_stretched_beyond_the_students_own() -> None:
    logits, labels = rows(1000)
    own = 2.0 * (logits + noise(1000))
    trusted, teachers = TrustMap(2, 10), torch.stack([logits, own])
    trusted.fit(teachers, labels, own=1)
    assert float(trusted.stretch) > 1.2
    assert spread_of(trusted(teachers)) == pytest.approx(spread_of(own), rel=1e-3)


def test_of_rows_known_by_heart_a_teacher_that_is_too_sure_is_no_surer_than_the_student() -> None:
    logits, _ = rows(600, sharp=6.0)
    labels = logits.argmax(1)
    trusted, teachers = TrustMap(2, 10), torch.stack([10 * logits[:, ORDER], logits + noise(600)])
    trusted.fit(teachers, labels, memorised=True, own=1, temperature=4.0)
    assert spread_of(trusted(teachers)) == pytest.approx(spread_of(teachers[1]), rel=1e-3)


def test_rows_without_a_label_are_left_out_and_a_fit_is_the_same_again() -> None:
    logits, labels = rows(300)
    both = torch.cat([logits[:, ORDER], noise(50)]), torch.cat([labels, torch.full((50,), -1)])
    first, again = TrustMap(1, 10), TrustMap(1, 10)
    report = first.fit(both[0][None], both[1])
    found_once.forget()
    assert again.fit(logits[:, ORDER][None], labels) == report
    for name, kept in first.state_dict().items():
        assert torch.equal(kept, again.state_dict()[name]), name
    assert report.rows == 300


def spoiled_labels(labels: Tensor, rates: Tensor, seed: int = 0) -> Tensor:
    """The same with a part of every class, ``rates`` (C,), that has the label of any other."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < rates[labels]
    return torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)


def test_where_labels_of_some_classes_are_wrong_it_is_found_of_which_and_nobody_becomes_unsure() -> None:
    rates = torch.tensor([0.4] * 5 + [0.0] * 5)
    logits, labels = rows(1000, sharp=6.0)
    teachers, spoiled = torch.stack([logits[:, ORDER], logits + 2 * noise(1000)]), spoiled_labels(labels, rates)
    trusted, as_if_right = (TrustMap(2, 10, spread="fitted") for _ in range(2))
    found = trusted.fit(teachers, spoiled, own=1)
    assert found.form == "order, wrong labels"
    assert found.wrong_labels == pytest.approx(rates.tolist(), abs=0.12)
    assert found.read_as[0] == {0: 1, 1: 2, 2: 0}
    told = "labels are wrong in class e (0.48), c (0.44), b (0.41) and 2 more"
    assert told in found.sentence(["large", "own"], "abcdefghij")
    assert as_if_right.fit(teachers, spoiled).wrong_labels is None  # nobody says that it is not the teachers
    fresh, its_labels = rows(2000, seed=1, sharp=6.0)
    new = torch.stack([fresh[:, ORDER], fresh + 2 * noise(2000, seed=7)])
    assert cross_entropy(trusted, new, its_labels) < 0.5  # that knows the order; with a full map it is 0.6 and 1.0
    assert cross_entropy(as_if_right, new, its_labels) > 0.8
    further, their_labels = rows(1000, seed=1, sharp=6.0)
    more, changed = torch.stack([further[:, ORDER], further + 2 * noise(1000)]), spoiled_labels(their_labels, rates)
    doubted = torch.cat([trusted.doubted(teachers, spoiled), trusted.doubted(more, changed)])
    wrong = torch.cat([spoiled != labels, changed != their_labels])
    assert doubted[wrong].double().mean() > 0.8
    assert doubted[~wrong].double().mean() < 0.02


@pytest.mark.parametrize("kind", ["random", "renamed"])
def test_where_teachers_err_no_label_is_called_wrong(kind: str) -> None:
    logits, labels = rows(300, sharp=6.0)
    teachers = torch.stack([noise(300) if kind == "random" else logits[:, ORDER], logits + noise(300, seed=7)])
    trusted = TrustMap(2, 10)
    assert trusted.fit(teachers, labels, own=1).wrong_labels is None
    assert not trusted.doubted(teachers, labels).any()


def test_where_a_class_has_no_row_nothing_is_fitted_by_class() -> None:
    logits, labels = rows(500)
    labels[labels == 3] = -1
    trusted = TrustMap(1, 10)
    assert trusted.fit(2.5 * logits[:, ORDER][None], labels).form == "temperature"
    assert not trusted.bias.any()


def test_of_many_classes_the_linear_form_looks_at_the_directions_in_which_teachers_differ() -> None:
    classes = FULL_CLASSES + 12
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, classes, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(600, 6, generator=generator, dtype=torch.float64) @ mix
    basis = directions(logits[None])
    assert basis.shape == (classes, RANK)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK, dtype=torch.float64))
    centred = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(centred @ basis @ basis.mT, centred)


def test_of_as_many_classes_as_tokens_only_a_temperature_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MOST_CLASSES", 9)
    monkeypatch.setattr(trust_map, "MOST_CLASSES", 9)
    logits, labels = rows(800)
    trusted = TrustMap(1, 10, "fitted")
    report = trusted.fit(2 * logits[:, ORDER][None], labels)
    assert report.form in ("as given", "temperature")  # and not the order, which is a matter of classes
    report = trusted.fit(2 * logits[None], labels)
    assert report.form == "temperature"
    assert float(trusted.scale) == pytest.approx(0.5, rel=0.1)
    assert trusted.linear.numel() == trusted.basis.numel() == 0
    assert trusted.matrices() is None
    torch.testing.assert_close(trusted(2 * logits[None]), logits.log_softmax(-1).float(), atol=0.5, rtol=0.1)


def test_too_few_rows_are_refused() -> None:
    logits, labels = rows(30)
    labels[5:] = -1
    with pytest.raises(UsageError, match="5 held-out rows with a label are too few"):
        TrustMap(1, 10).fit(logits[None], labels)


def test_rows_are_known_by_heart_when_few_are_wrong_beside_new_ones() -> None:
    by_heart = [(1986, 2000, 1892, 2000), (1962, 2000, 1866, 2000), (300, 300, 4500, 5000)]
    otherwise = [(1834, 2000, 1834, 2000), (1880, 2000, 1834, 2000), (100, 100, 141, 144), (200, 2000, 200, 2000)]
    for right, rows_, new_right, new in by_heart + otherwise:
        found = memorised(Answers(right, rows_), Answers(new_right, new))
        assert found == ((right, rows_, new_right, new) in by_heart), (right, rows_, new_right, new)


def test_a_teacher_that_excludes_classes_has_a_spread_where_its_temperature_is_kept() -> None:
    logits, labels = rows(200, sharp=6.0)
    teacher = logits[:, ORDER][None]
    teacher[0, labels == 0, 9] = -torch.inf
    trusted = TrustMap(1, 10)
    assert trusted.fit(teacher, labels, memorised=True, own=0).form != "as given"
    assert trusted(teacher).isfinite().all()


def test_of_rows_known_by_heart_order_is_learned_and_the_temperature_kept() -> None:
    """A fitted temperature would make labels of a teacher that is right on all of them."""
    logits, _ = rows(600, sharp=6.0)
    teacher, labels = logits[:, ORDER][None], logits.argmax(1)
    kept, fitted = (TrustMap(1, 10, spread="fitted") for _ in range(2))
    assert kept.fit(teacher, labels, memorised=True).read_as == [{0: 1, 1: 2, 2: 0}]
    fitted.fit(teacher, labels)
    before, by_heart, naive = (
        float(values.var(-1, correction=0).mean().sqrt()) for values in (logits, kept(teacher), fitted(teacher))
    )
    assert before < by_heart < 1.25 * before
    assert naive > 1.5 * before


def test_what_the_map_says_of_a_row_that_was_left_out_does_not_know_its_label() -> None:
    """Its cross-entropy is that of cross-validation, which that of the map on the rows it was fitted to is below."""
    teacher, labels = rows(300, 10)
    mixed = (teacher @ torch.linalg.qr(noise(10)).Q)[None]
    trusted = TrustMap(1, 10, spread="fitted")
    report = trusted.fit(mixed, labels)
    said = trusted.left_out(mixed, labels)
    assert report.form == "linear"
    assert float(F.nll_loss(said, labels)) == pytest.approx(report.cross_entropy, rel=1e-4)
    assert float(F.nll_loss(trusted(mixed), labels)) < report.cross_entropy - 0.01


def test_rows_of_one_sample_share_a_fold_and_do_not_count_as_evidence_of_their_own() -> None:
    """Each row 10 times: a fit by rows would see the rows that it is judged on, and find what is not there."""
    teacher, labels = rows(60, 5)
    repeated = teacher.repeat_interleave(10, 0)[None], labels.repeat_interleave(10)
    groups = torch.arange(60).repeat_interleave(10)
    by_row, by_group = TrustMap(1, 5), TrustMap(1, 5)
    report = by_group.fit(*repeated, groups=groups)
    assert by_row.fit(*repeated).form == "linear"
    assert report.form == TrustMap(1, 5).fit(teacher[None], labels).form == "as given"
    said = by_group.left_out(*repeated, groups=groups)
    assert float(F.nll_loss(said, repeated[1])) == pytest.approx(report.cross_entropy, rel=1e-4)


def test_the_error_of_alike_rows_is_that_of_their_samples() -> None:
    losses = [torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    alone = [simplest_of_the_best([losses[i], losses[j]]) for i in range(6) for j in range(6)]
    groups = torch.arange(30).repeat_interleave(7)
    repeated = [loss.repeat_interleave(7) for loss in losses]
    together = [simplest_of_the_best([repeated[i], repeated[j]], groups) for i in range(6) for j in range(6)]
    assert alone == together


def test_too_few_samples_are_refused_however_many_rows_they_have() -> None:
    teacher, labels = rows(190)
    with pytest.raises(UsageError, match="19 held-out samples with a label are too few"):
        TrustMap(1, 10).fit(teacher[None], labels, groups=torch.arange(190) // 10)


def test_what_is_believed_of_an_unsure_teacher_is_never_flatter_than_labels_justify() -> None:
    logits, labels = rows(500)
    trusted = TrustMap(1, 10)
    trusted.fit(0.1 * logits[None], labels, own=0, temperature=4.0)
    assert float(trusted.stretch) == 1.0
