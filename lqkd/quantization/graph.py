"""What a network computes between its layers, read from a symbolic trace that leaves the network untouched."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lqkd.errors import first_line
from lqkd.quantization.computed import copy_of
from lqkd.quantization.layers import QUANTIZED_LAYERS, QuantizedLayer
from lqkd.quantization.moves import moves
from lqkd.quantization.norms import is_batch_norm
from lqkd.quantization.ports import Calls, Port, is_inside, where
from lqkd.quantization.products import AttentionProducts
from lqkd.quantization.quantizers import Quantizer
from lqkd.quantization.residual import hook_up
from lqkd.quantization.shared_activations import shared_activations
from lqkd.quantization.survey import JOINS, Join, Operation, Survey
from lqkd.quantization.trial import PRODUCTS

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    torch.baddbmm: "matmul",
    torch.einsum: "einsum",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.stack: "cat",
    F.scaled_dot_product_attention: "attention product",
    F.multi_head_attention_forward: "attention",
    **dict.fromkeys(PRODUCTS, "product with a weight"),
}
_METHODS = {"add": "add", "add_": "add", "mul": "mul", "mul_": "mul", "matmul": "matmul", "bmm": "matmul"}
_OPAQUE: dict[type[nn.Module], int] = {nn.TransformerEncoderLayer: 2, nn.TransformerDecoderLayer: 3}
"""Modules that a trace does not look into, and their residual additions."""
_PAIRS = ("add", "mul")
"""Operations that are listed only when both operands are tensors."""


class Tracer(fx.Tracer):
    """Looks into everything but layers, products on grids, batch norms and quantizers, and keeps who passed what."""

    def __init__(self, given: Collection[str] | None = None) -> None:
        super().__init__()
        self.calls = Calls()
        self.given = given

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, QuantizedLayer | AttentionProducts | Quantizer) or is_batch_norm(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if not isinstance(m, Quantizer):
            name = self.path_of_module(m)
            self.calls.counts[name] += 1
            if isinstance(result, fx.Proxy):
                self.calls.outputs.setdefault(result.node, []).append(name)
            if args and isinstance(args[0], fx.Proxy):
                self.calls.inputs.setdefault(args[0].node, []).append(name)
        return result

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Arguments that are not given, where it is told which are, are what the forward takes by default."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self.given is None:
            return function, arguments
        defaults = inspect.signature(root_fn).parameters
        for index, argument in enumerate(arguments):
            if not isinstance(argument, fx.Proxy) or argument.node.op != "placeholder":
                continue
            name = str(argument.node.target)
            if name in defaults and name not in self.given and defaults[name].default is not inspect.Parameter.empty:
                arguments[index] = defaults[name].default
                self.graph.erase_node(argument.node)
        return function, arguments

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root`` in eval mode; a copy is traced that shares all tensors, as a forward may assign."""
        tensors = {id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())}
        copied = copy_of(root, {**tensors, **self._leaves_of(root)}).eval()
        hook_up(copied.modules())
        return super().trace(copied, concrete_args)

    def _leaves_of(self, root: nn.Module) -> dict[int, nn.Module]:
        """By the ids of the modules of which nothing runs in a trace, copies that are shallow, which take less time."""
        copies: dict[int, nn.Module] = {}

        def shallow(module: nn.Module) -> nn.Module:
            if id(module) not in copies:
                made = copies[id(module)] = module.__new__(type(module))
                made.__dict__.update(
                    {name: v.copy() if isinstance(v, dict | set) else v for name, v in module.__dict__.items()}
                )
                made._modules = {n: None if m is None else shallow(m) for n, m in module._modules.items()}
            return copies[id(module)]

        for name, module in root.named_modules():
            if name and all(self.is_leaf_module(inner, name) for inner in module.modules()):
                shallow(module)
        return copies


def trace(model: nn.Module) -> fx.Graph:
    """The graph of ``model`` as it runs in eval mode; the model itself is left alone.

    Raises:
        Exception: whatever the network's own forward, copy or the tracer raises.
    """
    return Tracer().trace(model)


def keep_constants(tracer: Tracer, model: nn.Module) -> None:
    """Let tensors that a traced forward made from nothing, such as masks, be buffers of ``model``, as of its graph."""
    for value, name in tracer.tensor_attrs.items():
        if isinstance(value, Tensor) and name.startswith("_tensor_constant"):
            model.register_buffer(name, value, persistent=False)


def obstacle(error: Exception) -> str:
    """Why :func:`trace` raised ``error``, with the line of the network's own code that a trace cannot follow."""
    told = first_line(error).partition(". ")[0]
    here = Path(__file__).parent
    ours = (str(Path(torch.__file__).parent), str(here), str(here.with_name("export")))
    lines = [at for at in traceback.extract_tb(error.__traceback__) if not at.filename.startswith(ours)]
    if not lines:
        return told
    told += f", at `{lines[-1].line}`, line {lines[-1].lineno} of {Path(lines[-1].filename).name}"
    if isinstance(error, fx.proxy.TraceError) or "Proxy" in told or "symbolic" in told:
        return (
            f"{told}: values, sizes and types of a batch cannot decide there in Python; compute it with tensors, such "
            "as torch.where, or decide when the network is built"
        )
    return told


