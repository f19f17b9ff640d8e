"""What moves codes in a TFLite file, or takes the largest of them, and leaves them on their grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from lqkd.export.litert_tensors import TensorWriter
from lqkd.export.litert_values import (
    BYTE,
    CHANNELS_LAST,
    IMAGE,
    Codes,
    Pending,
)
from lqkd.export.nodes import Operation, shape_of


class MoveWriter(TensorWriter):
    """The part of a writer for :data:`lqkd.quantization.placement.MOVES`."""

    def _moved(self, node: fx.Node, found: Operation) -> Codes | Pending:
        value = self.values[found.inputs[0]]
        move = getattr(self, f"_moved_by_{found.kind}")
        if isinstance(value, Codes):
            return replace(value, tensor=move(node, found, value.tensor))
        return self.quantized(node, move(node, found, self.real(found.inputs[0])))

    _maxpool = _reshape = _transpose = _slice = _pad = _nearest = _moved

    def _moved_by_maxpool(self, node: fx.Node, found: Operation, x: int) -> int:
        settings, value = found.settings, self.values[found.inputs[0]]
        if tuple(settings["dilation"]) != (1, 1) or not isinstance(value, Codes):
            self.refuse(node, "max pooling with dilation, or of what is on no grid")
        kernel, stride = settings["kernel"], settings["stride"]
        x, padding = self._padded(node, x, kernel, stride, settings["padding"], (1, 1), -BYTE)
        return self._pool("MAX_POOL_2D", node, x, kernel, stride, padding)

    def _moved_by_pad(self, node: fx.Node, found: Operation, x: int) -> int:
        pads = found.settings["pads"]
        rank = len(pads) // 2
        order = CHANNELS_LAST if rank == IMAGE else tuple(range(rank))
        before, after = ([side[axis] for axis in order] for side in (pads[:rank], pads[rank:]))
        return self._beside(x, before, after, self.label(node))

    def _moved_by_nearest(self, node: fx.Node, found: Operation, x: int) -> int:
        made = self.like(x, self.label(node), self._shape_of_result(node))
        size = self.integers(f"{self.label(node)}.size", shape_of(node)[2:])
        version = 1 if self.file.tensors[x].quantization is None else 2
        return self.file.operator("RESIZE_NEAREST_NEIGHBOR", [x, size], made, "ResizeNearestNeighborOptions", version)

    def _moved_by_transpose(self, node: fx.Node, found: Operation, x: int) -> int:
        order = found.settings["order"]
        if order[0] != 0:
            self.refuse(node, "samples on another axis than the first")
        own = CHANNELS_LAST if len(order) == IMAGE else tuple(range(len(order)))
        return self._permuted(x, [own.index(order[axis]) for axis in own], self.label(node))

    def _permuted(self, x: int, order: Sequence[int], name: str) -> int:
        """The tensor with its axes in another order."""
        shape = self.shape_in_file(x)
        made = self.like(x, name, [shape[axis] for axis in order])
        axes = self.integers(f"{name}.order", order)
        version = 1 if self.file.tensors[x].quantization is None else 2
        return self.file.operator("TRANSPOSE", [x, axes], made, "TransposeOptions", version)

    def _moved_by_reshape(self, node: fx.Node, found: Operation, x: int) -> int:
        return self._reshaped(x, self.shape(found.inputs[0]), self.shape(node), self.label(node))

    def _reshaped(self, x: int, before: list[int], after: list[int], name: str) -> int:
        """The tensor in another shape, in PyTorch's order of values; the shapes are PyTorch's."""
        if before == after:
            return x
        if len(before) == IMAGE and before[2:] != [1, 1]:
            x = self._permuted(x, np.argsort(CHANNELS_LAST).tolist(), f"{name}.channels_first")
        image = len(after) == IMAGE
        last = [after[axis] for axis in CHANNELS_LAST] if image and after[2:] == [1, 1] else after
        made = self.like(x, name, last)
        shape = self.integers(f"{name}.shape", last)
        self.file.operator("RESHAPE", [x, shape], made, "ReshapeOptions", newShape=last)
        if image and after[2:] != [1, 1]:
            return self._permuted(made, CHANNELS_LAST, f"{name}.channels_last")
        return made

    def _moved_by_slice(self, node: fx.Node, found: Operation, x: int) -> int:
        whole = self.shape(found.inputs[0])
        part = list(whole)
        for axis, start, end, step in found.settings["slices"]:
            part[axis] = len(range(start, end, step))
        x = self._sliced(x, whole, found.settings["slices"], part, self.label(node))
        return self._reshaped(x, part, self.shape(node), self.label(node)) if found.settings["dropped"] else x

    def _sliced(self, x: int, whole: list[int], slices: Any, part: list[int], name: str) -> int:
        """The part of a tensor; shapes and axes are PyTorch's."""
        rank = len(whole)
        order = CHANNELS_LAST if rank == IMAGE else tuple(range(rank))
        begin, end, stride = [0] * rank, list(whole), [1] * rank
        for axis, start, stop, step in slices:
            begin[axis], end[axis], stride[axis] = start, stop, step
        made = self.like(x, name, [part[axis] for axis in order])
        told = [
            self.integers(f"{name}.{kind}", [values[axis] for axis in order])
            for kind, values in (("begin", begin), ("end", end), ("step", stride))
        ]
        return self.file.operator("STRIDED_SLICE", [x, *told], made, "StridedSliceOptions", 2)

    def _chunks(self, node: fx.Node, found: Operation) -> tuple[Codes, ...]:
        axis, source = found.settings["axis"], found.inputs[0]
        value, whole = self.values[source], self.shape(source)
        if not isinstance(value, Codes):
            self.refuse(node, "parts of what is on no grid")
        axis %= len(whole)
        kept = [self.of_one(meta.shape) for meta in node.meta["tensor_meta"]]
        sizes = [shape[axis] for shape in kept] if found.kind == "chunks" else [1] * len(kept)
        parts, start = [], 0
        for index, (size, shape) in enumerate(zip(sizes, kept, strict=True)):
            part, name = [*whole[:axis], size, *whole[axis + 1 :]], f"{self.label(node)}.{index}"
            tensor = self._sliced(value.tensor, whole, [(axis, start, start + size, 1)], part, name)
            parts.append(replace(value, tensor=self._reshaped(tensor, part, shape, name)))
            start += size
        return tuple(parts)

    _unbound = _chunks

    def _part(self, node: fx.Node, found: Operation) -> Codes:
        part: Codes = self.values[found.inputs[0]][found.settings["index"]]
        return part
