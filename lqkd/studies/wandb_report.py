"""A W&B report of a project's runs: what the regularizers learned, beside the losses and the bits.

``python -m lqkd wandb-report ENTITY/PROJECT`` saves it as a draft of that project and prints its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lqkd.callbacks.dashboard import sections
from lqkd.errors import UsageError, first_line
from lqkd.tasks import Task
from lqkd.utils.renames import moved_command

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

STEP = "trainer/global_step"
"""Lightning's name in W&B of what every metric is drawn over."""
PICTURES = (
    *("weights", "distribution", "classes", "confidence", "divergence", "agreement", "balance", "step_length"),
    *("trust", "believed", "reliability", "map"),
)


def report(entity: str, project: str, monitor: str = Task.monitor, terms: Sequence[str] = ()) -> Report:
    """The report, not saved: a section of charts for each of the dashboard's, and one with the pictures.

    Args:
        entity: user or team of W&B.
        project: its project, whose runs are drawn; any subset of them can be chosen in the report itself.
        monitor: the metric that chose their best checkpoints.
        terms: names of the runs' distillation terms, where they have any.

    Raises:
        UsageError: when wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UsageError("a W&B report needs wandb-workspaces: pip install 'lqkd[wandb]'") from error

    def grid(panels: list[Any]) -> wr.PanelGrid:
        for number, panel in enumerate(panels):
            panel.layout = wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
        return wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=panels)

    blocks: list[Any] = [wr.TableOfContents()]
    for section, charts in sections(monitor, terms).items():
        lines = [wr.LinePlot(title=c.title, x=STEP, y=list(c.keys), log_y=c.logarithmic or None) for c in charts]
        blocks += [wr.H2(text=section), grid(lines)]
    names = [*PICTURES, *(f"{term}/{name}" for term in terms for name in PICTURES)]
    media = [wr.MediaBrowser(title=name, media_keys=[f"regularizer/pictures/{name}"]) for name in names]
    blocks += [wr.H2(text="Pictures"), grid(media)]
    return wr.Report(
        entity=entity,
        project=project,
        title="What the regularizer learned",
        description="Charts are explained in lqkd's docs/dashboards.md, pictures in docs/reading_the_pictures.md.",
        blocks=blocks,
        width="fluid",
    )


def wandb_report(entity: str, project: str, monitor: str = Task.monitor, terms: Sequence[str] = ()) -> str:
    """Save the report as a draft of its project, and print and return its address; the arguments are :func:`report`'s.

    Raises:
        UsageError: when wandb-workspaces is not installed, or W&B does not take the report.
    """
    made = report(entity, project, monitor, terms)
    try:
        made.save(draft=True)
    except Exception as error:  # wandb-workspaces raises many types, and Exception itself for want of a login
        raise UsageError(f"W&B does not take the report: {first_line(error)}") from error
    print(made.url)
    return str(made.url)


if __name__ == "__main__":
    moved_command("lqkd.studies.wandb_report", "wandb-report")
