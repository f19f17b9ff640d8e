"""What the regularizer's weights do during a training: numbers, a picture and a verdict."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.callbacks.run_logger import run_folder_of
from lqkd.files import atomic_path

FOLDER = "regularizer"
"""Folder in the run's folder with ``weights.csv`` and ``weights.png``."""

COLLAPSE_BELOW = 0.1
"""A mean weight below this is a collapse; every regularizer starts at 1."""

_AT_MAXIMUM = 0.98
"""Share of the upper bound from which on a weight counts as being at it; the bound is only approached."""

_BINS = 64


@dataclass(frozen=True)
class EpochWeights:
    """The weights w of one training epoch, over all elements of the divergence maps D of all batches and processes.

    Attributes:
        epoch: number of the epoch, from 0.
        mean, spread, minimum, maximum: of w; the spread is the standard deviation.
        effective: ``sum(w * D) / sum(D)``, the factor with which the divergence still counts; nan when D is 0.
        at_maximum: share of weights at the upper bound; None when there is no bound.
    """

    epoch: int
    mean: float
    spread: float
    minimum: float
    maximum: float
    effective: float
    at_maximum: float | None


@dataclass(frozen=True)
class Verdict:
    """What became of the weights, and a sentence that gives the number and, where one is needed, a remedy."""

    kind: Literal["healthy", "collapsed", "saturated", "uniform", "diverged"]
    sentence: str


def verdict(history: Sequence[EpochWeights]) -> Verdict:
    """Judge a training by its last epoch; ``history`` has at least one."""
    last = history[-1]
    number = last.epoch + 1
    if not math.isfinite(last.mean):
        return Verdict(
            "diverged",
            f"The regularizer's weights are no longer finite (mean {last.mean} in epoch {number}): the training "
            "diverged; lower the learning rate of student_optimizer or regularizer_optimizer.",
        )
    if last.mean < COLLAPSE_BELOW:
        return Verdict(
            "collapsed",
            f"The regularizer's mean weight fell from 1 to {last.mean:.3g} in epoch {number}, which all but turns "
            "distillation off: use a guard other than none, e.g. --model.regularizer.guard=barrier, since without one "
            "weight zero is the optimum of the literal formula; with a guard, use a loss with smaller divergences.",
        )
    if last.at_maximum is not None and last.at_maximum > 0.9:
        return Verdict(
            "saturated",
            f"{last.at_maximum:.0%} of the regularizer's weights are at their bound in epoch {number}, where they "
            "no longer tell elements apart: raise --model.regularizer.max_weight, or lower its learning rate.",
        )
    if last.spread < 0.01 * last.mean and 0.5 < last.mean < 2:
        return Verdict(
            "uniform",
            f"The regularizer's weights are all about {last.mean:.3g} (spread {last.spread:.2g}) in epoch {number}, no "
            "different from fixed distillation: raise its learning rate or train longer.",
        )
    return Verdict(
        "healthy",
        f"The regularizer's weights differ: mean {last.mean:.3g}, spread {last.spread:.3g} in epoch {number}; the "
        f"divergence counts {last.effective:.3g} times.",
    )


