"""What the regularizer does during a training: numbers, tables, pictures and a verdict."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.balances.base import DISTILL, TASK
from lqkd.callbacks.dashboard import tensorboard_layout
from lqkd.callbacks.folder import run_folder_of
from lqkd.callbacks.pace import Pace
from lqkd.callbacks.regularizer.moments import EpochWeights
from lqkd.callbacks.regularizer.record import Record
from lqkd.callbacks.regularizer.statistics import TOTAL, EpochStatistic, add, of_losses, statistics
from lqkd.callbacks.regularizer.tables import write_statistic, write_weights
from lqkd.callbacks.regularizer.verdict import Verdict, verdict
from lqkd.errors import Stopped, UsageError
from lqkd.modules.metrics import last_batch, send, show
from lqkd.regularizers import Regularizer
from lqkd.tasks.values import MONITOR
from lqkd.utils.files import write_text

__all__ = ["FOLDER", "EpochWeights", "RegularizerMonitor", "Verdict", "verdict"]

FOLDER = "regularizer"
"""Folder in the run's folder with tables and pictures."""

_BINS = 64
_PART_OF_TIME = 0.0025
"""Part of the time that writing tables may take, and that drawing may take, before training ends."""
_LAST_SECONDS = 4.0
"""Seconds within which the drawing of pictures after Ctrl-C may begin; each takes a part of a second."""


