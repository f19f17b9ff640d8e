"""Teacher answers as records of bytes and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.teachers.cache.records import Records
from lqkd.utils.counter_rng import STREAM_ORDER, uniform

TeacherOutputs = tuple[list[Tensor], list[Tensor]]
"""Logits (B, C) of every teacher, and what every tap saw of the teacher, (B, ...)."""


@dataclass(frozen=True)
class Codec:
    """Turns answers into records and back.

    With ``top_k`` a record holds each teacher's k largest logits and one more: the logit that each of the other classes
    has when their probability is shared out evenly. The k largest probabilities stay exact.

    Args:
        teachers: number of teachers.
        classes: number of classes.
        features: shapes of what the taps see, without the batch axis.
        dtype: ``float16`` or ``float32``.
        top_k: logits that are kept, fewer than the classes; None for all.
    """

    teachers: int
    classes: int
    features: tuple[tuple[int, ...], ...]
    dtype: str
    top_k: int | None

    @property
    def layout(self) -> np.dtype:
        """The fields of a record, little-endian; ``image`` is the :func:`projection` of what the teacher saw."""
        number = np.dtype(self.dtype).newbyteorder("<")
        kept = self.classes if self.top_k is None else self.top_k + 1
        fields: list[tuple[Any, ...]] = [("image", "<f4"), ("logits", number, (self.teachers, kept))]
        if self.top_k is not None:
            fields.append(("classes", "<u2" if self.classes <= 2**16 else "<u4", (self.teachers, self.top_k)))
        fields += [(f"feature{index}", number, shape) for index, shape in enumerate(self.features)]
        return np.dtype(fields)

    def encode(self, records: Records, answers: TeacherOutputs, projections: Tensor) -> None:
        """Fill ``records`` (B,) with answers.

        Raises:
            UsageError: when a value is too large for float16.
        """
        logits = torch.stack(answers[0], dim=1).float()  # (B, teachers, C)
        if self.top_k is not None:
            values, classes = logits.topk(self.top_k, dim=2)
            rest = logits.scatter(2, classes, -math.inf).logsumexp(2, keepdim=True)
            logits = torch.cat([values, rest - math.log(self.classes - self.top_k)], dim=2)
            records["classes"] = classes.cpu().numpy()
        records["image"] = projections.cpu().numpy()
        records["logits"] = self._numbers(logits)
        for index, feature in enumerate(answers[1]):
            records[f"feature{index}"] = self._numbers(feature)

    def _numbers(self, values: Tensor) -> np.ndarray:
        limit = float(np.finfo(self.dtype).max)
        if self.dtype == "float16" and bool((values.abs() > limit).any()):
            raise UsageError(
                "teacher_cache.dtype='float16' cannot hold the teacher's outputs, which exceed 65504: use float32"
            )
        return values.detach().float().cpu().numpy().astype(self.dtype)

    def decode(self, records: Records, device: torch.device) -> TeacherOutputs:
        """TeacherOutputs as float32 on ``device``."""
        kept = self._tensor(records["logits"], device)
        if self.top_k is None:
            logits = kept
        else:
            classes = torch.from_numpy(records["classes"].astype(np.int64)).to(device)
            logits = kept[..., -1:].expand(-1, -1, self.classes).scatter(2, classes, kept[..., :-1])
        features = [self._tensor(records[f"feature{index}"], device) for index in range(len(self.features))]
        return list(logits.unbind(1)), features

    @staticmethod
    def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)


def projection(images: Tensor) -> Tensor:
    """One number for each of the images (B, C, H, W), (B,) float32, that another crop, flip or colour changes.

    The scalar product with fixed random numbers in [-1/2, 1/2).
    """
    values = images.detach().float().flatten(1)
    weights = uniform(0, 0, torch.arange(values.shape[1], device=values.device), STREAM_ORDER) - 0.5
    return (values * weights).sum(1)