class RegularizerMonitor(Callback):
    """Measures the weights of the module's ``regularizer`` in every training batch and reports them every epoch.

    Reads the ``weights`` and the ``divergence`` (B, C) that ``training_step`` returns; batches without weights are
    skipped, and a module without a regularizer leaves nothing. Numbers stay on the device until the epoch ends.

    Every epoch it logs ``regularizer/mean``, ``spread``, ``minimum``, ``maximum``, ``effective`` and, when the weights
    have an upper bound, ``at_maximum`` (see :class:`EpochWeights`); W&B and TensorBoard get a histogram of the last
    batch's weights as ``regularizer/weights``. In a run folder it keeps ``regularizer/weights.csv``, a row per epoch,
    and ``regularizer/weights.png``. The first collapse, saturation and divergence are each a
    warning, and an entry in :attr:`warnings`.

    Args:
        picture_every_n_epochs: how often the picture is drawn before training ends.
    """

    def __init__(self, picture_every_n_epochs: int = 10) -> None:
        self.picture_every_n_epochs = picture_every_n_epochs
        self.history: list[EpochWeights] = []
        self.warnings: list[str] = []
        self._warned: list[str] = []  # kinds of verdict
        self._batches: list[Tensor] = []  # (8,) of each batch, see _moments
        self._last_weights: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        history = [asdict(epoch) for epoch in self.history]
        return {"history": history, "warnings": list(self.warnings), "warned": list(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [EpochWeights(**epoch) for epoch in state_dict["history"]]
        self.warnings = list(state_dict["warnings"])
        self._warned = list(state_dict["warned"])

    def summary(self) -> dict[str, Any]:
        """Last epoch's mean, spread, minimum, maximum and effective with verdict and sentence.

        A value is None when it is not finite; all are when there was no regularizer.
        """
        names = ("mean", "spread", "minimum", "maximum", "effective")
        if not self.history:
            return dict.fromkeys((*names, "verdict", "sentence"))
        values = {name: getattr(self.history[-1], name) for name in names}
        judged = verdict(self.history)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return finite | {"verdict": judged.kind, "sentence": judged.sentence}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Mapping) and "weights" in outputs:
            self._last_weights = outputs["weights"]
            self._batches.append(_moments(outputs["weights"], outputs["divergence"], _max_weight(pl_module)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._batches:
            return
        moments = _combine(torch.stack(self._batches))
        if trainer.world_size > 1:
            gathered = pl_module.all_gather(moments.float().to(pl_module.device))
            assert isinstance(gathered, Tensor)
            moments = _combine(gathered)
        epoch = _epoch_weights(moments, trainer.current_epoch, bounded=_max_weight(pl_module) is not None)
        self.history.append(epoch)
        numbers = {f"regularizer/{k}": v for k, v in asdict(epoch).items() if k != "epoch" and v is not None}
        pl_module.log_dict(numbers, sync_dist=True)  # the same on all processes; said so that Lightning does not warn
        self._warn_of_collapse()
        if trainer.is_global_zero:
            self._log_histogram(trainer)
            folder = run_folder_of(trainer)
            if folder is not None:
                _write_table(folder / FOLDER / "weights.csv", self.history)
                if (trainer.current_epoch + 1) % self.picture_every_n_epochs == 0:
                    draw(self.history, folder / FOLDER / "weights.png")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder_of(trainer)
        if trainer.is_global_zero and folder is not None and self.history:
            draw(self.history, folder / FOLDER / "weights.png")

    def _warn_of_collapse(self) -> None:
        judged = verdict(self.history)
        if judged.kind in ("collapsed", "saturated", "diverged") and judged.kind not in self._warned:
            self._warned.append(judged.kind)
            self.warnings.append(judged.sentence)
            rank_zero_warn(judged.sentence)

    def _log_histogram(self, trainer: Trainer) -> None:
        assert self._last_weights is not None
        weights = self._last_weights.detach().float().flatten().cpu()
        weights = weights[weights.isfinite()]
        if not len(weights):
            return
        step = trainer.fit_loop.epoch_loop.total_batch_idx  # where Lightning puts this epoch's metrics
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import numpy as np
                import wandb

                histogram = wandb.Histogram(np_histogram=np.histogram(weights.numpy(), bins=_BINS))
                logger.log_metrics({"regularizer/weights": histogram}, step=step)  # type: ignore[dict-item]
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram("regularizer/weights", weights, global_step=step)


def draw(history: Sequence[EpochWeights], target: Path) -> None:
    """Write a PNG of mean, spread, minimum and maximum over the epochs to ``target``, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [epoch.epoch + 1 for epoch in history]
    mean = [epoch.mean for epoch in history]
    low = [max(epoch.mean - epoch.spread, epoch.minimum) for epoch in history]  # a logarithmic axis ends above zero
    high = [epoch.mean + epoch.spread for epoch in history]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log", nonpositive="clip")
    axes.fill_between(epochs, low, high, alpha=0.25, color="tab:blue", linewidth=0, label="mean ± spread")
    axes.plot(epochs, mean, color="tab:blue", marker="o", markersize=3, label="mean")
    for name, style in (("maximum", "--"), ("minimum", ":")):
        axes.plot(epochs, [getattr(epoch, name) for epoch in history], style, color="tab:gray", label=name)
    axes.axhline(1, color="black", linewidth=0.6, label="fixed distillation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Weights of the regularizer", xlabel="epoch", ylabel="weight")
    axes.legend(fontsize="small")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _max_weight(module: LightningModule) -> float | None:
    bound = getattr(module.regularizer, "max_weight", math.inf)
    return bound if math.isfinite(bound) else None


def _moments(weights: Tensor, divergence: Tensor, max_weight: float | None) -> Tensor:
    """Count, mean, squared deviations, minimum, maximum, sum(w D), sum(D) and count at the bound; (8,) float32."""
    divergence = divergence.detach().float()
    weights = weights.detach().float().broadcast_to(divergence.shape)
    variance, mean = torch.var_mean(weights, correction=0)
    minimum, maximum = torch.aminmax(weights)
    count = torch.full_like(mean, weights.numel())
    at_maximum = (weights >= _AT_MAXIMUM * max_weight).sum() if max_weight is not None else torch.zeros_like(mean)
    counted, total = (weights * divergence).sum(), divergence.sum()
    return torch.stack((count, mean, variance * count, minimum, maximum, counted, total, at_maximum.float()))


def _combine(parts: Tensor) -> Tensor:
    """Moments of the union of ``parts`` (N, 8), each as :func:`_moments` gives them; (8,) float64 on the CPU."""
    count, mean, deviations, minimum, maximum, counted, total, at_maximum = parts.cpu().double().unbind(dim=1)
    center = (count * mean).sum() / count.sum()
    spread_of_means = (count * (mean - center).square()).sum()
    sums = (counted.sum(), total.sum(), at_maximum.sum())
    return torch.stack((count.sum(), center, deviations.sum() + spread_of_means, minimum.min(), maximum.max(), *sums))


def _epoch_weights(moments: Tensor, epoch: int, bounded: bool) -> EpochWeights:
    count, mean, deviations, minimum, maximum, counted, total, at_maximum = moments.tolist()
    return EpochWeights(
        epoch=epoch,
        mean=mean,
        spread=math.sqrt(deviations / count),
        minimum=minimum,
        maximum=maximum,
        effective=counted / total if total else math.nan,
        at_maximum=at_maximum / count if bounded else None,
    )


def _write_table(target: Path, history: Sequence[EpochWeights]) -> None:
    rows = [asdict(epoch) for epoch in history]
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
