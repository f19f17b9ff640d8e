"""Quantizers, quantised layers and the recipes that place them. Pure torch."""

from __future__ import annotations

from lqkd.quantization.analysis.budget import Budget
from lqkd.quantization.analysis.mixed_precision import MixedPrecision, allocate, assign_bits
from lqkd.quantization.analysis.sensitivity import Candidate, SensitivityReport, measure_sensitivity
from lqkd.quantization.batchnorm import Folding, fold_batchnorm, reestimate_batchnorm
from lqkd.quantization.calibrate import float_mode, initialize_quantizers, quantizers
from lqkd.quantization.convert import quantize_model
from lqkd.quantization.cost import LayerCost, Size, bit_operations, layer_costs, operation_shares, size
from lqkd.quantization.covered import CoverageReport, LayerCoverage, coverage
from lqkd.quantization.gptq import gptq, gptq_weight
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
from lqkd.quantization.quantizers import LSQ, QUANTIZERS, Quantizer
from lqkd.quantization.recipe import Recipe, Rule
from lqkd.quantization.rotation import rotate
from lqkd.quantization.survey import Operation

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "Budget",
    "Candidate",
    "CoverageReport",
    "Folding",
    "LayerCost",
    "LayerCoverage",
    "MixedPrecision",
    "Operation",
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
    "SensitivityReport",
    "Size",
    "allocate",
    "assign_bits",
    "bit_operations",
    "coverage",
    "float_mode",
    "fold_batchnorm",
    "gptq",
    "gptq_weight",
    "initialize_quantizers",
    "layer_costs",
    "measure_sensitivity",
    "operation_shares",
    "quantize_model",
    "quantizers",
    "reestimate_batchnorm",
    "rotate",
    "size",
]
