"""How far teachers can be believed, learned from labels of rows that no training step sees. Pure torch."""

from __future__ import annotations

from lqkd.losses.trust.believed import Believed
from lqkd.losses.trust.fitted import FittedInterpolation
from lqkd.losses.trust.interpolation import Interpolation
from lqkd.losses.trust.map import TrustMap
from lqkd.losses.trust.memorised import (
    Answers,
    left_out_sentence,
    memorised,
    memorised_sentence,
    seldom_wrong,
    seldom_wrong_sentence,
)
from lqkd.losses.trust.reliability import Reliability
from lqkd.losses.trust.report import TrustReport

__all__ = [
    "Answers",
    "Believed",
    "FittedInterpolation",
    "Interpolation",
    "Reliability",
    "TrustMap",
    "TrustReport",
    "left_out_sentence",
    "memorised",
    "memorised_sentence",
    "seldom_wrong",
    "seldom_wrong_sentence",
]
