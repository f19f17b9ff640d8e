"""The teacher's features on the student's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses.base import DistillationLoss, MapKind
from lqkd.losses.matching import channels, check_comparable, only_pair, to_size
from lqkd.losses.precision import in_full_precision


class QuantizedFeatures(DistillationLoss):
    """Squared residual ``(Q_S(f_T) - f_S)**2``, averaged, where Q_S is the student's own quantizer of these features.

    The idea of SQuaT ("Student-Aware Quantized Teacher Features", AISTATS 2026): a low-bit student cannot reach the
    values between its levels, so a residual to the plain features has a lower bound above 0; to the teacher's features
    on the student's grid it has not.

    :meth:`bind` finds Q_S. It works in evaluation mode and without gradients here: the features of the teacher train
    nothing and fit no grid; while the student has not fitted it yet, it passes them unchanged. It stays the student's:
    neither parameters nor state of the loss contain it.

    It takes feature maps (B, C, H, W), token sequences (B, N, C) or vectors (B, C). The teacher's maps are averaged to
    the student's size, where they are smaller repeated, before they are quantised. The numbers of channels must agree,
    since a connector would leave the grid. The student's features are compared as the tap gives them.

    Args:
        quantizer: name of the quantizer in the student that the compared features go through, for instance
            ``layer3.0.conv1.input_quantizer``; null for the tap's own ``output_quantizer``, which the tap has where
            its output enters a residual connection that is quantised.

    Raises:
        UsageError: when there is no such quantizer, :meth:`bind` has not been called, or features are of different
            layouts or numbers of channels or tokens.

    Examples:
        >>> from lqkd.quantization import Recipe, quantize_model
        >>> student, _ = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), Recipe())
        >>> loss = QuantizedFeatures(quantizer="1.input_quantizer")
        >>> loss.bind(student, "0")
        >>> _ = student(torch.rand(16, 4))  # fits the quantizers
        >>> loss(torch.rand(16, 8), torch.rand(16, 8)).shape
        torch.Size([16, 8])
    """

    compares = "features"
    kind: MapKind = "features"
    place_by_place = True

    def __init__(self, quantizer: str | None = None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self._bound: nn.Module | None = None

    def bind(self, student: nn.Module, tap: str) -> None:
        name = f"{tap}.output_quantizer" if self.quantizer is None else self.quantizer
        try:
            bound = student.get_submodule(name)
        except AttributeError:
            raise UsageError(
                f"quantizer={self.quantizer!r} of QuantizedFeatures for tap {tap!r} is not possible: the student has "
                f"no {name!r}; give the name of the quantizer that takes these features, for instance "
                "'layer3.0.conv1.input_quantizer'"
            ) from None
        self.__dict__["_bound"] = bound  # past nn.Module's registration: its parameters are the student's

    def connect(self, teacher: Sequence[torch.Size], student: Sequence[torch.Size]) -> None:
        self._check(*only_pair("QuantizedFeatures", teacher, student))

    def _check(self, teacher: Sequence[int], student: Sequence[int]) -> None:
        check_comparable("QuantizedFeatures", teacher, student)
        if channels(teacher) != channels(student):
            raise UsageError(
                f"QuantizedFeatures cannot compare the teacher's {channels(teacher)} channels with the student's "
                f"{channels(student)}: they must agree; choose other taps, or the loss Hints"
            )

    @in_full_precision
    def pair(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features on the student's grid, in the student's shape, and the student's."""
        if self._bound is None:
            raise UsageError("QuantizedFeatures has no quantizer yet: call bind with the student and its tap first")
        self._check(teacher.shape, student.shape)
        if teacher.ndim == 4:
            teacher = to_size(teacher, (student.shape[2], student.shape[3]))
        training = self._bound.training
        try:
            with torch.no_grad():
                return self._bound.eval()(teacher), student
        finally:
            self._bound.train(training)

    @in_full_precision
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher, student = self.pair(teacher, student)
        return (teacher - student).square()

    def reduce(self, divergence: Tensor) -> Tensor:
        return divergence.mean()
