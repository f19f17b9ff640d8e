"""A run or a study as one page of HTML that needs nothing else, with Markdown and CSV."""

from __future__ import annotations

import base64
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from lqkd.errors import UsageError
from lqkd.runs.folder import CONFIG, has_ended, resume_command
from lqkd.runs.verdicts import verdicts
from lqkd.studies import exports, plots
from lqkd.studies.exports import read_exports
from lqkd.studies.job import Task
from lqkd.studies.layers import read_layers
from lqkd.studies.named import read_named, tasks_by_name
from lqkd.studies.panel import PANEL, Panel, panel, panel_tables, write_panel
from lqkd.studies.results import Run, metric_of, read
from lqkd.studies.settings import STUDY, read_mapping, read_study
from lqkd.studies.statistics import Summary, summarize
from lqkd.studies.tables import (
    HEADINGS,
    NONE,
    RUNS,
    TABLE,
    cells,
    endings,
    heading,
    markdown,
    note,
    number,
    scale,
    write_tables,
)
from lqkd.tasks.values import is_share, name_of
from lqkd.utils import escaping
from lqkd.utils.files import check_inside, is_own_file, write_text
from lqkd.utils.progress import track

TASK, DISTILL = "task", "distill"
"""Names of losses as balances have them, which would load PyTorch."""

HTML = "report.html"
MARKDOWN = "report.md"
_TEMPLATE = "report.html.jinja"
_RUN_HEADINGS = ("variant", "seed", "status", "val best", "val last", "test", "W", "A", "kB", "train s")
_LAYER_HEADINGS = ("layer", "kind", "W", "A", "parameters", "bytes", "how")
_LOG_LINES = 30


@dataclass
class Picture:
    """An image of the page: its address (a data URI), what it shows, and the line below it."""

    source: str
    alt: str
    caption: str


@dataclass
class Table:
    """A table of the page."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Material:
    """All that the page tells."""

    folder: Path
    name: str
    kind: str
    runs: list[Run]
    summaries: dict[str, dict[str, Summary]]
    baseline: str | None
    tasks: list[Task]
    configs: dict[str, str]
    panel: Panel | None = None
    panels: list[Table] = field(default_factory=list)


def report(folder: Path) -> Path:
    """Write ``report.html``, one page that needs no network, ``report.md``, ``table.csv`` and ``runs.csv``.

    Args:
        folder: of a run or a study, finished or not; the files go there.

    Returns:
        The page.

    Raises:
        UsageError: when the folder is none of a run or a study, a file in it is damaged, or jinja2 is missing.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError("report needs jinja2: pip install 'lqkd[report]'")
    material = gather(folder)
    write_tables(folder, material.runs, material.summaries)
    if material.panel is not None:
        write_panel(folder, material.panel)
    write_text(folder / MARKDOWN, as_markdown(material))
    write_text(folder / HTML, as_html(material))
    for run in material.runs:
        for sentence in run.outdated:
            print(f"lqkd: warning: {escaping.terminal(sentence)}", file=sys.stderr)
    tables = f"{TABLE} and {RUNS}" if material.panel is None else f"{TABLE}, {RUNS} and {PANEL}"
    print(f"written to {folder}: {HTML}, {MARKDOWN}, {tables}")
    return folder / HTML


def gather(folder: Path) -> Material:
    """Read a run or a study.

    Raises:
        UsageError: when ``folder`` is neither, one of its files is damaged, or a link in it leads elsewhere.
    """
    if is_own_file(folder / STUDY, folder):
        study = read_study(folder / STUDY)
        names = [*study.runs, *sorted(path.stem for path in (folder / "variants").glob("trial_*.yaml"))]
        named = tasks_by_name(folder, study, names)
        tasks = [task for _, task in named]
        for task in tasks:
            check_inside(task.folder, folder)
        runs = read_named(track(named, "reading runs", len(named)))
        configs = {STUDY: _text(folder / STUDY)}
        for name in names:
            config = folder / "variants" / f"{name}.yaml"
            configs[name] = _text(config) if is_own_file(config, folder) else ""
        baseline, made = study.compared_with, panel(study, runs) if study.scenarios else None
        panels = [] if made is None else [Table(_sentence(t), h, rows) for t, h, rows in panel_tables(made, baseline)]
        summaries = summarize(runs, baseline)
        return Material(folder, study.name, "study", runs, summaries, baseline, tasks, configs, made, panels)
    if is_own_file(folder / CONFIG, folder):
        name = "/".join(folder.resolve().parts[-2:])
        settings = read_mapping(folder / CONFIG, "the run's configuration")
        text = _text(folder / CONFIG)
        run = read(folder, name, settings.get("seed_everything"))
        if not has_ended(run.summary):
            run.status, run.message = "stopped", f"not finished: {resume_command(folder)} goes on with it"
        return Material(folder, name, "run", [run], summarize([run], None), None, [], {CONFIG: text})
    raise UsageError(f"{str(folder)!r} is neither a run folder (with {CONFIG}) nor that of a study (with {STUDY})")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# ---- Markdown


