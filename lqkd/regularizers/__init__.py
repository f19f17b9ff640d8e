"""The learnable regularizer: modulators, guards that keep them alive, and players. Pure torch."""

from __future__ import annotations

from lqkd.regularizers.base import Regularizer
from lqkd.regularizers.convolutional import ConvModulator
from lqkd.regularizers.elementwise import ElementwiseMLP
from lqkd.regularizers.explained import ExplainedVariance
from lqkd.regularizers.guards import GUARDS, Barrier, BoundedBarrier, BoundedRange, Entropy, Guard, MeanOne, NoGuard
from lqkd.regularizers.interpolation import HeldOutInterpolation
from lqkd.regularizers.meta_weight import MetaWeightNet
from lqkd.regularizers.players import PLAYERS, Adversarial, Cooperative, HeldOut, LookAhead, Player, alignment
from lqkd.regularizers.sample import SampleWeight
from lqkd.regularizers.table import LearnableTable
from lqkd.utils.renames import moved_from

__all__ = [
    "GUARDS",
    "PLAYERS",
    "Adversarial",
    "Barrier",
    "BoundedBarrier",
    "BoundedRange",
    "ConvModulator",
    "Cooperative",
    "ElementwiseMLP",
    "Entropy",
    "ExplainedVariance",
    "Guard",
    "HeldOut",
    "HeldOutInterpolation",
    "LearnableTable",
    "LookAhead",
    "MeanOne",
    "MetaWeightNet",
    "NoGuard",
    "Player",
    "Regularizer",
    "SampleWeight",
    "alignment",
]

__getattr__ = moved_from(__name__)
