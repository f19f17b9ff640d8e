"""The runs of a study by what they are called, where several names may stand for the same run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lqkd.studies.job import Task
from lqkd.studies.results import Run, read_runs
from lqkd.studies.settings import Study
from lqkd.utils.files import is_own_file
from lqkd.utils.yaml_text import load_yaml


def tasks_by_name(folder: Path, study: Study, names: Sequence[str]) -> list[tuple[str, Task]]:
    """Every name with each seed of the study, and the task that trains it.

    In a study with scenarios, names with the same configuration have the first one's: a training on labels alone is the
    same whoever the teacher is.

    Args:
        folder: of the study, with the configurations; a name without one is a task of its own.
        study: what its file says.
        names: of variants, with scenarios or without.
    """
    first: dict[str, str] = {}
    same = {name: first.setdefault(_configuration(folder, name), name) if study.scenarios else name for name in names}
    return [(name, Task(folder, same[name], seed)) for name in names for seed in study.seeds]


def _configuration(folder: Path, name: str) -> str:
    path = Task(folder, name, 0).config
    if not is_own_file(path, folder):
        return name
    return json.dumps(load_yaml(path.read_text(encoding="utf-8"), str(path)), sort_keys=True, default=str)


def read_named(tasks: Iterable[tuple[str, Task]]) -> list[Run]:
    """The runs of :func:`tasks_by_name`, in order, each under its own name."""
    runs = []
    for name, task in tasks:
        (run,) = read_runs([task])
        runs.append(replace(run, variant=name))
    return runs