class RegularizerMonitor(Callback):
    """Measures the weights of the module's regularizers and reports them every epoch.

    Reads what ``training_step`` returns; whatever needs a key that is missing is left out. What a distillation term
    with a name has given is in ``terms``, by name, and is reported under the name: ``regularizer/NAME/mean``, say, and
    in the folder ``regularizer/NAME``.

    - ``weights`` and ``divergence``: a divergence map and what broadcasts to it, or a list with one of each per tap;
    - ``labels`` (B,) int64 and ``teacher`` (B, C) logits;
    - ``gradients``: of every loss by its name, and ``plain`` (distillation without weights) or ``NAME (plain)``, each
      (B, C), at the student's logits and without the weights of the balance; and ``balance``: the 0-dim weight of each
      loss. They are asked for by setting the module's ``watch_gradients`` before a step.

    - ``gradient_norms``: of what each loss, weighed, puts into the gradient in the student's parameters, and of the
      sum, ``total``, 0-dim each.

    Moments are taken of every batch, all else of every ``every_n_steps``-th batch of an epoch, from the first, and of
    maps with more than 65536 elements from as many of them. Numbers stay on the device until the epoch ends, and are
    those of all processes together.

    Every epoch it logs ``regularizer/mean``, ``spread``, ``minimum``, ``maximum``, ``effective``, ``contribution``
    and, when known, ``at_maximum`` and ``optimum`` (see :class:`EpochWeights`), ``regularizer/agreement/NAME`` with
    and without weights and ``regularizer/share/NAME`` of each loss, at the logits, and, in the student's parameters,
    ``gradient/norm/NAME`` and ``gradient/share/NAME`` of each loss and ``gradient/total_to_task``. W&B and TensorBoard
    get a histogram of the last batch's weights as ``regularizer/weights`` and each picture as
    ``regularizer/pictures/NAME``; TensorBoard also gets the layout of its tab "Custom Scalars". The run folder gets, in
    ``regularizer/``, ``weights.csv`` with a row per epoch; a table per statistic (``distribution``, ``label``,
    ``output``, ``confidence``, ``divergence``, ``place``, ``agreement``, ``balance``, ``share``, ``step_length``) with
    the columns ``epoch, bin, value, count``; and the pictures ``weights``, ``distribution``, ``classes``,
    ``confidence``, ``divergence``, ``places``, ``agreement``, ``balance`` and ``step_length``, which
    ``docs/reading_the_pictures.md`` explains, as PNG and, once training has ended, as SVG. Of a term whose teachers
    held-out rows judge there are also the tables and pictures ``believed`` and ``reliability``, of one whose
    regularizer they teach ``trust``, and the picture ``map``; of one whose weights differ by place the picture
    ``photographs``, of the last batch that was measured.

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
        self.warnings: list[str] = []
        self.records: dict[str, Record] = {"": Record()}
        self._tables, self._drawings = Pace(_PART_OF_TIME), Pace(_PART_OF_TIME, seconds=1.0)

    @property
    def history(self) -> list[EpochWeights]:
        """The weights of the only regularizer by epoch; empty where terms have names."""
        return self.records[""].history

    @property
    def statistics(self) -> dict[str, list[EpochStatistic]]:
        """Statistics of the only regularizer, and of all losses together, by name and epoch."""
        return self.records[""].statistics

    def state_dict(self) -> dict[str, Any]:
        states = {name: record.state() for name, record in self.records.items()}
        return {**states.pop(""), "warnings": list(self.warnings), "terms": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = {name: Record(name) for name in ("", *state_dict.get("terms", {}))}
        for name, record in self.records.items():
            record.load(state_dict["terms"][name] if name else state_dict)
        self.warnings = list(state_dict["warnings"])

    def summary(self) -> dict[str, Any] | None:
        """What :meth:`Record.summary` says of the only regularizer, or of each term's by name; None for none."""
        found = {name: summary for name, record in self.records.items() if (summary := record.summary()) is not None}
        return found.get("", found) or None

    # ---- during an epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for record in self.records.values():
            record.to(pl_module.device)
        self._regularizers = [m for m in pl_module.modules() if isinstance(m, Regularizer)]
        self._tables.start()
        self._drawings.start()
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                metric = str(getattr(getattr(pl_module, "task", None), "monitor", MONITOR))
                logger.experiment.add_custom_scalars(tensorboard_layout(metric, self._names(pl_module)))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for record in self.records.values():
            record.start_epoch()

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
        task = getattr(pl_module, "task", None)
        for name, report in outputs.get("terms", {"": outputs}).items():
            record = self.records.setdefault(name, Record(name))
            record.add(report, self._of_term(pl_module, name), measured)
            if measured and task is not None:
                record.see(task.inputs(batch))
        if measured:
            with torch.no_grad():
                add(self.records[""].sums, of_losses(outputs))

    @staticmethod
    def _names(module: LightningModule) -> list[str]:
        """Of the terms, where they have any."""
        distillation = getattr(module, "distillation", None)
        return [*distillation] if getattr(distillation, "named", False) else []  # type: ignore[misc]

    def _of_term(self, module: LightningModule, name: str) -> Iterable[Any]:
        """The regularizers of a term."""
        if name:
            return module.distillation[name].regularizers  # type: ignore[index, union-attr, return-value]
        return self._regularizers or [getattr(module, "regularizer", None)]

    # ---- at its end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trusted = self._add_trust(trainer, pl_module)
        numbers: dict[str, float] = {}
        shares: dict[str, float] = {}
        found = trusted
        for name, record in self.records.items():  # the first is of all losses
            sums = record.reduced_sums(trainer, pl_module)
            of_epoch = statistics(sums, trainer.current_epoch)
            found |= bool(of_epoch)
            for statistic, value in of_epoch.items():
                record.statistics.setdefault(statistic, []).append(value)
            for statistic in ("agreement", "share"):
                if statistic in of_epoch:
                    of = dict(zip(of_epoch[statistic].bins, of_epoch[statistic].columns["value"], strict=True))
                    numbers |= {f"regularizer/{statistic}/{loss}": value for loss, value in of.items()}
                    shares = of if statistic == "share" else shares
            if "step_length" in of_epoch:
                lengths = _step_length(of_epoch["step_length"])
                numbers |= lengths
                prefix = "gradient/share/"
                in_parameters = {k.removeprefix(prefix): v for k, v in lengths.items() if k.startswith(prefix)}
                shares = shares or in_parameters  # a loss on features has none at the logits
            before = len(record.history)
            record.end_epoch(trainer, pl_module, sums, shares.get(name or DISTILL))
            for epoch in record.history[before:]:
                numbers |= {
                    f"regularizer/{record.path}{of}": value
                    for of, value in asdict(epoch).items()
                    if of not in ("epoch", "share") and value is not None
                }
                self._warn_of_collapse(record)
        if not numbers and not found:
            return
        if numbers:  # the same on all processes
            values = torch.tensor([*numbers.values()], device=pl_module.device)
            show(trainer, dict(zip(numbers, values, strict=True)))
            send(trainer, numbers)
        if trainer.is_global_zero:
            for record in self.records.values():
                self._log_histogram(trainer, record)
            self._write(trainer, last=False)

    def _add_trust(self, trainer: Trainer, module: LightningModule) -> bool:
        """Take what held-out rows tell of each term, where that is new, and say whether any of it was."""
        told = getattr(module, "trust_tables", None)
        if told is None:
            return False
        new = False
        for term, by_name in told().items():
            name = term if term in self._names(module) else ""
            record = self.records.setdefault(name, Record(name))
            for table, (bins, columns) in by_name.items():
                history = record.statistics.setdefault(table, [])
                if not history or (history[-1].bins, history[-1].columns) != (bins, columns):
                    history.append(EpochStatistic(trainer.current_epoch, bins, columns))
                    new = True
        return new

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and any(record.history or record.statistics for record in self.records.values()):
            self._write(trainer, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        folder = run_folder_of(trainer)
        if trainer.is_global_zero and folder is not None:
            self._write_tables(folder)
            if isinstance(exception, Stopped) and exception.number == signal.SIGINT:  # someone waits, a cluster may not
                self._draw(trainer, folder, seconds=_LAST_SECONDS)

    def _warn_of_collapse(self, record: Record) -> None:
        judged = record.verdict()
        if judged.kind in ("collapsed", "dominant", "saturated", "diverged") and judged.kind not in record.warned:
            record.warned.append(judged.kind)
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
                self._draw(trainer, folder, with_drawings=last)

    def _write_tables(self, folder: Path) -> None:
        for record in self.records.values():
            if record.history:
                write_weights(folder / FOLDER / f"{record.path}weights.csv", record.history)
            for name, epochs in record.statistics.items():
                write_statistic(folder / FOLDER / f"{record.path}{name}.csv", epochs)

    def _picture_is_due(self, trainer: Trainer) -> bool:
        if self.picture_every_n_epochs is None:
            return self._drawings.due()
        return (trainer.current_epoch + 1) % self.picture_every_n_epochs == 0

    def _draw(
        self, trainer: Trainer, folder: Path | None, seconds: float = math.inf, with_drawings: bool = False
    ) -> None:
        """Draw all pictures, or those that can be begun within ``seconds``; as SVG too where that is wanted."""
        until = time.monotonic() + seconds
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        if folder is None and not loggers:
            return
        from lqkd.callbacks.regularizer.pictures import pictures
        from lqkd.utils import figures

        drawn = (
            (f"{record.path}{name}", figure)
            for record in self.records.values()
            for name, figure in pictures(
                record.history, record.statistics, record.name, self._maps(trainer, record), record.photographs
            )
        )
        for name, figure in drawn:
            if time.monotonic() > until:
                break
            image = figures.pixels(figure)
            if folder is not None:
                figures.write_image(folder / FOLDER / f"{name}.png", image)
                if with_drawings:
                    write_text(folder / FOLDER / f"{name}.svg", figures.svg(figure))
            for logger in loggers:
                if isinstance(logger, WandbLogger):
                    import wandb

                    media = {f"regularizer/pictures/{name}": wandb.Image(image)}
                    logger.log_metrics(media, step=last_batch(trainer))  # type: ignore[arg-type]
                else:
                    logger.experiment.add_image(
                        f"regularizer/pictures/{name}", image, global_step=last_batch(trainer), dataformats="HWC"
                    )

    @staticmethod
    def _maps(trainer: Trainer, record: Record) -> dict[str, Tensor]:
        """By teacher, the matrix (C, C) that held-out rows have made of its logits; empty where they have made none."""
        found = getattr(trainer.lightning_module, "trust_maps", None)
        return {} if found is None else found().get(record.name or DISTILL, {})

    def _log_histogram(self, trainer: Trainer, record: Record) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        if not loggers or not record.last_weights:
            return
        weights = torch.cat([weights.detach().float().flatten() for weights in record.last_weights]).cpu()
        weights = weights[weights.isfinite()]
        if not len(weights):
            return
        key = f"regularizer/{record.path}weights"
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                import numpy as np
                import wandb

                histogram = wandb.Histogram(np_histogram=np.histogram(weights.numpy(), bins=_BINS))
                logger.log_metrics({key: histogram}, step=last_batch(trainer))  # type: ignore[dict-item]
            else:
                logger.experiment.add_histogram(key, weights, global_step=last_batch(trainer))


def _step_length(statistic: EpochStatistic) -> dict[str, float]:
    """Metrics: the norm of each loss's gradient and its share, and the whole against the task's alone."""
    norms = dict(zip(statistic.bins, statistic.columns["value"], strict=True))
    shares = dict(zip(statistic.bins, statistic.columns["share"], strict=True))
    found = {f"gradient/norm/{of}": value for of, value in norms.items()}
    found |= {f"gradient/share/{of}": value for of, value in shares.items() if of != TOTAL}
    return found | ({"gradient/total_to_task": norms[TOTAL] / norms[TASK]} if norms.get(TASK) else {})
