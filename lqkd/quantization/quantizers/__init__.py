"""Quantizers, one family a file, and the names under which a recipe finds them."""

from __future__ import annotations

from lqkd.quantization.quantizers.base import Quantizer
from lqkd.quantization.quantizers.lsq import LSQ, LSQEWGS
from lqkd.quantization.quantizers.lsq_plus import LSQPlus
from lqkd.quantization.quantizers.pact import PACT
from lqkd.quantization.quantizers.uniform import MinMax, Mse

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQ,
    "lsq_ewgs": LSQEWGS,
    "lsq_plus": LSQPlus,
    "minmax": MinMax,
    "mse": Mse,
    "pact": PACT,
}
"""Short names accepted in a recipe; a dotted path to any other :class:`Quantizer` subclass is accepted as well."""

__all__ = ["LSQ", "LSQEWGS", "PACT", "QUANTIZERS", "LSQPlus", "MinMax", "Mse", "Quantizer"]
