"""Trainers on a GPU, whose sums come in one order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms need, before the first use

DEVICE = "cuda"
ACCELERATOR = "gpu"


@pytest.fixture
def on_gpu(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """A real Trainer on one GPU, silent; float32 is float32 in it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False

    def make(**arguments: Any) -> Trainer:
        return make_trainer(**({"accelerator": ACCELERATOR, "devices": 1, "benchmark": False} | arguments))

    yield make
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
