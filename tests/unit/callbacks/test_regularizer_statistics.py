"""What the monitor's tables say of weights, divergences and gradients that are known."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lqkd.callbacks.regularizer.monitor import RegularizerMonitor
from lqkd.callbacks.regularizer.statistics import measure, statistics
from lqkd.errors import UsageError
from lqkd.regularizers import Adversarial, Entropy, LearnableTable, LookAhead, Regularizer
from lqkd.runs.logger import RunLogger

from .dummy import BATCHES, Dummy, Play

pytestmark = pytest.mark.usefixtures("drawing")  # tables alone are looked at here, but for one test
MakeTrainer = Callable[..., Trainer]
SAMPLES, CLASSES = 8, 5


def _draws(shape: tuple[int, ...], low: float, high: float, seed: int = 0) -> Play:
    """Numbers that differ for every epoch and batch, evenly spread on a logarithmic scale."""

    def draw(epoch: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(10_000 * seed + 1000 * epoch + batch)
        return low * (high / low) ** torch.rand(shape, generator=generator)

    return draw


WEIGHTS = _draws((SAMPLES, CLASSES), 0.01, 50.0)
DIVERGENCE = _draws((SAMPLES, CLASSES), 1e-3, 1e2, seed=1)


def _teacher(epoch: int, batch: int) -> Tensor:
    return 3 * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(77 + 100 * epoch + batch))


def _labels(epoch: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(55 + 100 * epoch + batch)
    return torch.randint(CLASSES, (SAMPLES,), generator=generator)


def _gradients(epoch: int, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(33 + 100 * epoch + batch)
    task, distill, plain = torch.randn(3, SAMPLES, CLASSES, generator=generator)
    balance = {"task": torch.tensor(0.5 + batch), "distill": torch.tensor(2.0 + epoch)}
    return {"gradients": {"task": task, "distill": distill, "plain": plain}, "balance": balance}


def _more(epoch: int, batch: int) -> dict[str, Any]:
    return {"teacher": _teacher(epoch, batch), "labels": _labels(epoch, batch)} | _gradients(epoch, batch)


def _fit(
    make_trainer: MakeTrainer, folder: Path, module: Dummy, every_n_steps: int = 1, **arguments: Any
) -> tuple[RegularizerMonitor, Trainer]:
    monitor = RegularizerMonitor(every_n_steps=every_n_steps)
    trainer = make_trainer(**({"callbacks": [monitor], "logger": RunLogger(folder)} | arguments))
    trainer.fit(module)
    return monitor, trainer


def _rows(folder: Path, name: str, epoch: int = 0) -> dict[str, dict[str, float]]:
    """Rows of one epoch by bin."""
    with open(folder / "regularizer" / f"{name}.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if int(row["epoch"]) == epoch]
    return {row["bin"]: {k: float(v) for k, v in row.items() if k not in ("epoch", "bin")} for row in rows}


def _expected(keys: list[Any], values: list[float]) -> dict[Any, tuple[float, int]]:
    """Mean and number of values by key."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        groups[key].append(value)
    return {key: (sum(group) / len(group), len(group)) for key, group in groups.items()}


def _check(rows: dict[str, dict[str, float]], expected: dict[Any, tuple[float, int]]) -> None:
    assert {float(key) for key in rows} == {float(key) for key in expected}
    for key, row in rows.items():
        mean, count = expected[float(key)]
        assert row["value"] == pytest.approx(mean, rel=1e-5)
        assert row["count"] == count


def _all(play: Play, epoch: int = 0) -> Tensor:
    return torch.stack([play(epoch, batch) for batch in range(BATCHES)])


# ---- what is counted


def test_the_distribution_counts_every_weight_in_its_bin(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE), max_epochs=2)
    for epoch in (0, 1):
        rows = _rows(tmp_path, "distribution", epoch)
        weights = _all(WEIGHTS, epoch).flatten().tolist()
        lower = sorted(float(edge) for edge in rows)
        assert sum(row["count"] for row in rows.values()) == len(weights)
        assert sum(row["value"] for row in rows.values()) == pytest.approx(1)
        for key, row in rows.items():
            edge = float(key)
            assert row["count"] == sum(edge <= w < edge * 10 ** (1 / 8) * (1 - 1e-6) for w in weights)
        assert lower[0] <= min(weights) < lower[0] * 10 ** (1 / 8)


