"""What a study file says: a base configuration, named variants of it, seeds, a launcher and a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lqkd.errors import UsageError, first_line
from lqkd.runs.folder import check_seed
from lqkd.studies.overrides import merge, nested
from lqkd.utils.yaml_text import load_yaml

STUDY = "study.yaml"
"""The study file as it is kept in the study's folder."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass
class Launcher:
    """Where the runs go.

    Attributes:
        parallel: runs at the same time: processes here, or jobs in the queue. Processes here share the cores.
        submitit: settings of submitit's AutoExecutor, e.g. ``{cluster: slurm, timeout_min: 240, gpus_per_node: 1}``;
            null runs everything on this machine, in processes that fork from one that has imported everything.
    """

    parallel: int = 1
    submitit: dict[str, Any] | None = None


@dataclass
class Sweep:
    """A search with Optuna (TPE) for the settings with the best mean over the seeds of the task's metric on the
    validation split, ``val/acc`` of a classification; never by test data.

    Attributes:
        parameters: settings by dotted key: ``{low: 0.1, high: 10, log: true}``, ``{low: 8, high: 64, step: 8}`` (whole
            numbers where low and high are) or ``{choices: [...]}``.
        trials: how many points to try.
        sampler_seed: of the search.
    """

    parameters: dict[str, dict[str, Any]]
    trials: int = 20
    sampler_seed: int = 0


@dataclass
class Study:
    """A study as its file describes it.

    Attributes:
        name: of the study and its folder.
        base: configuration file as ``fit`` takes it; a relative path is relative to the study file.
        variants: overrides of the base by the variant's name, dotted keys or nested.
        baseline: variant that others are compared with; null is the first.
        scenarios: overrides of the base by the scenario's name. Each variant then runs in each of them, as
            ``scenario/variant``, and its own overrides come after the scenario's.
        tuned: variants, with scenarios, of which the best on the validation split of a scenario is what the others are
            held against there: fixed weights say.
        settings: overrides for all variants.
        seeds: of the runs; all variants of one seed share data order, augmentation and initial weights.
        root: folder of all studies.
        teacher_cache: arguments of the modules' ``teacher_cache``, with which later runs replay what the teacher has
            answered to earlier ones; its folder is one of the study's unless given. Null asks the teacher each time.
        launcher: where the runs go.
        sweep: a search on top of the variants.
    """

    name: str
    base: str
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str | None = None
    scenarios: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    root: str = "studies"
    teacher_cache: dict[str, Any] | None = None
    launcher: Launcher = field(default_factory=Launcher)
    sweep: Sweep | None = None

    @property
    def compared_with(self) -> str | None:
        """The variant that others are compared with; None in a sweep alone."""
        return self.baseline or next(iter(self.variants), None)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Overrides of the base by what is run: each variant, with scenarios in each of them.

        The first variants come first, in all scenarios, so that a study that is cut short has whole rows.
        """
        if not self.scenarios:
            return self.variants
        return {
            f"{scenario}/{variant}": merge(nested(given), nested(own))
            for variant, own in self.variants.items()
            for scenario, given in self.scenarios.items()
        }

    @property
    def folder(self) -> Path:
        """Where everything of the study is kept."""
        return Path(self.root) / self.name


def read_settings(
    config: Path,
    root: str | None = None,
    name: str | None = None,
    seeds: Sequence[int] | None = None,
    settings: Sequence[str] = (),
) -> tuple[Study, dict[str, Any]]:
    """A study from its file, as it is to be run.

    Args:
        config: the file.
        root, name, seeds: in the place of the file's; None for those.
        settings: KEY=VALUE, of all variants.

    Returns:
        The study, and its base with what all variants share.

    Raises:
        UsageError: when a setting is not possible.
    """
    described = read_mapping(config, "--config")
    own = {"root": root, "name": name, "seeds": None if seeds is None else list(seeds)}
    described |= {key: value for key, value in own.items() if value is not None}
    study = _study(described)
    shared = merge(nested(study.settings), nested(dict(_setting(text) for text in settings)))
    base = merge(nested(read_mapping(config.parent / study.base, "base")), shared)
    if study.teacher_cache is not None:
        cache = {"folder": str(study.folder / "teacher_cache")} | study.teacher_cache
        base = merge(base, {"model": {"init_args": {"teacher_cache": cache}}})
    return study, base


def read_study(path: Path) -> Study:
    """Read a study file as it is kept in a study's folder.

    Raises:
        UsageError: when it is none.
    """
    return _study(read_mapping(path, "study"))


def read_mapping(path: Path, key: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``key`` is what a mistake calls it.

    Raises:
        UsageError: when there is no such file, or something else in it.
    """
    if not path.is_file():
        raise UsageError(f"{key}={str(path)!r} does not exist: give a YAML file")
    try:
        value = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{key}={str(path)!r} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{key}={str(path)!r} holds no settings: a mapping is needed")
    return value


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"--set {text} is not possible: give KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text} is not possible: {value!r} is no YAML value ({first_line(error)})") from error


