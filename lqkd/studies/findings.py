"""What a report says first: what became of every variant, in a word and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lqkd.runs.verdicts import bits_of, in_a_sentence, measured_on, verdicts
from lqkd.studies.job import DIVERGED, FAILED, STOPPED
from lqkd.studies.material import STUDY_KIND, Material, sentence
from lqkd.studies.results import Run, metric_of
from lqkd.studies.statistics import Difference, Summary, is_baseline
from lqkd.studies.tables import difference, endings, of_variant, value
from lqkd.tasks.values import is_share, name_of, shown

GOOD, DOUBTFUL, BAD, OPEN = "good", "doubtful", "bad", "open"
"""Kinds of findings, which a page gives colours and marks."""


class Finding(NamedTuple):
    """Of one variant, or of the only run.

    Attributes:
        kind: one of the four.
        word: what became of it: ``collapsed``, for instance.
        name: of the variant.
        bits: of its students.
        value: with the spread over seeds; empty where nothing has finished.
        sentences: what that is worth, and what went wrong.
    """

    kind: str
    word: str
    name: str
    bits: str
    value: str
    sentences: list[str]


def findings(material: Material) -> list[Finding]:
    """One for each variant, in order."""
    return [_finding(material, name, of_variant(material.runs, name)) for name in material.summaries]


def headline(material: Material) -> str:
    """The whole in a sentence."""
    if material.kind != STUDY_KIND:
        run = material.runs[0]
        return in_a_sentence(run.summary) if run.summary else f"{run.status}: {run.message}"
    measure = measure_of(material)
    metric, mode = metric_of(material.runs)
    known = {name: one[measure] for name, one in material.summaries.items() if one[measure].mean is not None}
    if not known or material.panels:
        return ""
    best = (max if mode == "max" else min)(known, key=lambda name: known[name].mean or 0.0)
    told = f"Best is {best}: {name_of(metric)} {_shown(known[best], metric)} on the {split_of(material)}"
    if material.baseline is None or is_baseline(best, material.baseline):
        return f"{told}."
    return f"{told}; {_worth(known[best].difference, metric, mode, material.baseline)}."


def measure_of(material: Material) -> str:
    """The measure that tells most: the test value, where any run has one."""
    return "test" if any(run.test is not None for run in material.runs) else "val_best"


def split_of(material: Material) -> str:
    """Of that measure."""
    return "test split" if measure_of(material) == "test" else "validation split"


def _finding(material: Material, name: str, runs: Sequence[Run]) -> Finding:
    metric, mode = metric_of(material.runs)
    summary = material.summaries[name][measure_of(material)]
    kind, word = _state(runs)
    sentences = []
    if material.kind == STUDY_KIND:
        if is_baseline(name, material.baseline):
            sentences.append("The baseline: the others are compared with it.")
        elif material.baseline is not None and summary.mean is not None:
            sentences.append(sentence(f"{_worth(summary.difference, metric, mode, material.baseline)}."))
        if kind != GOOD and len(runs) > 1:
            sentences.append(f"Of {len(runs)} runs: {endings(runs)}.")
        sentences += [_wrong(run) for run in runs if _wrong(run)][:1]
        told = dict.fromkeys(bits_of(run.summary) for run in runs if run.summary)
        return Finding(kind, word, name, ", ".join(told), _shown(summary, metric), sentences)
    (run,) = runs
    sentences = [*([] if run.finished else [run.message])]
    sentences += [one.sentence for one in verdicts(run.summary).values() if one.sentence]
    measured = measured_on(run.summary)[0]
    bits = bits_of(run.summary) if run.summary else ""
    return Finding(kind, word, name, bits, "" if measured is None else shown(metric, measured, 2), sentences)


def _state(runs: Sequence[Run]) -> tuple[str, str]:
    """Kind and word of the worst that became of any of the runs."""
    statuses = [run.status for run in runs]
    for status in (FAILED, DIVERGED):
        if status in statuses:
            return BAD, status
    if STOPPED in statuses:
        return OPEN, "not finished"
    spoiled = next((run.verdict for run in runs if run.verdict is not None), None)
    return (GOOD, "finished") if spoiled is None else (DOUBTFUL, spoiled)


def _wrong(run: Run) -> str:
    return run.sentence if run.finished else run.message


def _shown(summary: Summary, metric: str) -> str:
    if summary.mean is None:
        return ""
    return value(summary, metric) + (" %" if is_share(metric) else "")


def _worth(d: Difference | None, metric: str, mode: str, baseline: str) -> str:
    """What a paired difference is worth: ``better than kl beyond chance: +2.51 [+1.12, +3.89]``."""
    if d is None or d.mean is None:
        return f"no run to compare with {baseline}"
    told = difference(Summary(d.pairs, None, None, d), metric)
    unit = " points" if is_share(metric) else ""
    if d.low is None or d.high is None:
        return f"{told}{unit} against {baseline}, from one seed, which proves nothing"
    if d.low <= 0 <= d.high:
        return f"not to be told from {baseline}: {told}{unit}"
    better = (d.mean > 0) == (mode == "max")
    return f"{'better' if better else 'worse'} than {baseline} beyond chance: {told}{unit}"
