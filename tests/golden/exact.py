"""Short runs whose losses and final tensors are kept to the last bit, and what a run gives.

Tensors of the student are kept by name. What the learned regularizer, balance, connectors and combination hold is kept
without names, which a change of structure may change.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.forked import Forks

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "configs" / "regularizer.yaml"
RUNS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
KEPT = Path(__file__).with_suffix(".json")
STEPS = 6
IMAGES = 288
"""Of the training: four whole batches and half of one, an epoch; the second epoch is cut short."""
LOSSES = ("train/loss", "train/task", "train/distill", "balance/task", "balance/distill")


def settings(name: str, folder: Path) -> dict[str, Any]:
    """The whole configuration of the run ``name``, which keeps everything below ``folder``."""
    of_run = RUNS[name]
    config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    model = config["model"]["init_args"]
    model["teacher"]["init_args"]["precision"] = "fp32"  # bf16 is chosen by the processor
    for key, value in of_run["model"].items():
        model[key] = {"class_path": value} if isinstance(value, str) else value
    if "ensemble" in of_run:
        second = copy.deepcopy(model["teacher"]["init_args"])
        second["network"]["init_args"]["depth"] = 8
        second["weights"] = "builtin:digits_student"
        arguments = {"combination": of_run["ensemble"], "teachers": [model["teacher"]["init_args"], second]}
        model["teacher"] = {"class_path": "lqkd.teachers.TeacherEnsemble", "init_args": arguments}
    if of_run.get("cached"):
        model["teacher_cache"] = {"folder": str(folder / "cache")}
    config["data"]["init_args"] = {"limit_train": IMAGES, **of_run.get("data", {})}
    config["run"] = {"root": str(folder), "name": name}
    config["trainer"] = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "callbacks": [],
    }
    return config


def trained(name: str, folder: Path, process: Forks) -> dict[str, Any]:
    """Losses of every step, as text that says a float32 exactly, and hashes of the final tensors.

    Args:
        name: of the run.
        folder: an empty one.
        process: runs command lines, on one thread and without compiled kernels.
    """

    def command(*arguments: str) -> None:
        assert process.run(*arguments) == 0, process.log.read_text()

    config = settings(name, folder)
    file = folder / "config.yaml"
    run = folder / name / "version_0"
    if RUNS[name].get("resumed"):
        config["trainer"]["max_steps"] = STEPS // 2
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command("fit", "--config", str(file))
        command("resume", str(run), f"--trainer.max_steps={STEPS}")
    else:
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        if RUNS[name].get("cached"):  # the second run reads what the first has stored
            command("fit", "--config", str(file), "--run.name=first")
        command("fit", "--config", str(file))
    with open(run / "metrics.csv", newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    losses = {key: [row[key] for row in rows] for key in LOSSES}
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    others = sorted(digest(v) for k, v in state.items() if not k.startswith("student."))
    return {
        "losses": losses,
        "student": hashed(f"{k} {digest(student[k])}" for k in sorted(student)),
        "phi": hashed(others),
    }


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and every bit of ``tensor``."""
    content = tensor.detach().cpu().contiguous()
    head = f"{content.dtype} {tuple(content.shape)} ".encode()
    return hashlib.sha256(head + content.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def hashed(lines: Iterable[str]) -> str:
    """One short hash of all lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def machine() -> str:
    """What floating-point sums may depend on: PyTorch's version and build, and the processor's instructions."""
    flags = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = ("vendor_id", "cpu family", "flags")
        first = info.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        flags += hashed([line for line in first if line.startswith(named)])
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {flags}"
