"""Callbacks: what watches a training and what it leaves on disk."""

from __future__ import annotations

from lqkd.callbacks.batchnorm import BatchNormReestimation
from lqkd.callbacks.bit_width import BitWidthScheduler, Stage
from lqkd.runs.checkpoint import BestAndLast
from lqkd.runs.checkpoint_io import AtomicCheckpointIO
from lqkd.callbacks.integer_biases import IntegerBiases
from lqkd.callbacks.oscillation.dampening import OscillationDampening
from lqkd.callbacks.oscillation.freezing import OscillationFreezing
from lqkd.callbacks.oscillation.monitor import OscillationMonitor
from lqkd.callbacks.progress import ProgressBar
from lqkd.callbacks.regularizer.monitor import RegularizerMonitor
from lqkd.runs.logger import RunLogger, run_folder_of
from lqkd.runs.summary import RunSummary
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
