"""A search for settings with Optuna, by the metric on the validation split; and the same as a sweep file of W&B."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from lqkd.errors import UsageError
from lqkd.studies.job import Task, tasks_of
from lqkd.studies.results import Run, metric_of, read_runs
from lqkd.studies.settings import Study, Sweep
from lqkd.studies.variants import Variants
from lqkd.utils.files import write_text
from lqkd.utils.tables import write_csv

TRIALS = "sweep.csv"
BEST = "best.yaml"
WANDB = "wandb_sweep.yaml"


def check_sweep(sweep: Sweep) -> None:
    """Refuse a sweep that cannot work, before the first run.

    Raises:
        UsageError: when Optuna is missing or a parameter is not described as it must be.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("sweep needs optuna: pip install 'lqkd[sweep]'")
    if not sweep.parameters:
        raise UsageError("sweep.parameters is empty: name at least one setting")
    for key, space in sweep.parameters.items():
        numbers = all(type(space.get(end)) in (int, float) for end in ("low", "high"))
        ranged = numbers and space.keys() <= {"low", "high", "log", "step"} and space["low"] <= space["high"]
        if ranged and (space.get("log") and ("step" in space or space["low"] <= 0)):
            ranged = False
        if not ranged and (space.keys() != {"choices"} or not isinstance(space["choices"], list)):
            raise UsageError(
                f"sweep.parameters.{key}={space} is not possible: give {{low: A, high: B}} with A <= B, and log: true "
                "(A > 0) or step: C if wanted, or {choices: [...]}"
            )


def search(study: Study, variants: Variants, run: Callable[[Sequence[Task]], None]) -> list[str]:
    """Try the points of the sweep one after the other, each with all seeds, and return the names of the variants.

    The search depends on its seed and on what earlier trials came to, so that one that is started again repeats itself
    up to where it was, out of the runs that are there. A trial with a run that failed counts as failed.
    """
    import optuna

    assert study.sweep is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=study.sweep.sampler_seed)
    trials = optuna.create_study(direction="maximize", sampler=sampler)
    rows: list[dict[str, Any]] = []
    everything: list[Run] = []
    for number in range(study.sweep.trials):
        trial = trials.ask()
        point = {key: _suggest(trial, key, space) for key, space in study.sweep.parameters.items()}
        name = f"trial_{number:03d}"
        variants.write(name, point)
        tasks = [task for seed in study.seeds for task in tasks_of(study, [name], seed)]
        run(tasks)
        results = read_runs(tasks)
        everything += results  # of which a run that failed does not tell the metric
        _, mode = metric_of(everything)
        scores = [result.best for result in results if result.finished and result.best is not None]
        mean = sum(scores) / len(scores) if len(scores) == len(tasks) else None
        if mean is None:
            trials.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            trials.tell(trial, mean if mode == "max" else -mean)
        rows.append({"trial": number, **point, "val_best_mean": mean})
    metric, mode = metric_of(everything)
    write_text(study.folder / WANDB, wandb_sweep(study, metric, mode))
    write_csv(study.folder / TRIALS, rows)
    scored = [row for row in rows if row["val_best_mean"] is not None]
    if scored:
        best = (max if mode == "max" else min)(scored, key=lambda row: row["val_best_mean"])
        point = {key: best[key] for key in study.sweep.parameters}
        heading = f"# trial {best['trial']} of {study.sweep.trials}: best mean {metric}, {best['val_best_mean']:.4f}"
        write_text(study.folder / BEST, f"{heading}\n{yaml.safe_dump(point, sort_keys=False)}")
        print(f"best on validation: trial {best['trial']}, {point}", flush=True)
    return [f"trial_{row['trial']:03d}" for row in rows]


def _suggest(trial: Any, key: str, space: Mapping[str, Any]) -> Any:
    if "choices" in space:
        return trial.suggest_categorical(key, space["choices"])
    whole = isinstance(space["low"], int) and isinstance(space["high"], int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    extra = {"step": space["step"]} if "step" in space else {}
    return suggest(key, space["low"], space["high"], log=bool(space.get("log", False)), **extra)


def wandb_sweep(study: Study, metric: str, mode: str) -> str:
    """The sweep as ``wandb sweep`` reads it; every trial is an ordinary ``fit`` with W&B's logger."""
    assert study.sweep is not None
    base = study.folder / "variants" / "base.yaml"
    logger = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"
    described = {
        "name": study.name,
        "method": "bayes",
        "metric": {"name": metric, "goal": f"{mode}imize"},
        "parameters": {key: _distribution(space) for key, space in study.sweep.parameters.items()},
        "command": ["${env}", "python", "-m", "lqkd", "fit", "--config", str(base), logger, "${args}"],
    }
    return f"# wandb sweep {WANDB}\n{yaml.safe_dump(described, sort_keys=False)}"


def _distribution(space: Mapping[str, Any]) -> dict[str, Any]:
    if "choices" in space:
        return {"values": space["choices"]}
    bounds = {"min": space["low"], "max": space["high"]}
    whole = isinstance(space["low"], int) and isinstance(space["high"], int)
    if "step" in space:
        return {"distribution": "q_uniform", "q": space["step"], **bounds}
    if space.get("log"):
        return {"distribution": "q_log_uniform_values" if whole else "log_uniform_values", **bounds}
    return {"distribution": "int_uniform" if whole else "uniform", **bounds}
