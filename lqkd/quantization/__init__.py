"""Quantizers, quantised layers and the recipes that place them. Pure torch."""

from __future__ import annotations

from lqkd.quantization.batchnorm import Folding, fold_batchnorm, reestimate_batchnorm
from lqkd.quantization.calibrate import float_mode, initialize_quantizers, quantizers
from lqkd.quantization.convert import CoverageReport, LayerCoverage, coverage, quantize_model
from lqkd.quantization.cost import Size, bit_operations, size
from lqkd.quantization.graph import Operation
from lqkd.quantization.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantizedLayer,
    QuantLinear,
    QuantMultiheadAttention,
)
from lqkd.quantization.oscillation import OscillationCounter
from lqkd.quantization.quantizers import LSQ, QUANTIZERS, Quantizer
from lqkd.quantization.recipe import Recipe, Rule

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "CoverageReport",
    "Folding",
    "LayerCoverage",
    "Operation",
    "OscillationCounter",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantizedLayer",
    "Quantizer",
    "Recipe",
    "Rule",
    "Size",
    "bit_operations",
    "coverage",
    "float_mode",
    "fold_batchnorm",
    "initialize_quantizers",
    "quantize_model",
    "quantizers",
    "reestimate_batchnorm",
    "size",
]
