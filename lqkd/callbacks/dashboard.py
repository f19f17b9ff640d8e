"""The dashboard of a training: which numbers belong into one chart, for TensorBoard and W&B alike.

``docs/dashboards.md`` explains every key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: its heading.
        keys: of the metrics that it draws.
        range: whether the keys are a mean, a minimum and a maximum.
        logarithmic: whether the values want a logarithmic axis.
    """

    title: str
    keys: tuple[str, ...]
    range: bool = False
    logarithmic: bool = False


def sections(monitor: str, terms: Sequence[str] = ()) -> dict[str, tuple[Chart, ...]]:
    """The charts by section. A chart whose keys a run does not log stays empty.

    Args:
        monitor: the metric that chooses the best checkpoint.
        terms: names of the distillation terms; none for a single one without a name.

    Examples:
        >>> [chart.keys for chart in sections("val/acc", ["logits"])["Training"]][0]
        ('train/loss', 'train/task', 'train/logits')
    """
    losses = ("task", *(terms or ("distill",)))
    agreements = [f"{name}{plain}" for name in terms for plain in ("", " (plain)")] or ["distill", "plain"]
    return {
        "Regularizer": (
            *(chart for name in terms or ("",) for chart in _weights(name)),
            Chart(
                "agreement with the task, with weights and without",
                tuple(f"regularizer/agreement/{name}" for name in agreements),
            ),
            Chart("shares of the student's gradient", tuple(f"regularizer/share/{name}" for name in losses)),
            Chart("weights of the balance", tuple(f"balance/{name}" for name in losses)),
            Chart(
                "length of a step: gradients of the losses in the student's parameters",
                tuple(f"gradient/norm/{name}" for name in (*losses, "total")),
                logarithmic=True,
            ),
            Chart("length of a step: shares of the losses", tuple(f"gradient/share/{name}" for name in losses)),
            Chart("length of a step, against the task's alone", ("gradient/total_to_task",)),
        ),
        "Training": (
            Chart("losses", ("train/loss", *(f"train/{name}" for name in losses))),
            Chart("loss on the validation split", ("val/loss",)),
            Chart(f"{monitor.rpartition('/')[2]} on the validation split", (monitor,)),
        ),
        "Low bits": _LOW_BITS,
    }


def _weights(term: str) -> tuple[Chart, ...]:
    """The charts of one regularizer."""
    path, told = (f"regularizer/{term}/", f" of {term}") if term else ("regularizer/", "")
    three = tuple(f"{path}{name}" for name in ("mean", "minimum", "maximum"))
    return (
        Chart(f"weights{told}: mean, smallest, largest", three, range=True, logarithmic=True),
        Chart(f"weights{told}: spread", (f"{path}spread",)),
        Chart(f"times that the divergence{told} still counts", (f"{path}effective",)),
        Chart(f"weighted divergence{told}, and at the guard's optimum", (f"{path}contribution", f"{path}optimum")),
        Chart(f"share of weights{told} at their bound", (f"{path}at_maximum",)),
    )


_LOW_BITS = (
    Chart("bits", ("bits/weight", "bits/activation")),
    Chart(
        "shares of weights that oscillate",
        ("oscillation/flipping", "oscillation/oscillating", "oscillation/frozen"),
    ),
    Chart("dampening", ("train/dampening",)),
)


def tensorboard_layout(monitor: str, terms: Sequence[str] = ()) -> dict[str, dict[str, list[Any]]]:
    """:func:`sections` as ``SummaryWriter.add_custom_scalars`` takes them: the tab "Custom Scalars" of TensorBoard."""
    return {
        section: {
            # A margin names tags; lines are named by patterns, which match the beginning of a tag.
            chart.title: ["Margin", list(chart.keys)]
            if chart.range
            else ["Multiline", [f"{re.escape(key)}$" for key in chart.keys]]
            for chart in charts
        }
        for section, charts in sections(monitor, terms).items()
    }
