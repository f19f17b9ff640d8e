"""What is known of one term's regularizer: sums of the epoch that goes on, and numbers of those that are over."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lqkd.callbacks.regularizer.moments import EpochWeights, Moments, combine, epoch_weights
from lqkd.callbacks.regularizer.photographs import Photographs
from lqkd.callbacks.regularizer.statistics import EpochStatistic, Optimum, Sums, add, measure
from lqkd.callbacks.regularizer.verdict import Verdict, verdict
from lqkd.regularizers import (
    BoundedRange,
    ExplainedVariance,
    HeldOut,
    HeldOutInterpolation,
    MetaWeightNet,
    Regularizer,
)


class Record:
    """Of the regularizer of one distillation term, or of the only one.

    Attributes:
        name: of the term; empty for the only one, whose record also holds what is known of all losses together.
        history: the weights by epoch.
        statistics: by name and epoch.
        regularizers: of every tap or teacher of the term.

    Args:
        name: see the attribute.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.history: list[EpochWeights] = []
        self.statistics: dict[str, list[EpochStatistic]] = {}
        self.regularizers: list[Any] = []
        self.warned: list[str] = []
        """Kinds of verdict that there was a warning of."""
        self.sums: Sums = {}
        self.last_weights: list[Tensor] = []
        self.photographs: Photographs | None = None
        self._moments = Moments()
        self._texts: dict[str, list[str]] = {}  # of history and statistics, for checkpoints

    @property
    def path(self) -> str:
        """What its metrics begin with after ``regularizer/``, and its folder: its name, if it has one, and a slash."""
        return f"{self.name}/" if self.name else ""

    # ---- in a checkpoint

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, from which :meth:`load` restores it."""
        return {
            "history": self._as_text("history", self.history),
            "statistics": {name: self._as_text(name, epochs) for name, epochs in self.statistics.items()},
            "warned": list(self.warned),
            "moments_by_tap": self._moments.by_tap(),  # of an epoch that goes on
            "sums": dict(self.sums),
        }

    def _as_text(self, name: str, epochs: Sequence[EpochWeights | EpochStatistic]) -> list[str]:
        """Each epoch as JSON, made once: a checkpoint late in a training costs no more than an early one."""
        texts = self._texts.setdefault(name, [])
        texts += [json.dumps(vars(epoch)) for epoch in epochs[len(texts) :]]
        return list(texts)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        self.history = [EpochWeights(**json.loads(epoch)) for epoch in state["history"]]
        self.statistics = {
            name: [EpochStatistic(**json.loads(epoch)) for epoch in epochs]
            for name, epochs in state["statistics"].items()
        }
        self._texts = {}
        self.warned = list(state["warned"])
        self._moments = Moments(state.get("moments_by_tap", ()))
        self.sums = dict(state.get("sums", {}))

    # ---- during an epoch

    def to(self, device: torch.device) -> None:
        """Move what is counted of the epoch that goes on."""
        self._moments = Moments(rows.to(device) for rows in self._moments.by_tap())
        self.sums = {name: sums.to(device) for name, sums in self.sums.items()}

    def start_epoch(self) -> None:
        """Count anew."""
        self._moments, self.sums = Moments(), {}

    def add(self, report: Mapping[str, Any], regularizers: Iterable[Any], measured: bool) -> None:
        """Count a batch.

        Args:
            report: what ``training_step`` returned of the term.
            regularizers: of the term; a single one weighs all of its maps.
            measured: whether more than moments is taken.
        """
        parts = _parts(report)
        self.regularizers = _of_parts([*regularizers], len(parts)) or self.regularizers
        for tap, ((weights, divergence), regularizer) in enumerate(zip(parts, self.regularizers, strict=False)):
            self._moments.add(tap, weights, divergence, partial(_bound, regularizer))
        if parts:
            self.last_weights = [weights for weights, _ in parts]
        if measured:
            with torch.no_grad():
                add(self.sums, measure(parts, report, [_optimum(one) for one in self.regularizers[: len(parts)]]))

    def see(self, inputs: Any) -> None:
        """Keep some samples of the batch that was added last, if they are photographs whose weights differ by place."""
        self.photographs = Photographs.of(inputs, self.last_weights) or self.photographs

    # ---- at its end

    def reduced_sums(self, trainer: Trainer, module: LightningModule) -> Sums:
        """The epoch's sums over all processes, on the CPU."""
        if not self.sums:
            return {}
        flat = torch.cat([values.flatten() for values in self.sums.values()])
        if trainer.world_size > 1:
            gathered = module.all_gather(flat)
            assert isinstance(gathered, Tensor)
            flat = gathered.sum(0)
        shapes = [values.shape for values in self.sums.values()]
        split = flat.cpu().split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.sums, split, shapes, strict=True)}

    def end_epoch(self, trainer: Trainer, module: LightningModule, sums: Sums, share: float | None) -> None:
        """Add the epoch to :attr:`history`, where there were weights.

        Args:
            trainer: whose epoch ends.
            module: the module that it trains.
            sums: of the epoch, reduced.
            share: of this term in the student's gradient; None where it is not known.
        """
        moments = self._moments.by_tap()
        if not moments:
            return
        optimum = (sums["contribution"][0] / sums["contribution"][1]).item() if "contribution" in sums else None
        combined = combine(torch.cat(moments))
        if trainer.world_size > 1:
            gathered = module.all_gather(combined.float().to(module.device))
            assert isinstance(gathered, Tensor)
            combined = combine(gathered)
        bounded = any(_bound(regularizer) is not None for regularizer in self.regularizers[:1])
        self.history.append(epoch_weights(combined, trainer.current_epoch, bounded, optimum, share))

    def verdict(self) -> Verdict:
        """What became of the regularizer, of which there is an epoch at least."""
        taught = HeldOutInterpolation | ExplainedVariance | MetaWeightNet
        learners = [one for one in self.regularizers if isinstance(one, taught)]
        told = "; ".join(one.told or "" for one in learners)
        return verdict(self.history, self.name, told if learners else None)

    def summary(self) -> dict[str, Any] | None:
        """Last epoch's moments, contribution, optimum and share with verdict and sentence.

        A value is None when it is not finite or not known. None when there was no regularizer.
        """
        names = ("mean", "spread", "minimum", "maximum", "effective", "contribution", "optimum", "share")
        if not self.history:
            return None
        values = {name: getattr(self.history[-1], name) for name in names}
        judged = self.verdict()
        finite = {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}
        return finite | {"verdict": judged.kind, "sentence": judged.sentence}


