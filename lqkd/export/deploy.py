"""From a trained student to the network that is deployed: integer weights and biases, a grid wherever kernels need one.

The result is an ordinary module that runs in PyTorch, in floating point; :mod:`lqkd.export.reference` runs it in whole
numbers, as integer kernels do. It is what the exported file is compared with, and what the cost of deployment is
measured on: how its accuracy differs from that of the student as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lqkd.errors import UsageError
from lqkd.export.explicit import check_takes, parameters, propagate_shapes, recompile
from lqkd.export.gates import GateGrid, GateRange
from lqkd.export.grids import ActivationGrid, LookupGrid, activation_grid
from lqkd.export.integer import integer_layer
from lqkd.export.middles import keep_off_middles
from lqkd.export.operations import operation
from lqkd.export.placement import missing_grid, place_grids
from lqkd.models.calls import Inputs
from lqkd.models.outputs import heads
from lqkd.quantization import Quantizer, initialize_quantizers, quantizers
from lqkd.quantization.codes import check_ungrouped
from lqkd.quantization.computed import copy_of
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.placement import MOVES
from lqkd.quantization.quantizers.base import alone
from lqkd.quantization.targets import Target
from lqkd.quantization.wrappers import unwrapped

INPUT = "images"
"""What files call the input of a network that takes a single one, by position."""
OUTPUT = "logits"
"""What files call the output of a network that returns a tensor by itself."""


@dataclass
class Deployed:
    """A network as it is deployed.

    Attributes:
        network: the graph module; its layers are :class:`IntegerLayer`, its quantizers :class:`ActivationGrid`.
        inputs: what files call its inputs, in order.
        outputs: what files call what it returns, in order.
        calibrated: the places whose 8-bit grid was fitted at export, as training had none there.
        rerouted: the inputs that read a value from an 8-bit grid of another consumer, where training read it in float.
        folded: how many batch norms are gone.
        kept: each batch norm that stays to the reason.
    """

    network: fx.GraphModule
    inputs: tuple[str, ...] = (INPUT,)
    outputs: tuple[str, ...] = (OUTPUT,)
    calibrated: list[str] = field(default_factory=list)
    rerouted: list[str] = field(default_factory=list)
    folded: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    def in_order(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The tensors of ``inputs`` in the order of the network's inputs."""
        return tuple(inputs.by_name(parameters(self.network)).values())


def deploy(
    student: nn.Module,
    example: Any,
    calibration: Iterable[Any] = (),
    progress: Callable[[int, int], None] | None = None,
    target: Target | None = None,
    gates: bool = False,
    off_middles: bool = False,
) -> Deployed:
    """Build the deployed form of a quantised network; the network itself is left alone.

    Batch norms are folded and input and residual quantizers become nodes of the graph. An integer kernel writes its
    result onto one 8-bit grid; so where training left such a result in floating point (residual additions, mostly),
    a grid is fitted to ``calibration``, and where several grids read one result, all but one read it from an 8-bit
    one. Biases are rounded to the grid of the accumulator.

    Args:
        student: fitted, on any device and in any precision, also in a wrapper such as ``DataParallel``; a copy on the
            CPU and in float32 is used.
        example: what the student is called with, B of at least 2: a tensor (B, C, H, W), say, a tuple of several, or
            a dict of keyword arguments.
        calibration: training inputs likewise, as the student sees them; needed where grids are missing.
        progress: called with the number of missing grids that are fitted and that of all.
        target: what the arithmetic of the file's runtime asks of these.
        gates: whether sigmoids and hard sigmoids without a grid of training get one of 256 levels, up to the largest in
            ``calibration``, and hard swish and SiLU become products with such a gate, which ONNX Runtime computes on
            integers.
        off_middles: whether grids that are fitted are made up to 0.6 % coarser, so that no code of one grid is in the
            middle between two levels of another that reads it, where other runtimes than ONNX Runtime round otherwise.
            Steps of training that read such a code, a sum or product of two, or a pixel change by less than 0.002 %.

    Raises:
        UsageError: when the network cannot be traced, something in it cannot be exported, such as a grid per group of
            inputs, a quantizer was not fitted, a scale is zero or not finite, the network does not take the example or
            calibration data, or grids are missing and there is no calibration data.
    """
    student = deployable_copy(student)
    inputs = as_float32(example, "an example")
    if isinstance(calibration, Tensor):
        raise UsageError("calibration is a tensor: give a list of batches, for instance [images]")
    batches = [as_float32(batch, "calibration data") for batch in calibration if not _is_empty(batch)]
    _fit_to_zeros(student, [inputs, *batches])
    for name, quantizer in quantizers(student).items():
        if not quantizer.is_ready:
            raise UsageError(
                f"quantizer {name!r} has no grid, since it has seen no data or nothing but zeros: train the student, "
                "or call initialize_quantizers"
            )
    _check_ungrouped(student)
    builder, folding = place_grids(student, inputs, missing_grid if target is None else target.missing_grid, gates)
    network = builder.network
    names = _names(network, inputs)
    ranges = any(isinstance(module, GateRange) for module in network.modules())
    if builder.fresh or (ranges and batches):
        _calibrate(network, builder.fresh, batches, progress)
    if off_middles:
        examples = [one.by_name(parameters(network)) for one in (inputs, *batches)]
        given = {name: [one[name] for one in examples] for name in examples[0]}
        keep_off_middles(network, builder.fresh, given)
    _make_integer(network)
    _settle_gates(network, builder.fresh)
    propagate_shapes(network, inputs)
    return Deployed(network, *names, list(builder.fresh.values()), builder.rerouted, len(folding.folded), folding.kept)


