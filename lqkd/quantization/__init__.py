"""Quantizers, quantised layers and the recipes that place them. Pure torch."""

from __future__ import annotations

from lqkd.quantization.calibrate import float_mode, initialize_quantizers, quantizers
from lqkd.quantization.convert import CoverageReport, LayerCoverage, coverage, quantize_model
from lqkd.quantization.cost import Size, bit_operations, size
from lqkd.quantization.layers import QuantConv2d, QuantizedLayer, QuantLinear
from lqkd.quantization.quantizers import LSQ, QUANTIZERS, Quantizer
from lqkd.quantization.recipe import Recipe, Rule

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "CoverageReport",
    "LayerCoverage",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "Quantizer",
    "Recipe",
    "Rule",
    "Size",
    "bit_operations",
    "coverage",
    "float_mode",
    "initialize_quantizers",
    "quantize_model",
    "quantizers",
    "size",
]
