"""What the arithmetic of a runtime asks of a network's grids, so that it is trained under it and not bent to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import PACT, LSQPlus, Quantizer, UniformQuantizer

FLOAT = 32


@dataclass(frozen=True)
class Target:
    """A runtime whose activations are signed whole numbers with zero in the middle, all of the same number of bits.

    Attributes:
        runtime: its name, for messages.
        activation_bits: of its codes, on which no smaller grid is.
    """

    runtime: str
    activation_bits: int = 8

    def constrained(self, kind: type[Quantizer], arguments: dict[str, Any], bits: int, place: str) -> dict[str, Any]:
        """The arguments of a quantizer of activations with what the target asks for.

        Args:
            kind: its family.
            arguments: further ones, as a recipe gives them.
            bits: 32 for no quantizer at all.
            place: what is quantised, for messages.

        Raises:
            UsageError: when the family, a number of bits or an argument is not possible.
        """
        if bits == FLOAT:
            return arguments
        if bits != self.activation_bits:
            raise UsageError(
                f"{bits} bits of the {place} are not possible with target={self.name!r}: {self.runtime} has codes of "
                f"{self.activation_bits} bits, and {FLOAT} leaves it in floating point"
            )
        if not issubclass(kind, UniformQuantizer) or issubclass(kind, LSQPlus | PACT):
            raise UsageError(
                f"quantizer {kind.__name__} of the {place} is not possible with target={self.name!r}: zero is the "
                f"middle of {self.runtime}'s codes, as lsq, lsq_ewgs, minmax and mse have it"
            )
        if not arguments.get("signed", True):
            raise UsageError(
                f"signed={arguments['signed']!r} of the {place} is not possible with target={self.name!r}: "
                f"{self.runtime}'s codes are signed"
            )
        return arguments | {"signed": True}

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        return next(name for name, target in TARGETS.items() if target is self)


TARGETS = {"tensorrt": Target("TensorRT")}
"""By the name that a recipe's ``target`` and the format of the file have."""


def find_target(name: str | None) -> Target | None:
    """The target of a recipe; None for none.

    Raises:
        UsageError: when there is no such target.
    """
    if name is None:
        return None
    if name not in TARGETS:
        raise UsageError(
            f"quantization.target={name!r} is unknown: use {', '.join(TARGETS)}, or null for all files that ask for "
            "nothing"
        )
    return TARGETS[name]
