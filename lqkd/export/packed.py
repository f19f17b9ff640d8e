"""Weights in 4 or 2 bits each: small files, whose convolutions today's runtimes compute in floating point."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from lqkd.export.deploy import Deployed
from lqkd.export.emitter import Exported
from lqkd.export.integer import IntegerLayer
from lqkd.export.portable import QuantizeDequantize

LOADER_NOTE = (
    "ONNX Runtime refuses 2-bit weights beside quantized activations unless told not to fuse them: "
    'options.add_session_config_entry("session.disable_quant_qdq", "1")'
)
"""What a user of a packed2 file must know."""


class Packed4(QuantizeDequantize):
    """Weights of at most 4 bits as INT4, others as INT8."""

    integer = plain = False  # no runtime has such convolutions in integers
    types: tuple[tuple[int, type], ...] = ((4, ml_dtypes.int4),)

    def weight(self, layer: IntegerLayer, label: str) -> str:
        codes = layer.codes.to(torch.int16)
        for bits, dtype in self.types:
            fitted = fit(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if fitted is not None:
                packed, signs = fitted
                weight = self.real(packed.numpy().astype(np.int8).astype(dtype), layer.scale, f"{label}.weight")
                return weight if signs is None else self.signed(weight, signs, label)
        return super().weight(layer, label)

    def signed(self, weight: str, signs: Tensor, label: str) -> str:
        """``weight`` with the sign of some channels changed."""
        return self.add("Mul", [weight, self.constant(signs, f"{label}.signs", np.float32)], f"{label}.signed")


class Packed2(Packed4):
    """Weights of at most 2 bits as INT2, of 3 and 4 bits as INT4, others as INT8."""

    opset = 25
    ir_version = 13
    types = ((2, ml_dtypes.int2), (4, ml_dtypes.int4))


def fit(codes: Tensor, low: int, high: int) -> tuple[Tensor, Tensor | None] | None:
    """``codes`` within ``[low, high]``, and the signs (channels, 1, ...) of channels that had to be negated.

    A negative batch norm factor turns -8 into 8, which two's complement of 4 bits lacks.

    Returns:
        ``None`` when there is no way; the signs are ``None`` when none is needed.
    """
    flat = codes.flatten(1)
    negated = flat.amax(1) > high
    if negated.any():
        signs = torch.where(negated, -1, 1).view(-1, *[1] * (codes.ndim - 1))
        codes = codes * signs
    if codes.amin() < low or codes.amax() > high:
        return None
    return codes, signs if negated.any() else None


def build4(deployed: Deployed) -> Exported:
    """The model with INT4 weights, opset 21."""
    return Packed4(deployed).build()


def build2(deployed: Deployed) -> Exported:
    """The model with INT2 weights, opset 25; see :data:`LOADER_NOTE`."""
    return Packed2(deployed).build()
