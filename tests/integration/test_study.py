"""Real studies on the digits, stopped and killed in real processes."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lqkd.cli.arguments import of
from lqkd.models import CifarResNet
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model, quantizers
from lqkd.runs.folder import lock
from lqkd.studies.overrides import merge, nested
from lqkd.studies.settings import read_settings
from lqkd.studies.variants import Variants
from tests.forked import Forks, send

CONFIGS = Path(__file__).parents[2] / "configs"
TEACHER = yaml.safe_load((CONFIGS / "regularizer.yaml").read_text())["model"]["init_args"]["teacher"]
SMALL: dict[str, Any] = {
    "name": "small",
    "base": str(CONFIGS / "regularizer.yaml"),
    "seeds": [0, 1],
    "settings": {
        "trainer.max_epochs": 40,  # of 4 steps: long enough to be killed within
        "trainer.log_every_n_steps": 1,
        "trainer.callbacks": None,
        "run.save_every_n_steps": 2,
        "trainer.num_sanity_val_steps": 0,
        "data.init_args": {"limit_train": 128, "batch_size": 32},
        "model.init_args.student_weights": None,
        "model.init_args.regularizer": None,
    },
    "variants": {
        "plain": {},
        "table": {
            "model.init_args.regularizer": {"class_path": "lqkd.regularizers.LearnableTable"},
            # To build more teachers before the student takes more random numbers.
            "model.init_args.teacher": {
                "class_path": "lqkd.teachers.TeacherEnsemble",
                "init_args": {"teachers": [TEACHER, TEACHER]},
            },
        },
    },
}

SHORTER = {"settings": SMALL["settings"] | {"trainer.max_epochs": 2}}

FORKING = """
import multiprocessing
choose = multiprocessing.get_context
multiprocessing.get_context = lambda method: choose("fork")
"""
"""Runs fork from the process that compares, which saves the time to import everything once more."""

pytestmark = pytest.mark.slow


def compare(
    lqkd: Forks, folder: Path, described: dict[str, Any], *arguments: str, before: str = FORKING, **options: Any
) -> int:
    path = folder / "study.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(described, sort_keys=False))
    return lqkd.run("compare", "--config", str(path), "--root", str(folder), *arguments, before=before, **options)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(lqkd: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nobody disturbed, with a variant that diverges and one that cannot start."""
    folder = tmp_path_factory.mktemp("finished")
    bad: dict[str, Any] = {
        "diverging": {"model.init_args.student_optimizer.init_args.lr": 1e30},
        "impossible": {"model.init_args.student_weights": "nowhere.safetensors"},
    }
    assert compare(lqkd, folder, SMALL | {"variants": SMALL["variants"] | bad}) == 0
    return folder / "small"


def test_failures_are_rows_and_the_others_finish(finished: Path) -> None:
    runs = {(row["variant"], row["seed"]): row for row in rows(finished / "runs.csv")}
    assert {variant: runs[variant, "0"]["status"] for variant in ("plain", "table", "diverging", "impossible")} == {
        "plain": "finished", "table": "finished", "diverging": "diverged", "impossible": "failed"
    }  # fmt: skip
    assert "'nowhere.safetensors' do not exist" in runs["impossible", "1"]["message"]


def test_variants_share_initial_weights_order_and_augmentation_and_seeds_do_not(finished: Path) -> None:
    """Before the first step the task loss of a batch depends on nothing else."""

    def first_loss(variant: str, seed: int) -> str:
        table = rows(finished / "runs" / variant / f"seed_{seed}" / "metrics.csv")
        return next(row["train/task"] for row in table if row["train/task"])

    assert first_loss("plain", 0) == first_loss("table", 0)
    assert first_loss("plain", 0) != first_loss("plain", 1)


def test_a_second_start_trains_nothing_and_failed_runs_only_when_asked(lqkd: Forks, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("metrics.csv")}
    table = (finished / "table.csv").read_bytes()
    described = yaml.safe_load((finished / "study.yaml").read_text())
    assert compare(lqkd, finished.parent, described) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("metrics.csv")} == before
    assert (finished / "table.csv").read_bytes() == table
    assert "8 of 8 runs are done already" in lqkd.log.read_text()


def test_a_variant_with_runs_cannot_change(lqkd: Forks, finished: Path) -> None:
    described = yaml.safe_load((finished / "study.yaml").read_text())
    described["settings"]["trainer.max_epochs"] = 3
    assert compare(lqkd, finished.parent, described) == 2
    assert "variants.plain has runs in" in lqkd.log.read_text()
    assert "trainer.max_epochs was 40 and is now 3" in lqkd.log.read_text()


