"""From a trained student to the network that is deployed: integer weights and biases, a grid wherever kernels need one.

The result is an ordinary module that runs in PyTorch, in floating point; :mod:`lqkd.export.reference` runs it in whole
numbers, as integer kernels do. It is what the exported file is compared with, and what the cost of deployment is
measured on: how its accuracy differs from that of the student as it was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lqkd.errors import UsageError, first_line
from lqkd.export.grids import ActivationGrid, LookupGrid, activation_grid
from lqkd.export.integer import IntegerLayer, integer_layer
from lqkd.export.operations import CLAMPS, KEEPS_GRID, Operation, operation, place
from lqkd.quantization import Quantizer, fold_batchnorm, initialize_quantizers, quantizers
from lqkd.quantization.batchnorm import Folding
from lqkd.quantization.graph import trace
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import LSQPlus, Mse, UniformQuantizer

RESIDUAL_BITS = 8
TWICE = ("add", "mul")
"""Kinds that are cheap enough to be computed once for each of two grids."""


@dataclass
class Deployed:
    """A network as it is deployed.

    Attributes:
        network: the graph module; its layers are :class:`IntegerLayer`, its quantizers :class:`ActivationGrid`.
        calibrated: the places whose 8-bit grid was fitted at export, as training had none there.
        rerouted: the inputs that read a value from an 8-bit grid of another consumer, where training read it in float.
        folded: how many batch norms are gone.
        kept: each batch norm that stays to the reason.
    """

    network: fx.GraphModule
    calibrated: list[str] = field(default_factory=list)
    rerouted: list[str] = field(default_factory=list)
    folded: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def changed_weights(self) -> int:
        """How many weights moved by one step, because a negative batch norm factor turns -128 into 128."""
        return sum(module.changed for module in self.network.modules() if isinstance(module, IntegerLayer))


def deploy(
    student: nn.Module,
    example: Tensor,
    calibration: Iterable[Tensor] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Deployed:
    """Build the deployed form of a quantised network; the network itself is left alone.

    Batch norms are folded and input and residual quantizers become nodes of the graph. An integer kernel writes its
    result onto one 8-bit grid; so where training left such a result in floating point (residual additions, mostly),
    a grid is fitted to ``calibration``, and where several grids read one result, all but one read it from an 8-bit
    one. Biases are rounded to the grid of the accumulator.

    Args:
        student: fitted, on any device; a copy on the CPU is used.
        example: one input (B, C, H, W) with B of at least 2.
        calibration: training inputs (B, C, H, W), as the student sees them; needed where grids are missing.
        progress: called with the number of missing grids that are fitted and that of all.

    Raises:
        UsageError: when the network cannot be traced, something in it cannot be exported, a quantizer was not fitted,
            a scale is zero or not finite, the network does not take the example or calibration data, or grids are
            missing and there is no calibration data.
    """
    student = copy.deepcopy(student).cpu().eval()
    example = example.detach().cpu()
    if isinstance(calibration, Tensor):
        raise UsageError("calibration is a tensor: give a list of batches, for instance [images]")
    batches = [batch.detach().cpu() for batch in calibration if len(batch)]
    for name, quantizer in quantizers(student).items():
        if not quantizer.is_ready:
            raise UsageError(
                f"quantizer {name!r} has never been fitted to data: train the student, or call initialize_quantizers"
            )
    builder, folding = _place_grids(student, example)
    network = builder.network
    if builder.fresh:
        _calibrate(network, builder.fresh, batches, progress)
    _make_integer(network)
    _shapes(network, example)
    return Deployed(network, list(builder.fresh.values()), builder.rerouted, len(folding.folded), folding.kept)


def check_deployable(student: nn.Module, example: Tensor) -> None:
    """Refuse a quantised network that :func:`deploy` would refuse when it is trained, whatever its quantizers know.

    Args:
        student: any quantised network; a copy on the CPU is looked at.
        example: (B, C, H, W), as for :func:`deploy`.

    Raises:
        UsageError: when the network cannot be traced, or something in it cannot be exported.
    """
    _place_grids(copy.deepcopy(student).cpu().eval(), example.detach().cpu())


def _place_grids(student: nn.Module, example: Tensor) -> tuple[_Builder, Folding]:
    for name, module in student.named_modules():
        if isinstance(module, nn.Embedding):
            raise UsageError(
                f"embedding {name!r} cannot be exported, since a file takes real numbers and no indices: export the "
                "module behind it with lqkd.export.to_onnx, and look rows up in its quantized_weight() before"
            )
    _check_takes(student, example, "an example")
    folding = fold_batchnorm(student)
    builder = _Builder(_explicit(student, example), example)
    builder.place_grids()
    return builder, folding


def _check_takes(network: nn.Module, inputs: Tensor, what: str) -> None:
    if not len(inputs):
        raise UsageError(f"{what} of shape {tuple(inputs.shape)} is empty: give at least two inputs")
    try:
        with torch.no_grad():
            network(inputs)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise UsageError(
            f"the network cannot take {what} of shape {tuple(inputs.shape)} and type {inputs.dtype} "
            f"({first_line(error)})"
        ) from error


def _explicit(student: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of ``student`` in which every quantizer is a node and nothing without effect is left."""
    graph = trace(student)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise UsageError("the network has several inputs: export takes networks with one")
    network = fx.GraphModule(student, graph)
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        module: Any = network.get_submodule(node.target)
        _expose(network, node, module, "argument_quantizer", before=True)
        if isinstance(module, QuantizedLayer):
            _expose(network, node, module, "input_quantizer", before=True)
        _expose(network, node, module, "output_quantizer", before=False)
    for module in network.modules():  # of the quantizers, which are nodes now
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, QuantizedLayer):
            module.input_quantizer = None
    _recompile(network)
    _shapes(network, example)
    for node in list(graph.nodes):
        found = operation(node, network)
        if found is not None and found.kind == "identity":
            node.replace_all_uses_with(found.inputs[0])
            graph.erase_node(node)
    _recompile(network)
    return network


