"""What of a network is quantised, and why the rest is not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lqkd.quantization.attention import QuantizedProducts, products_of, quantized_products
from lqkd.quantization.cost import size
from lqkd.quantization.granularity import granularity
from lqkd.quantization.graph import survey
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.ports import Port
from lqkd.quantization.quantizable import layer_kind, refusals_of
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.recipe import FLOAT_BITS
from lqkd.quantization.residual import attached
from lqkd.quantization.survey import Join, Operation, Survey
from lqkd.utils.tables import text_table

_NAMED = 3
"""So many layers of a kind are named where all of them stay in floating point."""
_CHOSEN = "floating point: the recipe says so"


@dataclass(frozen=True)
class LayerCoverage:
    """One row of a :class:`CoverageReport`: what happened to a layer with parameters, and why.

    Attributes:
        name: of the layer in its network.
        kind: its class.
        weight_bits, activation_bits: 32 for floating point.
        parameters: their number.
        note: what quantises it, or why nothing does.
        passed_over: whether it has weights (parameters over two axes or more) that the recipe did not leave in floating
            point and that are there nevertheless.
        operations: its share of the multiply-accumulates of a forward pass; ``None`` where they were not counted.

    Examples:
        >>> row = coverage(nn.Sequential(nn.Linear(4, 8))).layers[0]
        >>> row.name, row.kind, row.weight_bits, row.parameters, row.is_float
        ('0', 'Linear', 32, 40, True)
    """

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    parameters: int
    note: str
    passed_over: bool = False
    operations: float | None = field(default=None, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantised."""
        return self.weight_bits == self.activation_bits == FLOAT_BITS


@dataclass(frozen=True)
class CoverageReport:
    """What :func:`quantize_model` did to a network.

    Attributes:
        layers: every layer that has parameters, in the order of the network; a module under several names once.
        operations: what is computed in floating point between the layers: additions, concatenations, products.
        joins: the additions and concatenations whose operands are quantised.
        products: the attentions whose products are quantised.
        untraceable: why the operations are not known, but for those in PyTorch's transformer layers; ``None`` when
            all are.
        already_quantised: how many layers were quantised before :func:`quantize_model` was called.
        parameters: of the whole network, each once.
        functions: the values between layers that are on a grid of their own and that none of ``joins`` reads, with the
            bits of each: what functions read and write, by ``function_bits``, and what is read on several grids.

    Examples:
        >>> report = coverage(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
        >>> report.parameters, [layer.kind for layer in report.layers]
        (56, ['Linear', 'LayerNorm'])
    """

    layers: tuple[LayerCoverage, ...]
    operations: tuple[Operation, ...] = ()
    joins: tuple[Join, ...] = ()
    products: tuple[QuantizedProducts, ...] = ()
    untraceable: str | None = None
    already_quantised: int = field(default=0, compare=False)
    parameters: int = 0
    functions: Mapping[Port, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many layers are quantised, with how many bits, and how many are not."""
        quantised = [x for x in self.layers if not x.is_float]
        counts = Counter(f"W{x.weight_bits}A{x.activation_bits}" for x in quantised)
        bits = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        ends = f" (first: {quantised[0].name}, last: {quantised[-1].name})" if quantised else ""
        line = (
            f"{len(quantised)} layers quantised{ends}: {bits or 'none'}; {len(self.layers) - len(quantised)} in float"
        )
        if self.products:
            own = ", ".join(f"{bits} bits" for bits in dict.fromkeys(products.bits for products in self.products))
            line += f"; products of {len(self.products)} attentions with {own}"
        if self.functions:
            own = ", ".join(f"{bits} bits" for bits in dict.fromkeys(self.functions.values()))
            line += f"; {len(self.functions)} values between layers with {own}"
        return line + (f"; {self.already_quantised} were quantised already" if self.already_quantised else "")

    def with_operations(self, shares: Mapping[str, float]) -> CoverageReport:
        """The same with each layer's share of the operations, as :func:`lqkd.quantization.operation_shares` counts."""
        layers = tuple(replace(layer, operations=shares.get(layer.name)) for layer in self.layers)
        return replace(self, layers=layers)

    def passed_over(self) -> list[str]:
        """A sentence on the layers of each kind that stay in floating point although the recipe has bits for them."""
        groups: dict[tuple[str, str], list[LayerCoverage]] = defaultdict(list)
        for layer in self.layers:
            if layer.passed_over:
                groups[layer.kind, layer.note].append(layer)
        return [self._sentence(*group, layers) for group, layers in groups.items()]

    def _sentence(self, kind: str, note: str, layers: list[LayerCoverage]) -> str:
        names = ", ".join(layer.name or "the network" for layer in layers[:_NAMED])
        names += f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
        parameters = sum(layer.parameters for layer in layers) / max(self.parameters, 1)
        counted = [layer.operations for layer in layers if layer.operations is not None]
        if not counted:
            return f"{kind} {names} with {parameters:.1%} of the parameters in {note}"
        return (
            f"{kind} {names} with {parameters:.1%} of the parameters and {sum(counted):.1%} of the operations in {note}"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "kind", "W", "A", "parameters", "note")]
        for layer in self.layers:
            bits = ["float" if b == FLOAT_BITS else str(b) for b in (layer.weight_bits, layer.activation_bits)]
            rows.append((layer.name, layer.kind, *bits, f"{layer.parameters:,}", layer.note))
        lines = [text_table(rows, left=6)]
        lines += [f"not quantised: {sentence}" for sentence in self.passed_over()]
        lines += [f"quantised: {join}" for join in (*self.joins, *self.products)]
        lines += [f"quantised: {port} with {bits} bits" for port, bits in self.functions.items()]
        lines += [f"not quantised: {operation}" for operation in self.operations]
        if self.untraceable is not None:
            lines.append(
                f"other functional operations are not known: the graph could not be traced ({self.untraceable})"
            )
        return "\n".join(lines)


