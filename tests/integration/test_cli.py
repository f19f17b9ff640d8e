"""The command line as a user meets it: real processes would be slower, so ``main`` runs in this one."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lqkd.cli import main
from lqkd.runs import BestAndLast
from lqkd.runs.outcome import print_outcome
from tests.unit.callbacks.wandb_records import wandb_artifacts

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "configs" / "regularizer.yaml")
STUDENT = "--model.init_args.student.init_args"


def fit(tmp_path: Path, *arguments: str, epochs: int = 1, name: str = "regularizer") -> Path:
    """Fit configs/regularizer.yaml for a short while and return the run folder."""
    before = set((tmp_path / "runs" / name).glob("*"))
    short = ["--trainer.max_epochs", str(epochs), "--data.init_args.limit_train", "256"]
    short += ["--trainer.log_every_n_steps", "1"]
    command = ["fit", "--config", SHIPPED, "--run.root", str(tmp_path / "runs"), *short, *arguments]
    assert main(command) == 0
    (folder,) = set((tmp_path / "runs" / name).glob("*")) - before
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, drawing: Callable[..., Any]) -> Path:
    """One finished run, with its pictures, that several tests look at and none changes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lqkd.callbacks.regularizer.pictures.pictures", drawing)
        return fit(tmp_path_factory.mktemp("shared"), epochs=2)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one command, one after the other."""
    folder = tmp_path_factory.mktemp("twice")
    return [fit(folder) for _ in range(2)]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


# ---- what a run leaves behind


TABLES = (
    "weights", "distribution", "label", "output", "confidence", "divergence", "agreement", "balance", "share",
    "step_length",
)  # fmt: skip
PICTURES = ("weights", "distribution", "classes", "confidence", "divergence", "agreement", "balance", "step_length")


def test_a_run_folder_holds_everything_about_the_run(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml",
        "layers.txt",
        "starts.json",
        "metrics.csv",
        "summary.json",
        "student.safetensors",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        *(f"regularizer/{name}.csv" for name in TABLES),
        *(f"regularizer/{name}.{kind}" for name in PICTURES for kind in ("png", "svg")),
    }


def test_the_summary_has_every_documented_key_and_invents_no_value(run: Path) -> None:
    summary = summary_of(run)
    assert {
        "seed", "versions", "teacher", "student_float", "student_start",
        "val", "test", "weight_bits", "activation_bits", "parameters", "packed_bytes", "float_bytes",
        "bit_operations", "images_per_second", "train_seconds", "regularizer", "balance", "warnings",
    } <= set(summary)  # fmt: skip
    assert summary["seed"] == 0
    assert summary["teacher"] > 0.97
    assert summary["packed_bytes"] < summary["float_bytes"] / 8
    assert {"mean", "spread", "verdict"} <= set(summary["regularizer"])


def test_the_run_ends_with_a_table_and_the_path_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = fit(tmp_path)
    printed = capsys.readouterr().out
    for text in ("teacher", "student in float", "quantised only (PTQ)", "trained, W2 A2", "kB", "98.61%"):
        assert text in printed
    assert re.search(
        r"W2 A2: accuracy [\d.]+%, [\d.]+ points worse than in float \(98\.61%\), packed weights 10", printed
    )
    assert f"run folder: {folder}\nnext, a file to take away: python -m lqkd export {folder}\n" in printed


def test_the_students_file_holds_the_best_checkpoints_student_and_says_what_it_is(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    with safe_open(run / "student.safetensors", "pt") as stored:
        assert {f"student.{key}" for key in list(stored.keys())} == {k for k in checkpoint if k.startswith("student.")}
        for key in list(stored.keys()):
            assert torch.equal(stored.get_tensor(key), checkpoint[f"student.{key}"])
        described = {key: json.loads(value) for key, value in stored.metadata().items()}
    assert described["quantization"]["bits"] == "w2a2"
    assert described["student"]["class_path"] == "lqkd.models.CifarResNet"
    assert described["class_names"] == [str(digit) for digit in range(10)]


def test_metrics_hold_both_losses_and_the_teachers_accuracy_before_the_first_step(run: Path) -> None:
    with open(run / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[0]["teacher/acc"]) > 0.97
    assert int(rows[0]["step"]) == 0
    assert {"train/task", "train/distill", "val/acc", "regularizer/mean", "balance/distill"} <= set(rows[0])


def test_a_quantizer_with_arguments_and_quantised_additions_come_from_yaml(tmp_path: Path) -> None:
    quantization = {
        "weight_quantizer": {"name": "lsq", "initial": "mean"},
        "rules": [{"match": "layer2.*", "activation_quantizer": {"name": "lqkd.quantization.LSQ", "initial": "mean"}}],
        "residual_bits": 8,
    }
    config = tmp_path / "quantizer.yaml"
    config.write_text(yaml.safe_dump({"model": {"init_args": {"quantization": quantization}}}))
    folder = fit(tmp_path, "--config", str(config))
    assert "quantised: functional add at layer1.0 of 2 operands with 8 bits" in (folder / "layers.txt").read_text()
    assert summary_of(folder)["activation_bits"] == "2 (8 in 2 layers)"
    written = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["quantization"]
    assert written["weight_quantizer"] == quantization["weight_quantizer"]


def test_two_runs_with_one_seed_have_the_same_numbers(twice: list[Path]) -> None:
    first, second = map(summary_of, twice)
    for timing in ("images_per_second", "train_seconds"):
        del first[timing], second[timing]
    assert first == second


def test_another_seed_gives_other_numbers(tmp_path: Path, run: Path) -> None:
    other = summary_of(fit(tmp_path, "--seed_everything", "1", epochs=2))
    assert other["regularizer"]["mean"] != summary_of(run)["regularizer"]["mean"]


def test_bits_are_chosen_on_the_command_line(tmp_path: Path) -> None:
    assert summary_of(fit(tmp_path, "--model.quantization.bits", "w4a4"))["weight_bits"].startswith("4")


def test_a_run_tells_no_folder_to_processes_that_are_launched_after_it(run: Path) -> None:
    """Those of a second training of the same notebook would take it for theirs."""
    assert run.is_dir()
    assert "LQKD_RUN_FOLDER" not in os.environ


def test_a_second_run_gets_a_folder_of_its_own(twice: list[Path]) -> None:
    assert [folder.name for folder in twice] == ["version_0", "version_1"]


# ---- the other verbs


def test_test_and_validate_take_the_best_checkpoint_beside_the_config(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["test", "--config", str(run / "config.yaml")]) == 0
    assert f"{summary_of(run)['test']:.6f}"[:6] in capsys.readouterr().out
    assert main(["validate", "--config", str(run / "config.yaml")]) == 0
    assert f"{summary_of(run)['val']:.6f}"[:6] in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_predict_writes_a_class_for_every_image(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "copy")
    assert main(["predict", "--config", str(folder / "config.yaml")]) == 0
    with open(folder / "predictions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 359
    assert {row["class"] for row in rows} <= {str(digit) for digit in range(10)}
    assert [row["index"] for row in rows] == [str(index) for index in range(359)]
    right = sum(row["class"] == row["label"] for row in rows)
    assert right / 359 == pytest.approx(summary_of(folder)["test"])


def test_a_printed_config_reads_back_as_itself(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    printed = []
    source = SHIPPED
    for index in range(2):
        with pytest.raises(SystemExit):
            main(["fit", "--config", source, "--print_config"])
        printed.append(capsys.readouterr().out)
        source = str(tmp_path / f"{index}.yaml")
        Path(source).write_text(printed[-1])
    assert printed[0] == printed[1]


def test_the_command_line_wins_over_the_checkpoint_and_says_so(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [
        "fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt"),
        "--trainer.max_epochs", "3", "--run.root", str(tmp_path),
        "--model.student_optimizer.init_args.lr", "0.5", "--model.student_optimizer.init_args.weight_decay", "0.25",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "model.student_optimizer.init_args.lr was 0.02 and is now 0.5" in caplog.text
    checkpoint = tmp_path / "regularizer" / "version_0" / "checkpoints" / "last.ckpt"
    group = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.25)


def test_a_checkpoint_rebuilds_its_module_without_a_config(run: Path) -> None:
    from lqkd import DistillModule

    module = DistillModule.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in module.state_dict().items())


# ---- loggers


def test_wandb_and_tensorboard_write_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    loggers = [
        {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"log_model": True, "project": "test"}},
        {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "."}},
    ]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    folders = []
    for _ in range(2):
        folders.append(fit(tmp_path, "--config", str(tmp_path / "loggers.yaml")))
        told, summary = dict(wandb.run.summary), summary_of(folders[-1])
        assert {key: told[f"summary/{key}"] for key in ("test", "packed_bytes")} == {
            key: summary[key] for key in ("test", "packed_bytes")
        }
        wandb.finish()  # as the end of a process does
    for folder in folders:
        (records,) = folder.rglob("*.wandb")
        (student,) = (files for name, files in wandb_artifacts(records).items() if name.startswith("student-"))
        assert student == {"student.safetensors", "config.yaml", "summary.json"}
        assert list(folder.rglob("events.out.tfevents*"))
        assert (folder / "metrics.csv").is_file()


# ---- mistakes


def mistake(capsys: pytest.CaptureFixture, *arguments: str, tmp_path: Path) -> str:
    """Run ``fit`` with a mistake, check that it ends with one line and status 2 before any batch, return the line."""
    try:
        status = main(["fit", "--config", SHIPPED, "--run.root", str(tmp_path / "runs"), *arguments])
    except SystemExit as stop:  # jsonargparse's own usage errors
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert "epoch 1/" not in captured.out
    assert "usage" not in captured.err
    (line,) = [text for text in captured.err.splitlines() if "error" in text.lower()]
    assert line.startswith("lqkd: error: ")
    return line


def pretrained(name: str) -> nn.Module:
    """A library's function for a network with weights, on a machine without a network."""
    raise URLError("no network")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.quantization.weight_quantizer", "lsqq"], "quantizer 'lsqq' is unknown: use"),
        (["--model.quantization.bits", "w9a4"], "quantization.bits='w9a4' is not possible: bits are 1 to 8"),
        (["--trainer.precision", "16-mixed"], "trainer.precision='16-mixed' is not possible"),
        (["--trainer.gradient_clip_val", "1.0"], "trainer.gradient_clip_val=1.0 has no effect"),
        ([f"{STUDENT}.depth", "14"], "are of another network than CifarResNet"),
        (["--model.init_args.student_weights", "nowhere.pt"], "weights='nowhere.pt' do not exist"),
        (["--model.init_args.student_weights", "$NOWHERE/w.pt"], "name an environment variable that is not set"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path='nowhere.ckpt' does not exist"),
        (["--ckpt_path", SHIPPED], "is not a checkpoint that can be read"),
        (["--data.init_args.validation_fraction", "1.5"], "validation_fraction=1.5"),
        (["--data", "lqkd.data.CIFAR10", "--data.init_args.root", "/nowhere"], "/nowhere"),
        (["--model.init_args.lamda", "1"], "model: Option 'lamda' is not accepted"),
        (["--model.regularizer.hidden", "abc"], "model.regularizer.hidden: Expected a int. Got value: abc"),
        (["--trainer.max_epochs", "abc"], "trainer.max_epochs: Expected a int; got abc"),
        (["--config", "nowhere.yaml"], "does not exist: give a YAML file"),
        (["--trainer.strategy", "foo"], "the Trainer refuses these settings"),
        (["--trainer.precision", "bf16-true"], "trainer.precision='bf16-true' is not possible: use bf16-mixed"),
        (["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:02"], "Cosine needs to know the end"),
        (["--run.name", "/tmp/elsewhere"], "run.name='/tmp/elsewhere' is not possible"),
        (
            ["--model.teacher.minimum_accuracy", "1", "--model.teacher.weights", "null"],
            "less than teacher.minimum_accuracy=1",
        ),
        (["--seed_everything", "-1"], "seed_everything=-1 is not possible: a seed is a whole number from 0 to"),
        (["--seed_everything", "4294967296"], "seed_everything=4294967296 is not possible"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch=0 is not possible"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval=0 is not possible"),
        (["--trainer.log_every_n_steps", "-1"], "trainer.log_every_n_steps=-1 is not possible"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches=0 leaves nothing to train on"),
        (["--trainer.limit_train_batches", "0.001"], "Lightning refuses these settings: You requested to check 0.001"),
        (["--trainer.accelerator", "tpu"], "the Trainer refuses these settings"),
        (["--trainer.devices", "99999", "--trainer.accelerator", "cpu"], "trainer.devices='99999' is not possible"),
        (["--run.version", "-1"], "run.version=-1 is not possible: a number must be at least 0"),
        (
            ["--model.student={class_path: torch.nn.Linear, init_args: {in_features: -5, out_features: 3}}"],
            "torch.nn.modules.linear.Linear cannot be made with in_features=-5, out_features=3 (RuntimeError: ",
        ),
        (
            ["--model.student", "tests.integration.test_cli.pretrained", "--model.student.name", "big"],
            "tests.integration.test_cli.pretrained cannot be made with name='big' (URLError: <urlopen error no "
            "network>): if it wants to download weights, leave those out and give a file with them, .safetensors",
        ),
        (
            ["--trainer.callbacks+", "lightning.pytorch.callbacks.Timer", "--trainer.callbacks.duration", "soon"],
            "lightning.pytorch.callbacks.timer.Timer cannot be made with duration='soon' (Misconfiguration",
        ),
        (["--model.student_optimizer.lr", "-1"], "student_optimizer is not possible: Invalid learning rate: -1.0"),
        (["--model.regularizer_optimizer.lr", "-1"], "regularizer_optimizer is not possible: Invalid learning rate"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_batch(
    capsys: pytest.CaptureFixture, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in mistake(capsys, *arguments, tmp_path=tmp_path)


LOSSES, REGULARIZERS = "lqkd.losses", "lqkd.regularizers"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"distillation_loss": {"class_path": f"{LOSSES}.HintonKL", "init_args": {"temperature": -1.0}}},
            "temperature=-1.0 is not possible",
        ),
        (
            {"distillation_loss": {"class_path": f"{LOSSES}.Hints"}, "regularizer": None},
            "distillation_loss Hints compares features: give at least one pair of taps",
        ),
        (
            {
                "distillation_loss": {"class_path": f"{LOSSES}.Hints"},
                "regularizer": {"class_path": f"{REGULARIZERS}.ConvModulator"},
                "taps": [{"teacher": "layer3", "student": "layr3"}],
            },
            "tap 'layr3' does not exist in the student: near names are layer3",
        ),
        (
            {
                "distillation_loss": {"class_path": f"{LOSSES}.RKD"},
                "taps": [{"teacher": "layer3", "student": "layer3"}],
            },
            "ElementwiseMLP cannot weigh distillation_loss RKD",
        ),
        (
            {
                "regularizer": {
                    "class_path": f"{REGULARIZERS}.ElementwiseMLP",
                    "init_args": {"guard": "barrier", "player": "adversarial"},
                }
            },
            "guard Barrier does not go with player Adversarial",
        ),
        (
            {
                "teacher": {
                    "class_path": "lqkd.teachers.TeacherEnsemble",
                    "init_args": {
                        "teachers": [
                            {"network": {"class_path": "lqkd.models.CifarResNet", "init_args": arguments}}
                            for arguments in (
                                {"depth": 8, "in_channels": 1},
                                {"depth": 8, "in_channels": 1, "num_classes": 7},
                            )
                        ]
                    },
                }
            },
            "numbers of classes differ (data 10, teacher 1 10, teacher 2 7, student 10)",
        ),
        (
            {
                "balance": {
                    "class_path": f"{REGULARIZERS}.BoundedUncertaintyBalance",
                    "init_args": {"minimum": 3, "maximum": 2},
                }
            },
            "minimum",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_about_the_regularizer_is_one_line_before_the_first_batch(
    capsys: pytest.CaptureFixture, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = tmp_path / "mistake.yaml"
    config.write_text(yaml.safe_dump({"model": {"init_args": settings}}))
    assert message in mistake(capsys, "--config", str(config), tmp_path=tmp_path)


def test_a_checkpoint_of_another_architecture_is_one_line(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path
) -> None:
    arguments = [f"{STUDENT}.depth", "14", "--model.init_args.student_weights", "null"]
    line = mistake(capsys, *arguments, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), tmp_path=tmp_path)
    assert "the checkpoint is of another architecture" in line


def test_an_unwritable_run_folder_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "cannot be written" in mistake(capsys, tmp_path=tmp_path)


def test_an_existing_version_is_not_overwritten(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = fit(tmp_path, "--run.version", "mine")
    before = (folder / "summary.json").read_bytes()
    capsys.readouterr()
    assert "exists: choose another run.version" in mistake(capsys, "--run.version", "mine", tmp_path=tmp_path)
    assert (folder / "summary.json").read_bytes() == before


@pytest.mark.parametrize("late", [False, True])
def test_a_mistake_leaves_no_run_folder(capsys: pytest.CaptureFixture, tmp_path: Path, late: bool) -> None:
    arguments = ["--model.student_optimizer.lr", "-1"] if late else ["--model.quantization.bits", "w9a4"]
    mistake(capsys, *arguments, tmp_path=tmp_path)
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_resumed_run_cannot_change_its_optimizer(capsys: pytest.CaptureFixture, tmp_path: Path, run: Path) -> None:
    arguments = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--model.student_optimizer", "torch.optim.Adam"]
    assert "the checkpoint holds its state" in mistake(capsys, *arguments, tmp_path=tmp_path)


# ---- a run without a regularizer, whose epochs are shorter than the Trainer's interval of logging


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arguments = ["--model.regularizer=null", "--trainer.log_every_n_steps", "null"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*logging interval")
        return fit(tmp_path_factory.mktemp("plain"), *arguments)


def test_without_a_regularizer_the_summary_has_none_and_the_screen_says_so(
    capsys: pytest.CaptureFixture, plain: Path
) -> None:
    assert summary_of(plain)["regularizer"] is None
    print_outcome(plain)
    assert capsys.readouterr().out.count("no regularizer: every element of the distillation loss has the same") == 1


def test_the_table_says_of_a_student_without_weights_that_it_was_not_trained(
    capsys: pytest.CaptureFixture, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary_of(plain) | {"student_float": None}))
    print_outcome(tmp_path)
    assert re.search(r"student in float\W+not trained", capsys.readouterr().out)


def test_the_file_that_is_proposed_is_one_that_holds_the_grid(
    capsys: pytest.CaptureFixture, plain: Path, tmp_path: Path
) -> None:
    shutil.copy(plain / "summary.json", tmp_path)
    for bits, option in (("w4a4", ""), ("q4_0", " --format gguf")):
        save_file({}, tmp_path / "student.safetensors", {"quantization": json.dumps({"bits": bits})})
        print_outcome(tmp_path)
        assert f"a file to take away: python -m lqkd export {tmp_path}{option}\n" in capsys.readouterr().out
    said = {"quantization": {"bits": "w4a32"}, "student": {"class_path": "lqkd.models.GPT"}}
    save_file({}, tmp_path / "student.safetensors", {key: json.dumps(value) for key, value in said.items()})
    print_outcome(tmp_path)  # no file is made of a language model on another grid
    assert "a file to take away" not in capsys.readouterr().out


def test_an_epoch_shorter_than_the_interval_of_logging_logs_its_losses(plain: Path) -> None:
    with open(plain / "metrics.csv", newline="") as stream:
        assert [row["train/loss"] for row in csv.DictReader(stream) if row["train/loss"]]


# ---- resuming, of which tests/integration/test_resume.py has more


class Unlike(nn.Module):
    """A network that trains at few bits and has no counterpart in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bent, self.last = nn.Linear(64, 16), nn.PReLU(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bent(self.first(x.flatten(1))))


@pytest.mark.parametrize("exportable", [True, False])
def test_what_export_will_refuse_is_told_before_the_training(tmp_path: Path, exportable: bool) -> None:
    student = ["--model.init_args.student", f"{__name__}.Unlike", "--model.init_args.student_weights", "null"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, "--trainer.limit_train_batches", "1", *([] if exportable else student))
    told = [str(warning.message) for warning in caught if "export will refuse" in str(warning.message)]
    cause = "operator PReLU in bent cannot be exported: replace it in the network"
    assert told == ([] if exportable else [f"export will refuse this student: {cause}"])


def test_a_finished_run_says_so_and_is_left_alone(capsys: pytest.CaptureFixture, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["resume", str(run)]) == 0
    assert f"{run} is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is no run folder that can be resumed: it has no config.yaml"),
        (["--ckpt_path=other.ckpt"], "--ckpt_path is not possible with resume"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(
    capsys: pytest.CaptureFixture, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert main(["resume", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lqkd: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_run_that_may_not_be_read_is_one_line_on_resuming(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)  # permissions do not stop root
    assert main(["resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lqkd: error: '{run}/")
    assert error.endswith("cannot be used: Permission denied\n")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed_everything", "7"], "another split into training and validation images"),
        (["--data.init_args.validation_fraction", "0.2"], "another split into training and validation images"),
        (["--data.init_args.limit_train", "128"], "another split into training and validation images"),
        (["--trainer.max_epochs", "1"], "trainer.max_epochs=1 is not possible: the checkpoint has reached 2"),
        (["--trainer.max_steps", "1"], "trainer.max_steps=1 is not possible: the checkpoint has reached"),
        (["--model.teacher.minimum_accuracy", "1.01", "--trainer.max_epochs", "3"], "minimum_accuracy=1.01"),
        (["--run.name", "other"], "run.name='other' is not possible with resume"),
        (["--run.root=elsewhere"], "run.root='elsewhere' is not possible with resume"),
        (["--run.version", "other"], "run.version='other' is not possible with resume"),
    ],
)
def test_a_resumption_that_is_refused_leaves_the_settings_as_they_were(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path, arguments: list[str], message: str
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    before = (copy / "config.yaml").read_bytes()
    assert main(["resume", str(copy), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert message in errors[0]
    assert (copy / "config.yaml").read_bytes() == before
    assert main(["resume", str(copy)]) == 0


def test_a_finished_run_takes_no_settings_that_ask_for_no_more_training(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert main(["resume", str(copy), "--model.gradient_clip_val", "1.0"]) == 2
    assert "settings have no effect unless they ask for more training" in capsys.readouterr().err
    assert (copy / "summary.json").read_bytes() == (run / "summary.json").read_bytes()


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a file")


def test_a_finished_run_that_is_made_longer_and_interrupted_goes_on(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the commands that it is told: by the finished run, and by the disk that is full in the first epoch."""
    copy = shutil.copytree(run, tmp_path / "copy")
    assert main(["resume", str(copy)]) == 0
    longer = shlex.split(capsys.readouterr().out.rpartition("e.g. python -m lqkd ")[2])
    with monkeypatch.context() as patched:
        patched.setattr(BestAndLast, "check_monitor_top_k", full_disk)
        assert main(longer) == 4
    told = capsys.readouterr().err.splitlines()[-1]
    assert not {"summary.json", "student.safetensors"} & {path.name for path in copy.iterdir()}
    assert main(shlex.split(told.rpartition("go on with: python -m lqkd ")[2])) == 0
    assert [summary_of(copy)[key] for key in ("epochs", "finished")] == [4, True]


def test_a_setting_that_is_not_kept_yet_is_given_once_more(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk before the configuration is replaced: going on without the setting would do something else."""
    copy = shutil.copytree(run, tmp_path / "copy")
    monkeypatch.setattr("lqkd.runs.description.Description.describe", full_disk)
    assert main(["resume", str(copy), "--trainer.max_epochs", "3"]) == 4
    assert capsys.readouterr().err.endswith("make room, then the same command starts again\n")


def test_a_checkpoint_that_cannot_be_resumed_starts_the_new_run_that_it_is_told(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    checkpoint = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["resume"]
    torch.save(checkpoint, copy / "checkpoints" / "last.ckpt")
    assert main(["resume", str(copy)]) == 2
    told = capsys.readouterr().err.rpartition("start a new run from it with python -m lqkd ")[2]
    assert main([*shlex.split(told), "--trainer.max_epochs", "3"]) == 0
    assert summary_of(run.parent / "NEW")["epochs"] == 3
    shutil.rmtree(run.parent / "NEW")


def test_a_number_that_is_not_finite_is_null_in_the_summary_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lqkd.runs.summary._balance", lambda trainer: {"task": float("nan"), "distill": 1.0})
    summary = summary_of(fit(tmp_path, "--trainer.limit_train_batches", "1"))
    assert summary["balance"] == {"task": None, "distill": 1.0}
    assert summary["warnings"][-1] == "null stands for numbers that are not finite: balance.task"


def test_the_accuracy_of_an_earlier_step_is_not_that_of_the_weights_that_are_left(tmp_path: Path) -> None:
    """Without a best checkpoint these are the last ones, here of the middle of the second epoch."""
    folder = fit(tmp_path, "--trainer.enable_checkpointing", "false", "--trainer.max_steps", "6", epochs=-1)
    assert [summary_of(folder)[key] for key in ("steps", "val")] == [6, None]


def test_a_run_that_was_not_tested_is_finished_all_the_same(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = fit(tmp_path, "--trainer.limit_test_batches", "0", "--trainer.limit_train_batches", "1")
    assert summary_of(folder)["test"] is None
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 0
    assert f"{folder} is finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_new_run_from_a_checkpoint_keeps_its_split(
    capsys: pytest.CaptureFixture, tmp_path: Path, run: Path, name: str
) -> None:
    arguments = ["--ckpt_path", str(run / "checkpoints" / f"{name}.ckpt"), "--trainer.max_epochs", "3"]
    line = mistake(capsys, *arguments, "--seed_everything", "7", tmp_path=tmp_path)
    assert "another split into training and validation images" in line


def test_an_argument_is_not_abbreviated(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", SHIPPED, "--run.root", str(tmp_path), "--trainer.max_epoch", "1"])
    assert "--trainer.max_epoch" in capsys.readouterr().err


def test_a_checkpoint_plugin_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []

    class Mine(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            saved.append(Path(path).name)
            super().save_checkpoint(checkpoint, path, storage_options)

    monkeypatch.setattr("tests.integration.test_cli.Mine", Mine, raising=False)
    fit(tmp_path, "--trainer.plugins", "tests.integration.test_cli.Mine")
    assert set(saved) == {"best.ckpt", "last.ckpt"}


class Foreign(LightningModule):
    """A module of a user that is none of lqkd and has no settings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", 0.5, batch_size=1)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_is_not_lqkds_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.integration.test_cli.Foreign", Foreign, raising=False)
    where = ["--run.root", str(tmp_path), "--run.version", "a"]
    model = ["--model", "tests.integration.test_cli.Foreign", "--data", "lqkd.data.Digits"]
    assert main(["fit", *model, "--trainer.max_epochs", "1", *where]) == 0
    assert main(["resume", str(tmp_path / "run" / "a"), "--trainer.max_epochs", "2"]) == 0
    last = torch.load(tmp_path / "run" / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2


# ---- the package


def test_importing_the_package_is_quick_and_light() -> None:
    code = (
        "import sys, time; t = time.time(); import lqkd; assert time.time() - t < 4; "
        "assert not {'wandb', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_runs_as_a_command() -> None:
    environment = os.environ | {"COLUMNS": "100"}
    shown = subprocess.run(
        [sys.executable, "-m", "lqkd", "--help"], capture_output=True, text=True, check=True, env=environment
    )
    for verb in ("fit", "validate", "test", "predict"):
        assert verb in shown.stdout
