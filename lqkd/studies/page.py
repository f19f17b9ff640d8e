"""The report as one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from lqkd.errors import UsageError
from lqkd.runs.networks import networks_of
from lqkd.runs.verdicts import measured_on, verdicts
from lqkd.studies import drawn, exports
from lqkd.studies.differing import settings_table
from lqkd.studies.drawn import Drawn
from lqkd.studies.findings import findings, headline
from lqkd.studies.layers import read_layers
from lqkd.studies.material import STUDY_KIND, Material, Table, sentence
from lqkd.studies.results import Run, metric_of
from lqkd.studies.tables import HEADINGS, NONE, cells, endings, heading, note, number
from lqkd.tasks.values import is_share, name_of
from lqkd.utils import figures
from lqkd.utils.box_figures import PICTURE
from lqkd.utils.files import is_own_file
from lqkd.utils.progress import track

_TEMPLATE = "report.html.jinja"
RUN_HEADINGS = ("variant", "seed", "status", "val best", "val last", "test", "W", "A", "kB", "train s")
_LAYER_HEADINGS = ("layer", "kind", "W", "A", "parameters", "bytes", "how")
_LOG_LINES = 30
_WIDE = 1.9
"""Width over height from which a picture takes the room of two."""


@dataclass
class Picture:
    """An image of the page: its address (a data URI), what it shows, the line below it, and whether it is wide."""

    source: str
    alt: str
    caption: str
    wide: bool = False


def as_html(material: Material) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lqkd.studies", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    study = material.kind == STUDY_KIND
    return environment.get_template(_TEMPLATE).render(
        name=material.name,
        kind=material.kind,
        headline=headline(material),
        findings=findings(material),
        note=note(material.runs) if study else "",
        panels=material.panels,
        counts=_counts(material.runs),
        values=Table(_title(material), *_values(material)),
        results=[_picture(one) for one in track(drawn.results(material), "drawing", None)],
        training=[_picture(one) for one in track(drawn.training(material), "drawing", None)],
        runs=Table(f"Every run, {heading(material.runs)}", RUN_HEADINGS, [run_row(run) for run in material.runs]),
        found=_box_pictures(material.runs),
        regularizers=_regularizer_pictures(material.runs),
        layers=_layer_tables(material.runs),
        exports=Table("Exported files", exports.HEADINGS, exports.export_rows(material.runs)),
        measured=exports.measurements(material.runs),
        export_layers=[
            Table(f"Cost of each layer of {names}", exports.LAYER_HEADINGS, rows)
            for names, rows in exports.layer_tables(material.runs).items()
        ],
        failures=_failures(material),
        warnings=warnings(material.runs),
        differing=settings_table(material),
        configs=material.configs,
        command=f"python -m lqkd {'compare' if study else 'fit'} --config {'study.yaml' if study else 'config.yaml'}",
        origins=origins(material.runs),
    )


def _values(material: Material) -> tuple[Sequence[str], list[list[str]]]:
    """Headings and rows of the table of the variants: what all are held against stands above them.

    Of a run alone the networks, from the teacher to the exported files.
    """
    if material.kind != STUDY_KIND and material.runs[0].summary:
        (run,) = material.runs
        return ("network", name_of(run.metric), "size"), [[*one] for one in networks_of(run.folder, run.summary)]
    rows = cells(material.runs, material.summaries, material.baseline)
    count = len(material.summaries)
    return HEADINGS, rows[count:] + rows[:count]


def _title(material: Material) -> str:
    """``Accuracy of each variant, in %``."""
    metric, mode = metric_of(material.runs)
    if material.kind != STUDY_KIND:
        return sentence(f"{name_of(metric)} on the {measured_on(material.runs[0].summary)[1]}")
    what = ", in %" if is_share(metric) else ", less is better" if mode == "min" else ""
    return sentence(f"{name_of(metric)} of each variant{what}")


def _counts(runs: Sequence[Run]) -> str:
    told = endings(runs)
    plain = f"{sum(run.finished for run in runs)} of {len(runs)} runs finished"
    return plain if told == f"{len(runs)} finished" else f"{plain} ({told})"


def run_row(run: Run) -> list[str]:
    """The cells under :data:`RUN_HEADINGS`."""

    def shown(value: float | None) -> str:
        return NONE if value is None else number(run.metric, value)

    summary = run.summary
    size = summary.get("packed_bytes")
    row = [run.variant, str(run.seed), run.ending, shown(run.best), shown(run.last), shown(run.test)]
    row += [str(summary.get(key) or NONE) for key in ("weight_bits", "activation_bits")]
    return [*row, NONE if size is None else f"{size / 1000:.1f}", str(summary.get("train_seconds", NONE))]


def origins(runs: Sequence[Run]) -> list[str]:
    """Every combination of machine and versions, with the number of runs from there."""
    counts: dict[str, int] = {}
    for run in runs:
        if "versions" in run.summary:
            versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
            line = f"{run.summary.get('machine')}; {versions}"
            counts[line] = counts.get(line, 0) + 1
    return [f"{count} runs: {line}" if count > 1 else f"1 run: {line}" for line, count in counts.items()]


# ---- pictures


def _picture(one: Drawn) -> Picture:
    width, height = one.figure.get_size_inches()
    return Picture(
        _of_svg(figures.svg(one.figure)), one.alt, one.caption, width > _WIDE * height and width > figures.WIDTH
    )


def _of_svg(text: str) -> str:
    return _uri(text.encode(), "image/svg+xml")


def _regularizer_pictures(runs: Sequence[Run]) -> dict[str, list[Picture]]:
    """The pictures of each variant's first run that has any, as SVG where there is one beside the PNG."""
    found: dict[str, list[Picture]] = {}
    for run in runs:
        pictures = sorted((run.folder / "regularizer").rglob("*.png"))
        files = [path for path in pictures if is_own_file(path, run.folder)]
        if run.variant in found or not files:
            continue
        sentences = {name: told.sentence for name, told in verdicts(run.summary).items()}
        for path in files:
            below = path.relative_to(run.folder / "regularizer")
            name, told = below.with_suffix("").as_posix(), sentences.get(below.parent.name, "")
            content, width, height = _png(path)
            vector = path.with_suffix(".svg")
            picture = Picture(
                _of_svg(_svg(vector)) if is_own_file(vector, run.folder) else _uri(content, "image/png"),
                f"{name} of {run.variant}, seed {run.seed}. {told}",
                f"{name}, seed {run.seed}",
                width > _WIDE * height,
            )
            found.setdefault(run.variant, []).append(picture)
    return found


