"""Quantizers, one family a file, and the names under which a recipe finds them."""

from __future__ import annotations

from lqkd.quantization.quantizers.base import Quantizer
from lqkd.quantization.quantizers.lsq import LSQ

QUANTIZERS: dict[str, type[Quantizer]] = {"lsq": LSQ}
"""Short names accepted in a recipe; a dotted path to any other :class:`Quantizer` subclass is accepted as well."""

__all__ = ["LSQ", "QUANTIZERS", "Quantizer"]
