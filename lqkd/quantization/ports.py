"""Places in a network where a hook reaches a tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx, nn


@dataclass(frozen=True)
class Port:
    """A place where a tensor passes that a hook can reach.

    Attributes:
        module: name of a module that is called once.
        output: whether the tensor is what the module returns; otherwise it is its first argument.
    """

    module: str
    output: bool

    def __str__(self) -> str:
        return f"{'output' if self.output else 'input'} of {self.module}"

    def holds(self, node: fx.Node) -> bool:
        """Whether ``node``, which reads the tensor, reads what a hook here has made of it."""
        return self.output != is_inside(where(node), self.module)


@dataclass
class Calls:
    """Which module was called how often, and who took and returned which tensor: names, innermost module first."""

    counts: Counter[str] = field(default_factory=Counter)
    inputs: dict[fx.Node, list[str]] = field(default_factory=dict)
    outputs: dict[fx.Node, list[str]] = field(default_factory=dict)

    def ports(self, node: fx.Node, model: nn.Module) -> list[Port]:
        """Every place where a hook reaches the tensor of ``node``: where it is returned, then where it is taken."""
        return [port for port in self.passed(node) if takes_child(model.get_submodule(port.module))]

    def passed(self, node: fx.Node) -> list[Port]:
        """The same with modules of every class."""
        found = [Port(name, output=True) for name in self.outputs.get(node, ())]
        found += [Port(name, output=False) for name in self.inputs.get(node, ())]
        return [port for port in found if self.counts[port.module] == 1]


def takes_child(module: nn.Module) -> bool:
    """Whether ``module`` may have a quantizer as a child: a container calls each of its children as a step or layer."""
    return not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def where(node: fx.Node) -> str:
    """Name of the module in whose forward ``node`` is computed, or of the one that it calls; empty for the network."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack), ""))


def is_inside(name: str, module: str) -> bool:
    """Whether the module ``name`` is ``module`` or a part of it."""
    return name == module or name.startswith(f"{module}.")
