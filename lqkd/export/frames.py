"""A file that takes a camera's frames as they are, bytes of pixels with channels last, and prepares them itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lqkd.errors import ParityError, UsageError
from lqkd.export import metadata
from lqkd.export.deploy import INPUT
from lqkd.export.large_files import check_model, copy_of
from lqkd.export.runtimes import Runner

FRAMES = "frames"
"""What such a file calls its input."""
COMPARED = 4
"""Frames on which it is compared with the file that takes prepared images."""


def takes_frames(model: onnx.ModelProto, preprocessing: Mapping[str, Any] | None) -> onnx.ModelProto:
    """The same network behind the preparation of frames, proven to give the same numbers.

    Args:
        model: of :func:`lqkd.export.to_onnx`, whose input is images (B, C, H, W) float32.
        preprocessing: what it says of them: ``mean`` and ``std`` by channel, of pixels divided by 255.

    Returns:
        A model whose input ``frames`` is (B, H, W, C) uint8, of the size that the network was trained for; cutting out
        and resizing stay outside.

    Raises:
        UsageError: when the network takes something else than images, or does not say how they are prepared, or the
            model is for one number of samples.
        ParityError: when a result differs in a single bit.

    Examples:
        >>> import torch
        >>> from lqkd import Recipe, quantize_model
        >>> from lqkd.export import to_onnx
        >>> from lqkd.quantization import initialize_quantizers
        >>> network, _ = quantize_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), Recipe())
        >>> images = torch.randn(4, 3, 8, 8)
        >>> initialize_quantizers(network, images)
        >>> model = to_onnx(network, images, calibration=[images])
        >>> model = takes_frames(model, {"mean": [0.5] * 3, "std": [0.2] * 3})
        >>> [size.dim_value or size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim]
        ['batch', 8, 8, 3]
    """
    told = preprocessing or {}
    entries = [entry for entry in model.graph.input if entry.name == INPUT]
    sizes = [size.dim_value for size in entries[0].type.tensor_type.shape.dim] if entries else []
    statistics = {key: list(told.get(key) or ()) for key in ("mean", "std")}
    if len(model.graph.input) != 1 or len(sizes) != 4 or any(len(v) != sizes[1] for v in statistics.values()):
        raise UsageError(
            "a file takes frames where its network takes images (B, C, H, W) and the data say how they are prepared, "
            f"mean and std by channel: here it takes {[entry.name for entry in model.graph.input]}, with {statistics}"
        )
    batch, channels, height, width = sizes
    if batch:
        raise UsageError(
            f"a file for {batch} samples at a time takes frames where these come first: "
            f"of_batch(takes_frames(model, preprocessing), {batch}) of a model for any number"
        )
    framed = copy_of(model)
    del framed.graph.input[:]
    shape = [entries[0].type.tensor_type.shape.dim[0].dim_param, height, width, channels]
    framed.graph.input.append(helper.make_tensor_value_info(FRAMES, TensorProto.UINT8, shape))
    constants = {"whole": np.float32(255)} | {
        key: np.array(value, np.float32).reshape(-1, 1, 1) for key, value in statistics.items()
    }
    framed.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), f"{FRAMES}.{key}") for key, value in constants.items()
    )
    prepared = [  # as lqkd.data.Preprocessing does it, operation by operation
        helper.make_node("Cast", [FRAMES], [f"{FRAMES}.float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", [f"{FRAMES}.float"], [f"{FRAMES}.planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", [f"{FRAMES}.planes", f"{FRAMES}.whole"], [f"{FRAMES}.unit"]),
        helper.make_node("Sub", [f"{FRAMES}.unit", f"{FRAMES}.mean"], [f"{FRAMES}.centred"]),
        helper.make_node("Div", [f"{FRAMES}.centred", f"{FRAMES}.std"], [INPUT]),
    ]
    nodes = [*prepared, *framed.graph.node]
    del framed.graph.node[:]
    framed.graph.node.extend(nodes)
    check_model(framed)
    described = metadata.read(model)
    if described:
        metadata.write(framed, described | {"inputs": {FRAMES: shape[1:]}})
    _compare(model, framed, shape[1:], constants)
    return framed


def _compare(model: onnx.ModelProto, framed: onnx.ModelProto, shape: list[int], constants: Mapping[str, Any]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (COMPARED, *shape), np.uint8)
    unit = frames.transpose(0, 3, 1, 2).astype(np.float32) / constants["whole"]
    expected = Runner(model, optimised=True)((unit - constants["mean"]) / constants["std"])
    found = Runner(framed, optimised=True)(frames)
    for name, values in expected.items():
        if not np.array_equal(values, found[name], equal_nan=True):
            raise ParityError(f"of frames the file gives other {name} than of the images that they become")
