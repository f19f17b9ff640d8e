"""A run or a study as one page of HTML that needs nothing else, with Markdown, CSV and, on request, its figures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lqkd.errors import UsageError
from lqkd.studies import drawn
from lqkd.studies.material import Material, gather
from lqkd.studies.page import RUN_HEADINGS, as_html, origins, run_row, told, warnings
from lqkd.studies.panel import PANEL, write_panel
from lqkd.studies.tables import HEADINGS, RUNS, TABLE, cells, markdown, note, write_tables
from lqkd.utils import escaping, figures
from lqkd.utils.files import write_text
from lqkd.utils.progress import track

HTML = "report.html"
MARKDOWN = "report.md"
FIGURES = "figures"
"""Folder for the figures as files."""


def report(folder: Path, with_figures: bool = False) -> Path:
    """Write ``report.html``, one page that needs no network, ``report.md``, ``table.csv`` and ``runs.csv``.

    Args:
        folder: of a run or a study, finished or not; the files go there.
        with_figures: whether its figures are written to ``figures/`` too: ``NAME.svg``, which turns dark where a
            reader wants that, ``NAME.png`` and ``NAME_dark.png``.

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
    if with_figures:
        _write_figures(material)
    for run in material.runs:
        for line in run.outdated:
            print(f"lqkd: warning: {escaping.terminal(line)}", file=sys.stderr)
    files = [HTML, MARKDOWN, TABLE, RUNS, *([] if material.panel is None else [PANEL]), *[f"{FIGURES}/"] * with_figures]
    print(f"written to {folder}: {', '.join(files[:-1])} and {files[-1]}")
    return folder / HTML


def as_markdown(material: Material) -> str:
    """The tables of the report as Markdown."""
    rows = cells(material.runs, material.summaries, material.baseline)
    parts = [f"# {escaping.markdown(material.name)}\n", f"{note(material.runs)}\n"]
    for table in material.panels:
        parts += [f"## {escaping.markdown(table.caption)}\n", markdown(table.headings, table.rows)]
    parts += ["## Variants\n"] * bool(material.panels) + [markdown(HEADINGS, rows)]
    parts += ["## Runs\n", markdown(RUN_HEADINGS, [run_row(run) for run in material.runs])]
    failed = [run for run in material.runs if not run.finished]
    if failed:
        parts.append("## Not finished\n")
        parts.append("".join(f"- {escaping.markdown(told(run))}\n" for run in failed))
    for title, lines in (("Warnings", warnings(material.runs)), ("Versions and machines", origins(material.runs))):
        if lines:
            parts += [f"## {title}\n", "".join(f"- {escaping.markdown(line)}\n" for line in lines)]
    return "\n".join(parts)


def _write_figures(material: Material) -> None:
    folder = material.folder / FIGURES
    for palette, ending in ((figures.LIGHT, ""), (figures.DARK, "_dark")):
        with figures.drawn_in(palette):
            for one in track((*drawn.results(material), *drawn.training(material)), "drawing", None):
                figures.write_png(folder / f"{one.name}{ending}.png", one.figure)
                if palette is figures.LIGHT:
                    write_text(folder / f"{one.name}.svg", figures.svg(one.figure))