@pytest.mark.parametrize(
    ("weight", "edge"), [(0.0, 0.0), (5e-5, 0.0), (1e-4, 1e-4), (0.1, 0.1), (1.0, 1.0), (1e4, 1e4), (math.inf, 1e4)]
)
def test_a_weight_at_an_edge_is_in_the_bin_above(
    make_trainer: MakeTrainer, tmp_path: Path, weight: float, edge: float
) -> None:
    _fit(make_trainer, tmp_path, Dummy(lambda e, b: torch.full((2, 3), weight)))
    assert [float(key) for key in _rows(tmp_path, "distribution")] == [pytest.approx(edge, rel=1e-6)]


def test_weights_that_are_no_numbers_are_in_no_bin(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(
        make_trainer, tmp_path, Dummy(lambda e, b: torch.tensor([[math.nan, 2.0, 2.0]]), lambda e, b: torch.ones(1, 3))
    )
    (row,) = _rows(tmp_path, "distribution").values()
    assert row["count"] == 2 * BATCHES


def test_weights_by_label_are_means_over_the_samples_of_a_label(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=_more))
    labels = _all(_labels).flatten().tolist()
    _check(_rows(tmp_path, "label"), _expected(labels, _all(WEIGHTS).mean(2).flatten().tolist()))


def test_weights_by_class_of_the_map_are_means_over_all_samples(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=_more))
    means = _all(WEIGHTS).mean((0, 1)).tolist()
    _check(_rows(tmp_path, "output"), {c: (mean, BATCHES * SAMPLES) for c, mean in enumerate(means)})


def test_weights_by_confidence_go_by_the_teachers_largest_probability(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=_more))
    confidence = _all(_teacher).softmax(2).amax(2).flatten().tolist()
    edges = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
    bins = [max(edge for edge in edges if edge <= c) for c in confidence]
    _check(_rows(tmp_path, "confidence"), _expected(bins, _all(WEIGHTS).mean(2).flatten().tolist()))


def test_of_classes_that_are_there_or_not_the_largest_probability_is_a_sigmoid(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    more = {"teacher": torch.tensor([[-9.0], [-9.0], [9.0]]), "independent": True}
    dummy = Dummy(lambda e, b: torch.ones(3, 1), lambda e, b: torch.ones(3, 1), more=lambda e, b: more)
    _fit(make_trainer, tmp_path, dummy)
    assert {edge: row["count"] for edge, row in _rows(tmp_path, "confidence").items()} == {"0.0": 8.0, "0.999": 4.0}


def test_a_label_came_once_however_many_maps_weigh_it() -> None:
    report = {"teacher": torch.zeros(3, 100), "labels": torch.tensor([4, 4, 9])}
    parts = [(torch.ones(3, 1), torch.ones(3, 100))] * 3
    frequency = statistics(measure(parts, report, [lambda divergence: None] * 3), 0)["frequency"]
    assert [row["bin"] for row in frequency.rows()] == [1, 2]


def test_weights_of_tokens_go_by_position_and_of_many_classes_by_how_often_a_label_came(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 7, 7, 100])  # in each of four batches: 20, 8 and 4 times
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0])
    positions = torch.tensor([1, 2, 3, 4, 7, 8, 1023, 1024])
    for many in (101, 99):
        teacher = torch.zeros(8, many)
        more = {"teacher": teacher, "labels": labels, "positions": positions}
        dummy = Dummy(lambda e, b: weights, lambda e, b: torch.ones(8), more=lambda e, b, more=more: more)  # type: ignore[misc]
        _fit(make_trainer, tmp_path / str(many), dummy)
    found = _rows(tmp_path / "101", "position")
    assert {edge: row["value"] for edge, row in found.items()} == {
        "1": 1.0, "2": 2.5, "4": 4.5, "8": 6.0, "512": 8.0, "1024": 16.0
    }  # fmt: skip
    assert _rows(tmp_path / "101", "frequency") == {
        "4": {"value": 16.0, "count": 4.0, "labels": 1.0},
        "8": {"value": 7.0, "count": 8.0, "labels": 1.0},
        "16": {"value": 3.0, "count": 20.0, "labels": 1.0},
    }
    assert not (tmp_path / "99" / "regularizer" / "frequency.csv").exists()