def _study(described: dict[str, Any]) -> Study:
    values = _typed(Study, described, "")
    for key, kind in (("launcher", Launcher), ("sweep", Sweep)):
        if values.get(key) is not None:
            values[key] = kind(**_typed(kind, values[key], f"{key}."))
    study = Study(**values)
    for key in ("variants", "scenarios"):
        setattr(study, key, {str(name): overrides or {} for name, overrides in getattr(study, key).items()})
    _check(study)
    return study


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "int": ((int,), "a whole number"),
    "list": ((list,), "a list"),
    "dict": ((dict,), "a mapping"),
    "Launcher": ((dict,), "a mapping"),
    "Sweep": ((dict,), "a mapping"),
}


def _typed(kind: type, described: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The settings, each of the kind that the dataclass says."""
    known = {f.name: f for f in fields(kind)}
    for key, value in described.items():
        if key not in known:
            raise UsageError(f"{prefix}{key} is no setting of a study: use {', '.join(known)}")
        expected, _, null = str(known[key].type).partition(" | ")
        types, words = _KINDS[expected.partition("[")[0]]
        if not (isinstance(value, types) and not isinstance(value, bool)) and not (value is None and null):
            raise UsageError(f"{prefix}{key}={value!r} is not possible: {words} is needed")
    for name, f in known.items():
        if name not in described and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{prefix}{name} is missing from the study")
    return dict(described)


def _check(study: Study) -> None:
    if not study.variants and study.sweep is None:
        raise UsageError("variants is empty: name at least one variant, or a sweep")
    groups = {"variants": study.variants, "scenarios": study.scenarios}
    for key, name in [("name", study.name), *((key, name) for key, group in groups.items() for name in group)]:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{key}: {name!r} is not possible: use letters, digits and _ . + - for a folder's name")
    for key, group in groups.items():
        for name, overrides in group.items():
            if not isinstance(overrides, dict):
                raise UsageError(f"{key}.{name}={overrides!r} is not possible: a mapping of settings is needed")
    _check_panel(study)
    if any(type(seed) is not int for seed in study.seeds):
        raise UsageError(f"seeds={study.seeds} is not possible: give whole numbers")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise UsageError(f"seeds={study.seeds} is not possible: give different whole numbers >= 0")
    for seed in study.seeds:
        check_seed("seeds", seed)
    if study.baseline is not None and study.baseline not in study.variants:
        raise UsageError(f"baseline={study.baseline!r} is no variant: use one of {', '.join(study.variants)}")
    if study.launcher.parallel < 1:
        raise UsageError(f"launcher.parallel={study.launcher.parallel} is not possible: it must be at least 1")
    if study.sweep is not None:
        _check_sweep(study.sweep, list(study.variants))


def _check_panel(study: Study) -> None:
    if study.scenarios and study.sweep is not None:
        raise UsageError("scenarios and sweep are not possible in one study: give each a study of its own")
    if bool(study.tuned) != bool(study.scenarios):
        given, missing = ("tuned", "scenarios") if study.tuned else ("scenarios", "tuned")
        raise UsageError(f"{given} needs {missing}: the best of the tuned variants is chosen for each scenario")
    unknown = [name for name in study.tuned if name not in study.variants]
    if unknown:
        raise UsageError(f"tuned={unknown[0]!r} is no variant: use some of {', '.join(study.variants)}")


def _check_sweep(sweep: Sweep, variants: Sequence[str]) -> None:
    if "base" in variants:
        raise UsageError("variants: the name base is that of the sweep's own configuration")
    if sweep.trials < 1:
        raise UsageError(f"sweep.trials={sweep.trials} is not possible: it must be at least 1")
    check_seed("sweep.sampler_seed", sweep.sampler_seed)
    if any(name.startswith("trial_") for name in variants):
        raise UsageError("variants: names that begin with trial_ are those of the sweep")
