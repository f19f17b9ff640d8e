"""Quantising what functions between layers read and write, at the modules that it comes from or goes to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lqkd.errors import UsageError
from lqkd.quantization.batchnorm import fold_batchnorm, is_activated, take_activations_apart
from lqkd.quantization.computed import copy_of
from lqkd.quantization.graph import Tracer, kind_of_operation, sizes
from lqkd.quantization.kinds import kind_of
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.placement import CLAMPS, MOVES, TWICE, Placement
from lqkd.quantization.ports import Port, takes_child, where
from lqkd.quantization.products import OPERANDS, AttentionProducts
from lqkd.quantization.quantizers import LSQ, Quantizer
from lqkd.quantization.recipe import FLOAT_BITS, Recipe, check_bits
from lqkd.quantization.residual import attach, quantizer_at
from lqkd.quantization.survey import JOINS, Operation, Survey
from lqkd.quantization.targets import RESIDUAL_BITS


@dataclass(frozen=True)
class FunctionGrids:
    """What :func:`quantize_functions` did.

    Attributes:
        bits: for each place that has got a quantizer, its number.
        left: the functions that read or write values which no hook reaches before all of their readers.
    """

    bits: dict[Port, int]
    left: tuple[Operation, ...]


def check_functions(recipe: Recipe, found: Survey) -> None:
    """Refuse ``recipe.function_bits`` that are not possible, or have no effect.

    Args:
        recipe: what the user asked for.
        found: what :func:`~lqkd.quantization.graph.survey` says about the network.

    Raises:
        UsageError: then.
    """
    bits = recipe.function_bits
    if bits is None:
        return
    check_bits(bits, "quantization.function_bits", bits)
    if bits == FLOAT_BITS:
        return
    if recipe.residual_bits is None:
        raise UsageError(
            f"quantization.function_bits={bits} is not possible without residual_bits: what functions read comes "
            "through additions and concatenations as well; give residual_bits=8, say"
        )
    if found.untraceable is not None:
        raise UsageError(
            f"quantization.function_bits={bits} has no effect: the graph of the network could not be traced "
            f"({found.untraceable}); leave it null"
        )


def quantize_functions(model: nn.Module, recipe: Recipe) -> FunctionGrids:
    """Give every value that a file has on a grid and training has not a quantizer of ``recipe.function_bits`` bits.

    An integer kernel writes its result on a grid. Where no layer reads it, but a hard swish, the product or the mean of
    squeeze and excitation, an addition or the like, training has none there, and the export would fit one. Which values
    these are is found by the export's own rule (:mod:`lqkd.quantization.placement`), on a copy with batch norms folded.
    The network is not rewritten: quantizers are at modules, as :func:`~lqkd.quantization.residual.quantize_joins` has
    them, which comes behind and finds most operands on grids. A value that additions and concatenations alone read has
    ``recipe.residual_bits`` bits, one that both read the larger number.

    A value is left in floating point where no hook reaches it before all of its readers, such as the result of a
    function in the forward that reads it, or of a module that is called several times.

    Args:
        model: a network with quantised layers that can be traced, in place.
        recipe: the numbers of bits and the quantizer; nothing is done without the first.

    Raises:
        UsageError: when the quantizer is not possible.
    """
    if recipe.function_bits in (None, FLOAT_BITS) or isinstance(model, QuantizedLayer):
        return FunctionGrids({}, ())
    search = _Search(model, recipe)
    search.place()
    attach(model, search.found)
    bits = {port: quantizer.bits for port, quantizer in search.found.items()}
    return FunctionGrids(bits, tuple(Operation(*which, count) for which, count in search.left.items()))


class _Search(Placement):
    """Places grids in the graph of a copy, and keeps where hooks of the network itself have them."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.found: dict[Port, Quantizer] = {}
        self.left: Counter[tuple[str, str]] = Counter()
        self.new: dict[fx.Node, Quantizer] = {}
        self.copy = copy_of(model, {id(t): t for t in (*model.parameters(), *model.buffers())}).eval()
        self.activated = [name for name, module in model.named_modules() if is_activated(module)]
        folded = fold_batchnorm(self.copy).folded  # no result is looked at in front of a batch norm that is
        take_activations_apart(self.copy)
        self.activations = {f"{n}.1" if n in folded else f"{n}.1.1": f"{n}.act" for n in self.activated}
        tracer = Tracer()
        super().__init__(tracer.trace(self.copy))
        self.calls = tracer.calls
        self.sizes = sizes(self.graph) | {node for node in self.graph.nodes if node.target is getattr}
        for node in self.sizes:  # which are numbers in a file, and read nothing
            node.args, node.kwargs = (), {}
        self._expose()

    def _expose(self) -> None:
        """Let the quantizers that modules have be nodes, where the trace did not look into these."""
        for node in list(self.graph.nodes):
            module = self._module(node) if node.op == "call_module" else None
            if module is None or isinstance(module, Quantizer):
                continue
            if isinstance(module, AttentionProducts):
                for name, operand in zip(OPERANDS, node.all_input_nodes, strict=False):
                    self._read_on(operand, node, name)
            for name in ("argument_quantizer", *(["input_quantizer"] if isinstance(module, QuantizedLayer) else [])):
                self._read_on(node.all_input_nodes[0], node, name)
            if isinstance(module._modules.get("output_quantizer"), Quantizer):
                with self.graph.inserting_after(node):
                    new = self._called(f"{node.target}.output_quantizer", node, node)
                node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)  # noqa: B023

    def _read_on(self, x: fx.Node, node: fx.Node, name: str) -> None:
        if isinstance(self._module(node)._modules.get(name), Quantizer):
            with self.graph.inserting_before(node):
                node.replace_input_with(x, self._called(f"{node.target}.{name}", x, node))

    def _called(self, target: str, x: fx.Node, owner: fx.Node) -> fx.Node:
        new = self.graph.call_module(target, (x,))
        new.meta["nn_module_stack"] = owner.meta.get("nn_module_stack")
        return new

    def _kind(self, node: fx.Node) -> str:
        if node in self.new:
            return "grid"
        return "" if node in self.sizes else kind_of(node, self.copy)

    def _inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(x for x in node.all_input_nodes if self._kind(x))

    def _module(self, node: fx.Node) -> nn.Module:
        return self.new[node] if node in self.new else self.copy.get_submodule(str(node.target))

    def _is_matrix_product(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._module(node), AttentionProducts)

    def _insert(self, end: fx.Node, users: list[fx.Node]) -> fx.Node:
        readers = self._readers(end)
        port = self._port(end, readers) if users else None
        if port is not None:
            users = readers
        elif users and self._is_computed_twice(end, readers):
            port = self._port(end, users)
        quantizer: Quantizer = LSQ(RESIDUAL_BITS, batched=True)
        if port is not None:
            quantizer = self.found[port] = quantizer_at(port, self.recipe, self._bits_for(users))
        else:
            self.left.update({(_name(x, self.copy), where(x)): 1 for user in users for x in self._functions(user)})
        with self.graph.inserting_after(end):
            new = self.graph.call_module("", (end,))
        self.new[new] = quantizer
        for user in users:
            user.replace_input_with(end, new)
        return new

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user.op != "output"]

    def _is_computed_twice(self, end: fx.Node, readers: list[fx.Node]) -> bool:
        """Whether a kernel may compute the value for one grid more."""
        while self._kind(end) in (*CLAMPS, "identity"):
            end = end.all_input_nodes[0]
        return self._kind(end) in TWICE and sum(self._kind(reader) == "grid" for reader in readers) < len(TWICE)

    def _port(self, node: fx.Node, users: list[fx.Node]) -> Port | None:
        """Where a hook reaches the value of ``node``, or what is moved of it, before ``users`` and nobody else."""
        for passed in self.calls.passed(node):
            port = self._own(passed)
            if port is not None and all(passed.holds(user) == (user in users) for user in node.users):
                return port
        alone = list(node.users) == users and len(users) == 1 and self._keeps_grid(users[0])
        return self._port(users[0], list(users[0].users)) if alone else None

    def _own(self, port: Port) -> Port | None:
        """The same place in the network, whose batch norms are where they were."""
        name = port.module
        if name in self.activations:
            return None if port.output else Port(self.activations[name], output=False)
        if any(name.startswith(f"{norm}.") for norm in self.activated):  # modules that the network has not
            return None
        return port if takes_child(self.model.get_submodule(name)) else None

    def _bits_for(self, users: list[fx.Node]) -> int:
        ends = [end for user in users for end in self._ends(user)]
        given = [self.recipe.residual_bits if self._is_join(end) else self.recipe.function_bits for end in ends]
        return max(bits for bits in given if bits is not None)

    def _functions(self, node: fx.Node) -> list[fx.Node]:
        """What reads a value that is no join, be it ``node`` or behind it where that moves the value."""
        return [x for x in self._ends(node) if not self._is_join(x) and x.op != "output"]

    def _ends(self, node: fx.Node) -> list[fx.Node]:
        if self._kind(node) not in MOVES:
            return [node]
        return [end for user in node.users for end in self._ends(user)]

    def _is_join(self, node: fx.Node) -> bool:
        return self._kind(node) in JOINS and len(self._inputs(node)) > 1


def _name(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    target: Any = node.target
    return kind_of_operation(node) or str(getattr(target, "__name__", target))
