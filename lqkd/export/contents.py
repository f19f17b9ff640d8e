"""Whether the integers of a file are those of the network, number by number."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from lqkd.export.deploy import Deployed
from lqkd.export.integer import IntegerLayer


def altered_integers(model: onnx.ModelProto, deployed: Deployed) -> str | None:
    """The first layer of whose weight or bias the file has other codes, scales or zero points; None where it has none.

    Few images may never tell: the codes behind a layer are rounded.

    Args:
        model: with 8-bit weight codes, as portable files have them; biases may be real numbers.
        deployed: the network that it was made of.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    read = {node.name: node.input for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for place, layer in deployed.network.named_modules():
        if not isinstance(layer, IntegerLayer):
            continue
        codes = (layer.codes.to(torch.int16) * layer.multiplier).to(torch.int8)
        scale = layer.scale / layer.multiplier
        bias, integers = layer.float_bias(), {"weight": (codes, scale), "bias": (layer.bias_codes, layer.bias_scale)}
        if bias is not None and f"{place}.bias" in held:
            del integers["bias"]
            if not _same(held[f"{place}.bias"], bias):
                return f"{place}.bias"
        for node, wanted in integers.items():
            names = read.get(f"{place}.{node}", ())
            for kind, name, value in zip(("codes", "scale"), names or ("", ""), wanted, strict=False):
                if value is not None and (name not in held or not _same(held[name], value)):
                    return f"{place}.{node}_{kind}"
            if any(np.any(numpy_helper.to_array(held[name])) for name in names[2:] if name in held):
                return f"{place}.{node}_zero_point"
    return None


def _same(tensor: onnx.TensorProto, value: Tensor) -> bool:
    """Whether a tensor of the file is ``value``, and zero in channels that the network does not have."""
    array = numpy_helper.to_array(tensor)
    if array.ndim == 0:  # one number for all channels
        array = np.full(value.shape, array)
    if array.ndim != value.ndim:
        return False
    own = array[tuple(slice(size) for size in value.shape)]
    same = own.shape == tuple(value.shape) and own.tobytes() == value.contiguous().numpy().tobytes()
    more = array.dtype != np.float32 and np.count_nonzero(array) != np.count_nonzero(own)
    return same and not more
