"""The frozen teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models import load_weights
from lqkd.models.calls import Inputs
from lqkd.teachers.inference import computes_bf16, inference_copy

_COMPARED = 8  # images that a faster copy is compared with the network on

PRECISIONS = ("auto", "fp32", "bf16")


class FrozenTeacher(nn.Module):
    """A full-precision network that only answers.

    Always in eval mode, whatever ``train()`` is called on it or above it; parameters need no gradient and the
    forward pass records none. Its inputs may be normalised otherwise than the student's: images are converted from
    the student's normalisation to its own.

    In a training it answers through a faster copy of the network: see :meth:`accelerate`.

    Args:
        network: the network.
        weights: ``builtin:NAME`` or a file with its weights; null keeps those it was built with.
        mean: channel means of the teacher's own normalisation, in [0, 1]; null when it is the student's.
        std: channel standard deviations of the teacher's own normalisation; null when it is the student's.
        image_size: side in pixels that images are resized to for it (bilinear); null for the student's.
        class_names: what its outputs mean, in order, to be compared with the data's; null when that is not known.
        minimum_accuracy: accuracy below which training refuses to start; null for 1.5 times chance, or
            chance and 10 points where that is less (60 % for two classes).
        precision: what a training's teacher computes in: ``fp32``; ``bf16``; or ``auto``, bf16 where the device has it
            in hardware and the accuracy on the validation images moves by less than 0.1 points.
        compile: whether it answers training batches through ``torch.compile``, also where the student does not.

    Raises:
        UsageError: when the weights do not fit, or an argument is not possible.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | None = None,
        class_names: Sequence[str] | None = None,
        minimum_accuracy: float | None = None,
        precision: str = "auto",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise UsageError(f"teacher precision={precision!r} is unknown: use {', '.join(PRECISIONS)}")
        if image_size is not None and image_size < 1:
            raise UsageError(f"teacher image_size={image_size!r} is not possible: it must be at least 1 pixel, or null")
        if (mean is None) != (std is None):
            raise UsageError("teacher mean and std belong together: give both, or neither for the student's")
        if mean is not None and not all(map(math.isfinite, mean)):
            raise UsageError(f"teacher mean={list(mean)} is not possible: means are finite")
        if std is not None and not all(0 < value < math.inf for value in std):
            raise UsageError(f"teacher std={list(std)} is not possible: standard deviations are greater than 0")
        check_minimum_accuracy(minimum_accuracy)
        if weights is not None and (told := load_weights(network, weights, replace_head=None)) is not None:
            rank_zero_info(told)
        self.network = network
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.image_size = image_size
        self.class_names = None if class_names is None else tuple(class_names)
        self.minimum_accuracy = minimum_accuracy
        self.precision = precision
        self.compiled = compile
        self.source = weights
        self._format = torch.contiguous_format  # of the images that the faster copy is given
        self._acceleration: tuple[bool, tuple[str, ...]] | None = None
        self.__dict__["_copy"] = None  # past nn.Module's registration: it is no part of the teacher's state
        self._gain: Tensor | None = None
        self._shift: Tensor | None = None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode: batch norm, dropout and drop-path of a teacher never train."""
        super().train(False)
        return self

    def convert_from(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Tell the teacher how the images that it will be given are normalised; None when that is not known.

        Raises:
            UsageError: when the teacher has a normalisation of its own that images cannot be converted to.
        """
        if self.mean is None or self.std is None:
            return
        if mean is None or std is None:
            raise UsageError(
                f"teacher mean={list(self.mean)} cannot be honoured: the DataModule has no mean and std to convert from"
            )
        if len(mean) != len(self.mean):
            raise UsageError(f"teacher mean={list(self.mean)} has {len(self.mean)} channels: the data have {len(mean)}")
        given_mean, given_std, own_mean, own_std = (torch.tensor(v) for v in (mean, std, self.mean, self.std))
        self._gain = (given_std / own_std).view(-1, 1, 1)
        self._shift = ((given_mean - own_mean) / own_std).view(-1, 1, 1)

    def check_classes(self, names: Sequence[str]) -> None:
        """Compare the teacher's own class names, where it knows them, with those of the data.

        Raises:
            UsageError: when a class differs, or their number.
        """
        if self.class_names is None or self.class_names == tuple(names):
            return
        pairs = enumerate(zip(self.class_names, names, strict=False))
        different = next(
            (f"class {i} is {a!r} for the teacher and {b!r} in the data" for i, (a, b) in pairs if a != b), None
        )
        different = different or f"it has {len(self.class_names)}, they have {len(names)}"
        raise UsageError(f"the teacher's classes are not the data's: {different}")

    def running(self, given: Inputs | Tensor) -> nn.Module:
        """What answers for these inputs: the network, or its faster copy; both have modules of the same names."""
        if self._acceleration is None:
            return self.network
        if self.__dict__["_copy"] is None:
            bf16, untouched = self._acceleration
            seen = self._converted(Inputs.of(given).part(slice(_COMPARED)))
            made, obstacle = inference_copy(self.network, seen, bf16=bf16, untouched=untouched)
            if obstacle is not None:
                rank_zero_info(f"a teacher runs without folded batch norms and channels_last: {obstacle}")
            self.__dict__["_copy"] = made
            self._format = torch.channels_last if obstacle is None else torch.contiguous_format
        copied: nn.Module = self.__dict__["_copy"]
        return copied

    def wants_bf16(self, device: torch.device) -> bool:
        """Whether bfloat16 is asked for on ``device``, subject to a check of its accuracy where that is ``auto``."""
        return self.precision == "bf16" or (self.precision == "auto" and computes_bf16(device))

    def accelerate(self, *, bf16: bool, untouched: Collection[str] = ()) -> None:
        """Answer through a faster copy of the network, which is made at the first answer, until :meth:`restore`.

        Batch norms are folded into convolutions, memory is in channels_last; autocast around it does not matter. What
        is done to the weights of the network from then on has no effect on the answers.

        Args:
            bf16: whether to compute in bfloat16.
            untouched: names of modules whose outputs someone reads.
        """
        self._acceleration = (bf16, tuple(untouched))
        self.__dict__["_copy"] = None

    def restore(self) -> None:
        """Answer through the network itself again."""
        self._acceleration = None
        self.__dict__["_copy"] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        self.__dict__["_copy"] = None  # another device or dtype needs another copy
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, *args: Any, **keywords: Any) -> Any:
        """What the network returns, logits (B, C) say, for inputs in the student's normalisation.

        Args:
            *args, **keywords: what the network takes: images (B, channels, H, W), or inputs of another kind.

        Raises:
            UsageError: when a normalisation or size of its own cannot be honoured.
        """
        inputs = Inputs(args, keywords)
        running = self.running(inputs)
        inputs = self._converted(inputs)
        if running is self.network:
            return inputs.call(self.network)
        dtype = next((p.dtype for p in running.parameters()), None)
        with torch.autocast(inputs.tensors()[0].device.type, enabled=False):
            returned = inputs.map(lambda tensor: self._laid_out(tensor, dtype)).call(running)
        return returned.float() if isinstance(returned, Tensor) else returned

    def _laid_out(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """As the faster copy takes it."""
        if tensor.is_floating_point() and dtype is not None:  # not the numbers of tokens
            tensor = tensor.to(dtype)
        return tensor.contiguous(memory_format=self._format) if tensor.ndim == 4 else tensor

    def _converted(self, inputs: Inputs) -> Inputs:
        """``inputs`` with images in the teacher's own normalisation and size."""
        if self._gain is None and self.image_size is None:
            return inputs
        images = inputs.alone()
        if images is None:
            setting = "image_size" if self._gain is None else "mean"
            raise UsageError(
                f"teacher {setting} is not possible with a network that is not called with images alone: the task's "
                "teacher_inputs() must convert them"
            )
        if self._gain is not None and self._shift is not None:
            images = images * self._gain.to(images) + self._shift.to(images)
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return Inputs((images,))


def check_minimum_accuracy(value: float | None) -> None:
    """Refuse what is no accuracy.

    Raises:
        UsageError: then.
    """
    if value is not None and not 0 <= value <= 1:
        raise UsageError(f"teacher minimum_accuracy={value!r} is not possible: it must be from 0 to 1, or null")