def as_markdown(material: Material) -> str:
    """The tables of the report as Markdown."""
    rows = cells(material.runs, material.summaries, material.baseline)
    parts = [f"# {escaping.markdown(material.name)}\n", f"{note(material.runs)}\n"]
    for table in material.panels:
        parts += [f"## {escaping.markdown(table.caption)}\n", markdown(table.headings, table.rows)]
    parts += ["## Variants\n"] * bool(material.panels) + [markdown(HEADINGS, rows)]
    parts += ["## Runs\n", markdown(_RUN_HEADINGS, [_run_row(run) for run in material.runs])]
    failed = [run for run in material.runs if not run.finished]
    if failed:
        parts.append("## Not finished\n")
        parts.append("".join(f"- {escaping.markdown(_told(run))}\n" for run in failed))
    for title, lines in (("Warnings", _warnings(material.runs)), ("Versions and machines", _origins(material.runs))):
        if lines:
            parts += [f"## {title}\n", "".join(f"- {escaping.markdown(line)}\n" for line in lines)]
    return "\n".join(parts)


def _run_row(run: Run) -> list[str]:
    def shown(value: float | None) -> str:
        return NONE if value is None else number(run.metric, value)

    summary = run.summary
    size = summary.get("packed_bytes")
    row = [run.variant, str(run.seed), run.ending, shown(run.best), shown(run.last), shown(run.test)]
    row += [str(summary.get(key) or NONE) for key in ("weight_bits", "activation_bits")]
    return [*row, NONE if size is None else f"{size / 1000:.1f}", str(summary.get("train_seconds", NONE))]


def _origins(runs: Sequence[Run]) -> list[str]:
    """Every combination of machine and versions, with the number of runs from there."""
    counts: dict[str, int] = {}
    for run in runs:
        if "versions" in run.summary:
            versions = ", ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
            line = f"{run.summary.get('machine')}; {versions}"
            counts[line] = counts.get(line, 0) + 1
    return [f"{count} runs: {line}" if count > 1 else f"1 run: {line}" for line, count in counts.items()]


# ---- HTML


def as_html(material: Material) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lqkd.studies", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(_TEMPLATE).render(
        name=material.name,
        kind=material.kind,
        note=note(material.runs),
        panels=material.panels,
        counts=_counts(material.runs),
        values=Table(
            _title(material.runs),
            HEADINGS,
            cells(material.runs, material.summaries, material.baseline),
        ),
        runs=Table(f"Every run, {heading(material.runs)}", _RUN_HEADINGS, [_run_row(run) for run in material.runs]),
        plots=_plots(material),
        regularizers=_regularizer_pictures(material.runs),
        layers=_layer_tables(material.runs),
        exports=Table("Exported files", exports.HEADINGS, exports.export_rows(material.runs)),
        measured=exports.measurements(material.runs),
        export_layers=[
            Table(f"Cost of each layer of {names}", exports.LAYER_HEADINGS, rows)
            for names, rows in exports.layer_tables(material.runs).items()
        ],
        failures=_failures(material),
        warnings=_warnings(material.runs),
        configs=material.configs,
        origins=_origins(material.runs),
    )


def _title(runs: Sequence[Run]) -> str:
    """``Accuracy of each variant, in %``."""
    metric, mode = metric_of(runs)
    name = name_of(metric)
    what = ", in %" if is_share(metric) else ", less is better" if mode == "min" else ""
    return _sentence(f"{name} of each variant{what}")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _counts(runs: Sequence[Run]) -> str:
    told = endings(runs)
    plain = f"{sum(run.finished for run in runs)} of {len(runs)} runs finished"
    return plain if told == f"{len(runs)} finished" else f"{plain} ({told})"


def _plots(material: Material) -> list[Picture]:
    return [
        Picture(_uri(plots.svg(figure).encode(), "image/svg+xml"), alt, caption)
        for figure, alt, caption in track(_figures(material), "drawing", 6 if material.baseline is None else 8)
        if figure is not None
    ]


