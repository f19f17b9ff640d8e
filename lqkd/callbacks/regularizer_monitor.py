"""What the regularizer learned, epoch by epoch: numbers, a picture and a verdict."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lqkd.callbacks.run_logger import run_folder_of
from lqkd.files import atomic_path

COLLAPSED_BELOW = 0.1
"""A mean weight under this part of the initial weight, 1, counts as collapsed: distillation hardly acts any more."""
SATURATED_ABOVE = 0.9
"""A greater share of weights at their upper bound counts as saturated."""
UNIFORM_BELOW = 0.01
"""A spread under this part of the mean, at a mean near 1, counts as uniform."""


@dataclass(frozen=True)
class EpochWeights:
    """The weights of all training batches of one epoch."""

    epoch: int
    mean: float
    spread: float
    """Standard deviation over all elements."""
    minimum: float
    maximum: float
    effective: float
    """Part of the divergence that still counts, ``sum(w D) / sum(D)``."""
    at_maximum: float
    """Share of the weights within 2 % of their upper bound."""


@dataclass(frozen=True)
class Verdict:
    """What the weights of the last epoch mean for the run, and what to do about it."""

    kind: Literal["healthy", "collapsed", "saturated", "uniform"]
    sentence: str


def verdict(last: EpochWeights) -> Verdict:
    """Judge the weights of the last epoch."""
    if last.mean < COLLAPSED_BELOW:
        return Verdict(
            "collapsed",
            f"The regularizer collapsed: its mean weight fell from 1 to {last.mean:.3g} and distillation is all but "
            "off. Use a guard other than none, e.g. --model.regularizer.guard=barrier: without one, zero weights are "
            "the optimum of the literal formula.",
        )
    if last.at_maximum > SATURATED_ABOVE:
        return Verdict(
            "saturated",
            f"The regularizer is saturated: {last.at_maximum:.0%} of its weights are at their upper bound. "
            "Raise max_weight, or use a fixed weight: it no longer tells differences apart.",
        )
    if last.spread < UNIFORM_BELOW * last.mean and 0.5 < last.mean < 2.0:
        return Verdict(
            "uniform",
            f"The regularizer is uniform: mean weight {last.mean:.3g}, spread {last.spread:.2g}, no different from "
            "fixed distillation. Raise its learning rate or train longer, or save its cost.",
        )
    return Verdict(
        "healthy", f"The regularizer is healthy: mean weight {last.mean:.3g}, spread {last.spread:.3g} in the last epoch."
    )


class _Accumulator:
    """Sums over the weights of an epoch, kept on the device so that no batch waits for it."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.sums = torch.zeros(6, dtype=dtype, device=device)  # n, w, w^2, at maximum, w D, D
        self.extremes = torch.tensor([-torch.inf, -torch.inf], dtype=dtype, device=device)  # of -w and of w

    def add(self, weights: Tensor, divergence: Tensor, max_weight: float | None) -> None:
        w = weights.to(self.sums.dtype)
        d = divergence.to(self.sums.dtype)
        at_maximum = w.new_zeros(()) if max_weight is None else (w >= 0.98 * max_weight).sum()
        counted = w.new_tensor(float(w.numel()))
        self.sums += torch.stack([counted, w.sum(), w.square().sum(), at_maximum, (w * d).sum(), d.sum()])
        self.extremes = torch.maximum(self.extremes, torch.stack([(-w).max(), w.max()]))

    def result(self, epoch: int) -> EpochWeights:
        """Statistics over all ranks, on all of which this must be called."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
            torch.distributed.all_reduce(self.extremes, torch.distributed.ReduceOp.MAX)
        count, total, squares, at_maximum, weighted, divergence = self.sums.tolist()
        mean = total / count
        negative_minimum, maximum = self.extremes.tolist()
        return EpochWeights(
            epoch=epoch,
            mean=mean,
            spread=max(0.0, squares / count - mean**2) ** 0.5,
            minimum=-negative_minimum,
            maximum=maximum,
            effective=weighted / divergence if divergence else mean,
            at_maximum=at_maximum / count,
        )


class RegularizerMonitor(Callback):
    """Logs and draws the regularizer's weights, and warns when they collapse.

    After each epoch it logs ``regularizer/mean``, ``spread``, ``minimum``, ``maximum``, ``effective`` and
    ``at_maximum`` (see :class:`EpochWeights`) to every logger, and a histogram to W&B and TensorBoard where these are
    in use. The run folder gets ``regularizer/weights.csv`` and ``regularizer/weights.png``.

    Args:
        picture_every_n_epochs: how often the picture is redrawn during training; it is always drawn at the end.
    """

    def __init__(self, picture_every_n_epochs: int = 10) -> None:
        self.picture_every_n_epochs = picture_every_n_epochs
        self.history: list[EpochWeights] = []
        self.warnings: list[str] = []
        self._accumulator: _Accumulator | None = None
        self._latest: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"history": [asdict(row) for row in self.history], "warnings": list(self.warnings)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [EpochWeights(**row) for row in state_dict["history"]]
        self.warnings = list(state_dict["warnings"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, dict) or "weights" not in outputs:
            return
        weights, divergence = outputs["weights"], outputs["divergence"]
        if self._accumulator is None:
            self._accumulator = _Accumulator(weights.device)
        max_weight = getattr(pl_module.regularizer, "max_weight", None)
        self._accumulator.add(weights.expand_as(divergence), divergence, max_weight)
        self._latest = weights

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._accumulator is None:
            return
        row = self._accumulator.result(trainer.current_epoch)
        self._accumulator = None
        self.history.append(row)
        pl_module.log_dict({f"regularizer/{key}": value for key, value in asdict(row).items() if key != "epoch"})
        judged = verdict(row)
        if judged.kind == "collapsed" and judged.kind not in (text.split(":")[0] for text in self.warnings):
            self.warnings.append(f"{judged.kind}: {judged.sentence}")
            rank_zero_warn(judged.sentence)
        self._log_histograms(trainer)
        self._write(trainer, picture=(trainer.current_epoch + 1) % self.picture_every_n_epochs == 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history:
            self._write(trainer, picture=True)

    def summary(self) -> dict[str, Any]:
        """The last epoch's statistics with the verdict; every value None when there was no regularizer."""
        keys = ("mean", "spread", "minimum", "maximum", "effective", "at_maximum")
        if not self.history:
            return dict.fromkeys((*keys, "verdict", "sentence"))
        last = self.history[-1]
        judged = verdict(last)
        return {key: getattr(last, key) for key in keys} | {"verdict": judged.kind, "sentence": judged.sentence}

    @rank_zero_only
    def _log_histograms(self, trainer: Trainer) -> None:
        assert self._latest is not None
        values = self._latest.flatten().float().cpu().numpy()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                histogram = wandb.Histogram(np_histogram=np.histogram(values, bins=64))
                # Not committed: it joins the metrics that Lightning logs for this step.
                logger.experiment.log(
                    {"regularizer/weights": histogram, "trainer/global_step": trainer.global_step}, commit=False
                )
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram("regularizer/weights", values, trainer.global_step)

    @rank_zero_only
    def _write(self, trainer: Trainer, picture: bool) -> None:
        run_folder = run_folder_of(trainer)
        if run_folder is None:
            return
        _write_table(run_folder / "regularizer" / "weights.csv", self.history)
        if picture:
            draw_weights(run_folder / "regularizer" / "weights.png", self.history)


def _write_table(target: Path, history: Sequence[EpochWeights]) -> None:
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(EpochWeights.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in history)


def draw_weights(target: Path, history: Sequence[EpochWeights]) -> None:
    """Draw mean, spread and extremes of the weights over the epochs and write them to ``target``, a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [row.epoch + 1 for row in history]
    mean = np.array([row.mean for row in history])
    spread = np.array([row.spread for row in history])
    floor = max(min(row.minimum for row in history), 1e-4)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between(
        epochs, np.maximum(mean - spread, floor), mean + spread, alpha=0.3, label="mean ± standard deviation"
    )
    axes.plot(epochs, mean, marker="o", markersize=3, label="mean")
    axes.plot(epochs, [row.effective for row in history], linestyle="--", label="part of the divergence that counts")
    axes.plot(epochs, [max(row.minimum, floor) for row in history], linewidth=0.8, color="gray", label="extremes")
    axes.plot(epochs, [row.maximum for row in history], linewidth=0.8, color="gray")
    axes.axhline(1.0, linewidth=0.8, linestyle=":", color="black", label="plain distillation")
    axes.set(yscale="log", xlabel="epoch", ylabel="weight", title="Weights of the regularizer")
    axes.legend(fontsize="small")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
