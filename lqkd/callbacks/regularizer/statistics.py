"""Statistics of the regularizer's weights: sums that a batch adds on its device, and what they say of an epoch.

Every sum is additive over batches and over processes, and has a fixed shape, so that nothing waits for the device
until the epoch ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sums = dict[str, Tensor]
"""Sums by name, float64 (float32 where a device has no float64)."""

Optimum = Callable[[Tensor], Tensor | None]
"""The weights that a guard's closed form gives for a divergence map, in its shape."""

TOTAL = "total"
"""What the sum of all losses is called among them."""
WEIGHT_DECADES, WEIGHTS_PER_DECADE = (-4, 4), 8
DIVERGENCE_DECADES, DIVERGENCES_PER_DECADE = (-8, 4), 4
CONFIDENCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
"""Lower edges of the bins of confidence: finer towards 1, where a good teacher's are."""


def _edges(decades: tuple[int, int], per_decade: int) -> list[float]:
    """Lower edges of logarithmic bins; the first, 0, is of all that is smaller and the last of all that is larger."""
    low, high = decades
    return [0.0, *(10 ** (low + i / per_decade) for i in range((high - low) * per_decade + 1))]


WEIGHT_EDGES = _edges(WEIGHT_DECADES, WEIGHTS_PER_DECADE)
DIVERGENCE_EDGES = _edges(DIVERGENCE_DECADES, DIVERGENCES_PER_DECADE)

POSITIONS = (0, *(2**i for i in range(20)))
"""Lower edges of the bins of the position in a sequence, and of how often a label came."""
MANY = 100
"""From so many classes on weights are also told by how often a label came."""
GRID = 8
"""Rows and columns of the grid into which the places of a feature map are gathered, whatever its size."""
_ELEMENTS = 2**16
"""Elements of a map that are looked at, at most, for the statistics of single elements."""


