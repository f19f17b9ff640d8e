"""Teacher answers as records of bytes and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.taps import Seen
from lqkd.teachers.cache.records import Records
from lqkd.utils.counter_rng import STREAM_ORDER, uniform

TeacherOutputs = Mapping[str, Seen]
"""What is seen of every teacher, by its name."""

OUTPUT = "output"
"""What the output of a teacher is called among its tensors; taps have the names of their modules."""

TensorShapes = list[list[tuple[str, tuple[int, ...]]]]
"""Of every teacher in order: its tensors by name, the output first, and their shapes without the batch axis."""


def shapes_of(outputs: TeacherOutputs) -> TensorShapes:
    """The shapes of what is seen of teachers."""
    return [[(name, tuple(x.shape[1:])) for name, x in _tensors(seen)] for seen in outputs.values()]


def _tensors(seen: Seen) -> list[tuple[str, Tensor]]:
    return [(OUTPUT, seen.output), *seen.features.items()]


@dataclass(frozen=True)
class Codec:
    """Turns what teachers answer into records and back.

    With ``top_k`` a record holds each teacher's k largest logits along the last axis and one more: the logit that each
    of the other classes has when their probability is shared out evenly. The k largest probabilities stay exact.

    Args:
        teachers: names of the teachers.
        shapes: of their tensors; see :data:`TensorShapes`.
        dtype: ``float16`` or ``float32``.
        top_k: logits that are kept of every teacher, fewer than the classes; None for all.
    """

    teachers: tuple[str, ...]
    shapes: TensorShapes
    dtype: str
    top_k: int | None

    @property
    def layout(self) -> np.dtype:
        """The fields of a record, little-endian; ``image`` is the :func:`projection` of what the teachers saw."""
        number = np.dtype(self.dtype).newbyteorder("<")
        fields: list[tuple[Any, ...]] = [("image", "<f4")]
        for teacher, tensors in enumerate(self.shapes):
            for index, (_, shape) in enumerate(tensors):
                kept = shape
                if index == 0 and self.top_k is not None:
                    number_of_class = "<u2" if shape[-1] <= 2**16 else "<u4"
                    fields.append((f"{teacher} classes", number_of_class, (*shape[:-1], self.top_k)))
                    kept = (*shape[:-1], self.top_k + 1)
                fields.append((f"{teacher} {index}", number, kept))
        return np.dtype(fields)

    def encode(self, records: Records, outputs: TeacherOutputs, projections: Tensor) -> None:
        """Fill ``records`` (B,) with what teachers answer.

        Raises:
            UsageError: when a value is too large for float16.
        """
        records["image"] = projections.cpu().numpy()
        for teacher, seen in enumerate(outputs.values()):
            for index, (_, tensor) in enumerate(_tensors(seen)):
                values = tensor
                if index == 0 and self.top_k is not None:
                    values, classes = _largest(tensor.float(), self.top_k)
                    records[f"{teacher} classes"] = classes.cpu().numpy()
                records[f"{teacher} {index}"] = self._numbers(values)

    def _numbers(self, values: Tensor) -> np.ndarray:
        limit = float(np.finfo(self.dtype).max)
        if self.dtype == "float16" and bool((values.abs() > limit).any()):
            raise UsageError(
                "teacher_cache.dtype='float16' cannot hold the teacher's outputs, which exceed 65504: use float32"
            )
        return values.detach().float().cpu().numpy().astype(self.dtype)

    def decode(self, records: Records, device: torch.device) -> dict[str, Seen]:
        """What teachers answered, as float32 on ``device``."""
        found = {}
        for teacher, (name, tensors) in enumerate(zip(self.teachers, self.shapes, strict=True)):
            values = [self._tensor(records[f"{teacher} {index}"], device) for index in range(len(tensors))]
            if self.top_k is not None:
                classes = torch.from_numpy(records[f"{teacher} classes"].astype(np.int64)).to(device)
                kept, count = values[0], tensors[0][1][-1]
                rest = kept[..., -1:].expand(*kept.shape[:-1], count)
                values[0] = rest.scatter(-1, classes, kept[..., :-1])
            names = [tensor for tensor, _ in tensors[1:]]
            found[name] = Seen(values[0], dict(zip(names, values[1:], strict=True)))
        return found

    @staticmethod
    def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)


def _largest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of logits (..., C) the k largest and the one of each other class, (..., k + 1), and the classes of the k."""
    values, classes = logits.topk(top_k, dim=-1)
    rest = logits.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([values, rest - math.log(logits.shape[-1] - top_k)], dim=-1), classes


def projection(images: Tensor) -> Tensor:
    """One number for each of the images (B, C, H, W), (B,) float32, that another crop, flip or colour changes.

    The scalar product with fixed random numbers in [-1/2, 1/2).
    """
    values = images.detach().float().flatten(1)
    weights = uniform(0, 0, torch.arange(values.shape[1], device=values.device), STREAM_ORDER) - 0.5
    return (values * weights).sum(1)
