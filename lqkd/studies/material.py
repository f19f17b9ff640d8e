"""All that the report of a run or a study tells, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lqkd.errors import UsageError
from lqkd.runs.folder import CONFIG, has_ended, resume_command
from lqkd.studies.job import Task
from lqkd.studies.named import read_named, tasks_by_name
from lqkd.studies.panel import Panel, panel, panel_tables
from lqkd.studies.results import Run, read
from lqkd.studies.settings import STUDY, read_mapping, read_study
from lqkd.studies.statistics import Summary, summarize
from lqkd.utils.files import check_inside, is_own_file
from lqkd.utils.progress import track

STUDY_KIND, RUN_KIND = "study", "run"


@dataclass
class Table:
    """A table of the page."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Material:
    """What a report tells.

    Attributes:
        folder: of the run or study.
        name: of it.
        kind: ``run`` or ``study``.
        runs: all of them.
        summaries: by variant and measure.
        baseline: the variant that the others are compared with.
        tasks: of a study, beside the runs.
        configs: name of a file to its text.
        panel: of a study with scenarios.
        panels: its tables.
    """

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


def gather(folder: Path) -> Material:
    """Read a run or a study.

    Raises:
        UsageError: when ``folder`` is neither, one of its files is damaged, or a link in it leads elsewhere.
    """
    if is_own_file(folder / STUDY, folder):
        return _of_study(folder)
    if is_own_file(folder / CONFIG, folder):
        return _of_run(folder)
    raise UsageError(f"{str(folder)!r} is neither a run folder (with {CONFIG}) nor that of a study (with {STUDY})")


def _of_study(folder: Path) -> Material:
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
    panels = [] if made is None else [Table(sentence(t), h, rows) for t, h, rows in panel_tables(made, baseline)]
    summaries = summarize(runs, baseline)
    return Material(folder, study.name, STUDY_KIND, runs, summaries, baseline, tasks, configs, made, panels)


def _of_run(folder: Path) -> Material:
    name = "/".join(folder.resolve().parts[-2:])
    settings = read_mapping(folder / CONFIG, "the run's configuration")
    run = read(folder, name, settings.get("seed_everything"))
    if not has_ended(run.summary):
        run.status, run.message = "stopped", f"not finished: {resume_command(folder)} goes on with it"
    configs = {CONFIG: _text(folder / CONFIG)}
    return Material(folder, name, RUN_KIND, [run], summarize([run], None), None, [], configs)


def sentence(text: str) -> str:
    """``text`` with a capital letter."""
    return f"{text[:1].upper()}{text[1:]}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
