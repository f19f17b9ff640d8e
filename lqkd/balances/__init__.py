"""Balances: how much the task loss and the distillation loss count against each other."""

from __future__ import annotations

from lqkd.balances.average import DynamicWeightAverage
from lqkd.balances.base import Balance
from lqkd.balances.fixed import FixedBalance
from lqkd.balances.gradients import GradientBalance, LearnableRatioBalance, OutputGradientBalance
from lqkd.balances.gradnorm import GradNorm, OutputGradNorm
from lqkd.balances.random_weights import RandomBalance
from lqkd.balances.scheduled import ScheduledBalance
from lqkd.balances.uncertainty import BoundedUncertaintyBalance, ImpartialBalance, UncertaintyBalance

__all__ = [
    "Balance",
    "BoundedUncertaintyBalance",
    "DynamicWeightAverage",
    "FixedBalance",
    "GradNorm",
    "GradientBalance",
    "ImpartialBalance",
    "LearnableRatioBalance",
    "OutputGradNorm",
    "OutputGradientBalance",
    "RandomBalance",
    "ScheduledBalance",
    "UncertaintyBalance",
]