def test_every_variant_runs_in_every_scenario_and_the_report_says_what_it_costs(lqkd: Forks, tmp_path: Path) -> None:
    weight = "model.init_args.balance.init_args.distill"
    described = SMALL | SHORTER | {
        "seeds": [0],
        "variants": {"fixed": {weight: 0.5}, "given": {}},
        "scenarios": {"light": {weight: 0.1}, "heavy": {weight: 10.0}},
        "tuned": ["fixed"],
    }  # fmt: skip
    assert compare(lqkd, tmp_path, described) == 0
    study = tmp_path / "small"
    trained = {path.parent.relative_to(study / "runs").as_posix() for path in study.glob("runs/*/*/*/summary.json")}
    assert trained == {
        f"{run}/seed_0" for run in ("light/fixed", "light/given", "heavy/given")
    }  # fixed is the same twice
    cells = {(row["scenario"], row["variant"]): row for row in rows(study / "panel.csv")}
    assert cells["light", "fixed"]["test_mean"] == cells["heavy", "fixed"]["test_mean"]
    for scenario in ("light", "heavy"):
        lost = float(cells[scenario, "fixed"]["test_mean"]) - float(cells[scenario, "given"]["test_mean"])
        assert float(cells[scenario, "given"]["regret_mean"]) == pytest.approx(lost)
    assert lqkd.run("report", str(study)) == 0
    for page in ("report.md", "report.html"):
        assert "Regret: the best tuned variant of the scenario" in (study / page).read_text()


def test_a_mistake_in_a_variant_is_told_before_the_first_run(lqkd: Forks, tmp_path: Path) -> None:
    variants: dict[str, Any] = {"good": {}, "bad": {"model.init_args.regularizer": {"class_path": "lqkd.Nothing"}}}
    assert compare(lqkd, tmp_path, SMALL | {"variants": variants}) == 2
    (line,) = [line for line in lqkd.log.read_text().splitlines() if line.startswith("lqkd: error:")]
    assert line.startswith("lqkd: error: variants.bad: ")
    assert not (tmp_path / "small" / "runs").exists()


def test_a_study_that_is_killed_again_and_again_ends_with_the_same_table(
    lqkd: Forks, finished: Path, tmp_path: Path
) -> None:
    """SIGKILL at a claimed folder and within a run; SIGTERM at last."""
    runs = tmp_path / "small" / "runs"
    moments = [
        (signal.SIGKILL, (runs / "plain" / "seed_0").exists),
        (signal.SIGKILL, (runs / "plain" / "seed_0" / "checkpoints" / "last.ckpt").exists),
        (signal.SIGTERM, (runs / "plain" / "seed_1" / "starts.json").exists),
    ]
    for number, moment in moments:
        status = compare(lqkd, tmp_path, SMALL, meanwhile=lambda pid, n=number, when=moment: send(pid, n, when))
        assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert compare(lqkd, tmp_path, SMALL) == 0
    expected = [row for row in rows(finished / "runs.csv") if row["variant"] in SMALL["variants"]]
    assert rows(tmp_path / "small" / "runs.csv") == expected
    expected, got = (
        [row for row in rows(folder / "table.csv") if row["variant"] in SMALL["variants"]]
        for folder in (finished, tmp_path / "small")
    )
    assert got == expected
    starts = [start for path in runs.rglob("starts.json") for start in json.loads(path.read_text())]
    assert any(start["checkpoint"] is not None for start in starts)  # some did go on within


def test_runs_stop_when_the_process_that_compares_is_killed(lqkd: Forks, tmp_path: Path) -> None:
    """Here they fork, two at a time, from the server that does so for users."""
    described = SMALL | {"settings": SMALL["settings"] | {"trainer.max_epochs": 500}, "launcher": {"parallel": 2}}
    folders = [tmp_path / "small" / "runs" / name / "seed_0" for name in SMALL["variants"]]

    def train() -> bool:
        return all((folder / "checkpoints" / "last.ckpt").exists() for folder in folders)

    compare(lqkd, tmp_path, described, before="", meanwhile=lambda pid: send(pid, signal.SIGKILL, train))
    assert train()
    for folder in folders:
        os.close(lock(folder, patience=20.0))  # nobody trains into it any more


