"""The rest of a frozen network behind one of its modules, as a function of what that module gives."""

from __future__ import annotations

from torch import Tensor, fx, nn

from lqkd.errors import UsageError, first_line
from lqkd.models.outputs import Asked, main_tensor
from lqkd.quantization.modes import evaluating


class Rest:
    """From the output of one module of a network to the network's own main output, differentiable in it.

    It is read from a symbolic trace (``torch.fx``) and works with the network's own modules, which it holds without
    being a module, so that a loss which has it keeps none of their parameters.

    Args:
        network: in evaluation mode whenever this is called, as a frozen teacher is.
        tap: name of the module.
        loss: the name of the loss, for messages.

    Raises:
        UsageError: when the network cannot be traced, calls the module not exactly once, or goes on with more than
            what the module gives, as a skip connection around it does.

    Examples:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> images = torch.randn(2, 4)
        >>> bool(torch.equal(Rest(network, "0", "StitchedKL")(network[0](images)), network(images)))
        True
    """

    def __init__(self, network: nn.Module, tap: str, loss: str) -> None:
        name = type(network).__name__
        with evaluating(network):
            try:
                graph = fx.GraphModule(network, _Tracer(tap).trace(network)).graph
            except Exception as error:  # a network of the user's own may raise any type
                raise UsageError(
                    f"{loss} needs the rest of the teacher behind {tap!r}, but {name} cannot be traced "
                    f"({first_line(error)}): take Hints"
                ) from error
        called = [node for node in graph.nodes if node.op == "call_module" and node.target == tap]
        if len(called) != 1:
            raise UsageError(
                f"{loss} needs a module that the teacher calls once on its way, and {name} calls {tap!r} "
                f"{len(called)} times: choose another tap"
            )
        rest = _behind(graph, called[0], f"{loss}: behind {tap!r} {name}")
        self._rest = fx.Interpreter(network, graph=rest)  # which reads what the network has then, on its device

    def __call__(self, features: Tensor) -> Tensor:
        """The main output of the network whose module gives ``features``, (B, ...) on the network's device."""
        own = features.clone()  # which a network may work on in place, as ReLU(inplace=True) does
        return main_tensor(self._rest.run(own), Asked("teacher", len(features)))


class _Tracer(fx.Tracer):
    """Looks into everything but the modules of torch and one module."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self.tap or super().is_leaf_module(m, module_qualified_name)


def _behind(graph: fx.Graph, tap: fx.Node, told: str) -> fx.Graph:
    """What is computed of the output of ``tap``, and of parameters and constants, and of nothing else."""
    graph.eliminate_dead_code()
    if tap not in {*graph.nodes}:
        raise UsageError(f"{told} makes nothing of what it gives: choose another tap")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    before, behind = _reached(graph, inputs, tap), _reached(graph, [tap])
    rest = fx.Graph()
    found = {tap: rest.placeholder("features")}
    for node in graph.nodes:
        if node is tap or (node in before and node not in behind):
            continue
        others = [other.name for other in node.all_input_nodes if other not in found]
        if others:
            raise UsageError(f"{told} goes on with more than what it gives ({others[0]}): choose another tap")
        if node.op == "output":
            rest.output(fx.node.map_arg(node.args[0], found.__getitem__))
        else:
            found[node] = rest.node_copy(node, found.__getitem__)
    return rest


def _reached(graph: fx.Graph, sources: list[fx.Node], beyond: fx.Node | None = None) -> set[fx.Node]:
    """The sources and all that is computed of them, but for what only ``beyond`` makes of them."""
    reached = {*sources}
    for node in graph.nodes:  # in the order of their computation
        if node is not beyond and reached & {*node.all_input_nodes}:
            reached.add(node)
    return reached
