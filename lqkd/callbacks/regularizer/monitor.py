"""What the regularizer does during a training: numbers, tables, pictures and a verdict."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.callbacks.dashboard import tensorboard_layout
from lqkd.callbacks.folder import run_folder_of
from lqkd.callbacks.pace import Pace
from lqkd.callbacks.regularizer.moments import EpochWeights, Moments, combine, epoch_weights
from lqkd.callbacks.regularizer.statistics import EpochStatistic, Optimum, Sums, add, measure, statistics
from lqkd.callbacks.regularizer.tables import write_statistic, write_weights
from lqkd.callbacks.regularizer.verdict import Verdict, verdict
from lqkd.errors import Stopped, UsageError
from lqkd.modules.metrics import last_batch, send, show
from lqkd.regularizers import BoundedRange, Regularizer

__all__ = ["FOLDER", "EpochWeights", "RegularizerMonitor", "Verdict", "verdict"]

FOLDER = "regularizer"
"""Folder in the run's folder with tables and pictures."""

_BINS = 64
_PART_OF_TIME = 0.0025
"""Part of the time that writing tables may take, and that drawing may take, before training ends."""
_LAST_SECONDS = 4.0
"""Seconds within which the drawing of pictures after Ctrl-C may begin; each takes a part of a second."""


