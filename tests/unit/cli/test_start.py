"""What a person is told at once: help and mistakes load neither PyTorch nor Lightning, which take seconds."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "lightning", "numpy", "jsonargparse", "onnx", "matplotlib", "rich")
VERBS = ("distill", "export", "predict", "report", "sensitivity", "compare", "resume", "make-shards", "wandb-report")
TOLD_AT_ONCE = [
    (["--help"], 0),
    *(([verb, "--help"], 0) for verb in VERBS),
    (["exprot", "runs"], 2),
    (["export", "runs", "--laten"], 2),
    (["distill", "missing"], 2),
    (["distill", ".", "--epochs", "0"], 2),
    (["fit"], 2),
    (["fit", "--config", "missing.yaml"], 2),
    (["compare", "--config", "missing.yaml"], 2),
    *(([verb, "missing"], 2) for verb in ("export", "report", "sensitivity", "resume")),
    (["predict", "missing.onnx", "cat.jpg"], 2),
    (["make-shards", "missing", "shards"], 2),
    (["make-shards", ".", "shards", "--shard-mb", "0"], 2),
    (["wandb-report", "lqkd"], 2),
]
CODE = f"""
import sys
from lqkd.cli import main
for arguments, expected in {TOLD_AT_ONCE!r}:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code or 0
    assert status == expected, (arguments, status)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (arguments, loaded)
"""


def loaded_by(module: str) -> set[str]:
    """By the command line, before it calls the module's ``main``."""
    code = f"import sys; from lqkd.cli.main import _load; _load({module!r}); print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_help_and_mistakes_are_told_before_pytorch_is_loaded() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, stdout=subprocess.DEVNULL)


def test_a_page_needs_no_pytorch_and_a_prediction_no_lightning() -> None:
    assert not loaded_by("lqkd.studies.report") & {"torch", "lightning", "scipy.stats"}
    assert not loaded_by("lqkd.export.predict") & {"lightning", "torchvision", "torchmetrics"}