def coverage(model: nn.Module) -> CoverageReport:
    """Report the bits of every layer of ``model`` that owns parameters, and what is computed between them.

    Args:
        model: any network, quantised or not.

    Examples:
        >>> print(coverage(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
        layer  kind    W      A      parameters  note
        0      Linear  float  float  40          floating point: the recipe says so
        2      Linear  float  float  18          floating point: the recipe says so
    """
    return covered(model, survey(model))


def covered(model: nn.Module, found: Survey) -> CoverageReport:
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    refusals = refusals_of(model, found)
    rows = []
    for name, module in model.named_modules():
        if not module._parameters or isinstance(module, Quantizer):
            continue
        # What a parametrised layer computes its weight from is in modules of their own.
        row = _describe(name, module, refusals.get(name.partition(".parametrizations.")[0]))
        more = [f"also {', '.join(names[id(module)][1:])}"] if len(names[id(module)]) > 1 else []
        if found.calls.get(name, 1) > 1:
            more.append(f"called {found.calls[name]} times")
        rows.append(replace(row, note="; ".join([row.note, *more])))
    if all(row.is_float for row in rows):  # a network that is to stay as it is
        rows = [replace(row, passed_over=False) for row in rows]
    joins = tuple(join for join in found.joins if join.is_quantised)
    met = {id(model.get_submodule(name)) for join in joins for name in join.quantizers if name is not None}
    return CoverageReport(
        tuple(rows),
        found.operations,
        joins,
        quantized_products(model),
        found.untraceable,
        parameters=size(model).parameters,
        functions={port: own.bits for port, own in attached(model).items() if id(own) not in met},
    )


def _describe(name: str, module: nn.Module, refused: str | None) -> LayerCoverage:
    parameters = sum(p.numel() for p in module._parameters.values() if p is not None)
    if isinstance(module, QuantizedLayer):
        weight, activation = module.weight_quantizer, module.input_quantizer
        notes = [
            f"{what} {type(q).__name__} {granularity(q)}"
            for what, q in (("weight", weight), ("input", activation))
            if q is not None
        ]
        notes = notes or [_CHOSEN]
        if isinstance(module, nn.MultiheadAttention) and products_of(module) is None:
            notes.append("attention products in floating point")
        bits = [FLOAT_BITS if q is None else q.bits for q in (weight, activation)]
        return LayerCoverage(name, layer_kind(module), bits[0], bits[1], parameters, ", ".join(notes))
    if refused is not None:
        note = f"floating point: {refused}"
    elif isinstance(module, tuple(QUANTIZED_LAYERS)):
        note = _CHOSEN
    else:
        note = "floating point: no quantised layer of this kind"
    passed_over = note != _CHOSEN and any(_is_weight(p) for p in module._parameters.values() if p is not None)
    return LayerCoverage(name, layer_kind(module), FLOAT_BITS, FLOAT_BITS, parameters, note, passed_over)


def _is_weight(parameter: nn.Parameter) -> bool:
    """Whether it extends over two axes or more; a layer scale of shape (C, 1, 1) does not."""
    return parameter.is_floating_point() and sum(side > 1 for side in parameter.shape) > 1
