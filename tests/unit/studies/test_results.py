"""What is read of runs, of any task and of earlier versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from lqkd.studies.bars import StudyProgress
from lqkd.studies.job import Task
from lqkd.studies.results import Run, metric_of, read
from lqkd.studies.settings import Study, Sweep
from lqkd.studies.statistics import summarize
from lqkd.studies.sweep import BEST, search
from lqkd.studies.tables import cells, heading, note
from lqkd.studies.variants import Variants

OLD = {
    "val_accuracy": 0.9,
    "test_accuracy": 0.88,
    "teacher_accuracy": 0.97,
    "student_float_accuracy": 0.95,
    "student_initial_quantized_accuracy": 0.4,
}


def test_a_summary_that_an_earlier_version_wrote_is_read_as_one_of_accuracies(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(OLD))
    (tmp_path / "metrics.csv").write_text("epoch,step,val/acc\n0,1,0.8\n")
    run = read(tmp_path, "a", 0)
    assert (run.metric, run.mode) == ("val/acc", "max")
    assert (run.best, run.last, run.test) == (0.9, 0.8, 0.88)
    assert [run.summary[key] for key in ("teacher", "student_float", "student_start")] == [0.97, 0.95, 0.4]
    assert heading([run]) == "accuracy in %"


def test_the_line_of_a_run_that_ends_has_its_metric_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, summary in enumerate((OLD, {"metric": "val/mae", "mode": "min", "val": 12.5})):
        task = Task(tmp_path, "a", seed)
        for path, content in (
            (task.outcome, {"status": "finished", "message": ""}),
            (task.folder / "summary.json", summary),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        StudyProgress(2, 2 - seed, 1).ended(task)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/2] a seed 0: val best 90.00%;")
    assert second == "[2/2] a seed 1: val best 12.5"


def test_a_sweep_whose_last_trial_fails_chooses_the_least_error(tmp_path: Path) -> None:
    base = yaml.safe_load((Path(__file__).parents[3] / "configs" / "regularizer.yaml").read_text())
    parameters = {"trainer.max_epochs": {"low": 1, "high": 1000}}
    study = Study("errors", "base.yaml", seeds=[0], root=str(tmp_path), sweep=Sweep(parameters, trials=3))
    left = [2.5, 1.5, None]

    def run(tasks: Sequence[Task]) -> None:
        (task,), error = tasks, left.pop(0)
        task.outcome.parent.mkdir(parents=True)
        task.outcome.write_text(json.dumps({"status": "finished" if error else "failed", "message": ""}))
        if error is not None:
            task.folder.mkdir(parents=True)
            (task.folder / "summary.json").write_text(json.dumps({"metric": "val/mae", "mode": "min", "val": error}))

    search(study, Variants(study.folder, base), run)
    assert (study.folder / BEST).read_text().startswith("# trial 1 of 3: best mean val/mae, 1.5000")


def errors(variant: str, seed: int, error: float) -> Run:
    summary = {"metric": "val/mae", "mode": "min", "val": error, "test": error + 1, "teacher": 2.0}
    return Run(variant, seed, "finished", "", Path(), summary, {"val/mae": [(1, error), (2, error + 0.125)]})


def test_values_of_another_metric_are_no_percentages() -> None:
    runs = [errors("a", 0, 12.5), errors("b", 0, 12.0)]
    assert metric_of(runs) == ("val/mae", "min")
    assert heading(runs) == "mae (less is better)"
    assert note(runs).startswith("Mae (less is better), mean and standard deviation")
    first, second, teacher = cells(runs, summarize(runs, "a"), "a")
    assert first[:5] == ["a", "12.5", "baseline", "12.62", "baseline"]
    assert second[1:3] == ["12", "-0.5"]
    assert teacher[5] == "2"


@pytest.mark.parametrize(("runs", "expected"), [([], "val/acc"), ([Run("a", 0, "failed", "", Path())], "val/acc")])
def test_without_a_summary_it_is_the_accuracy(runs: list[Run], expected: str) -> None:
    assert metric_of(runs)[0] == expected
