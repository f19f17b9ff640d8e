"""The tables of a study as CSV and Markdown. They hold no times, so that they are the same however a study was run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqkd.runs.verdicts import SPOILED, bits_of
from lqkd.studies.job import DIVERGED, FAILED, FINISHED, STOPPED
from lqkd.studies.results import Run, metric_of
from lqkd.studies.statistics import Summary, is_baseline, moments
from lqkd.tasks.values import is_share, name_of
from lqkd.utils import escaping
from lqkd.utils.tables import write_csv

TABLE = "table.csv"
RUNS = "runs.csv"
_NOTE = (
    "mean and standard deviation over seeds. Differences to the baseline are paired by seed, with a 95 % t interval. "
    "Validation: best epoch, and last epoch. The test value is that of the checkpoint that was best on the validation "
    "split; nothing was selected on test data. The teacher, the student in float, and quantised and no more, were "
    "measured before the training."
)
UNTRAINED = "quantised only (PTQ)"
CALIBRATED = "calibrated only (GPTQ)"
_REFERENCES = {
    "the teacher": "teacher",
    "the student in float": "student_float",
    UNTRAINED: "student_start",
    CALIBRATED: "student_gptq",
}
"""Rows below the variants, by what summary.json calls their value on the test split; no variant has such a name."""
_FROM_SUMMARY = ("weight_bits", "activation_bits", "packed_bytes", "float_bytes", "bit_operations", "epochs", "steps")


def heading(runs: Sequence[Run]) -> str:
    """What the numbers of a study are: ``accuracy in %``, or a metric and which end of it is the better."""
    metric, mode = metric_of(runs)
    if is_share(metric):
        return "accuracy in %"
    return name_of(metric) + (" (less is better)" if mode == "min" else "")


def note(runs: Sequence[Run]) -> str:
    """What the tables show."""
    told = heading(runs)
    return f"{told[0].upper()}{told[1:]}, {_NOTE}"


def scale(metric: str) -> int:
    """What values of the metric are multiplied by: 100 for percent."""
    return 100 if is_share(metric) else 1


def number(metric: str, value: float, sign: str = "") -> str:
    """A value as tables have it, ``+`` as its sign for a difference: 91.24 of a share, else four digits."""
    return f"{100 * value:{sign}.2f}" if is_share(metric) else f"{value:{sign}.4g}"


def write_tables(folder: Path, runs: Sequence[Run], summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    """Write ``table.csv``, a row a variant and reference, and ``runs.csv``, a row a run, to ``folder``, atomically."""
    rows = [_variant_row(name, measures) | _endings(of_variant(runs, name)) for name, measures in summaries.items()]
    rows += [{"variant": name} | _measured("test", summary) for name, summary in references(runs).items()]
    write_csv(folder / TABLE, rows)
    write_csv(folder / RUNS, [_run_row(run) for run in runs])


def _variant_row(name: str, measures: Mapping[str, Summary]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name}
    for measure, summary in measures.items():
        row |= _measured(measure, summary)
        d = summary.difference
        for key in ("pairs", "mean", "low", "high"):
            row[f"{measure}_difference_{key}"] = None if d is None else getattr(d, key)
    return row


def _measured(measure: str, summary: Summary) -> dict[str, Any]:
    return {f"{measure}_seeds": summary.count, f"{measure}_mean": summary.mean, f"{measure}_std": summary.std}


def _endings(runs: Sequence[Run]) -> dict[str, int]:
    """Number of runs by status, and of those whose regularizer came to nothing."""
    statuses, verdicts = Counter(run.status for run in runs), Counter(run.verdict for run in runs if run.finished)
    named = {f"runs_{name}": statuses[name] for name in (FINISHED, STOPPED, FAILED, DIVERGED)}
    return named | {f"regularizer_{name}": verdicts[name] for name in SPOILED}


def of_variant(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs of one variant."""
    return [run for run in runs if run.variant == name]


def endings(runs: Sequence[Run]) -> str:
    """How runs ended, in words: ``3 finished, 1 with a collapsed regularizer; 1 failed``."""
    told = []
    for status, count in Counter(run.status for run in runs).items():
        verdicts = Counter(run.verdict for run in runs if run.status == status and run.verdict is not None)
        told.append(
            ", ".join([f"{count} {status}", *(f"{n} with a {verdict} regularizer" for verdict, n in verdicts.items())])
        )
    return "; ".join(told)


def references(runs: Sequence[Run]) -> dict[str, Summary]:
    """The test value over the runs of what they are held against: the teacher, and the student before quantization.

    One row where all variants agree; otherwise one for those variants that do, which are named, or their bits.
    """
    found: dict[str, Summary] = {}
    for title, key in _REFERENCES.items():
        groups: list[tuple[dict[int | None, float], list[str]]] = []  # value by seed, and the variants
        for variant in dict.fromkeys(run.variant for run in runs):
            measured = {run.seed: run.summary.get(key) for run in of_variant(runs, variant)}
            known = {seed: value for seed, value in measured.items() if value is not None}
            if not known:
                continue
            for shared, names in groups:
                if all(shared.get(seed, value) == value for seed, value in known.items()):
                    shared.update(known)
                    names.append(variant)
                    break
            else:
                groups.append((known, [variant]))
        bits = [", ".join(dict.fromkeys(bits_of(run.summary) for run in runs if run.variant in of)) for _, of in groups]
        by_bits = title in (UNTRAINED, CALIBRATED) and len(set(bits)) == len(groups)
        for (shared, names), width in zip(groups, bits, strict=True):
            of = f", {width}" if by_bits else f" of {', '.join(names)}"
            name = title if len(groups) == 1 else f"{title}{of}"
            found[name] = Summary(len(shared), *moments([*shared.values()]), None)
    return found


def _run_row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "status": run.status, "message": run.message}
    row["verdict"] = run.verdict
    row |= {"val_best": run.best, "val_last": run.last, "test": run.test}
    return row | {key: run.summary.get(key) for key in _FROM_SUMMARY}


NONE = "n/a"
HEADINGS = (
    "variant", "val best", "difference", "val last", "difference", "test", "difference", "runs"
)  # fmt: skip


def cells(runs: Sequence[Run], summaries: Mapping[str, Mapping[str, Summary]], baseline: str | None) -> list[list[str]]:
    """The texts under :data:`HEADINGS`: a row for each variant, then those that all are held against."""
    rows, (metric, _) = [], metric_of(runs)
    for name, measures in summaries.items():
        row = [name]
        for summary in measures.values():
            row += [value(summary, metric), "baseline" if is_baseline(name, baseline) else difference(summary, metric)]
        rows.append([*row, endings(of_variant(runs, name))])
    for name, summary in references(runs).items():
        rows.append([name, NONE, NONE, NONE, NONE, value(summary, metric), NONE, NONE])
    return rows


def value(summary: Summary, metric: str) -> str:
    """For example ``91.24 ± 0.31``."""
    if summary.mean is None:
        return NONE
    return number(metric, summary.mean) + ("" if summary.std is None else f" ± {number(metric, summary.std)}")


def difference(summary: Summary, metric: str) -> str:
    """For example ``+0.41 [+0.12, +0.70]``."""
    d = summary.difference
    if d is None or d.mean is None:
        return NONE
    ends = () if d.low is None or d.high is None else (number(metric, d.low, "+"), number(metric, d.high, "+"))
    return number(metric, d.mean, "+") + (f" [{', '.join(ends)}]" if ends else "")


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    escaped = [[escaping.markdown(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in escaped) for column in range(len(headings))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in escaped]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines) + "\n"