def test_a_sweep_chooses_by_validation_and_repeats_itself(lqkd: Forks, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = {"trials": 3, "parameters": {"model.init_args.balance.init_args.distill": {"low": 0.01, "high": 100.0}}}
    described = SMALL | SHORTER | {"variants": {}, "seeds": [0], "sweep": sweep}
    assert compare(lqkd, tmp_path, described) == 0
    trials = rows(tmp_path / "small" / "sweep.csv")
    best = max(trials, key=lambda row: float(row["val_best_mean"]))
    chosen = yaml.safe_load((tmp_path / "small" / "best.yaml").read_text())
    assert chosen == {key: float(best[key]) for key in sweep["parameters"]}  # type: ignore[attr-defined]
    (tmp_path / "small" / "sweep.csv").unlink()
    assert compare(lqkd, tmp_path, described) == 0
    assert rows(tmp_path / "small" / "sweep.csv") == trials
    assert lqkd.log.read_text().count("1 of 1 runs are done already") == 3


def test_submitit_runs_a_study(lqkd: Forks, tmp_path: Path) -> None:
    """Its local executor starts the same job as that of SLURM."""
    pytest.importorskip("submitit")
    launcher = {"parallel": 2, "submitit": {"cluster": "local", "timeout_min": 5}}
    described = SMALL | SHORTER | {"variants": {"plain": {}}, "seeds": [0], "launcher": launcher}
    assert compare(lqkd, tmp_path, described) == 0
    (run,) = rows(tmp_path / "small" / "runs.csv")
    assert run["status"] == "finished"
    described["launcher"] = {"submitit": {"cluster": "local", "nonsense": 5}}
    assert compare(lqkd, tmp_path, described, "--name", "other") == 2
    assert "launcher.submitit is not possible" in lqkd.log.read_text()


def test_the_studies_of_cifar10_differ_in_their_bits_only() -> None:
    four, two = ((CONFIGS / "studies" / f"cifar10_{bits}.yaml").read_text() for bits in ("w4a4", "w2a2"))
    assert four.replace("w4a4", "w2a2").replace("W4A4", "W2A2") == two


STUDIES = sorted(set((CONFIGS / "studies").glob("*.yaml")) - {CONFIGS / "studies" / "cifar10_w4a4.yaml"})


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_is_a_configuration(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LQKD_DATA", str(tmp_path))
    study, base, _ = of("compare", ["--config", str(path), "--root", str(tmp_path)])
    variants = Variants(study.folder, base)
    first = {next(iter(names), "") for names in (study.scenarios, study.variants)}
    for name, overrides in study.runs.items() or [("base", {})]:
        if not study.scenarios or first & {*name.split("/")}:  # each scenario and each variant, not each of their pairs
            variants.write(name, overrides)
    assert f"--config configs/studies/{path.name}" in path.read_text()
    assert os.environ.get("PL_GLOBAL_SEED") == "0"  # the process that starts runs sets no seed


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_variants_of_a_shipped_study_that_are_called_after_labels_distil_nothing(path: Path) -> None:
    """A variant is merged with what all share, of which a term or its weight may stay."""
    study, base = read_settings(path)
    for name, overrides in study.runs.items():
        variant = name.split("/")[-1]
        if variant in ("task_only", "labels") or (
            variant.endswith("_labels") and not variant.endswith("without_labels")
        ):
            settings = merge(base, nested(overrides))["model"]["init_args"]
            balance, terms = settings["balance"], settings.get("distillation") or ["distill"]
            weights = {"distill": 1.0, "terms": None} | balance["init_args"]
            of_terms = dict.fromkeys(terms, weights["distill"]) | (weights["terms"] or {})
            assert balance["class_path"].endswith("FixedBalance")
            assert not any(of_terms.values()), (name, of_terms)


QUANTIZERS = yaml.safe_load((CONFIGS / "studies" / "quantizers.yaml").read_text())["variants"]


@pytest.mark.parametrize("variant", QUANTIZERS)
def test_every_variant_of_the_quantizer_study_fits_a_network_whose_images_are_signed(variant: str) -> None:
    given: dict[str, Any] = {"bits": "w2a2"}
    for key, value in QUANTIZERS[variant].items():
        rest = key.removeprefix("model.init_args.quantization").removeprefix(".")
        given |= {rest: value} if rest else value
    given["rules"] = [Rule(**rule) for rule in given.get("rules", ())]
    student, _ = quantize_model(CifarResNet(8, width=4), Recipe(**given))
    initialize_quantizers(student, torch.randn(8, 3, 16, 16))
    assert all(quantizer.is_ready for quantizer in quantizers(student).values())
