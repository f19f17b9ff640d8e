"""Runs as jobs of a SLURM cluster, through submitit."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError, first_line
from lqkd.studies.job import Task
from lqkd.studies.settings import Launcher
from lqkd.utils.files import write_json

_JOBS = "jobs"
_EVERY = 1.0
"""Seconds from one look at the queue to the next."""


def check_cluster(launcher: Launcher) -> None:
    """Refuse settings of a launcher that cannot work, before anything is submitted.

    Raises:
        UsageError: when submitit is missing or refuses them.
    """
    if launcher.submitit is not None and importlib.util.find_spec("submitit") is None:
        raise UsageError("launcher.submitit needs submitit: pip install 'lqkd[slurm]'")


def run_on_cluster(
    study: Path,
    tasks: Sequence[Task],
    launcher: Launcher,
    ended: Callable[[Task], None],
    waiting: Callable[..., None],
) -> None:
    """Submit the tasks and wait for them.

    Jobs go on without this process: started again it finds those that are in the queue and waits for them.

    Args:
        study: folder of the study, on a disk that all machines see.
        tasks: what to run.
        launcher: settings.
        ended: called after each, whatever came of it.
        waiting: called every few seconds with the tasks that are not done.

    Raises:
        UsageError: when submitit refuses the settings.
    """
    import submitit

    folder = (study / _JOBS).resolve()
    options: dict[str, Any] = dict(launcher.submitit or {})
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", None))
        if executor.cluster == "slurm":
            options = {"slurm_array_parallelism": launcher.parallel} | options
        executor.update_parameters(**{"name": study.name} | options)
    except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
        raise UsageError(f"launcher.submitit is not possible: {first_line(error)}") from error
    kind = submitit.SlurmJob if executor.cluster == "slurm" else submitit.LocalJob
    jobs: dict[Task, Any] = {}
    for task in tasks:
        record = _record(task)
        if record.is_file():
            job: Any = kind(folder=folder, job_id=json.loads(record.read_text(encoding="utf-8"))["job"])
            if not job.done(force_check=True):
                jobs[task] = job
    new = [task for task in tasks if task not in jobs]
    if executor.cluster == "slurm" and new:  # one array, which keeps to its own limit of jobs at a time
        with executor.batch():
            submitted = [executor.submit(task) for task in new]
        jobs |= _recorded(new, submitted)
        new = []
    while jobs or new:
        while new and len(jobs) < launcher.parallel:
            task = new.pop(0)
            jobs |= _recorded([task], [executor.submit(task)])
        for task in [task for task, job in jobs.items() if job.done()]:
            del jobs[task]
            _record(task).unlink(missing_ok=True)
            ended(task)
        waiting(list(jobs))
        time.sleep(_EVERY if jobs else 0)


def _record(task: Task) -> Path:
    return task.study / _JOBS / task.variant / f"seed_{task.seed}.json"


def _recorded(tasks: Sequence[Task], jobs: Sequence[Any]) -> dict[Task, Any]:
    for task, job in zip(tasks, jobs, strict=True):
        write_json(_record(task), {"job": job.job_id})
    return dict(zip(tasks, jobs, strict=True))
