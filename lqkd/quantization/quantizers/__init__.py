"""Quantizers, one family a file, and the names under which a recipe finds them."""

from __future__ import annotations

from lqkd.quantization.quantizers.apot import APoT
from lqkd.quantization.quantizers.base import Quantizer
from lqkd.quantization.quantizers.binary import IRNet, ReAct
from lqkd.quantization.quantizers.blocks import Q4_0, Q8_0, TQ2_0
from lqkd.quantization.quantizers.dorefa import DoReFa
from lqkd.quantization.quantizers.dynamic import Dynamic
from lqkd.quantization.quantizers.levelwise import LevelwiseStep
from lqkd.quantization.quantizers.lsq import LSQ, LSQEWGS, LSQPowerOfTwo
from lqkd.quantization.quantizers.lsq_plus import LSQPlus
from lqkd.quantization.quantizers.n2uq import N2UQ
from lqkd.quantization.quantizers.pact import PACT
from lqkd.quantization.quantizers.seq import SEQ
from lqkd.quantization.quantizers.ternary import TTQ, TWN, AbsMean
from lqkd.quantization.quantizers.uniform import MinMax, Mse, UniformQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "absmean": AbsMean,
    "apot": APoT,
    "dorefa": DoReFa,
    "dynamic": Dynamic,
    "irnet": IRNet,
    "lsq": LSQ,
    "lsq_ewgs": LSQEWGS,
    "lsq_plus": LSQPlus,
    "lsq_power_of_two": LSQPowerOfTwo,
    "minmax": MinMax,
    "mse": Mse,
    "n2uq": N2UQ,
    "pact": PACT,
    "q4_0": Q4_0,
    "q8_0": Q8_0,
    "react": ReAct,
    "seq": SEQ,
    "tq2_0": TQ2_0,
    "ttq": TTQ,
    "twn": TWN,
}
"""Short names accepted in a recipe; a dotted path to any other :class:`Quantizer` subclass is accepted as well."""

__all__ = [
    "LSQ",
    "LSQEWGS",
    "N2UQ",
    "PACT",
    "Q4_0",
    "Q8_0",
    "QUANTIZERS",
    "SEQ",
    "TQ2_0",
    "TTQ",
    "TWN",
    "APoT",
    "AbsMean",
    "DoReFa",
    "Dynamic",
    "IRNet",
    "LSQPlus",
    "LSQPowerOfTwo",
    "LevelwiseStep",
    "MinMax",
    "Mse",
    "Quantizer",
    "ReAct",
    "UniformQuantizer",
]