@torch.no_grad()
def _fit_to_zeros(student: nn.Module, batches: list[Inputs]) -> None:
    """Give a grid to quantizers that only zeros reach, as behind a branch that is still zero: every grid holds them.

    In training they pass zeros on as they are, and so nothing changes.
    """
    waiting = [quantizer for quantizer in quantizers(student).values() if not quantizer.is_ready]
    seen: dict[Quantizer, Tensor] = {}
    values: set[Quantizer] = set()

    def look(quantizer: Any, args: tuple[Tensor, ...]) -> None:
        seen[quantizer] = args[0]
        if args[0].any():
            values.add(quantizer)

    hooks = [quantizer.register_forward_pre_hook(look) for quantizer in waiting]
    try:
        for batch in batches if waiting else ():
            check_takes(student, batch, "an example")
    finally:
        for hook in hooks:
            hook.remove()
    for quantizer, zeros in seen.items():
        if quantizer not in values:
            quantizer.initialize(torch.ones_like(zeros))


def check_deployable(student: nn.Module, example: Inputs) -> None:
    """Refuse a quantised network that :func:`deploy` would refuse when it is trained, whatever its quantizers know.

    Args:
        student: any quantised network; a copy on the CPU is looked at.
        example: as for :func:`deploy`.

    Raises:
        UsageError: when the network cannot be traced, or something in it cannot be exported.
    """
    inputs = as_float32(example, "an example")
    _check_ungrouped(student)
    _names(place_grids(deployable_copy(student), inputs)[0].network, inputs)


def _check_ungrouped(student: nn.Module) -> None:
    for name, layer in student.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
            check_ungrouped(layer.weight_quantizer, name or "the network")