def _expose(network: fx.GraphModule, node: fx.Node, module: Any, name: str, before: bool) -> None:
    quantizer = module._modules.get(name)
    if not isinstance(quantizer, Quantizer):
        return
    target = f"grids.{str(node.target).replace('.', '_')}.{name}"
    network.add_submodule(target, quantizer)
    if before:
        with network.graph.inserting_before(node):
            new = network.graph.call_module(target, (node.args[0],))
        node.args = (new, *node.args[1:])
    else:
        with network.graph.inserting_after(node):
            new = network.graph.call_module(target, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta["lqkd_place"] = str(node.target)


def _recompile(network: fx.GraphModule) -> None:
    network.graph.lint()
    network.recompile()


def _shapes(network: fx.GraphModule, example: Tensor) -> None:
    try:
        with torch.no_grad():
            ShapeProp(network).propagate(example)
    except RuntimeError as error:
        raise UsageError(
            f"the network cannot take an example of shape {tuple(example.shape)} ({first_line(error)})"
        ) from error
    for node in network.graph.nodes:  # shapes of several results are kept by ShapeProp as a tuple of metas
        if isinstance(node.meta.get("tensor_meta"), tuple) and not hasattr(node.meta["tensor_meta"], "shape"):
            node.meta["tensors"] = True


class _Builder:
    """Places grids in the graph of a network whose quantizers are nodes."""

    def __init__(self, network: fx.GraphModule, example: Tensor) -> None:
        self.network = network
        self.graph = network.graph
        self.example = example
        self.fresh: dict[str, str] = {}
        self.rerouted: list[str] = []

    def place_grids(self) -> None:
        self._hoist()
        for node in list(self.graph.nodes):
            if node.op != "output" and self._is_integer(node):
                self._settle(node)
        self._hoist()
        _recompile(self.network)
        _shapes(self.network, self.example)

    def _kind(self, node: fx.Node) -> str:
        found = self._operation(node)
        return "" if found is None else found.kind

    def _operation(self, node: fx.Node) -> Operation | None:
        if "tensor_meta" not in node.meta and node.op == "call_module":
            return Operation("grid", tuple(node.all_input_nodes), {"module": self._module(node)})
        return operation(node, self.network)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.network.get_submodule(str(node.target))

    def _hoist(self) -> None:
        """Move grids before operations that keep a grid, so that these run on codes. The values do not change."""
        moved = True
        while moved:
            moved = False
            for node in list(self.graph.nodes):
                if self._kind(node) != "grid" or not self._is_uniform(node):
                    continue
                above = node.args[0]
                assert isinstance(above, fx.Node)
                self._share(above)
                if self._kind(above) in KEEPS_GRID and self._kind(above) != "relu" and list(above.users) == [node]:
                    source = above.args[0]
                    assert isinstance(source, fx.Node)
                    node.replace_all_uses_with(above)
                    node.args = (source,)
                    above.replace_input_with(source, node)
                    above.prepend(node)
                    node.meta.update({k: v for k, v in source.meta.items() if k == "tensor_meta"})
                    moved = True

    def _share(self, node: fx.Node) -> None:
        """Let the readers of a result that keeps its grid read it from an 8-bit grid that one of them has."""
        if self._kind(node) not in KEEPS_GRID or self._kind(node) == "relu" or len(node.users) < 2:
            return
        if self._on_grid(node):  # an integer kernel wrote it, before it was moved
            return
        grids = [user for user in node.users if self._kind(user) == "grid"]
        if len(grids) == len(node.users) and any(self._bits(grid) == RESIDUAL_BITS for grid in grids):
            self._read_from(next(grid for grid in grids if self._bits(grid) == RESIDUAL_BITS), node)

    def _is_uniform(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), UniformQuantizer | LSQPlus)

    def _bits(self, node: fx.Node) -> int:
        module = self._module(node)
        return module.bits if isinstance(module, UniformQuantizer) else 0

    def _on_grid(self, node: fx.Node) -> bool:
        kind = self._kind(node)
        if kind == "grid":
            return isinstance(self._module(node), Quantizer)
        if kind in (*KEEPS_GRID, "part", "chunks"):
            found = self._operation(node)
            assert found is not None
            return self._on_grid(found.inputs[0])
        return False

    def _is_integer(self, node: fx.Node) -> bool:
        """Whether an integer kernel, or one between two grids, computes ``node``."""
        found = self._operation(node)
        if found is None or not found.inputs or found.kind in ("grid", "output", *KEEPS_GRID, "part", "chunks"):
            return False
        if found.kind == "layer":
            module = self._module(node)
            if not isinstance(module, QuantizedLayer) or module.weight_quantizer is None:
                return False
        return all(self._on_grid(x) for x in found.inputs)

    def _settle(self, node: fx.Node) -> None:
        """Give the result of ``node`` one grid, or two where it is cheap enough to be computed twice."""
        end = node
        while len(end.users) == 1 and self._kind(next(iter(end.users))) in CLAMPS:
            end = next(iter(end.users))
        users = [user for user in end.users if user.op != "output"]
        others = [user for user in users if self._kind(user) != "grid"]
        grids = [user for user in users if self._kind(user) == "grid"]
        if any(self._feeds_float(user) for user in others):
            return
        if others:
            grids.append(self._insert(end, others))
        if len(grids) <= 1 or (len(grids) == 2 and self._kind(node) in TWICE):
            return
        base = max(grids, key=self._bits)
        if self._bits(base) < RESIDUAL_BITS:
            base = self._insert(end, [])
        self._read_from(base, end)

    def _feeds_float(self, node: fx.Node) -> bool:
        """Whether ``node`` is a layer whose input training left in floating point, or what reaches one unchanged."""
        kind = self._kind(node)
        return kind == "layer" or (kind in KEEPS_GRID and any(self._feeds_float(user) for user in node.users))

    def _insert(self, end: fx.Node, users: list[fx.Node]) -> fx.Node:
        where = f"{end.target}" if end.op == "call_module" else f"{end.name} in {place(end)}"
        target = f"grids.calibrated.{end.name}"
        self.network.add_submodule(target, Mse(RESIDUAL_BITS, batched=True).eval())
        self.fresh[target] = where
        with self.graph.inserting_after(end):
            new = self.graph.call_module(target, (end,))
        new.meta["tensor_meta"] = end.meta["tensor_meta"]
        new.meta["lqkd_place"] = where
        for user in users:
            user.replace_input_with(end, new)
        return new

    def _read_from(self, base: fx.Node, end: fx.Node) -> None:
        end.append(base)
        for user in list(end.users):
            if user is not base and user.op != "output":
                user.replace_input_with(end, base)
                self.rerouted.append(str(user.meta.get("lqkd_place", user.name)))


