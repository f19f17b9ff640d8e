"""The keys of metrics are those of docs/dashboards.md, and both dashboards draw them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import wandb_workspaces.reports.v2 as wr
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from lqkd.callbacks.dashboard import sections
from lqkd.cli import main
from lqkd.runs.folder import CONFIG
from lqkd.studies import wandb_report

SECTIONS = sections("val/acc")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8")
DOCUMENTED = {
    key for row in re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE) for key in re.findall(r"`(\w+/[\w/]+)`", row)
}
PANELS = (wr.LinePlot, wr.MediaBrowser)
EVERYTHING = {
    "trainer": {
        "max_epochs": 2,
        "limit_train_batches": 4,
        "limit_test_batches": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "."}},
        "callbacks": [
            {"class_path": "lqkd.callbacks.OscillationMonitor"},
            {"class_path": "lqkd.callbacks.OscillationFreezing"},
            {"class_path": "lqkd.callbacks.OscillationDampening"},
            {
                "class_path": "lqkd.callbacks.BitWidthScheduler",
                "init_args": {"stages": [{"bits": "w8a8", "until_epoch": 1}]},
            },
        ],
    },
    "model": {"init_args": {"regularizer": {"init_args": {"guard": "bounded_barrier"}}, "gptq_batches": 1}},
}
"""Over configs/regularizer.yaml, with everything switched on that logs a number."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dashboard")
    (root / "everything.yaml").write_text(yaml.safe_dump(EVERYTHING), encoding="utf-8")
    configs = ["--config", str(ROOT / "configs" / "regularizer.yaml"), "--config", str(root / "everything.yaml")]
    assert main(["fit", *configs, "--run.root", str(root)]) == 0
    (config,) = root.rglob(CONFIG)
    return config.parent


def test_the_logged_keys_are_the_documented_ones(run: Path) -> None:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {key for row in rows for key, value in row.items() if value} - {"epoch", "step"} == DOCUMENTED


def test_loggers_get_the_same_keys(run: Path) -> None:
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents*")).parent))
    events.Reload()
    assert set(events.Tags()["scalars"]) - {"epoch", "hp_metric"} == DOCUMENTED


def test_the_hyper_parameters_of_a_run_stand_beside_what_it_reached(run: Path) -> None:
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents*")).parent))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    reached = json.loads((run / "summary.json").read_text())["test"]
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(reached)


def test_every_chart_draws_documented_keys() -> None:
    drawn = [key for charts in sections("val/acc").values() for chart in charts for key in chart.keys]
    assert set(drawn) <= DOCUMENTED
    assert len(drawn) == len(set(drawn))


def test_tensorboard_finds_the_layout_and_what_it_draws(run: Path) -> None:
    events = EventAccumulator(str(next(run.rglob("events.out.tfevents*")).parent))
    events.Reload()
    (event,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(sections("val/acc"))
    scalars = events.Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            wanted = sections("val/acc")[category.title][list(category.chart).index(chart)]
            if chart.HasField("margin"):
                (series,) = chart.margin.series
                found = {series.value, series.lower, series.upper} & set(scalars)
            else:
                found = {tag for tag in scalars for pattern in chart.multiline.tag if re.match(pattern, tag)}
            assert found == set(wanted.keys), chart.title


def test_the_report_for_wandb_draws_every_chart_and_picture() -> None:
    grids = [block for block in wandb_report.report("someone", "lqkd").blocks if isinstance(block, wr.PanelGrid)]
    lines, media = ([panel for grid in grids for panel in grid.panels if isinstance(panel, kind)] for kind in PANELS)
    drawn = {line.title: tuple(key if isinstance(key, str) else key.name for key in line.y) for line in lines}
    assert drawn == {chart.title: chart.keys for charts in sections("val/acc").values() for chart in charts}
    assert [key for panel in media for key in panel.media_keys] == [
        f"regularizer/pictures/{name}" for name in wandb_report.PICTURES
    ]


@pytest.mark.parametrize("project", ["lqkd", "/lqkd", "someone/"])
def test_the_report_needs_a_project_of_someone(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wandb-report", project]) == 2
    assert f"{project!r} names no project of W&B: give ENTITY/PROJECT" in capsys.readouterr().err


def test_the_report_is_saved_as_a_draft_and_its_address_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(wr.Report, "save", lambda self, draft: saved.append((self.entity, self.project, draft)))
    monkeypatch.setattr(wr.Report, "url", "https://wandb.ai/someone/lqkd/reports/x")
    assert main(["wandb-report", "someone/lqkd", "--terms", "hints", "logits"]) == 0
    assert saved == [("someone", "lqkd", True)]
    assert capsys.readouterr().out == "https://wandb.ai/someone/lqkd/reports/x\n"


def test_a_report_that_wandb_does_not_take_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: wr.Report, **settings: bool) -> None:
        raise Exception("not logged in to W&B")

    monkeypatch.setattr(wr.Report, "save", refuse)
    assert main(["wandb-report", "someone/lqkd"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "lqkd: error: W&B does not take the report: not logged in to W&B"