def deployable_copy(student: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode and float32, which files compute in, without what is wrapped around it."""
    return copy_of(unwrapped(student)).cpu().float().eval()


def as_float32(given: Any, what: str) -> Inputs:
    """What a network is called with, as the deployed network takes it: on the CPU, real numbers in float32.

    Raises:
        UsageError: when it is nothing that a network can be called with; ``what`` is what the message calls it.
    """
    if _is_empty(given):
        raise UsageError(f"{what} of shape {tuple(given.shape)} is empty: give at least two inputs")
    return Inputs.of(given).map(lambda x: x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu())


def _is_empty(given: Any) -> bool:
    return isinstance(given, Tensor) and given.ndim > 0 and len(given) == 0


def _names(network: fx.GraphModule, inputs: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What files call the inputs and outputs of a network.

    Raises:
        UsageError: when it returns something that files do not have, or calls two things the same.
    """
    taken = (INPUT,) if inputs.alone() is not None else parameters(network)
    result = next(node for node in network.graph.nodes if node.op == "output").args[0]
    returned = heads(result, OUTPUT)
    for name, node in returned.items():
        if not isinstance(node, fx.Node) or not hasattr(node.meta.get("tensor_meta"), "shape"):
            made = isinstance(node, fx.Node) and node is result  # by a class of the user's, say
            what = getattr(node.target, "__name__", type(result).__name__) if made else f"{name!r}"
            raise UsageError(
                f"the network returns {what}, which is no tensor: export takes networks that return a tensor, or "
                "tensors in a dict or a tuple"
            )
    if shared := set(taken) & set(returned):
        raise UsageError(f"the network calls an input and an output {min(shared)!r}: rename one of them")
    return taken, tuple(returned)


def _calibrate(
    network: fx.GraphModule,
    fresh: dict[str, str],
    calibration: list[Inputs],
    progress: Callable[[int, int], None] | None,
) -> None:
    if not calibration:
        raise UsageError(
            f"{len(fresh)} results have no grid from training ({next(iter(fresh.values()))} is the first) and there is "
            "no calibration data to fit one: give training images, or train with quantization.residual_bits=8 and "
            "function_bits=8"
        )
    check_takes(network, calibration[0].part(slice(1)), "calibration data")
    inputs = Inputs.joined(calibration)
    with alone():  # one process of several exports
        initialize_quantizers(network, *inputs.args, keywords=inputs.keywords, progress=progress)
    for target, where in fresh.items():
        quantizer: Any = network.get_submodule(target)
        if not quantizer.is_ready:  # only zeros arrive: any grid holds them
            quantizer.signed = bool(quantizer.signed)
            quantizer._ready = True
            if not all(tensor.isfinite().all() for tensor in inputs.tensors()):
                raise UsageError(f"calibration data for {where} are not finite")


def _make_integer(network: fx.GraphModule) -> None:
    """Exchange quantizers for grids and quantised layers for integer ones."""
    graph = network.graph
    done: dict[int, nn.Module] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module = network.get_submodule(str(node.target))
        where = str(node.meta.get("lqkd_place", node.target))
        if isinstance(module, GateRange):
            _exchange(network, str(node.target), module.grid())
        elif isinstance(module, Quantizer):
            if id(module) not in done:
                done[id(module)] = activation_grid(module, where)
            _exchange(network, str(node.target), done[id(module)])
        elif isinstance(module, QuantizedLayer):
            grid = grid_of(node.all_input_nodes[0], network)
            if id(module) not in done:
                uniform = grid if isinstance(grid, ActivationGrid) else None
                layer = integer_layer(module, uniform, where)
                done[id(module)] = _float_layer(module) if layer is None else layer
            _exchange(network, str(node.target), done[id(module)])
    network.delete_all_unused_submodules()
    recompile(network)


def _settle_gates(network: fx.GraphModule, fresh: Container[str]) -> None:
    for node in network.graph.nodes:
        grid = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(grid, GateGrid):
            (gate,) = node.all_input_nodes
            (x,) = gate.all_input_nodes
            source, found = grid_of(x, network), operation(gate, network)
            if not isinstance(source, ActivationGrid) or found is None:
                continue
            name, own = found.settings["name"], str(x.target) in fresh and x.users.keys() <= {gate, *node.users}
            if not (name == "HardSigmoid" and own and grid.share(source)):
                grid.settle(source, name)


def grid_of(node: fx.Node, network: nn.Module) -> ActivationGrid | LookupGrid | None:
    """The grid that the value of ``node`` is on, ``None`` in floating point."""
    while True:
        found = operation(node, network)
        if found is None or not found.inputs:
            return None
        if found.kind == "grid":
            module = found.settings["module"]
            return module if isinstance(module, ActivationGrid | LookupGrid) else None
        if found.kind not in MOVES:
            return None
        node = found.inputs[0]


def _float_layer(layer: Any) -> nn.Module:
    """A layer whose weight stays in floating point, as a plain one of PyTorch."""
    weight = layer.quantized_weight().detach()
    base = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) if isinstance(layer, kind))
    plain: Any = base.__new__(base)
    plain.__dict__.update({k: v for k, v in layer.__dict__.items() if not k.startswith("_")})
    nn.Module.__init__(plain)
    if hasattr(layer, "_reversed_padding_repeated_twice"):
        plain._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    return plain.eval()


def _exchange(network: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
