"""The two files of an ncnn network, written and read: layers and blobs as text, and weights one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_MAGIC = "7767517"
_INT8 = np.uint32(0x000D4B38).tobytes()
"""What stands before weights that are int8."""
_FLOAT = np.uint32(0).tobytes()
"""What stands before weights that are float32."""
PRODUCTS = ("Convolution", "ConvolutionDepthWise", "InnerProduct")
"""Layers with weights."""
_SIZES = {"Convolution": ("5", "6"), "ConvolutionDepthWise": ("5", "6"), "InnerProduct": ("1", "2")}
"""Parameters that say whether there is a bias, and how many weights there are."""


@dataclass(frozen=True)
class Layer:
    """A layer of an ncnn network.

    Attributes:
        kind: ncnn's name of it.
        name: its own.
        inputs, outputs: names of blobs.
        parameters: by their number, as text.
        weight: of a product: int8, or float32; flat in a file that was read.
        bias: float32, where there is one.
        scales: of int8 weights, float32: what they were multiplied by to become whole numbers, one an output channel,
            and what the input is multiplied by.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: dict[str, str]
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    scales: tuple[np.ndarray, np.ndarray] | None = None


def number(value: float) -> str:
    """As ncnn reads it back to the last bit: it takes 15 characters, and nine digits are enough for a float32."""
    return f"{value:.8e}"


def written(layers: Sequence[Layer]) -> tuple[str, bytes]:
    """The two files. A blob that several layers read, which ncnn does not have, becomes as many of them by a Split."""
    split = list(_split(layers))
    blobs = sum(len(layer.outputs) for layer in split)
    lines = [_MAGIC, f"{len(split)} {blobs}", *(_line(layer) for layer in split)]
    return "\n".join(lines) + "\n", b"".join(_bytes(layer) for layer in split)


def _split(layers: Sequence[Layer]) -> Iterator[Layer]:
    readers = Counter(name for layer in layers for name in layer.inputs)
    taken: Counter[str] = Counter()

    def own(name: str) -> str:
        if readers[name] < 2:
            return name
        taken[name] += 1
        return f"{name}.{taken[name]}"

    for layer in layers:
        yield replace(layer, inputs=tuple(own(name) for name in layer.inputs))
        for name in layer.outputs:
            if readers[name] > 1:
                copies = tuple(f"{name}.{index + 1}" for index in range(readers[name]))
                yield Layer("Split", f"{name}.split", (name,), copies, {})


def _line(layer: Layer) -> str:
    given = [f"{key}={value}" for key, value in layer.parameters.items()]
    counts = [str(len(layer.inputs)), str(len(layer.outputs))]
    return " ".join([layer.kind, layer.name, *counts, *layer.inputs, *layer.outputs, *given])


def _bytes(layer: Layer) -> bytes:
    if layer.weight is None:
        return b""
    tag = _INT8 if layer.weight.dtype == np.int8 else _FLOAT
    content = layer.weight.tobytes()
    parts = [tag, content, b"\0" * (-len(content) % 4)]
    for array in (layer.bias, *(layer.scales or ())):
        parts.append(b"" if array is None else array.astype(np.float32).tobytes())
    return b"".join(parts)


def read(text: str, content: bytes) -> list[Layer]:
    """The layers of two files that :func:`written` made.

    Args:
        text: of ``.param``.
        content: of ``.bin``.

    Raises:
        ValueError: when they are not, or do not belong together.
    """
    magic, _, *lines = text.splitlines()
    if magic != _MAGIC:
        raise ValueError(f"an ncnn file begins with {_MAGIC}, not {magic!r}")
    layers, place = [], 0

    def take(count: int, dtype: Any) -> np.ndarray:
        nonlocal place
        array = np.frombuffer(content, dtype, count, place)
        place += -(-array.nbytes // 4) * 4
        return array

    for line in lines:
        kind, name, taken, returned, *rest = line.split()
        first, last = int(taken), int(taken) + int(returned)
        parameters = dict(entry.split("=", 1) for entry in rest[last:])
        layer = Layer(kind, name, tuple(rest[:first]), tuple(rest[first:last]), parameters)
        if kind in PRODUCTS:
            has_bias, size = (int(parameters.get(key, "0")) for key in _SIZES[kind])
            outputs = int(parameters["0"])
            integer = take(1, np.uint32).tobytes() == _INT8
            weight = take(size, np.int8 if integer else np.float32)
            bias = take(outputs, np.float32) if has_bias else None
            scales = (take(outputs, np.float32), take(1, np.float32)) if integer else None
            layer = replace(layer, weight=weight, bias=bias, scales=scales)
        layers.append(layer)
    if place != len(content):
        raise ValueError(f"{len(content)} bytes of weights are not the {place} that the layers have")
    return layers
