"""A run that is killed leaves nothing half-written under a final name."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.forked import Forks, send

CONFIG = Path(__file__).parents[2] / "configs" / "regularizer.yaml"

DRAWING = "import importlib, lqkd.callbacks.regularizer.pictures as pictures; importlib.reload(pictures)"
"""Pictures are written too, which processes of tests otherwise leave out."""


def check_whole(folder: Path) -> int:
    """Read every file of a run folder that has its final name; return how many there were."""
    checked = 0
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.endswith(".tmp"):
            continue
        checked += 1
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert "model" in yaml.safe_load(path.read_text())
        elif path.suffix == ".csv":
            with open(path, newline="") as stream:
                rows = list(csv.DictReader(stream))
            assert all(None not in row and None not in row.values() for row in rows)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as stored:
                assert list(stored.keys())
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        else:
            assert path.name == "layers.txt"
    return checked


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_files_only(lqkd: Forks, tmp_path: Path) -> None:
    generator = random.Random(0)
    command = ["fit", "--config", str(CONFIG), "--run.root", str(tmp_path)]
    command += [
        "--data.init_args.limit_train",
        "128",
        "--trainer.max_epochs",
        "2000",
        "--trainer.log_every_n_steps",
        "1",
    ]
    for attempt in range(3):
        folder = tmp_path / "regularizer" / f"version_{attempt}"
        pause = generator.uniform(0, 1.5)  # many checkpoints are written in this time

        def kill(pid: int, folder: Path = folder, pause: float = pause) -> None:
            send(pid, signal.SIGKILL, lambda: (folder / "checkpoints" / "last.ckpt").exists() and not time.sleep(pause))

        assert lqkd.run(*command, before=DRAWING, meanwhile=kill) == -signal.SIGKILL, lqkd.log.read_text()
        assert check_whole(folder) >= 4
