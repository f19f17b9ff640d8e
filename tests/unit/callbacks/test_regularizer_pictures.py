"""Pictures of the regularizer: when they are drawn, where they go and what they show."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

from lqkd.callbacks.pace import Pace
from lqkd.callbacks.regularizer.monitor import RegularizerMonitor
from lqkd.callbacks.regularizer.photographs import Photographs
from lqkd.callbacks.regularizer.pictures import pictures
from lqkd.callbacks.regularizer.statistics import WEIGHT_EDGES, EpochStatistic
from lqkd.regularizers import LearnableTable
from lqkd.runs.logger import RunLogger
from lqkd.utils.figures import finding_of, pixels

from .dummy import Dummy
from .wandb_records import wandb_history

MakeTrainer = Callable[..., Trainer]
NAMES = {"weights", "distribution", "classes", "confidence", "divergence", "agreement", "balance"}


def _more(epoch: int, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * epoch + batch)
    task, distill, plain, teacher = torch.randn(4, 8, 5, generator=generator)
    return {
        "weights": torch.rand(8, 5, generator=generator) + 0.1,
        "divergence": torch.rand(8, 5, generator=generator),
        "teacher": 3 * teacher,
        "labels": torch.arange(8) % 5,
        "gradients": {"task": task, "distill": distill, "plain": plain},
        "balance": {"task": torch.tensor(1.0), "distill": torch.tensor(0.5 + epoch)},
    }


def _module() -> Dummy:
    return Dummy(more=_more, regularizer=LearnableTable(guard="barrier"))


def _fit(make_trainer: MakeTrainer, logger: Any, epochs: int = 2, **arguments: Any) -> RegularizerMonitor:
    monitor = RegularizerMonitor(1, **arguments)
    make_trainer(callbacks=[monitor], logger=logger, max_epochs=epochs).fit(_module())
    return monitor


def _drawn(monitor: RegularizerMonitor) -> dict[str, Figure]:
    return dict(pictures(monitor.history, monitor.statistics))


# ---- where they go


def test_the_run_folder_gets_every_picture_and_no_part_of_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    _fit(make_trainer, RunLogger(tmp_path))
    folder = tmp_path / "regularizer"
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")} == NAMES
    assert {path.suffix for path in folder.iterdir()} == {".png", ".svg", ".csv"}
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 10, path.name


def test_tensorboard_gets_every_picture_at_the_step_of_the_epochs_numbers(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _fit(make_trainer, TensorBoardLogger(tmp_path, name="", version=""), picture_every_n_epochs=1)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"regularizer/pictures/{name}" for name in NAMES}
    for name in NAMES:
        images = events.Images(f"regularizer/pictures/{name}")
        assert [image.step for image in images] == [3, 7, 7]  # and once more when training ends
        assert (images[0].height, images[0].width) in ((660, 1080), (660, 1674))


def test_wandb_gets_every_picture(make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        _fit(make_trainer, WandbLogger(project="lqkd-test", save_dir=tmp_path))
    finally:
        wandb.finish()
    path = next(tmp_path.rglob("*.wandb"))
    rows = wandb_history(path)
    for name in NAMES:
        (row,) = [row for row in rows if f"regularizer/pictures/{name}/path" in row]
        assert row["trainer/global_step"] == 7
        image = Image.open(path.parent / "files" / row[f"regularizer/pictures/{name}/path"])
        assert image.size[1] == 660
    assert any("regularizer/agreement/distill" in row for row in rows)


def test_drawing_leaves_pyplot_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    _fit(make_trainer, RunLogger(tmp_path))
    assert plt.get_fignums() == []


# ---- when


def test_pictures_and_tables_wait_until_they_cost_little_and_come_at_the_end(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looks(RegularizerMonitor):
        def on_train_epoch_end(self, *arguments: Any) -> None:
            super().on_train_epoch_end(*arguments)
            here = {path.name for path in (tmp_path / "regularizer").iterdir()}
            seen.append(("weights.png" in here, "weights.csv" in here))

    seen: list[tuple[bool, bool]] = []
    make_trainer(callbacks=[Looks(1)], logger=RunLogger(tmp_path), max_epochs=3).fit(_module())
    assert seen == [(False, True)] * 3
    assert (tmp_path / "regularizer" / "weights.png").exists()
    rows = (tmp_path / "regularizer" / "agreement.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2


def test_work_is_due_again_when_it_has_become_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lqkd.callbacks.pace.time.monotonic", lambda: now[0])
    pace = Pace(0.01, seconds=0.5)
    dues = []
    for now[0] in (149.0, 151.0):
        dues.append(pace.due())
    with pace.work():
        now[0] += 2.0
    for now[0] in (352.0, 354.0):
        dues.append(pace.due())
    assert dues == [False, True, False, True]


def test_the_first_tables_are_written_at_the_first_epochs_end(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Stops(RegularizerMonitor):
        def on_train_epoch_end(self, *arguments: Any) -> None:
            super().on_train_epoch_end(*arguments)
            here.extend(path.stem for path in (tmp_path / "regularizer").glob("*.csv"))

    here: list[str] = []
    make_trainer(callbacks=[Stops(1)], logger=RunLogger(tmp_path)).fit(_module())
    assert set(here) == (NAMES - {"classes"}) | {"label", "output", "share"}


def test_a_training_that_fails_leaves_its_tables(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Fails(Dummy):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 3:
                raise RuntimeError("the power fails")

    with pytest.raises(RuntimeError, match="power"):
        make_trainer(callbacks=[RegularizerMonitor(1)], logger=RunLogger(tmp_path), max_epochs=4).fit(Fails(more=_more))
    for name in ("weights", "balance"):
        rows = (tmp_path / "regularizer" / f"{name}.csv").read_text().splitlines()
        assert rows[-1].startswith("2,"), name


# ---- what they show


def test_the_closed_form_of_the_guard_is_drawn_beside_the_weights(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = _fit(make_trainer, RunLogger(tmp_path), epochs=1)
    figure = _drawn(monitor)["divergence"]
    (axes,) = [axes for axes in figure.axes if axes.get_yscale() == "log"]
    lines = {str(line.get_label()): line for line in axes.lines}
    statistic = monitor.statistics["divergence"][0]
    filled = [i for i, count in enumerate(statistic.columns["count"]) if count]
    for label, column in (("epoch 1", "value"), ("closed form of the guard", "optimum")):
        assert list(lines[label].get_xdata()) == [statistic.bins[i] for i in filled]  # type: ignore[arg-type]
        assert list(lines[label].get_ydata()) == [statistic.columns[column][i] for i in filled]  # type: ignore[arg-type]


def test_agreement_is_drawn_with_and_without_weights(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = _fit(make_trainer, RunLogger(tmp_path), epochs=3)
    (axes,) = _drawn(monitor)["agreement"].axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}  # type: ignore[call-overload]
    values = [dict(zip(e.bins, e.columns["value"], strict=True)) for e in monitor.statistics["agreement"]]
    assert lines["with weights"] == [value["distill"] for value in values]
    assert lines["without weights"] == [value["plain"] for value in values]


def test_the_heat_map_has_a_column_for_every_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = _fit(make_trainer, RunLogger(tmp_path), epochs=3)
    mesh = _drawn(monitor)["distribution"].axes[0].collections[0]
    shares = np.ma.filled(mesh.get_array(), 0)  # type: ignore[no-untyped-call]
    expected = np.array([epoch.columns["value"] for epoch in monitor.statistics["distribution"]]).T
    np.testing.assert_allclose(shares.reshape(expected.shape), expected)


def test_values_that_cannot_be_drawn_stop_no_picture() -> None:
    nan, inf = float("nan"), float("inf")
    columns = {"value": [nan, inf, 0.0], "count": [1.0, 1.0, 1.0], "optimum": [inf, nan, 0.0]}
    first = [1.0] + [0.0] * (len(WEIGHT_EDGES) - 1)
    statistics = {
        "distribution": [EpochStatistic(0, list(WEIGHT_EDGES), {"value": first, "count": first})],
        "divergence": [EpochStatistic(0, [0.0, 1e-8, 1e-7], columns)],
        "label": [EpochStatistic(0, [0, 1, 2], columns)],
        "confidence": [EpochStatistic(0, [0.0, 0.1, 0.2], columns)],
        "agreement": [EpochStatistic(0, ["distill"], {"value": [nan], "count": [1.0]})],
        "balance": [EpochStatistic(0, ["task"], {"value": [nan], "count": [1.0]})],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name for name, figure in pictures([], statistics) if pixels(figure).size} == NAMES - {"weights"}


def test_what_held_out_rows_say_is_drawn_as_it_is() -> None:
    bins = [f"{who} {edge / 10:g}" for who in ("teacher large", "student") for edge in range(10)]
    right = [*[0.0] * 8, 0.5, 1.0] * 2
    confidence, count = [*[0.0] * 8, 0.85, 0.95] * 2, [*[0.0] * 8, 10.0, 20.0] * 2
    losses = {"believed": 0.9, "loss": 0.1, "loss_of_student": 0.4, "loss_of_teachers": 0.2}
    statistics = {
        "trust": [EpochStatistic(e, [*losses], {"value": [*losses.values()], "count": [60.0] * 4}) for e in range(2)],
        "believed": [
            EpochStatistic(e, ["cat", "dog"], {"value": [0.9, 0.3 + e], "count": [1.0] * 2}) for e in range(2)
        ],
        "reliability": [EpochStatistic(1, bins, {"value": right, "count": count, "confidence": confidence})],
    }
    maps = {"teacher large": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "own": torch.eye(2)}
    figures = dict(pictures([], statistics, "logits", maps))
    assert [*figures] == ["trust", "believed", "reliability", "map"]
    assert all(pixels(figure).size for figure in figures.values())
    weight, drawn = figures["trust"].axes
    assert weight.lines[0].get_xydata().tolist() == [[1, 0.9], [2, 0.9]]
    assert [line.get_ydata()[0] for line in drawn.lines] == [0.1, 0.4, 0.2]
    assert [bar.get_height() for bar in figures["believed"].axes[0].patches] == [0.9, 1.3]
    _, *speakers = figures["reliability"].axes[0].lines
    assert [line.get_label() for line in speakers] == ["teacher large", "student"]
    assert speakers[0].get_xydata().tolist() == [[0.85, 0.5], [0.95, 1.0]]
    images = [axes.images[0].get_array().tolist() for axes in figures["map"].axes if axes.images]
    assert images == [matrix.tolist() for matrix in maps.values()]


def test_the_title_of_places_says_where_weights_are_large() -> None:
    value = [4.0 if row in range(2, 6) and column in range(2, 6) else 1.0 for row in range(8) for column in range(8)]
    epoch = EpochStatistic(2, [*range(64)], {"value": value, "count": [1.0] * 64, "divergence": [1.0] * 64})
    figure = dict(pictures([], {"place": [epoch]}))["places"]
    assert finding_of(figure) == "The middle of the map counts more than its edge: 4, not 1"
    weights, divergences = (axes.images[0].get_array().tolist() for axes in figure.axes if axes.images)
    assert np.ravel(weights).tolist() == value
    assert np.ravel(divergences).tolist() == [1.0] * 64


def test_weights_of_tokens_are_drawn_by_position_and_frequency_and_many_classes_are_no_line() -> None:
    bins = [2**i for i in range(20)]
    columns = {"value": [1.0, 0.5, 2.0] + [float("nan")] * 17, "count": [9.0, 9.0, 9.0] + [0.0] * 17}
    of_label = EpochStatistic(0, [*range(5000)], {"value": [1.0] * 5000, "count": [1.0] * 5000})
    statistics = {name: [EpochStatistic(0, bins, columns)] for name in ("frequency", "position")} | {
        "label": [of_label]
    }
    drawn = dict(pictures([], statistics))
    assert {name: finding_of(figure) for name, figure in drawn.items()} == {
        "frequency": "Where its label is most frequent a sample counts more: 2, elsewhere 1",
        "position": "Late in a text a token counts more: 2, elsewhere 1",
    }
    for figure in drawn.values():
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]
        assert pixels(figure).size


def test_weights_lie_over_the_places_of_the_photographs_that_they_are_of() -> None:
    images, weights = torch.rand(5, 3, 8, 12), torch.full((5, 6, 2, 3), 0.5)
    weights[2, :, 1, 0] = 4.0  # below left in the third photograph, which is the first of the second row
    found = Photographs.of(images, [torch.rand(5, 6, 1, 1), weights])  # a weight for each channel has no places
    assert found is not None
    figure = dict(pictures([], {}, photographs=found))["photographs"]
    assert finding_of(figure) == "On these photographs a place counts from 0.5 to 4"
    photograph, *over = (image.get_array() for axes in figure.axes for image in axes.images)
    first = images[0].permute(1, 2, 0)
    assert np.allclose(photograph[:8, :12], (first - first.min()) / (first.max() - first.min()))
    rows, columns = np.nonzero(over[1] > 1)
    assert (set(rows), set(columns)) == ({12, 13, 14, 15}, {0, 1, 2, 3})


@pytest.mark.parametrize(
    ("inputs", "weights"),
    [(torch.rand(4, 16), torch.rand(4, 1, 2, 2)), (torch.rand(4, 3, 8, 8), torch.rand(4, 10))],
)
def test_texts_and_weights_without_places_have_no_photographs(inputs: torch.Tensor, weights: torch.Tensor) -> None:
    assert Photographs.of(inputs, [weights]) is None


@pytest.mark.parametrize("spread", [1e-4, 0.01, 0.5, 30.0])
def test_the_ticks_of_classes_differ_and_its_labels_lie_within_the_picture(spread: float) -> None:
    columns = {"value": [1.0, 1.0 + spread, 1.0 + spread / 2], "count": [4, 4, 4]}
    statistic = EpochStatistic(0, [0, 1, 2], columns)
    figure = dict(pictures([], {"label": [statistic], "output": [statistic]}))["classes"]
    height, width, _ = pixels(figure).shape
    boxes = []
    for axes in figure.axes:
        low, high = axes.get_ylim()
        shown = [t for t in axes.yaxis.get_ticklabels() if low <= t.get_position()[1] <= high]
        texts = [t.get_text() for t in shown]
        assert len(texts) == len(set(texts)) >= 2
        assert not any("$" in text for text in texts)
        boxes.append(axes.get_tightbbox())
    assert boxes[0].x0 >= 0
    assert boxes[1].x1 <= width
    assert boxes[0].x1 <= boxes[1].x0
    assert all(box.y0 >= 0 and box.y1 <= height for box in boxes)