def test_weights_by_divergence_go_by_its_decade(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE))
    divergences, weights = _all(DIVERGENCE).flatten(), _all(WEIGHTS).flatten()
    bins = ((divergences.log10() * 4).floor() / 4).tolist()
    expected = _expected(bins, weights.tolist())
    rows = {str(round(4 * math.log10(float(key))) / 4): row for key, row in _rows(tmp_path, "divergence").items()}
    _check(rows, expected)
    assert "optimum" not in next(iter(rows.values()))


@pytest.mark.parametrize("shape", [(SAMPLES, 1), (1, CLASSES)])
def test_weights_that_broadcast_count_as_often_as_they_are_used(
    make_trainer: MakeTrainer, tmp_path: Path, shape: tuple[int, int]
) -> None:
    weights = _draws(shape, 0.1, 10.0)
    _fit(make_trainer, tmp_path, Dummy(weights, DIVERGENCE, more=_more))
    full = torch.stack([weights(0, b).expand(SAMPLES, CLASSES) for b in range(BATCHES)])
    _check(_rows(tmp_path, "label"), _expected(_all(_labels).flatten().tolist(), full.mean(2).flatten().tolist()))
    means = full.mean((0, 1)).tolist()
    _check(_rows(tmp_path, "output"), {c: (mean, BATCHES * SAMPLES) for c, mean in enumerate(means)})
    assert sum(row["count"] for row in _rows(tmp_path, "distribution").values()) == full.numel()


