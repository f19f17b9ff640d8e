"""Variants of a training, each with every seed, compared pair by pair."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from lqkd.runs.folder import lock, remove_partial_files
from lqkd.studies.bars import StudyProgress
from lqkd.studies.cluster import check_cluster, run_on_cluster
from lqkd.studies.job import FINISHED, STOPPED, Task, tasks_of
from lqkd.studies.local import run_here
from lqkd.studies.named import read_named, tasks_by_name
from lqkd.studies.panel import panel, panel_tables, write_panel
from lqkd.studies.results import Run
from lqkd.studies.settings import STUDY, Study
from lqkd.studies.statistics import Summary, summarize
from lqkd.studies.sweep import check_sweep, search
from lqkd.studies.tables import HEADINGS, cells, heading, markdown, write_tables
from lqkd.studies.variants import Variants
from lqkd.utils.escaping import terminal
from lqkd.utils.files import write_text
from lqkd.utils.tables import print_table


def compare(study: Study, base: dict[str, Any], retry_failed: bool = False) -> None:
    """Train every variant of a study with every seed and compare them pair by pair.

    Runs that are finished are kept, stopped ones go on.

    Args:
        study, base: as :func:`lqkd.studies.settings.read_settings` reads them from a file.
        retry_failed: whether to train runs again that failed.

    Raises:
        UsageError: after a user's mistake.
        Stopped: after Ctrl-C or SIGTERM, once the runs have saved themselves.
    """
    check_cluster(study.launcher)
    if study.sweep is not None:
        check_sweep(study.sweep)
    study.folder.mkdir(parents=True, exist_ok=True)
    held = lock(study.folder)
    try:
        _compare(study, base, retry_failed)
    finally:
        os.close(held)


def _compare(study: Study, base: dict[str, Any], retry: bool) -> None:
    remove_partial_files(study.folder)
    variants = Variants(study.folder, base)
    for name, overrides in study.runs.items():
        variants.write(name, overrides)
    if study.sweep is not None:
        variants.write("base", {})
    write_text(study.folder / STUDY, _described(study))
    names = list(study.runs)
    once = list(dict.fromkeys(task.variant for _, task in tasks_by_name(study.folder, study, names)))
    tasks = [task for seed in study.seeds for task in tasks_of(study, once, seed)]
    trials = study.sweep.trials if study.sweep is not None else 0
    run = Runner(study, len(tasks) + trials * len(study.seeds), retry)
    run(tasks)
    if study.sweep is not None:
        names += search(study, variants, run)
    results = read_named(tasks_by_name(study.folder, study, names))
    summaries = summarize(results, study.compared_with)
    write_tables(study.folder, results, summaries)
    if study.scenarios:
        write_panel(study.folder, panel(study, results))
    _print(study, results, summaries)


def _print(study: Study, results: Sequence[Run], summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    baseline = study.compared_with
    compared = "" if baseline is None else f" (difference to {baseline}: paired by seed, 95 % interval)"
    title, width = f"{study.name}: {heading(results)}{compared}", None if sys.stdout.isatty() else 120
    if study.scenarios:
        for told, headings, rows in panel_tables(panel(study, results), baseline):
            print(terminal(f"{study.name}: {heading(results)}; {told}"), markdown(headings, rows), sep="\n\n")
    else:
        print_table(title, HEADINGS, cells(results, summaries, baseline), width=width)
    for result in results:
        if not result.finished:
            told = f"{result.variant} seed {result.seed} {result.status}: {result.message}"
        elif result.verdict is not None:
            told = f"{result.variant} seed {result.seed} {result.verdict}: {result.sentence}"
        else:
            continue
        print(terminal(told))
    print(f"study folder: {study.folder}; python -m lqkd report {study.folder} makes a page")


class Runner:
    """Runs those tasks that have not ended yet, here or on a cluster.

    Args:
        study: the study.
        total: number of its runs.
        retry: whether to train runs again that failed.
    """

    def __init__(self, study: Study, total: int, retry: bool) -> None:
        self.study, self.retry = study, retry
        self.progress = StudyProgress(total, total, study.launcher.parallel)

    def __call__(self, tasks: Sequence[Task]) -> None:
        """Run what is left of ``tasks``."""
        left = []
        for task in tasks:
            status, _ = task.ended()
            if status not in (FINISHED, STOPPED) and self.retry:
                task.outcome.unlink()
                shutil.rmtree(task.folder, ignore_errors=True)
                status = STOPPED
            if status == STOPPED:
                left.append(task)
        self.progress.left -= len(tasks) - len(left)
        if len(left) < len(tasks):
            print(f"{len(tasks) - len(left)} of {len(tasks)} runs are done already", flush=True)
        launcher = self.study.launcher
        if launcher.submitit is None:
            run_here(left, launcher.parallel, self.progress.ended, self.progress.waiting)
        elif left:
            run_on_cluster(self.study.folder, left, launcher, self.progress.ended, self.progress.waiting)


def _described(study: Study) -> str:
    return yaml.safe_dump(asdict(study), sort_keys=False)
