"""The learnable regularizer: modulators, guards that keep them alive, players, and balances. Pure torch."""

from __future__ import annotations

from lqkd.balances import (
    Balance,
    BoundedUncertaintyBalance,
    DynamicWeightAverage,
    FixedBalance,
    GradientBalance,
    GradNorm,
    ImpartialBalance,
    LearnableRatioBalance,
    OutputGradientBalance,
    OutputGradNorm,
    RandomBalance,
    ScheduledBalance,
    UncertaintyBalance,
)
from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.convolutional import ConvModulator
from lqkd.regularizers.elementwise import ElementwiseMLP
from lqkd.regularizers.guards import GUARDS, Barrier, BoundedBarrier, BoundedRange, Entropy, Guard, MeanOne, NoGuard
from lqkd.regularizers.players import PLAYERS, Adversarial, Cooperative, LookAhead, Player, alignment
from lqkd.regularizers.sample import SampleWeight
from lqkd.regularizers.table import LearnableTable

__all__ = [
    "GUARDS",
    "PLAYERS",
    "Adversarial",
    "Balance",
    "Barrier",
    "BoundedBarrier",
    "BoundedRange",
    "BoundedUncertaintyBalance",
    "ConvModulator",
    "Cooperative",
    "DynamicWeightAverage",
    "ElementwiseMLP",
    "Entropy",
    "FixedBalance",
    "GradNorm",
    "GradientBalance",
    "Guard",
    "ImpartialBalance",
    "LearnableRatioBalance",
    "LearnableTable",
    "LookAhead",
    "MeanOne",
    "NoGuard",
    "OutputGradNorm",
    "OutputGradientBalance",
    "Player",
    "RandomBalance",
    "Regularizer",
    "SampleWeight",
    "ScheduledBalance",
    "UncertaintyBalance",
    "alignment",
]