@pytest.mark.parametrize("shape", [(SAMPLES, 3, 4, 4), (SAMPLES, 6, 3), (SAMPLES,)])
def test_maps_that_are_not_over_classes_have_no_weights_by_class_of_the_map(
    make_trainer: MakeTrainer, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    weights = _draws(shape, 0.1, 10.0)
    _fit(make_trainer, tmp_path, Dummy(weights, _draws(shape, 0.1, 1.0), more=_more))
    assert not (tmp_path / "regularizer" / "output.csv").exists()
    of_samples = _all(weights).flatten(2).mean(2) if len(shape) > 1 else _all(weights)
    _check(_rows(tmp_path, "label"), _expected(_all(_labels).flatten().tolist(), of_samples.flatten().tolist()))


def test_several_taps_are_counted_together(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    small = _draws((SAMPLES, 2, 3, 3), 0.1, 10.0)

    def more(epoch: int, batch: int) -> dict[str, Any]:
        one = torch.ones(SAMPLES, 2, 3, 3)
        lists = {"weights": [WEIGHTS(epoch, batch), small(epoch, batch)], "divergence": [DIVERGENCE(epoch, batch), one]}
        return _more(epoch, batch) | lists

    monitor, _ = _fit(make_trainer, tmp_path, Dummy(more=more))
    everything = torch.cat((_all(WEIGHTS).flatten(), _all(small).flatten()))
    assert monitor.history[0].mean == pytest.approx(everything.mean().item(), rel=1e-5)
    assert sum(row["count"] for row in _rows(tmp_path, "distribution").values()) == everything.numel()
    assert sum(row["count"] for row in _rows(tmp_path, "label").values()) == 2 * BATCHES * SAMPLES
    assert sum(row["count"] for row in _rows(tmp_path, "output").values()) == BATCHES * SAMPLES * CLASSES


def test_large_maps_are_looked_at_in_all_channels_and_positions(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    shape = (4, 64, 32, 32)
    channel = torch.arange(64.0).view(1, 64, 1, 1).expand(shape)

    def weights(epoch: int, batch: int) -> Tensor:
        return 10 ** (channel / 64 * 2 - 1)

    _fit(make_trainer, tmp_path, Dummy(weights, lambda e, b: 10 ** (torch.arange(32.0) % 4).expand(shape)))
    rows = _rows(tmp_path, "distribution")
    counts = [row["count"] for row in rows.values()]
    assert BATCHES * 30_000 < sum(counts) <= BATCHES * 65_536
    assert len(counts) == 16
    assert max(counts) / min(counts) < 1.05
    columns = [row["count"] for row in _rows(tmp_path, "divergence").values()]
    assert len(columns) == 4
    assert max(columns) / min(columns) < 1.05


@pytest.mark.parametrize("side", [8, 16])
def test_weights_by_place_are_means_over_channels_samples_and_the_places_of_a_cell(
    make_trainer: MakeTrainer, tmp_path: Path, side: int
) -> None:
    weights, divergence = (_draws((SAMPLES, channels, side, side), 0.1, 10.0, channels) for channels in (1, 3))
    _fit(make_trainer, tmp_path, Dummy(weights, divergence))
    rows = _rows(tmp_path, "place")
    for column, play in (("value", weights), ("divergence", divergence)):
        cells = _all(play).mean((0, 1, 2)).unflatten(0, (8, -1)).unflatten(2, (8, -1)).mean((1, 3))
        assert [row[column] for row in rows.values()] == pytest.approx(cells.flatten().tolist(), rel=1e-5)
    assert {row["count"] for row in rows.values()} == {BATCHES * SAMPLES}


def test_weights_that_are_the_same_everywhere_in_a_map_have_none_by_place(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    _fit(make_trainer, tmp_path, Dummy(_draws((SAMPLES, 3, 1, 1), 0.1, 10.0), _draws((SAMPLES, 3, 4, 4), 0.1, 1.0)))
    assert not (tmp_path / "regularizer" / "place.csv").exists()


# ---- the guard's closed form


def _regularizer(**arguments: Any) -> Regularizer:
    return LearnableTable(**arguments)


def test_the_closed_form_stands_beside_the_weights(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Dummy(WEIGHTS, DIVERGENCE, regularizer=_regularizer(guard="barrier", max_weight=100.0))
    monitor, _ = _fit(make_trainer, tmp_path, module)
    divergences = _all(DIVERGENCE).flatten()
    best = (1 / divergences).clamp_max(100.0)
    bins = ((divergences.log10() * 4).floor() / 4).tolist()
    expected = _expected(bins, best.tolist())
    for key, row in _rows(tmp_path, "divergence").items():
        assert row["optimum"] == pytest.approx(expected[round(4 * math.log10(float(key))) / 4][0], rel=1e-4)
    assert monitor.history[0].optimum == pytest.approx((best * divergences).mean().item(), rel=1e-5)
    contribution = (_all(WEIGHTS) * _all(DIVERGENCE)).mean().item()
    assert monitor.history[0].contribution == pytest.approx(contribution, rel=1e-5)


def test_the_closed_form_is_that_of_an_adversary_where_there_is_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    player = Adversarial()
    player.progress = 1.0
    module = Dummy(WEIGHTS, DIVERGENCE, regularizer=_regularizer(guard=Entropy(2.0), player=player))
    monitor, _ = _fit(make_trainer, tmp_path, module)
    expected = torch.zeros(())
    for batch in range(BATCHES):
        d = DIVERGENCE(0, batch)
        weights = d.numel() * (d / (2 * d.mean())).flatten().softmax(0).view_as(d)
        expected += (weights * d).mean() / BATCHES
    assert monitor.history[0].optimum == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("arguments", [{"guard": "mean_one"}, {"guard": "entropy", "player": LookAhead()}])
def test_without_a_closed_form_none_is_claimed(
    make_trainer: MakeTrainer, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    monitor, trainer = _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, regularizer=_regularizer(**arguments)))
    assert monitor.history[0].optimum is None
    assert "optimum" not in next(iter(_rows(tmp_path, "divergence").values()))
    assert "regularizer/optimum" not in trainer.callback_metrics


def test_every_tap_has_the_closed_form_of_its_own_regularizer(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def more(epoch: int, batch: int) -> dict[str, Any]:
        return {"weights": [torch.ones(2, 3), torch.ones(2, 3)], "divergence": [torch.ones(2, 3), torch.ones(2, 3)]}

    both = nn.ModuleList([_regularizer(guard="barrier"), _regularizer(guard="none")])
    monitor, _ = _fit(make_trainer, tmp_path, Dummy(more=more, regularizer=both))
    assert monitor.history[0].optimum == pytest.approx(0.5)


# ---- gradients


def _pooled(name: str, epoch: int) -> float:
    gradients = [_gradients(epoch, batch)["gradients"] for batch in range(BATCHES)]
    task, other = (torch.cat([g[of].flatten() for g in gradients]) for of in ("task", name))
    return nn.functional.cosine_similarity(task, other, dim=0).item()


def test_agreement_is_the_cosine_over_all_samples_of_the_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _, trainer = _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=_more), max_epochs=2)
    for epoch in (0, 1):
        rows = _rows(tmp_path, "agreement", epoch)
        assert set(rows) == {"distill", "plain"}
        for name, row in rows.items():
            assert row["value"] == pytest.approx(_pooled(name, epoch), rel=1e-5)
            assert row["count"] == BATCHES
            if epoch == 1:
                logged = trainer.callback_metrics[f"regularizer/agreement/{name}"]
                assert logged.item() == pytest.approx(row["value"])


def test_shares_are_of_the_norms_that_each_loss_puts_into_the_gradient(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    monitor, trainer = _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=_more))
    squared = {"task": 0.0, "distill": 0.0}
    for batch in range(BATCHES):
        outputs = _gradients(0, batch)
        for name in squared:
            squared[name] += (outputs["balance"][name] * outputs["gradients"][name]).square().sum().item()
    norms = {name: math.sqrt(value) for name, value in squared.items()}
    for name, row in _rows(tmp_path, "share").items():
        expected = norms[name] / sum(norms.values())
        assert row["value"] == pytest.approx(expected, rel=1e-5)
        assert trainer.callback_metrics[f"regularizer/share/{name}"].item() == pytest.approx(expected, rel=1e-5)
    assert monitor.history[0].share == pytest.approx(norms["distill"] / sum(norms.values()), rel=1e-5)
    balance = _rows(tmp_path, "balance")
    assert balance["task"]["value"] == pytest.approx(sum(0.5 + b for b in range(BATCHES)) / BATCHES)
    assert balance["distill"]["value"] == pytest.approx(2)


def test_a_loss_whose_gradient_is_not_known_leaves_no_shares(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def more(epoch: int, batch: int) -> dict[str, Any]:
        outputs = _more(epoch, batch)
        return outputs | {"balance": outputs["balance"] | {"features": torch.tensor(1.0)}}

    monitor, _ = _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=more))
    assert not (tmp_path / "regularizer" / "share.csv").exists()
    assert monitor.history[0].share is None
    assert set(_rows(tmp_path, "balance")) == {"task", "distill", "features"}


def test_a_balance_is_watched_without_a_regularizer_too(
    make_trainer: MakeTrainer, tmp_path: Path, drawing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lqkd.callbacks.regularizer.pictures.pictures", drawing)
    monitor, _ = _fit(make_trainer, tmp_path, Dummy(None, more=_more))
    assert {path.name for path in (tmp_path / "regularizer").iterdir()} == {
        "agreement.csv", "agreement.png", "agreement.svg", "balance.csv", "balance.png", "balance.svg", "share.csv",
    }  # fmt: skip
    assert monitor.summary() is None


@pytest.mark.parametrize(
    ("missing", "statistics"),
    [
        ("teacher", {"label", "output", "confidence"}),
        ("labels", {"label"}),
        ("gradients", {"agreement", "share"}),
        ("balance", {"balance", "share"}),
    ],
)
def test_what_an_output_is_missing_for_is_left_out(
    make_trainer: MakeTrainer, tmp_path: Path, missing: str, statistics: set[str]
) -> None:
    everything = {
        "weights", "distribution", "label", "output", "confidence", "divergence", "agreement", "balance", "share",
    }  # fmt: skip

    def more(epoch: int, batch: int) -> dict[str, Any]:
        return {name: value for name, value in _more(epoch, batch).items() if name != missing}

    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=more))
    assert {path.stem for path in (tmp_path / "regularizer").glob("*.csv")} == everything - statistics


