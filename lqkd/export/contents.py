"""Whether the integers of a file are those of the network, number by number."""

from __future__ import annotations

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from lqkd.export.deploy import Deployed
from lqkd.export.integer import IntegerLayer


def altered_integers(model: onnx.ModelProto, deployed: Deployed) -> str | None:
    """The first layer whose weight codes or bias the file has otherwise; None where it has all as they are.

    Few images may never tell: the codes behind a layer are rounded.

    Args:
        model: with 8-bit weight codes, as portable files have them.
        deployed: the network that it was made of.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for place, layer in deployed.network.named_modules():
        if not isinstance(layer, IntegerLayer):
            continue
        codes = (layer.codes.to(torch.int16) * layer.multiplier).to(torch.int8)
        scale = layer.scale / layer.multiplier
        for name, value in (("weight_codes", codes), ("weight_scale", scale), ("bias_codes", layer.bias_codes)):
            tensor = held.get(f"{place}.{name}")
            if value is not None and tensor is not None and not _same(tensor, value):
                return f"{place}.{name}"
    return None


def _same(tensor: onnx.TensorProto, value: Tensor) -> bool:
    return numpy_helper.to_array(tensor).tobytes() == value.contiguous().numpy().tobytes()
