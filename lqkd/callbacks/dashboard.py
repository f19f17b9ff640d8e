"""The dashboard of a training: which numbers belong into one chart, for TensorBoard and W&B alike.

``docs/dashboards.md`` explains every key.
"""

from __future__ import annotations

import re
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


WEIGHTS = tuple(f"regularizer/{name}" for name in ("mean", "minimum", "maximum"))
SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Regularizer": (
        Chart("weights: mean, smallest, largest", WEIGHTS, range=True, logarithmic=True),
        Chart("weights: spread", ("regularizer/spread",)),
        Chart("times that the divergence still counts", ("regularizer/effective",)),
        Chart("weighted divergence, and at the guard's optimum", ("regularizer/contribution", "regularizer/optimum")),
        Chart("share of weights at their bound", ("regularizer/at_maximum",)),
        Chart(
            "agreement with the task, with weights and without",
            ("regularizer/agreement/distill", "regularizer/agreement/plain"),
        ),
        Chart("shares of the student's gradient", ("regularizer/share/task", "regularizer/share/distill")),
        Chart("weights of the balance", ("balance/task", "balance/distill")),
    ),
    "Training": (
        Chart("losses", ("train/loss", "train/task", "train/distill")),
        Chart("loss on the validation split", ("val/loss",)),
    ),
    "Low bits": (
        Chart("bits", ("bits/weight", "bits/activation")),
        Chart(
            "shares of weights that oscillate",
            ("oscillation/flipping", "oscillation/oscillating", "oscillation/frozen"),
        ),
        Chart("dampening", ("train/dampening",)),
    ),
}
"""The charts by section, without that of the task's metric. A chart whose keys a run does not log stays empty."""


def sections(monitor: str) -> dict[str, tuple[Chart, ...]]:
    """The charts by section of runs whose best checkpoint is chosen by the metric ``monitor``."""
    own = Chart(f"{monitor.rpartition('/')[2]} on the validation split", (monitor,))
    return SECTIONS | {"Training": (*SECTIONS["Training"], own)}


def tensorboard_layout(monitor: str) -> dict[str, dict[str, list[Any]]]:
    """:func:`sections` as ``SummaryWriter.add_custom_scalars`` takes them: the tab "Custom Scalars" of TensorBoard."""
    return {
        section: {
            # A margin names tags; lines are named by patterns, which match the beginning of a tag.
            chart.title: ["Margin", list(chart.keys)]
            if chart.range
            else ["Multiline", [f"{re.escape(key)}$" for key in chart.keys]]
            for chart in charts
        }
        for section, charts in sections(monitor).items()
    }
