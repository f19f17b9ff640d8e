"""Distillation losses. Pure torch."""

from __future__ import annotations

from lqkd.losses.base import DistillationLoss
from lqkd.losses.logits import HintonKL, LogitResidual

__all__ = ["DistillationLoss", "HintonKL", "LogitResidual"]