def survey(model: nn.Module) -> Survey:
    """Find the functional operations of ``model``, without running or changing it."""
    operations = Counter(
        {
            ("add", name): additions
            for name, module in model.named_modules()
            for opaque, additions in _OPAQUE.items()
            if isinstance(module, opaque)
        }
    )
    if isinstance(model, QuantizedLayer):
        return Survey()
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # networks with data-dependent control flow fail in many ways
        return Survey(_listed(operations), untraceable=f"{type(error).__name__}: {obstacle(error)}")
    numbers = sizes(graph)
    calls: Counter[str] = Counter()
    read: dict[str, str] = {}
    listed: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] += 1
        elif node.op == "get_attr":
            owner = node.target.rpartition(".")[0]
            if owner and isinstance(model.get_submodule(owner), (QuantizedLayer, *QUANTIZED_LAYERS)):
                read.setdefault(owner, where(node))
        kind = kind_of_operation(node)
        if kind is None or node in numbers or (kind in _PAIRS and not _combines(node, numbers)):
            continue
        if kind != "matmul" or not _is_on_grids(node, model):
            listed[node] = kind
    joins, forked = _joins(listed, graph, model, tracer.calls)
    for node, kind in listed.items():
        quantised = joins[node].is_quantised if node in joins else kind == "mul" and _is_on_grids(node, model)
        if not quantised:
            operations[kind, where(node)] += 1
    bypassed = {name: reader for name, reader in read.items() if name not in calls}
    return Survey(_listed(operations), tuple(joins.values()), forked, dict(calls), bypassed)


def _joins(
    listed: dict[fx.Node, str], graph: fx.Graph, model: nn.Module, calls: Calls
) -> tuple[dict[fx.Node, Join], tuple[Port, ...]]:
    """The joins among the operations, and shared activations where a quantised operand has the value of one."""
    joined = {node: kind for node, kind in listed.items() if kind in JOINS}
    names = {x: _quantizer(x, model) for node in joined for x in node.all_input_nodes}
    bits = {x: None if name is None else cast(Quantizer, model.get_submodule(name)).bits for x, name in names.items()}
    ports = {(node, x): _port(x, where(node), model, calls) for node in joined for x in node.all_input_nodes}
    planned: dict[fx.Node, list[Port]] = {}
    for node in joined:
        if all(ports[node, x] is not None or bits[x] is not None for x in node.all_input_nodes):
            for x in node.all_input_nodes:
                port = ports[node, x]
                if port is not None and bits[x] is None:
                    planned.setdefault(x, []).append(port)
    found = shared_activations(
        graph, model, calls, planned, frozenset(n for n, kind in listed.items() if kind in _PAIRS)
    )
    joins = {
        node: Join(
            kind,
            where(node),
            tuple(_of_fork(x, found, model) or ports[node, x] for x in node.all_input_nodes),
            tuple(bits[x] for x in node.all_input_nodes),
            tuple(names[x] for x in node.all_input_nodes),
        )
        for node, kind in joined.items()
    }
    return joins, tuple(dict.fromkeys(found.values()))


def _of_fork(node: fx.Node, found: dict[fx.Node, Port], model: nn.Module) -> Port | None:
    """Where the value is quantised that ``node`` has or moves, if it is that of a fork."""
    while node not in found and moves(node, model):
        node = node.all_input_nodes[0]
    return found.get(node)


def _port(node: fx.Node, place: str, model: nn.Module, calls: Calls) -> Port | None:
    """Where a hook reaches the tensor of ``node`` before it is used in the forward of the module ``place``."""
    return next((p for p in calls.ports(node, model) if p.output or is_inside(place, p.module)), None)


def _quantizer(node: fx.Node, model: nn.Module) -> str | None:
    """The name of the quantizer whose result ``node`` is or moves."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, Quantizer):
            return str(node.target)
        if isinstance(module._modules.get("output_quantizer"), Quantizer):
            return f"{node.target}.output_quantizer"
    return _quantizer(node.all_input_nodes[0], model) if moves(node, model) else None


def _is_on_grids(node: fx.Node, model: nn.Module) -> bool:
    return all(_quantizer(x, model) is not None for x in node.all_input_nodes)


def _listed(operations: Counter[tuple[str, str]]) -> tuple[Operation, ...]:
    return tuple(Operation(kind, place, count) for (kind, place), count in operations.items())


def kind_of_operation(node: fx.Node) -> str | None:
    """What a :class:`~lqkd.quantization.survey.Operation` is called; ``None`` for all that combines no tensors."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _combines(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether two tensors meet in ``node``."""
    return sum(isinstance(x, fx.Node) and x not in numbers for x in (*node.args, *node.kwargs.values())) > 1


def sizes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that hold sizes, not tensors: shapes and what is computed from them."""
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("size", "dim", "numel"):
            numbers.add(node)
        elif node.op == "call_function":
            if node.target is getattr and node.args[1] in ("shape", "ndim"):
                numbers.add(node)
            elif getattr(node.target, "__module__", None) in ("_operator", "math", "builtins"):
                inputs = node.all_input_nodes
                if inputs and all(x in numbers for x in inputs):
                    numbers.add(node)
    return numbers
