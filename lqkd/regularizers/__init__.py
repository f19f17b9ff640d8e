"""The learnable regularizer: modulators, the guards that keep them alive, and balances. Pure torch."""

from __future__ import annotations

from lqkd.regularizers.balances import Balance, BoundedUncertaintyBalance, FixedBalance
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.elementwise import ElementwiseMLP
from lqkd.regularizers.guards import GUARDS, Barrier, Guard, NoGuard

__all__ = [
    "GUARDS",
    "Balance",
    "Barrier",
    "BoundedUncertaintyBalance",
    "ElementwiseMLP",
    "FixedBalance",
    "Guard",
    "NoGuard",
    "Regularizer",
]
