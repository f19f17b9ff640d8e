"""LightningModules: distillation of a quantised student, and full-precision training."""

from __future__ import annotations

from lqkd.modules.classifier import ClassifierModule
from lqkd.modules.distill import DistillModule
from lqkd.modules.schedules import Constant, Cosine, Schedule, TorchSchedule
from lqkd.modules.terms import Tap, Term

__all__ = ["ClassifierModule", "Constant", "Cosine", "DistillModule", "Schedule", "Tap", "Term", "TorchSchedule"]
