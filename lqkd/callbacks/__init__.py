"""Callbacks: what watches a training and what it leaves on disk."""

from __future__ import annotations

from lqkd.callbacks.batchnorm import BatchNormReestimation
from lqkd.callbacks.bit_width import BitWidthScheduler, Stage
from lqkd.callbacks.integer_biases import IntegerBiases
from lqkd.callbacks.oscillation import OscillationDampening, OscillationFreezing, OscillationMonitor
from lqkd.callbacks.progress import ProgressBar
from lqkd.callbacks.regularizer import RegularizerMonitor
from lqkd.callbacks.weight_ema import WeightEMA
from lqkd.utils.renames import moved_from

__all__ = [
    "BatchNormReestimation",
    "BitWidthScheduler",
    "IntegerBiases",
    "OscillationDampening",
    "OscillationFreezing",
    "OscillationMonitor",
    "ProgressBar",
    "RegularizerMonitor",
    "Stage",
    "WeightEMA",
]

__getattr__ = moved_from(__name__)
