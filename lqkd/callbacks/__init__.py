"""Callbacks: what watches a training and what it leaves on disk."""

from __future__ import annotations

from lqkd.callbacks.batchnorm import BatchNormReestimation
from lqkd.callbacks.bit_width import BitWidthScheduler, Stage
from lqkd.callbacks.checkpoint import BestAndLast
from lqkd.callbacks.checkpoint_io import AtomicCheckpointIO
from lqkd.callbacks.oscillation import OscillationMonitor
from lqkd.callbacks.progress import ProgressBar
from lqkd.callbacks.regularizer_monitor import RegularizerMonitor
from lqkd.callbacks.run_logger import RunLogger, run_folder_of
from lqkd.callbacks.run_summary import RunSummary

__all__ = [
    "AtomicCheckpointIO",
    "BatchNormReestimation",
    "BestAndLast",
    "BitWidthScheduler",
    "OscillationMonitor",
    "ProgressBar",
    "RegularizerMonitor",
    "RunLogger",
    "RunSummary",
    "Stage",
    "run_folder_of",
]
