"""What a trace says about a network: the functional operations between its layers, and who calls what."""

from __future__ import annotations

from dataclasses import dataclass, field

from lqkd.quantization.ports import Port

JOINS = ("add", "cat")
"""Operations whose operands can be quantised where they come from."""


@dataclass(frozen=True)
class Join:
    """An addition or concatenation of tensors, as in a residual connection.

    Attributes:
        kind: one of :data:`JOINS`.
        where: name of the module in whose forward it is computed; empty for the network itself.
        ports: for each operand a place that a hook can reach, ``None`` where there is none.
        bits: for each operand the bits of the quantizer that it comes from, ``None`` where there is none.
        quantizers: for each operand the name of that quantizer, likewise.
    """

    kind: str
    where: str
    ports: tuple[Port | None, ...]
    bits: tuple[int | None, ...]
    quantizers: tuple[str | None, ...]

    @property
    def is_quantised(self) -> bool:
        """Whether every operand is on a grid."""
        return None not in self.bits

    def __str__(self) -> str:
        bits = ", ".join(dict.fromkeys(f"{number} bits" for number in self.bits))
        return f"functional {self.kind} at {self.where or 'the top level'} of {len(self.bits)} operands with {bits}"


@dataclass(frozen=True)
class Operation:
    """A function that combines tensors outside of any layer.

    Attributes:
        kind: ``add``, ``cat``, ``mul``, ``matmul`` ...
        where: name of the module in whose forward it is computed; empty for the network itself.
        count: how many there are at this place.

    Examples:
        >>> print(Operation("add", "layer1.0", 2))
        functional add at layer1.0 (2 times)
    """

    kind: str
    where: str
    count: int

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"functional {self.kind} at {self.where or 'the top level'}{times}"


@dataclass(frozen=True)
class Survey:
    """What a trace says about a network.

    Attributes:
        operations: the functional operations, but for joins whose operands are quantised.
        joins: the additions and concatenations, quantised or not.
        shared: where a hook reaches each value that several grids read and that has none of its own; see
            :func:`~lqkd.quantization.shared_activations.shared_activations`.
        calls: name of each layer to the number of times it is called in one forward pass.
        bypassed: name of each layer that is never called to the name of the module whose forward reads its weight.
        untraceable: why the network could not be traced, ``None`` when it could. Nothing is known then but the
            additions inside of PyTorch's own transformer layers.
    """

    operations: tuple[Operation, ...] = ()
    joins: tuple[Join, ...] = ()
    shared: tuple[Port, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    bypassed: dict[str, str] = field(default_factory=dict)
    untraceable: str | None = None
