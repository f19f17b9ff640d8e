"""The figures of a report, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from lqkd.runs.provenance import FLOAT_ONNX
from lqkd.runs.verdicts import measured_on
from lqkd.studies import plots
from lqkd.studies.exports import read_exports
from lqkd.studies.findings import measure_of, split_of
from lqkd.studies.material import STUDY_KIND, Material, sentence
from lqkd.studies.plots import Row
from lqkd.studies.results import Run, metric_of
from lqkd.studies.statistics import Summary
from lqkd.studies.tables import UNTRAINED, references, scale, value
from lqkd.tasks.values import is_share, name_of
from lqkd.utils.figures import finding_of

TASK, DISTILL = "task", "distill"
"""Names of losses as balances have them, which would load PyTorch."""
_FLOAT = "float"


class Drawn(NamedTuple):
    """A figure of the page: the name of its files, what it shows, and the line below it."""

    name: str
    figure: Figure
    caption: str

    @property
    def alt(self) -> str:
        """For those who do not see it."""
        return f"{finding_of(self.figure)}. {self.caption}"


def results(material: Material) -> Iterator[Drawn]:
    """What the networks are worth."""
    metric, mode = metric_of(material.runs)
    figure = plots.values(_rows(material), metric, mode, _split(material))
    yield from _known("values", figure, "Each pale dot is a run, each diamond the mean. The numbers are in the table.")
    if material.baseline is not None:
        measures = {"test": "test", "val_best": "best validation"}
        for measure in (m for m in measures if m == measure_of(material)):
            label = f"{measures[measure]} {name_of(metric)}"
            figure = plots.differences(material.summaries, measure, material.baseline, metric, sentence(label))
            yield from _known(
                "differences", figure, "Paired by seed. Blue: zero is outside of the interval, so chance alone is no "
                "likely reason. The numbers are in the table.",
            )  # fmt: skip
    of = "test" if measure_of(material) == "test" else "best"
    figure = plots.bits(material.runs, _levels(material), metric, of, split_of(material))
    yield from _known("bits", figure, "More bits to the right. Variants whose names differ in bits alone are one line.")
    yield from _trades(material)


def training(material: Material) -> Iterator[Drawn]:
    """How it went, epoch by epoch."""
    metric, mode = metric_of(material.runs)
    losses = [(f"train/{of}", f"{_of_term(of)} in training") for of in _distillation_losses(material.runs)]
    several = len(material.runs) > len(material.summaries)
    caption = " Mean over seeds and, shaded, from the least to the largest of them." if several else ""
    for key, words, better in (
        (metric, f"{name_of(metric)} on the validation split", mode),
        ("train/loss", "training loss", None),
        ("train/task", "task loss in training", "min"),
        *((key, words, None) for key, words in losses),
        ("gradient/total_to_task", "length of a step against that of the task alone", "min"),
        ("oscillation/oscillating", "share of weights that oscillate between two codes", "min"),
    ):
        figure = plots.curves(material.runs, key, sentence(words), better)
        yield from _known(f"curve_{key.replace('/', '_')}", figure, f"{sentence(words)}.{caption}")


def _known(name: str, figure: Figure | None, caption: str) -> Iterator[Drawn]:
    if figure is not None:
        yield Drawn(name, figure, caption)


def _rows(material: Material) -> list[Row]:
    """What was given, what is only quantised, and what was trained."""
    metric, _ = metric_of(material.runs)
    first = [
        Row(name, plots.QUANTISED if name.startswith(UNTRAINED) else plots.GIVEN, [], one.mean, value(one, metric))
        for name, one in _references(material).items()
    ]
    if material.kind == STUDY_KIND:
        of = "test" if measure_of(material) == "test" else "best"
        return first + plots.rows_of(material.runs, material.summaries, of, measure_of(material))
    run = material.runs[0]
    measured = measured_on(run.summary)[0]
    told = value(Summary(1, measured, None, None), metric)
    return [*first, Row("trained", plots.TRAINED, [], measured, told)]


def _references(material: Material) -> dict[str, Summary]:
    """What was measured beside the variants; nothing where these are measured on another split."""
    return references(material.runs) if measure_of(material) == "test" else {}


def _levels(material: Material) -> dict[str, float]:
    """Values that no bits change, under the names of all that have them."""
    names: dict[float, list[str]] = {}
    for name, one in _references(material).items():
        if one.mean is not None and not name.startswith(UNTRAINED):
            names.setdefault(one.mean, []).append(name)
    return {", ".join(of): level for level, of in names.items()}


def _split(material: Material) -> str:
    if material.kind == STUDY_KIND:
        return split_of(material)
    return measured_on(material.runs[0].summary)[1]


def _distillation_losses(runs: Sequence[Run]) -> list[str]:
    """Names of what was weighed beside the task's loss in any of the runs, in the order in which they are met."""
    logged = (key.removeprefix("train/") for run in runs for key in run.curves if key.startswith("train/"))
    known = {key.removeprefix("balance/") for run in runs for key in run.curves if key.startswith("balance/")}
    return [name for name in dict.fromkeys(logged) if name == DISTILL or name in known - {TASK}]


def _of_term(name: str) -> str:
    return "distillation loss" if name == DISTILL else f"distillation loss {name}"


def _trades(material: Material) -> Iterator[Drawn]:
    """The metric against size and time, with the float network as a point, where one is to be traded for the other."""
    metric, mode = metric_of(material.runs)
    label = f"{name_of(metric)} on the {split_of(material)}{', %' if is_share(metric) else ''}"
    caption = "The line joins what nothing else beats in both."
    for name, words, points in (
        ("size", "packed size, kB", _by_size(material)),
        ("time", "latency of an image, ms", _by_time(material)),
    ):
        if len({x for variant, (x, _) in points.items() if variant != _FLOAT}) > 1:
            figure = plots.pareto(points, words, sentence(label), mode)
            yield from _known(f"pareto_{name}", figure, f"{sentence(label)} against {words}. {caption}")


def _by_size(material: Material) -> dict[str, tuple[float, float]]:
    packed = {run.folder: _kilobytes(run, "packed_bytes") for run in material.runs}
    whole = [_kilobytes(run, "float_bytes") for run in material.runs]
    return _points(material, packed, whole)


def _kilobytes(run: Run, key: str) -> float | None:
    size = run.summary.get(key)
    return None if size is None else size / 1000


def _by_time(material: Material) -> dict[str, tuple[float, float]]:
    """Of the fastest of a run's exported files, where it was measured, and of the same network in float."""
    files = {run.folder: read_exports(run.folder) for run in material.runs}
    own = {
        folder: min((file.latency for file in of if file.latency is not None), default=None)
        for folder, of in files.items()
    }
    whole = [file.milliseconds.get(FLOAT_ONNX) for of in files.values() for file in of]
    return _points(material, own, whole)


def _points(
    material: Material, costs: dict[Path, float | None], of_float: Sequence[float | None]
) -> dict[str, tuple[float, float]]:
    metric, measure = metric_of(material.runs)[0], measure_of(material)
    found = {}
    for name, measures in material.summaries.items():
        runs = [run for run in material.runs if run.variant == name and run.finished]
        known = [cost for run in runs if (cost := costs[run.folder]) is not None]
        mean = measures[measure].mean
        if known and mean is not None:
            found[name] = (sum(known) / len(known), scale(metric) * mean)
    whole = [cost for cost in of_float if cost is not None]
    level = next((s.mean for n, s in _references(material).items() if n.startswith("the student in float")), None)
    if whole and level is not None:
        found[_FLOAT] = (sum(whole) / len(whole), scale(metric) * level)
    return found