def _figures(material: Material) -> Iterator[tuple[Figure | None, str, str]]:
    """Figure, alternative text and caption; a figure is None where nothing is known."""
    metric, mode = metric_of(material.runs)
    name, unit = name_of(metric), ", %" if is_share(metric) else ""
    written = ("{:.2f} %" if is_share(metric) else "{:.4g}").format
    if material.baseline is not None:
        for measure, words in (("val_best", f"best validation {name}"), ("test", f"test {name}")):
            figure = plots.differences(material.summaries, measure, material.baseline, metric)
            caption = f"Paired difference of the {words} to {material.baseline}: mean over seeds and 95 % interval."
            yield figure, f"{caption} The numbers are in the table of the variants.", caption
    for key, words in (
        (metric, f"{name} on the validation split"),
        ("train/loss", "training loss"),
        ("train/task", "task loss in training"),
        *((f"train/{of}", f"{_of_term(of)} in training") for of in _distillation_losses(material.runs)),
    ):
        caption = f"Learning curves: {words}; mean over seeds, and the range of the seeds."
        last = _last_values(material.runs, key)
        yield plots.curves(material.runs, key, words), f"{caption} Last epoch: {last}.", caption
    for cost, words in ((_kilobytes, "packed size, kB"), (_latency, "latency, ms")):
        points = _pareto_points(material, cost, scale(metric))
        caption = f"Best validation {name} against {words}; the line joins what nothing else beats in both."
        told = "; ".join(f"{variant}: {x:.1f}, {written(y)}" for variant, (x, y) in points.items())
        yield plots.pareto(points, words, f"best validation {name}{unit}", mode), f"{caption} {told}.", caption


def _distillation_losses(runs: Sequence[Run]) -> list[str]:
    """Names of what was weighed beside the task's loss in any of the runs, in the order in which they are met."""
    logged = (key.removeprefix("train/") for run in runs for key in run.curves if key.startswith("train/"))
    known = {key.removeprefix("balance/") for run in runs for key in run.curves if key.startswith("balance/")}
    return [name for name in dict.fromkeys(logged) if name == DISTILL or name in known - {TASK}]


def _of_term(name: str) -> str:
    return "distillation loss" if name == DISTILL else f"distillation loss {name}"


def _last_values(runs: Sequence[Run], metric: str) -> str:
    values: dict[str, list[float]] = {}
    for run in runs:
        if run.curves.get(metric):
            values.setdefault(run.variant, []).append(run.curves[metric][-1][1])
    return ", ".join(f"{name} {sum(last) / len(last):.3f}" for name, last in values.items())


def _pareto_points(
    material: Material, cost: Callable[[Run], float | None], factor: int
) -> dict[str, tuple[float, float]]:
    points = {}
    for name, measures in material.summaries.items():
        runs = [run for run in material.runs if run.variant == name and run.finished]
        costs = [value for run in runs if (value := cost(run)) is not None]
        if costs and measures["val_best"].mean is not None:
            points[name] = (sum(costs) / len(costs), factor * measures["val_best"].mean)
    return points


def _kilobytes(run: Run) -> float | None:
    size = run.summary.get("packed_bytes")
    return None if size is None else size / 1000


def _latency(run: Run) -> float | None:
    """Of the fastest of the run's exported files, where it was measured."""
    times = [file.latency for file in read_exports(run.folder)]
    return min((time for time in times if time is not None), default=None)


def _regularizer_pictures(runs: Sequence[Run]) -> dict[str, list[Picture]]:
    """The pictures of each variant's first run that has any."""
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
            picture = Picture(
                _uri(_png(path), "image/png"),
                f"{name} of {run.variant}, seed {run.seed}. {told}",
                f"{name}, seed {run.seed}",
            )
            found.setdefault(run.variant, []).append(picture)
    return found


def _png(path: Path) -> bytes:
    """The content of a picture.

    Raises:
        UsageError: when it is something else, which does not belong on a page.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.verify()
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UsageError(f"{str(path)!r} is no picture in the format PNG: remove it") from error
    return content


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
    told = []
    for run, task in zip_longest(material.runs, material.tasks):  # a run alone has no task
        if run.finished:
            continue
        log = None if task is None else task.log
        is_there = log is not None and is_own_file(log, material.folder)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log and is_there else []
        told.append((_told(run), "\n".join(lines[-_LOG_LINES:])))
    return told


def _told(run: Run) -> str:
    return f"{run.variant} seed {run.seed} {run.status}: {run.message}"


def _warnings(runs: Sequence[Run]) -> list[str]:
    told = [f"{run.variant} seed {run.seed}: {text}" for run in runs for text in run.summary.get("warnings", ())]
    return told + [sentence for run in runs for sentence in run.outdated]


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
