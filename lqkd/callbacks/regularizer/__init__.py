"""What a regularizer does during a training: its weights measured, tabled, drawn and judged."""

from __future__ import annotations

from lqkd.callbacks.regularizer.monitor import RegularizerMonitor

__all__ = ["RegularizerMonitor"]