@dataclass
class EpochStatistic:
    """One statistic of one epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        bins: what is told apart: lower edges of bins, numbers of classes, or names.
        columns: float lists as long as ``bins``; ``value`` and ``count`` are always there.
    """

    epoch: int
    bins: list[Any]
    columns: dict[str, list[float]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each bin in which something was counted."""
        count = self.columns["count"]
        return [
            {"epoch": self.epoch, "bin": edge} | {name: column[i] for name, column in self.columns.items()}
            for i, edge in enumerate(self.bins)
            if count[i]
        ]


def measure(
    parts: Sequence[tuple[Tensor, Tensor]],
    report: Mapping[str, Any],
    optima: Sequence[Optimum],
) -> Sums:
    """All sums that one batch of one term allows; what would need something that ``report`` lacks is left out.

    Args:
        parts: weights and divergence map of every tap; the weights broadcast to the map.
        report: what ``training_step`` returned of the term.
        optima: of every tap.
    """
    sums: Sums = {}
    for (weights, divergence), optimum in zip(parts, optima, strict=True):
        add(sums, _of_elements(weights, divergence, optimum))
        add(sums, _of_samples(weights, divergence, report, len(parts)))
        add(sums, _of_places(weights, divergence))
    return sums


def add(sums: Sums, more: Sums) -> None:
    """Add ``more`` to ``sums`` in place."""
    for name, values in more.items():
        sums[name] = sums[name] + values if name in sums else values


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.device.type == "mps" else values.double()


def _of_elements(weights: Tensor, divergence: Tensor, optimum: Optimum) -> Sums:
    divergence = divergence.detach().float()
    weights = _some(weights.detach().float().broadcast_to(divergence.shape))
    best = optimum(divergence)
    divergence = _some(divergence)
    one = torch.ones_like(weights)
    size = _logarithmic(divergence, DIVERGENCE_DECADES, DIVERGENCES_PER_DECADE)
    sums = {
        "distribution": _binned(_logarithmic(weights, WEIGHT_DECADES, WEIGHTS_PER_DECADE), one, bins=len(WEIGHT_EDGES)),
        "divergence": _binned(size, weights, one, bins=len(DIVERGENCE_EDGES)),
    }
    if best is not None:
        best = _some(best.float())
        sums["optimum"] = _binned(size, best, bins=len(DIVERGENCE_EDGES))
        matters = torch.where(divergence > 0, best * divergence, 0)  # not infinity times zero
        sums["contribution"] = _wide(torch.stack((matters.sum(), one.sum())))
    return sums


def _some(values: Tensor) -> Tensor:
    """``values``, flat, or so many of them, evenly spread and the same ones for every map of a shape."""
    number = values.numel()
    stride = max(1, math.ceil(number / _ELEMENTS))
    while stride > 1 and math.gcd(stride, number) > 1:  # a common divisor would see the same channels only
        stride += 1
    return values.reshape(-1)[::stride]


def _logarithmic(values: Tensor, decades: tuple[int, int], per_decade: int) -> Tensor:
    """Index into the edges of each value; one past the last for what is not a number."""
    low, high = decades
    last = (high - low) * per_decade + 1
    # The logarithm of an edge itself may be rounded below it.
    position = (values.clamp_min(1e-30).log10() - low) * per_decade + 1e-4
    index = position.floor().clamp(-1, last - 1) + 1
    return torch.where(values.isnan(), last + 1.0, index).long()


def _binned(index: Tensor, *values: Tensor, bins: int) -> Tensor:
    """(len(values), bins): sums of each of ``values`` by bin; what has the index ``bins`` is dropped."""
    stacked = _wide(torch.stack(values))
    return stacked.new_zeros(len(values), bins + 1).index_add_(1, index, stacked)[:, :-1]


def _bin_of(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Index into ``edges``, whose first none of ``values`` is below."""
    return torch.bucketize(values, _boundaries(edges, values.device), right=True)


@functools.cache
def _boundaries(edges: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(edges[1:], device=device)


def _of_samples(weights: Tensor, divergence: Tensor, outputs: Mapping[str, Any], maps: int) -> Sums:
    teacher, labels = outputs.get("teacher"), outputs.get("labels")
    if teacher is None or divergence.ndim == 0:
        return {}
    teacher = teacher.detach().float()
    samples, classes = teacher.shape
    weights = weights.detach().float()
    weights = weights.reshape(*[1] * (divergence.ndim - weights.ndim), *weights.shape)
    mean = weights.flatten(1).mean(1) if weights.ndim > 1 else weights
    mean = mean.expand(samples)
    one = torch.ones_like(mean)
    confidence = (teacher.sigmoid() if outputs.get("independent") else teacher.softmax(1)).amax(1)
    index = _bin_of(confidence, CONFIDENCES)
    index = torch.where(confidence.isnan(), len(CONFIDENCES), index)
    sums = {"confidence": _binned(index, mean, one, bins=len(CONFIDENCES))}
    if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        known = (labels >= 0) & (labels < classes)
        index = torch.where(known, labels, classes).long()
        sums["label"] = _binned(index, mean, one, one / maps, bins=classes)  # the last: rows, however many maps
    positions = outputs.get("positions")
    if positions is not None:
        sums["position"] = _binned(_bin_of(positions, POSITIONS), mean, one, bins=len(POSITIONS))
    if divergence.shape == teacher.shape:
        by_class = _wide(weights.broadcast_to(divergence.shape)).sum(0)
        sums["output"] = torch.stack((by_class, torch.full_like(by_class, samples)))
    return sums


def _of_places(weights: Tensor, divergence: Tensor) -> Sums:
    """By place in maps (B, C, H, W) whose weights know places; the same grid for maps of all sizes."""
    if divergence.ndim != 4 or weights.ndim < 2 or weights.shape[-2:] != divergence.shape[-2:]:
        return {}
    both = [m.detach().float().broadcast_to(divergence.shape).mean((0, 1)) for m in (weights, divergence)]
    cells = torch.nn.functional.adaptive_avg_pool2d(torch.stack(both), GRID).flatten(1)
    return {"place": _wide(torch.cat((cells, torch.ones_like(cells[:1]))) * len(divergence))}


def of_losses(outputs: Mapping[str, Any]) -> Sums:
    """Products of the gradients at the student's logits, and squared norms of what each loss puts into them.

    Args:
        outputs: of ``training_step``.
    """
    gradients = {name: _wide(g.detach()) for name, g in outputs.get("gradients", {}).items()}
    balance = {name: _wide(w.detach()) for name, w in outputs.get("balance", {}).items()}
    sums: Sums = {}
    if "task" in gradients:
        task = gradients["task"]
        for name, other in gradients.items():
            if name != "task":
                products = ((task * other).sum(), task.square().sum(), other.square().sum())
                sums[f"agreement/{name}"] = torch.stack((*products, torch.ones_like(products[0])))
    for name, weight in balance.items():
        sums[f"balance/{name}"] = torch.stack((weight, torch.ones_like(weight)))
        if name in gradients:
            squared = weight.square() * gradients[name].square().sum()
            sums[f"share/{name}"] = torch.stack((squared, torch.ones_like(weight)))
    for name, norm in outputs.get("gradient_norms", {}).items():
        sums[f"step_length/{name}"] = torch.stack((_wide(norm), _wide(torch.ones_like(norm))))
    return sums


def statistics(sums: Sums, epoch: int) -> dict[str, EpochStatistic]:
    """What ``sums`` over an epoch, on the CPU, say: by name of statistic, only those that something was counted for.

    ``distribution`` gives the share of weights by size. ``label``, ``output``, ``confidence``, ``position`` and
    ``divergence`` give mean weights by true label, by class of the map, by the teacher's largest probability, by the
    place in a sequence and by size of the divergence; the last has a column ``optimum`` where the guard has a closed
    form. ``frequency``, of many classes, gives them by how often the label of a row came among all that were counted,
    and how many labels came so often as its column ``labels``. ``place`` gives them by cell of a
    grid laid over feature maps, row by row, with the mean divergence as its column ``divergence``. ``agreement`` gives
    the cosine between the gradients of distillation and task, ``balance`` the mean weight of each loss, and ``share``
    the part of each loss in the student's gradient: of the norms, so that shares add up to one. ``step_length`` gives
    the mean norm of what each loss puts into the gradient in the student's parameters, and of their sum, ``total``; its
    column ``share`` is the part of each in the sum of the norms.
    """
    found: dict[str, EpochStatistic] = {}
    if "distribution" in sums:
        (counts,) = sums["distribution"].tolist()
        total = sum(counts) or 1.0
        columns = {"value": [count / total for count in counts], "count": counts}
        found["distribution"] = EpochStatistic(epoch, list(WEIGHT_EDGES), columns)
    bins = {"confidence": CONFIDENCES, "position": POSITIONS, "divergence": DIVERGENCE_EDGES}
    for name in ("label", "output", "confidence", "position", "divergence"):
        if name in sums:
            total_weight, count, *_ = sums[name]
            columns = {"value": (total_weight / count).tolist(), "count": count.tolist()}
            if name == "divergence" and "optimum" in sums:
                columns["optimum"] = (sums["optimum"][0] / count).tolist()
            found[name] = EpochStatistic(epoch, list(bins.get(name, range(len(count)))), columns)
    if "label" in sums and sums["label"].shape[1] >= MANY:
        weight, count, rows = sums["label"]
        found["frequency"] = _by_frequency(weight, count, rows, epoch)
    if "place" in sums:
        weight, differs, count = sums["place"]
        columns = {"value": weight / count, "count": count, "divergence": differs / count}
        found["place"] = EpochStatistic(epoch, [*range(GRID**2)], {key: c.tolist() for key, c in columns.items()})
    found |= _of_losses(sums, epoch)
    return {name: statistic for name, statistic in found.items() if any(statistic.columns["count"])}


def _by_frequency(weight: Tensor, count: Tensor, rows_of: Tensor, epoch: int) -> EpochStatistic:
    """Mean weight of rows by how often their label came, of sums (C,) by label."""
    came = count > 0
    index = _bin_of(rows_of[came].round(), POSITIONS)
    total, rows, labels = _binned(index, weight[came], count[came], torch.ones_like(count[came]), bins=len(POSITIONS))
    columns = {"value": total / rows, "count": rows, "labels": labels}
    return EpochStatistic(epoch, list(POSITIONS), {key: column.tolist() for key, column in columns.items()})


def _of_losses(sums: Sums, epoch: int) -> dict[str, EpochStatistic]:
    named: dict[str, dict[str, list[float]]] = {"agreement": {}, "balance": {}, "share": {}, "step_length": {}}
    for name, values in sums.items():
        statistic, _, of = name.partition("/")
        if statistic in named:
            named[statistic][of] = values.tolist()
    if set(named["share"]) != set(named["balance"]):  # a share of an unknown whole
        named["share"] = {}
    agreement = {of: _ratio(v[0], math.sqrt(v[1] * v[2])) for of, v in named["agreement"].items()}
    balance = {of: _ratio(v[0], v[1]) for of, v in named["balance"].items()}
    norms = {of: math.sqrt(v[0]) for of, v in named["share"].items()}
    share = {of: _ratio(norm, sum(norms.values())) for of, norm in norms.items()}
    length = {of: _ratio(v[0], v[1]) for of, v in named["step_length"].items()}
    found = {}
    for statistic, computed in (
        ("agreement", agreement),
        ("balance", balance),
        ("share", share),
        ("step_length", length),
    ):
        if computed:
            count = [named[statistic][of][-1] for of in computed]
            columns = {"value": list(computed.values()), "count": count}
            found[statistic] = EpochStatistic(epoch, list(computed), columns)
    if length:
        whole = sum(value for of, value in length.items() if of != TOTAL)
        found["step_length"].columns["share"] = [_ratio(value, whole) for value in length.values()]
    return found


def of_bin(history: Sequence[EpochStatistic], name: Any) -> tuple[list[int], list[float]]:
    """Epochs, from 1, and the values of one bin, where it is there."""
    found = [(e.epoch + 1, e.columns["value"][e.bins.index(name)]) for e in history if name in e.bins]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