def _of_parts(found: list[Any], parts: int) -> list[Any]:
    """The regularizer of each tap; a single one weighs all of them."""
    return found[-parts:] if len(found) >= parts > 0 else found[:1] * parts


def _parts(report: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Weights and divergence map of every tap; empty where there are no weights."""
    weights, divergence = report.get("weights"), report.get("divergence")
    if weights is None or divergence is None:
        return []
    if isinstance(weights, Tensor):
        return [(weights, divergence)]
    return list(zip(weights, divergence, strict=True))


def _bound(regularizer: Any) -> float | None:
    """The largest weight there can be; None when there is no bound that it could be stuck at."""
    if isinstance(regularizer, HeldOutInterpolation | ExplainedVariance):
        return None
    largest = getattr(regularizer, "max_weight", math.inf)
    guard = getattr(regularizer, "guard", None)
    if isinstance(guard, BoundedRange):
        return float(guard.constrain(torch.tensor(largest, dtype=torch.float64)))
    return largest if math.isfinite(largest) else None


def _optimum(regularizer: Any) -> Optimum:
    """The closed form of the guard under what the player wants; gives None where there is none."""

    def optimum(divergence: Tensor) -> Tensor | None:
        if not isinstance(regularizer, Regularizer) or isinstance(regularizer.player, HeldOut):
            return None
        if regularizer.player.needs_alignment:
            return None
        price, scale = regularizer.player.price(divergence, None)
        best = regularizer.guard.optimum(price, scale)
        if best is None or regularizer.guard.limits_above:
            return best
        return best.clamp_max(regularizer.max_weight)

    return optimum