def _box_pictures(runs: Sequence[Run]) -> list[Picture]:
    """What the networks of each variant's first detector find on photographs."""
    first = {run.variant: run for run in reversed(runs) if is_own_file(run.folder / PICTURE, run.folder)}
    found = []
    for run in reversed(first.values()):
        content, width, height = _png(run.folder / PICTURE)
        told = f"{run.variant}, seed {run.seed}: test photographs with what is there, and what each network finds there"
        found.append(Picture(_uri(content, "image/png"), told, told, width > height))
    return found


def _png(path: Path) -> tuple[bytes, int, int]:
    """The content of a picture, its width and its height.

    Raises:
        UsageError: when it is something else, which does not belong on a page.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            size = picture.size
            picture.verify()
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UsageError(f"{str(path)!r} is no picture in the format PNG: remove it") from error
    return content, *size


def _svg(path: Path) -> str:
    """The content of a drawing; within an image of a page nothing in it is run or fetched.

    Raises:
        UsageError: when it is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = ""
    if "<svg" not in text[:1000]:
        raise UsageError(f"{str(path)!r} is no drawing in the format SVG: remove it")
    return text


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- layers, failures, warnings


def _layer_tables(runs: Sequence[Run]) -> list[tuple[Table, list[str]]]:
    """One table for all variants whose layers are the same."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for run in runs:
        layers, others = read_layers(run.folder)
        names = groups.setdefault((tuple(layers), tuple(others)), []) if layers else []
        if run.variant not in names:
            names.append(run.variant)
    tables = []
    for (layers, others), names in groups.items():
        rows = [
            [
                layer.name,
                layer.kind,
                layer.weight_bits,
                layer.activation_bits,
                f"{layer.parameters:,}",
                NONE if layer.packed_bytes is None else f"{layer.packed_bytes:,.0f}",
                layer.note,
            ]
            for layer in layers
        ]
        tables.append((Table(f"Layers of {', '.join(names)}", _LAYER_HEADINGS, rows), list(others)))
    return tables


def _failures(material: Material) -> list[tuple[str, str]]:
    """What each unfinished run says of itself, and the end of what it printed."""
    found = []
    for run, task in zip_longest(material.runs, material.tasks):  # a run alone has no task
        if run.finished:
            continue
        log = None if task is None else task.log
        is_there = log is not None and is_own_file(log, material.folder)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log and is_there else []
        found.append((told(run), "\n".join(lines[-_LOG_LINES:])))
    return found


def told(run: Run) -> str:
    """What an unfinished run says of itself."""
    return f"{run.variant} seed {run.seed} {run.status}: {run.message}"


def warnings(runs: Iterable[Run]) -> list[str]:
    """What the runs warned of, and every exported file that is out of date."""
    runs = list(runs)
    said = [f"{run.variant} seed {run.seed}: {text}" for run in runs for text in run.summary.get("warnings", ())]
    return said + [line for run in runs for line in run.outdated]
