"""Balances: how much the task loss and the distillation loss count against each other."""

from __future__ import annotations

from lqkd.regularizers.balances.average import DynamicWeightAverage
from lqkd.regularizers.balances.base import Balance
from lqkd.regularizers.balances.fixed import FixedBalance
from lqkd.regularizers.balances.gradients import GradientBalance, LearnableRatioBalance, OutputGradientBalance
from lqkd.regularizers.balances.gradnorm import GradNorm, OutputGradNorm
from lqkd.regularizers.balances.random_weights import RandomBalance
from lqkd.regularizers.balances.scheduled import ScheduledBalance
from lqkd.regularizers.balances.uncertainty import BoundedUncertaintyBalance, ImpartialBalance, UncertaintyBalance

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