def _calibrate(
    network: fx.GraphModule,
    fresh: dict[str, str],
    calibration: list[Tensor],
    progress: Callable[[int, int], None] | None,
) -> None:
    if not calibration:
        raise UsageError(
            f"{len(fresh)} results have no grid from training ({next(iter(fresh.values()))} is the first) and there is "
            "no calibration data to fit one: give training images, or train with quantization.residual_bits=8"
        )
    _check_takes(network, calibration[0][:1], "calibration data")
    images = torch.cat(calibration)
    initialize_quantizers(network, images, progress=progress)
    for target, where in fresh.items():
        quantizer: Any = network.get_submodule(target)
        if not quantizer.is_ready:  # only zeros arrive: any grid holds them
            quantizer.signed = False
            quantizer._ready = True
            if not images.isfinite().all():
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
        if isinstance(module, Quantizer):
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
    _recompile(network)


def grid_of(node: fx.Node, network: nn.Module) -> ActivationGrid | LookupGrid | None:
    """The grid that the value of ``node`` is on, ``None`` in floating point."""
    while True:
        found = operation(node, network)
        if found is None or not found.inputs:
            return None
        if found.kind == "grid":
            module = found.settings["module"]
            return module if isinstance(module, ActivationGrid | LookupGrid) else None
        if found.kind not in (*KEEPS_GRID, "part", "chunks"):
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
