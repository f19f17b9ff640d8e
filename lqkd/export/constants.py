"""What a network computes from its parameters alone, once and for all."""

from __future__ import annotations

import torch
from torch import fx


@torch.no_grad()
def fold_constants(network: fx.GraphModule) -> None:
    """Exchange what does not depend on the inputs, such as a bias looked up by position, for its value, in place.

    Args:
        network: in eval mode, with its quantizers as nodes.
    """
    graph = network.graph
    values = fx.Interpreter(network)
    fixed: set[fx.Node] = set()
    for node in list(graph.nodes):
        sources = node.all_input_nodes
        computed = node.op.startswith("call_") and bool(sources) and fixed.issuperset(sources)
        if node.op == "get_attr" or computed:
            values.env[node] = values.run_node(node)
            fixed.add(node)
    for node in fixed:
        read = any(user not in fixed for user in node.users)
        if node.op == "get_attr" or not read or not isinstance(values.env[node], torch.Tensor):
            continue
        name = f"constant_{node.name}"
        network.register_buffer(name, values.env[node], persistent=False)
        with graph.inserting_after(node):
            made = graph.get_attr(name)
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
    graph.eliminate_dead_code()
