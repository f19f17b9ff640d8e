"""``lqkd.distill`` in a script that Lightning starts once for each device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lqkd
import lqkd.callbacks.regularizer.pictures as pictures

pictures.pictures = lambda *history: iter(())
torch.manual_seed(0)
x = torch.randn(64, 3, 6, 6)
y = x.mean((2, 3)).argmax(1)
network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
optimizer = torch.optim.Adam(network.parameters(), 0.02)
for _ in range(80):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()
loader = DataLoader(TensorDataset(x, y), 16)
trainer = {"devices": 2, "strategy": "ddp", "accelerator": "cpu", "enable_progress_bar": False}
for _ in range(2):
    student = lqkd.distill(network, train=loader, val=loader, test=loader, epochs=1, trainer=trainer)
    weights = sum(value.double().sum() for value in student.network.state_dict().values())
    with open(f"told_by_{os.environ.get('LOCAL_RANK', '0')}.txt", "a") as stream:
        print(student.folder.name, student.summary["test"], f"{weights:.12f}", file=stream)
    student.export()
"""


@pytest.mark.slow
def test_two_calls_of_a_script_train_on_two_processes_and_the_first_exports(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"told_by_{rank}.txt").read_text() for rank in range(2)]
    assert told[0].count("\n") == 2
    assert told[1] == told[0]
    exported = sorted(path.parent.name for path in (tmp_path / "runs" / "distill").glob("*/student.onnx"))
    assert exported == ["version_0", "version_1"]
