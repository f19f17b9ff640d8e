"""The first losses of the main configurations, on scikit-learn's digits."""

from __future__ import annotations

import csv
from pathlib import Path

from lqkd.cli import main

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("losses.json")
STEPS = 5
KEYS = ("train/loss", "train/task", "train/distill")
VARIANTS: dict[str, list[str]] = {
    "quickstart": [],
    "w4a4": ["--model.quantization.bits=w4a4"],
    "w1a1": ["--model.quantization.bits=w1a1"],
    "ternary": ["--model.quantization.bits=ternary"],
    "literal": ["--model.regularizer.guard=none", "--model.regularizer.max_weight=.inf"],
    "kl_by_sample": [
        "--model.distillation_loss=lqkd.losses.HintonKL",
        "--model.regularizer=lqkd.regularizers.SampleWeight",
        "--model.regularizer.guard=mean_one",
        "--model.regularizer.player=adversarial",
    ],
    "look_ahead": [
        "--model.regularizer.guard=bounded",
        "--model.regularizer.player=look_ahead",
        "--model.balance=lqkd.regularizers.OutputGradientBalance",
    ],
    "plain": ["--model.regularizer=null"],
}
"""Over the quickstart."""
ALWAYS = [
    f"--trainer.max_steps={STEPS}",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=[]",
    "--model.teacher.init_args.precision=fp32",  # bf16 is chosen by the processor
]


def first_losses(variant: str, folder: Path) -> dict[str, list[float]]:
    """Losses of the first steps of a variant, which is trained below ``folder``."""
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *ALWAYS, *VARIANTS[variant]]
    assert main([*arguments, f"--run.root={folder}", f"--run.name={variant}"]) == 0
    with open(folder / variant / "version_0" / "metrics.csv", newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    return {key: [float(row[key]) for row in rows] for key in KEYS}