def test_labels_outside_of_the_classes_are_not_counted(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def more(epoch: int, batch: int) -> dict[str, Any]:
        return _more(epoch, batch) | {"labels": torch.tensor([0, 0, -1, CLASSES, 1, 1, 1, 255])}

    _fit(make_trainer, tmp_path, Dummy(WEIGHTS, DIVERGENCE, more=more))
    assert {key: row["count"] for key, row in _rows(tmp_path, "label").items()} == {"0": 2 * BATCHES, "1": 3 * BATCHES}


# ---- how often


def test_gradients_are_asked_for_and_measured_in_every_nth_batch_from_the_first(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = Dummy(WEIGHTS, DIVERGENCE, more=_more)
    _fit(make_trainer, tmp_path, module, every_n_steps=3, max_epochs=2)
    assert module.watched == [0, 3, 0, 3]
    assert module.watch_gradients is False
    assert _rows(tmp_path, "agreement")["distill"]["count"] == 2
    assert sum(row["count"] for row in _rows(tmp_path, "label").values()) == 2 * SAMPLES


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"picture_every_n_epochs": 0}])
def test_an_impossible_interval_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="=0 is not possible"):
        RegularizerMonitor(**arguments)


def _operations(guard: str, batch_idx: int) -> list[str]:
    """Operations of the monitor in one batch, and of what waits for its moments then."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    module = Dummy(WEIGHTS, DIVERGENCE, regularizer=_regularizer(guard=guard))
    outputs = {"weights": WEIGHTS(0, 0), "divergence": DIVERGENCE(0, 0)} | _more(0, 0)
    monitor = RegularizerMonitor()
    monitor.on_train_start(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module)
    with Operations():
        monitor.on_train_batch_start(None, module, None, batch_idx)  # type: ignore[arg-type]
        monitor.on_train_batch_end(None, module, outputs, None, batch_idx)  # type: ignore[arg-type]
        seen.append("batch")
        monitor.state_dict()  # takes the moments that wait
    return seen


@pytest.mark.parametrize("guard", ["barrier", "bounded_barrier", "entropy"])
def test_a_measured_batch_waits_for_no_result(guard: str) -> None:
    seen = set(_operations(guard, batch_idx=0))
    assert {"index_add_", "bucketize", "var_mean"} <= seen
    assert not seen & {"_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero"}


def test_only_every_20th_batch_costs_operations() -> None:
    counted = {i: [name for name in _operations("barrier", i) if name != "detach"] for i in (0, 1, 19, 20)}
    per_batch = {i: names.index("batch") for i, names in counted.items()}
    assert per_batch[1] == per_batch[19] == 0
    assert 50 < per_batch[0] == per_batch[20] < 160


# ---- several processes and resuming


@pytest.mark.own_process
def test_two_processes_write_the_statistics_of_both(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Dummy(WEIGHTS, DIVERGENCE, more=_more, regularizer=_regularizer(guard="barrier"))
    _fit(make_trainer, tmp_path / "one", module)
    module = Dummy(WEIGHTS, DIVERGENCE, more=_more, regularizer=_regularizer(guard="barrier"))
    _fit(make_trainer, tmp_path / "two", module, strategy="ddp_fork", devices=2)
    names = {path.name for path in (tmp_path / "one" / "regularizer").iterdir()}
    assert {path.name for path in (tmp_path / "two" / "regularizer").iterdir()} == names
    for name in sorted(path.removesuffix(".csv") for path in names if path.endswith(".csv") and path != "weights.csv"):
        one, two = _rows(tmp_path / "one", name), _rows(tmp_path / "two", name)
        assert one.keys() == two.keys(), name
        for key, row in one.items():
            assert two[key] == pytest.approx(row, rel=1e-6), name


def test_a_resumed_training_continues_every_table(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    callbacks = [RegularizerMonitor(every_n_steps=1), saver]
    module = Dummy(WEIGHTS, DIVERGENCE, more=_more)
    make_trainer(max_epochs=2, logger=RunLogger(tmp_path / "a"), callbacks=callbacks, enable_checkpointing=True).fit(
        module
    )
    resumed = make_trainer(max_epochs=3, logger=RunLogger(tmp_path / "b"), callbacks=[RegularizerMonitor(1)])
    resumed.fit(Dummy(WEIGHTS, DIVERGENCE, more=_more), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    _fit(make_trainer, tmp_path / "c", Dummy(WEIGHTS, DIVERGENCE, more=_more), max_epochs=3)
    for path in (tmp_path / "c" / "regularizer").glob("*.csv"):
        assert (tmp_path / "b" / "regularizer" / path.name).read_text() == path.read_text(), path.name
