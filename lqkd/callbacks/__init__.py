"""Callbacks: what watches a training and what it leaves on disk."""

from __future__ import annotations

from lqkd.callbacks.batchnorm import BatchNormReestimation
from lqkd.callbacks.bit_width import BitWidthScheduler, Stage
from lqkd.callbacks.checkpoint import BestAndLast
from lqkd.callbacks.checkpoint_io import AtomicCheckpointIO
from lqkd.callbacks.integer_biases import IntegerBiases
from lqkd.callbacks.oscillation_dampening import OscillationDampening
from lqkd.callbacks.oscillation_freezing import OscillationFreezing
from lqkd.callbacks.oscillation_monitor import OscillationMonitor
from lqkd.callbacks.progress import ProgressBar
from lqkd.callbacks.regularizer_monitor import RegularizerMonitor
from lqkd.callbacks.run_logger import RunLogger, run_folder_of
from lqkd.callbacks.run_summary import RunSummary
from lqkd.callbacks.weight_ema import WeightEMA

__all__ = [
    "AtomicCheckpointIO",
    "BatchNormReestimation",
    "BestAndLast",
    "BitWidthScheduler",
    "IntegerBiases",
    "OscillationDampening",
    "OscillationFreezing",
    "OscillationMonitor",
    "ProgressBar",
    "RegularizerMonitor",
    "RunLogger",
    "RunSummary",
    "Stage",
    "WeightEMA",
    "run_folder_of",
]
