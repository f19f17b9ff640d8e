"""Distillation losses. Pure torch."""

from __future__ import annotations

from lqkd.losses.attention import AttentionTransfer
from lqkd.losses.base import DistillationLoss
from lqkd.losses.channels import CWD
from lqkd.losses.contrastive import ContrastiveRepresentation
from lqkd.losses.correlation import CorrelationCongruence
from lqkd.losses.cosine import CosineDistance
from lqkd.losses.cross_head import CrossKD
from lqkd.losses.curriculum import CurriculumTemperature
from lqkd.losses.dist import DIST
from lqkd.losses.dkd import DKD
from lqkd.losses.foreground import ForegroundWeighted
from lqkd.losses.hints import Hints
from lqkd.losses.logits import BinaryKL, HintonKL, LogitResidual, SoftCrossEntropy
from lqkd.losses.mgd import MGD
from lqkd.losses.pearson import PKD
from lqkd.losses.quantized_features import QuantizedFeatures
from lqkd.losses.relational import RKD
from lqkd.losses.relations import AttentionRelations
from lqkd.losses.review import ReviewKD
from lqkd.losses.similarity import SimilarityPreserving
from lqkd.losses.standardized import Standardized
from lqkd.losses.stitched import StitchedKL
from lqkd.losses.token_rows import CAKLD, ForwardKL, JensenShannon, ReverseKL
from lqkd.losses.vid import VID

__all__ = [
    "CAKLD",
    "CWD",
    "DIST",
    "DKD",
    "MGD",
    "PKD",
    "RKD",
    "VID",
    "AttentionRelations",
    "AttentionTransfer",
    "BinaryKL",
    "ContrastiveRepresentation",
    "CorrelationCongruence",
    "CosineDistance",
    "CrossKD",
    "CurriculumTemperature",
    "DistillationLoss",
    "ForegroundWeighted",
    "ForwardKL",
    "HintonKL",
    "Hints",
    "JensenShannon",
    "LogitResidual",
    "QuantizedFeatures",
    "ReverseKL",
    "ReviewKD",
    "SimilarityPreserving",
    "SoftCrossEntropy",
    "Standardized",
    "StitchedKL",
]
