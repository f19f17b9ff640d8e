"""Weights that flip between two levels: watched, held in their bins, frozen (Nagel et al., arXiv 2203.11086)."""

from __future__ import annotations

from lqkd.callbacks.oscillation.dampening import OscillationDampening
from lqkd.callbacks.oscillation.freezing import OscillationFreezing
from lqkd.callbacks.oscillation.monitor import OscillationMonitor

__all__ = ["OscillationDampening", "OscillationFreezing", "OscillationMonitor"]