class RegularizerMonitor(Callback):
    """Measures the weights of the module's ``regularizer`` and reports them every epoch.

    Reads what ``training_step`` returns; whatever needs a key that is missing is left out:

    - ``weights`` and ``divergence``: a divergence map and what broadcasts to it, or a list with one of each per tap;
    - ``labels`` (B,) int64 and ``teacher`` (B, C) logits;
    - ``gradients``: ``task``, ``distill`` and ``plain`` (distillation without weights), each (B, C), at the student's
      logits and without the weights of the balance; and ``balance``: the 0-dim weight of each loss. They are asked
      for by setting the module's ``watch_gradients`` before a step.

    Moments are taken of every batch, all else of every ``every_n_steps``-th batch of an epoch, from the first, and of
    maps with more than 65536 elements from as many of them. Numbers stay on the device until the epoch ends, and are
    those of all processes together.

    Every epoch it logs ``regularizer/mean``, ``spread``, ``minimum``, ``maximum``, ``effective``, ``contribution``
    and, when known, ``at_maximum`` and ``optimum`` (see :class:`EpochWeights`), and
    ``regularizer/agreement/distill`` and ``plain``, ``regularizer/share/NAME`` of each loss. W&B and TensorBoard get a
    histogram of the last batch's weights as ``regularizer/weights`` and each picture as
    ``regularizer/pictures/NAME``; TensorBoard also gets the layout of its tab "Custom Scalars". The run folder gets,
    in ``regularizer/``, ``weights.csv`` with a row per epoch; a
    table per statistic (``distribution``, ``label``, ``output``, ``confidence``, ``divergence``, ``agreement``,
    ``balance``, ``share``) with the columns ``epoch, bin, value, count``; and the pictures ``weights``,
    ``distribution``, ``classes``, ``confidence``, ``divergence``, ``agreement`` and ``balance``, which
    ``docs/reading_the_pictures.md`` explains.

    Tables and pictures are written as often as that takes no more than a quarter of a percent of the time each, tables
    from the first epoch on, and when training ends; tables also when it fails, and pictures after Ctrl-C, for a few
    seconds.

    The first collapse, saturation and divergence are each a warning, and an entry in :attr:`warnings`.

    Args:
        every_n_steps: batches of an epoch from one to the next that all but the moments are measured in.
        picture_every_n_epochs: how often pictures are drawn before training ends; None for as often as said above.

    Raises:
        UsageError: when a number is less than 1.
    """

    def __init__(self, every_n_steps: int = 20, picture_every_n_epochs: int | None = None) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps={every_n_steps} is not possible: it must be at least 1")
        if picture_every_n_epochs is not None and picture_every_n_epochs < 1:
            raise UsageError(
                f"picture_every_n_epochs={picture_every_n_epochs} is not possible: it must be at least 1, or null"
            )
        self.every_n_steps = every_n_steps
        self.picture_every_n_epochs = picture_every_n_epochs
        self.history: list[EpochWeights] = []
        self.statistics: dict[str, list[EpochStatistic]] = {}
        self.warnings: list[str] = []
        self._texts: dict[str, list[str]] = {}  # of history and statistics, for checkpoints
        self._warned: list[str] = []  # kinds of verdict
        self._moments = Moments()
        self._sums: Sums = {}
        self._last_weights: list[Tensor] = []
        self._regularizers: list[Any] = []
        self._tables, self._drawings = Pace(_PART_OF_TIME), Pace(_PART_OF_TIME, seconds=1.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self._as_text("history", self.history),
            "statistics": {name: self._as_text(name, epochs) for name, epochs in self.statistics.items()},
            "warnings": list(self.warnings),
            "warned": list(self._warned),
            "moments_by_tap": self._moments.by_tap(),  # of an epoch that goes on
            "sums": dict(self._sums),
        }

    def _as_text(self, name: str, epochs: Sequence[EpochWeights | EpochStatistic]) -> list[str]:
        """Each epoch as JSON, made once: a checkpoint late in a training costs no more than an early one."""
        texts = self._texts.setdefault(name, [])
        texts += [json.dumps(vars(epoch)) for epoch in epochs[len(texts) :]]
        return list(texts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [EpochWeights(**json.loads(epoch)) for epoch in state_dict["history"]]
        self.statistics = {
            name: [EpochStatistic(**json.loads(epoch)) for epoch in epochs]
            for name, epochs in state_dict["statistics"].items()
        }
        self._texts = {}
        self.warnings = list(state_dict["warnings"])
        self._warned = list(state_dict["warned"])
        self._moments = Moments(state_dict.get("moments_by_tap", ()))
        self._sums = dict(state_dict.get("sums", {}))

    def summary(self) -> dict[str, Any] | None:
        """Last epoch's moments, contribution, optimum and share with verdict and sentence.

        A value is None when it is not finite or not known. None when there was no regularizer.
        """
        names = ("mean", "spread", "minimum", "maximum", "effective", "contribution", "optimum", "share")
        if not self.history:
            return None
        values = {name: getattr(self.history[-1], name) for name in names}
        judged = verdict(self.history)
        finite = {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}
        return finite | {"verdict": judged.kind, "sentence": judged.sentence}

    # ---- during an epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._moments = Moments(rows.to(pl_module.device) for rows in self._moments.by_tap())
        self._sums = {name: sums.to(pl_module.device) for name, sums in self._sums.items()}
        self._regularizers = [m for m in pl_module.modules() if isinstance(m, Regularizer)]
        self._tables.start()
        self._drawings.start()
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(tensorboard_layout(str(getattr(pl_module.task, "monitor", ""))))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._moments, self._sums = Moments(), {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every_n_steps == 0:
            pl_module.watch_gradients = True  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        measured = batch_idx % self.every_n_steps == 0
        if measured:
            pl_module.watch_gradients = False  # type: ignore[assignment]
        if not isinstance(outputs, Mapping):
            return
        parts = _parts(outputs)
        regularizers = self._of_parts(pl_module, len(parts))
        for tap, ((weights, divergence), regularizer) in enumerate(zip(parts, regularizers, strict=True)):
            self._moments.add(tap, weights, divergence, partial(_bound, regularizer))
        if parts:
            self._last_weights = [weights for weights, _ in parts]
        if measured:
            with torch.no_grad():
                add(self._sums, measure(parts, outputs, [_optimum(regularizer) for regularizer in regularizers]))

    def _of_parts(self, module: LightningModule, parts: int) -> list[Any]:
        """The regularizer of each tap; a single one weighs all of them."""
        found = self._regularizers or [getattr(module, "regularizer", None)]
        return found[-parts:] if len(found) >= parts > 0 else found[:1] * parts

    # ---- at its end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sums = self._reduced_sums(trainer, pl_module)
        found = statistics(sums, trainer.current_epoch)
        for name, statistic in found.items():
            self.statistics.setdefault(name, []).append(statistic)
        numbers = {
            f"regularizer/{name}/{of}": value
            for name in ("agreement", "share")
            if name in found
            for of, value in zip(found[name].bins, found[name].columns["value"], strict=True)
        }
        if moments := self._moments.by_tap():
            optimum = (sums["contribution"][0] / sums["contribution"][1]).item() if "contribution" in sums else None
            task = numbers.get("regularizer/share/task")
            epoch = self._epoch(trainer, pl_module, torch.cat(moments), optimum, None if task is None else 1 - task)
            self.history.append(epoch)
            numbers |= {
                f"regularizer/{name}": value
                for name, value in asdict(epoch).items()
                if name not in ("epoch", "share") and value is not None
            }
            self._warn_of_collapse()
        if not numbers and not found:
            return
        if numbers:  # the same on all processes
            values = torch.tensor([*numbers.values()], device=pl_module.device)
            show(trainer, dict(zip(numbers, values, strict=True)))
            send(trainer, numbers)
        if trainer.is_global_zero:
            self._log_histogram(trainer)
            self._write(trainer, last=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and (self.history or self.statistics):
            self._write(trainer, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        folder = run_folder_of(trainer)
        if trainer.is_global_zero and folder is not None:
            self._write_tables(folder)
            if isinstance(exception, Stopped) and exception.number == signal.SIGINT:  # someone waits, a cluster may not
                self._draw(trainer, folder, seconds=_LAST_SECONDS)

    def _reduced_sums(self, trainer: Trainer, module: LightningModule) -> Sums:
        """The epoch's sums over all processes, on the CPU."""
        if not self._sums:
            return {}
        flat = torch.cat([values.flatten() for values in self._sums.values()])
        if trainer.world_size > 1:
            gathered = module.all_gather(flat)
            assert isinstance(gathered, Tensor)
            flat = gathered.sum(0)
        shapes = [values.shape for values in self._sums.values()]
        split = flat.cpu().split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(self._sums, split, shapes, strict=True)}

    def _epoch(
        self,
        trainer: Trainer,
        module: LightningModule,
        moments: Tensor,
        optimum: float | None,
        share: float | None,
    ) -> EpochWeights:
        combined = combine(moments)
        if trainer.world_size > 1:
            gathered = module.all_gather(combined.float().to(module.device))
            assert isinstance(gathered, Tensor)
            combined = combine(gathered)
        bounded = any(_bound(regularizer) is not None for regularizer in self._of_parts(module, 1))
        return epoch_weights(combined, trainer.current_epoch, bounded, optimum, share)

    def _warn_of_collapse(self) -> None:
        judged = verdict(self.history)
        if judged.kind in ("collapsed", "dominant", "saturated", "diverged") and judged.kind not in self._warned:
            self._warned.append(judged.kind)
            self.warnings.append(judged.sentence)
            rank_zero_warn(judged.sentence)

    # ---- where it goes

    def _write(self, trainer: Trainer, last: bool) -> None:
        folder = run_folder_of(trainer)
        if folder is not None and (last or self._tables.due()):
            with self._tables.work():
                self._write_tables(folder)
        if last or self._picture_is_due(trainer):
            with self._drawings.work():
                self._draw(trainer, folder)

    def _write_tables(self, folder: Path) -> None:
        if self.history:
            write_weights(folder / FOLDER / "weights.csv", self.history)
        for name, epochs in self.statistics.items():
            write_statistic(folder / FOLDER / f"{name}.csv", epochs)

    def _picture_is_due(self, trainer: Trainer) -> bool:
        if self.picture_every_n_epochs is None:
            return self._drawings.due()
        return (trainer.current_epoch + 1) % self.picture_every_n_epochs == 0

    def _draw(self, trainer: Trainer, folder: Path | None, seconds: float = math.inf) -> None:
        """Draw all pictures, or those that can be begun within ``seconds``."""
        until = time.monotonic() + seconds
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        if folder is None and not loggers:
            return
        from lqkd.callbacks.regularizer.pictures import pictures, pixels, write

        for name, figure in pictures(self.history, self.statistics):
            if time.monotonic() > until:
                break
            image = pixels(figure)
            if folder is not None:
                write(folder / FOLDER / f"{name}.png", image)
            for logger in loggers:
                if isinstance(logger, WandbLogger):
                    import wandb

                    media = {f"regularizer/pictures/{name}": wandb.Image(image)}
                    logger.log_metrics(media, step=last_batch(trainer))  # type: ignore[arg-type]
                else:
                    logger.experiment.add_image(
                        f"regularizer/pictures/{name}", image, global_step=last_batch(trainer), dataformats="HWC"
                    )

    def _log_histogram(self, trainer: Trainer) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        if not loggers or not self._last_weights:
            return
        weights = torch.cat([weights.detach().float().flatten() for weights in self._last_weights]).cpu()
        weights = weights[weights.isfinite()]
        if not len(weights):
            return
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                import numpy as np
                import wandb

                histogram = wandb.Histogram(np_histogram=np.histogram(weights.numpy(), bins=_BINS))
                logger.log_metrics({"regularizer/weights": histogram}, step=last_batch(trainer))  # type: ignore[dict-item]
            else:
                logger.experiment.add_histogram("regularizer/weights", weights, global_step=last_batch(trainer))


def _parts(outputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Weights and divergence map of every tap; empty where there are no weights."""
    weights, divergence = outputs.get("weights"), outputs.get("divergence")
    if weights is None or divergence is None:
        return []
    if isinstance(weights, Tensor):
        return [(weights, divergence)]
    return list(zip(weights, divergence, strict=True))


def _bound(regularizer: Any) -> float | None:
    """The largest weight there can be; None when there is no bound."""
    largest = getattr(regularizer, "max_weight", math.inf)
    guard = getattr(regularizer, "guard", None)
    if isinstance(guard, BoundedRange):
        return float(guard.constrain(torch.tensor(largest, dtype=torch.float64)))
    return largest if math.isfinite(largest) else None


def _optimum(regularizer: Any) -> Optimum:
    """The closed form of the guard under what the player wants; gives None where there is none."""

    def optimum(divergence: Tensor) -> Tensor | None:
        if not isinstance(regularizer, Regularizer) or regularizer.player.needs_alignment:
            return None
        price, scale = regularizer.player.price(divergence, None)
        best = regularizer.guard.optimum(price, scale)
        if best is None or regularizer.guard.limits_above:
            return best
        return best.clamp_max(regularizer.max_weight)

    return optimum
