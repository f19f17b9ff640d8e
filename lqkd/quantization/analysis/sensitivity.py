"""How much each layer of a network suffers when it alone is quantised."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqkd.errors import UsageError
from lqkd.quantization.analysis.budget import Budget
from lqkd.quantization.analysis.judging import Classifier, Judge
from lqkd.quantization.batchnorm import reestimate_batchnorm
from lqkd.quantization.calibrate import initialize_quantizers
from lqkd.quantization.computed import copy_of
from lqkd.quantization.convert import layer_quantizers, quantize_model
from lqkd.quantization.cost import bit_operations, size
from lqkd.quantization.graph import survey
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizable import layer_kind, quantizable_layers
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.recipe import FLOAT_BITS, LayerSettings, Recipe, Rule, exactly, parse_bits, resolve
from lqkd.quantization.residual import quantizers_between
from lqkd.utils.tables import text_table

BITS = ("w8a8", "w4a4", "w2a2")
"""The bits that are tried unless others are asked for."""
Call: TypeAlias = "tuple[tuple[Any, ...], Mapping[str, Any]]"
"""Arguments and keyword arguments of a network."""


@dataclass(frozen=True)
class Candidate:
    """One layer, or all layers that share one weight, quantised with so many bits while all others are in float.

    Attributes:
        layers: names of the layers.
        weight_bits: of each of them, 32 where the recipe leaves the weight in float.
        activation_bits: likewise for the input.
        loss_increase: loss above that of the float network; below zero when it fell. Cross-entropy of a classifier.
        distance: from the float network: of a classifier the mean over samples of KL(float || quantised) between the
            class probabilities, in nats.
        change: of the metric, minus that of the float network.
        packed_bytes: size of the whole network, as :class:`lqkd.quantization.Size` counts it.
        bit_operations: of one forward pass of the whole network, as :func:`lqkd.quantization.bit_operations` counts.

    Examples:
        >>> candidate = Candidate(
        ...     layers=("fc",), weight_bits=(4,), activation_bits=(8,), loss_increase=0.02, distance=0.01,
        ...     change=-0.005, packed_bytes=60, bit_operations=3200,
        ... )
        >>> candidate.bits
        'W4A8'
    """

    layers: tuple[str, ...]
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    loss_increase: float
    distance: float
    change: float
    packed_bytes: int
    bit_operations: int

    @property
    def bits(self) -> str:
        """Bits of the first layer, e.g. ``W4A4``; 32 is floating point."""
        return f"W{self.weight_bits[0]}A{self.activation_bits[0]}"


@dataclass(frozen=True)
class SensitivityReport:
    """What :func:`measure_sensitivity` found.

    Attributes:
        recipe: the recipe whose quantizers were used.
        bits: the bits that were tried.
        groups: for every layer (or layers that share a weight), in the order of the network, one candidate for each
            of ``bits``.
        samples: number of validation samples.
        loss: of the float network on them.
        value: its metric on them, of a classifier the top-1 accuracy.
        packed_bytes: size of the float network.
        bit_operations: of one of its forward passes.
        metric, distance: the names of what was measured.

    Examples:
        >>> w4 = Candidate(("fc",), (4,), (4,), 0.02, 0.01, -0.01, packed_bytes=60, bit_operations=1600)
        >>> w2 = Candidate(("fc",), (2,), (2,), 0.3, 0.2, -0.1, packed_bytes=35, bit_operations=400)
        >>> report = SensitivityReport(Recipe(), ("W4A4", "W2A2"), ((w4, w2),), 100, 0.5, 0.9, 400, 102_400)
        >>> print(report)
        layer  loss W4A4  loss W2A2  KL W2A2  accuracy W2A2
        fc       +0.0200    +0.3000   0.2000        -10.00%
    """

    recipe: Recipe
    bits: tuple[str, ...]
    groups: tuple[tuple[Candidate, ...], ...]
    samples: int
    loss: float
    value: float
    packed_bytes: int
    bit_operations: int
    metric: str = Classifier.metric
    distance: str = Classifier.distance

    def ranked(self) -> list[tuple[Candidate, ...]]:
        """The groups, the most sensitive first: by the largest increase of the loss among the candidates."""
        return sorted(self.groups, key=lambda group: -max(candidate.loss_increase for candidate in group))

    def __str__(self) -> str:
        share = self.metric == Classifier.metric
        measured = (self.distance, "accuracy" if share else self.metric)
        rows = [("layer", *(f"loss {b}" for b in self.bits), *(f"{x} {self.bits[-1]}" for x in measured))]
        for group in self.ranked():
            increases = (f"{candidate.loss_increase:+.4f}" for candidate in group)
            last = group[-1]
            change = f"{last.change:+.2%}" if share else f"{last.change:+.4f}"
            rows.append((", ".join(last.layers), *increases, f"{last.distance:.4f}", change))
        return text_table(rows, left=1)


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    recipe: Recipe,
    validation: Sequence[Any],
    calibration: Sequence[Tensor | Call],
    bits: Sequence[str] = BITS,
    progress: Callable[[int, int], None] | None = None,
    budget: Budget | None = None,
    judge: Judge | None = None,
) -> SensitivityReport:
    """Quantise each layer of a network alone, with each number of bits, and see what the loss says.

    The measure of Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets" (ICML 2021, arXiv
    2006.10518), whose integer program adds the degradations of layers that are quantised one at a time. Nothing is
    trained: quantizers are fitted to the first calibration batch, as before a training, and batch norm gets the
    statistics of all calibration batches, since weights on a grid may have another scale. The float network that all
    is compared with gets them too, so that the difference is that of quantization alone, also when its own
    statistics are those of a quantised training.

    The first and the last layer are measured like all others. What the recipe leaves in float, a layer or one of its
    operands, is left in float; layers that share one weight are quantised together. ``model`` is not changed.

    Args:
        model: a network in float or one that ``recipe`` has quantised.
        recipe: which quantizers, and which layers stay in float; of its numbers of bits only 32 counts.
        validation: batches as ``judge`` takes them, on the model's device: of a classifier inputs (B, ...) and labels
            (B,) int64. Never test data.
        calibration: training inputs (B, ...), on the model's device, or arguments and keyword arguments.
        bits: what to try, e.g. ``w4a8``; 1 to 8 each.
        progress: called with the number of measurements that are done and that of all.
        budget: what is to be kept later; one that these bits cannot reach is refused before anything is measured.
        judge: says how good a network is; None for classifiers, which return logits (B, C).

    Raises:
        UsageError: when bits are not possible, a batch is missing, nothing is quantised, a loss is not finite or the
            budget cannot be reached.

    Examples:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, labels = torch.randn(32, 4), torch.randint(3, (32,))
        >>> report = measure_sensitivity(network, Recipe(), [(x, labels)], [x], bits=["w8a8", "w2a2"])
        >>> [[candidate.bits for candidate in group] for group in report.groups]
        [['W8A8', 'W2A2'], ['W8A8', 'W2A2']]
    """
    wanted = [_parse(text) for text in bits]
    for what, given in (("bits", wanted), ("validation", validation), ("calibration", calibration)):
        if not given:
            raise UsageError(f"sensitivity needs at least one entry in {what}: it is empty")
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"bits={list(bits)!r} name the same bits twice: name each once")
    network, _ = quantize_model(copy_of(model), recipe)
    for owner, name in quantizers_between(network):  # layers are what is ranked
        owner._modules[name] = None
    network.eval()
    judge = Classifier() if judge is None else judge
    calls: list[Call] = [((x,), {}) if isinstance(x, Tensor) else x for x in calibration]
    groups = _groups(network)
    if not groups:
        raise UsageError(f"the recipe (bits={recipe.bits!r}) quantises no layer: there is nothing to rank")
    settings = [_settings(network, recipe, groups, pair) for pair in wanted]
    times = survey(network).calls
    for layer in _quantized(network).values():
        layer.weight_quantizer = layer.input_quantizer = None
    _calibrate(network, calls)
    reference = [judge.answer(network, batch) for batch in validation]
    loss, _, value = judge.judge(zip(validation, reference, reference, strict=True))
    if not math.isfinite(loss):
        raise UsageError(f"the loss of the float network is {loss}: its weights are of no use")
    example = _one(calls[0])
    report = SensitivityReport(
        recipe=recipe,
        bits=tuple(f"W{weight}A{activation}" for weight, activation in wanted),
        groups=(),
        samples=sum(map(judge.samples, validation, reference)),
        loss=loss,
        value=value,
        packed_bytes=size(network).packed_bytes,
        bit_operations=bit_operations(network, *example[0], keywords=example[1]),
        metric=judge.metric,
        distance=judge.distance,
    )
    costs = [[_costs(network, group, own, times, example) for own in settings] for group in groups]
    if budget is not None:
        kind, base = (0, report.packed_bytes) if budget.quantity == "size" else (1, report.bit_operations)
        budget.check(base + sum(min(cost[kind] for cost in row) - base for row in costs), base)
    total, done = len(groups) * len(wanted), 0
    measured: list[tuple[Candidate, ...]] = []
    for group, row in zip(groups, costs, strict=True):
        candidates = []
        for own, (packed_bytes, operations) in zip(settings, row, strict=True):
            with _quantizing(network, group, own, times):
                _calibrate(network, calls)
                answers = (judge.answer(network, batch) for batch in validation)
                increased, distance, found = judge.judge(zip(validation, answers, reference, strict=True))
                layers = [_quantized(network)[name] for name in group]
                candidate = Candidate(
                    layers=tuple(group),
                    weight_bits=tuple(_bits(layer.weight_quantizer) for layer in layers),
                    activation_bits=tuple(_bits(layer.input_quantizer) for layer in layers),
                    loss_increase=increased - loss,
                    distance=distance,
                    change=found - value,
                    packed_bytes=packed_bytes,
                    bit_operations=operations,
                )
            if not (math.isfinite(candidate.loss_increase) and math.isfinite(distance)):
                raise UsageError(
                    f"layer {group[0]!r} has a loss of {increased} as {candidate.bits}: leave these bits out"
                )
            candidates.append(candidate)
            done += 1
            if progress is not None:
                progress(done, total)
        measured.append(tuple(candidates))
    return replace(report, groups=tuple(measured))


def _parse(text: str) -> tuple[int, int]:
    if re.fullmatch("w[1-8]a[1-8]", text) is None:
        raise UsageError(
            f"bits={text!r} are not possible for a ranking: write 1 to 8 each, like w4a8 (what the recipe leaves in "
            "float stays so)"
        )
    weight, activation = parse_bits(text)
    return weight, activation


def _bits(quantizer: Quantizer | None) -> int:
    return FLOAT_BITS if quantizer is None else quantizer.bits


def _quantized(network: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


def _groups(network: nn.Module) -> list[list[str]]:
    """Names of the layers that have a quantizer; those that share a weight in one list."""
    groups: dict[int, list[str]] = {}
    for name, layer in _quantized(network).items():
        if layer.weight_quantizer is not None or layer.input_quantizer is not None:
            groups.setdefault(id(layer.weight), []).append(name)
    return list(groups.values())


def _settings(
    network: nn.Module, recipe: Recipe, groups: list[list[str]], pair: tuple[int, int]
) -> dict[str, LayerSettings]:
    """What the recipe says about each layer when those that it quantises get ``pair`` for weight and activation."""
    layers = quantizable_layers(network)
    rules = []
    for name in (name for group in groups for name in group):
        layer = cast(QuantizedLayer, layers[name])
        weight = FLOAT_BITS if layer.weight_quantizer is None else pair[0]
        activation = FLOAT_BITS if layer.input_quantizer is None else pair[1]
        rules.append(Rule(exactly(name), weight, activation))
    kinds = {name: layer_kind(layer) for name, layer in layers.items()}
    return resolve(replace(recipe, rules=[*recipe.rules, *rules]), kinds)


@contextmanager
def _quantizing(
    network: nn.Module, group: list[str], settings: dict[str, LayerSettings], times: Mapping[str, int]
) -> Iterator[None]:
    """Give the layers of ``group``, called so many times in a pass, fresh quantizers in the block, none afterwards."""
    layers = {name: layer for name, layer in _quantized(network).items() if name in group}
    shared: dict[int, Quantizer] = {}
    try:
        for name, layer in layers.items():
            weight, activation = layer_quantizers(name, layer, settings[name], shared, times.get(name, 1))
            layer.weight_quantizer, layer.input_quantizer = weight, activation
        network.eval()
        yield
    finally:
        for layer in layers.values():
            layer.weight_quantizer = layer.input_quantizer = None


def _costs(
    network: nn.Module, group: list[str], settings: dict[str, LayerSettings], times: Mapping[str, int], example: Call
) -> tuple[int, int]:
    """Bytes and bit operations of the network with only the layers of ``group`` quantised."""
    with _quantizing(network, group, settings, times):
        return size(network).packed_bytes, bit_operations(network, *example[0], keywords=example[1])


def _one(call: Call) -> Call:
    """The first sample of a call."""
    args, keywords = call
    samples = next(len(x) for x in (*args, *keywords.values()) if isinstance(x, Tensor) and x.ndim > 0)

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples else value

    return tuple(map(first, args)), {key: first(value) for key, value in keywords.items()}


def _calibrate(network: nn.Module, calibration: Sequence[Call]) -> None:
    """Fit the quantizers and all of batch norm anew; nothing of an earlier measurement is left."""
    args, keywords = calibration[0]
    initialize_quantizers(network, *args, keywords=keywords, batch_statistics=True)
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        reestimate_batchnorm(network, calibration, lambda model, call: model(*call[0], **call[1]))
