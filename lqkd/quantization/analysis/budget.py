"""How large a network, or how costly a forward pass, may be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lqkd.errors import UsageError

_UNITS = {
    "size": {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bops": {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
}
_EXAMPLES = "size=120kB, size=12%, bops=2.5G or bops=3%"


@dataclass(frozen=True)
class Budget:
    """An upper bound on the packed size of a network or on the bit operations of one forward pass.

    Attributes:
        quantity: ``size`` in bytes, or ``bops`` in bit operations.
        amount: the bound; a share of the float network's, 1 for all of it, when ``relative``.
        relative: whether it is such a share.

    Examples:
        >>> Budget.parse("size=12%").limit(1_000_000)
        120000
        >>> Budget.parse("bops=2.5G")
        Budget(quantity='bops', amount=Fraction(2500000000, 1), relative=False)
    """

    quantity: Literal["size", "bops"]
    amount: Fraction
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``size=120kB``, ``size=12%``, ``bops=2.5G`` or ``bops=3%``; % is of the float network.

        Units of size are B, kB, MB, GB (powers of 1000) and KiB, MiB, GiB; those of bit operations k, M, G, T or none.

        Raises:
            UsageError: when the text has another form.
        """
        match = re.fullmatch(r"(size|bops)=(\d+(?:\.\d+)?) ?(%|[A-Za-z]*)", text)
        if match is None or (match[3] != "%" and match[3] not in _UNITS[match[1]]):
            raise UsageError(f"budget={text!r} is not understood: write it like {_EXAMPLES}")
        quantity: Literal["size", "bops"] = "size" if match[1] == "size" else "bops"
        if match[3] == "%":
            return cls(quantity, Fraction(match[2]) / 100, relative=True)
        return cls(quantity, Fraction(match[2]) * _UNITS[quantity][match[3]], relative=False)

    def limit(self, float_cost: int) -> int:
        """The bound in whole bytes or bit operations, for a network that costs ``float_cost`` in float."""
        return int(self.amount * float_cost if self.relative else self.amount)

    def check(self, smallest: int, float_cost: int) -> None:
        """Refuse a budget that is out of reach.

        Args:
            smallest: what the network costs with the fewest bits everywhere.
            float_cost: what it costs in float.

        Raises:
            UsageError: when ``smallest`` is above the budget; it says so.
        """
        if smallest > self.limit(float_cost):
            raise UsageError(
                f"budget={str(self)!r} cannot be reached with these bits: the smallest is {self.quantity}="
                f"{self.describe(smallest)} ({smallest / float_cost:.2%} of the float network)"
            )

    def describe(self, cost: int) -> str:
        """``cost`` with its unit, rounded up to a thousandth of it, so that it is enough as a budget."""
        decimal = {unit: factor for unit, factor in _UNITS[self.quantity].items() if "i" not in unit}
        unit, factor = max((x for x in decimal.items() if x[1] <= max(cost, 1)), key=lambda x: x[1])
        thousandths = -(-cost * 1000 // factor)
        return (
            f"{thousandths / 1000:g}{unit}"
            if thousandths < 10**6
            else f"{cost}{'B' if self.quantity == 'size' else ''}"
        )

    def __str__(self) -> str:
        if self.relative:
            return f"{self.quantity}={float(self.amount * 100):g}%"
        return f"{self.quantity}={self.describe(int(self.amount))}"
