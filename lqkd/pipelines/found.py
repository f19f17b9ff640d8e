"""What a folder can hold that a network is trained on, and what is chosen for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lqkd.quantization.recipe import BLOCK_FORMATS

SMALL_FCOS = "lqkd.models.SmallFCOS"
CONTEXT = 128
"""Bytes that a language model sees at once."""


@dataclass(frozen=True)
class Found(ABC):
    """What a folder holds, and what is chosen for its kind.

    Attributes:
        root: the folder.
        train: number of images, or windows of text, to train on.
        val: to validate with.
        test: to test with.
        student: the network that is trained unless another is asked for.
        bits: likewise.
        things: what there are so many of.
        optimizers: of a float network with random weights, of one with weights, and of the low-bit student.
        distillation: of the low-bit student: temperature, and the weights of task and distillation.
        learns: what it learns from beside its teacher.
        most_in_batch: things of a step, at most.
        epochs_in_float: fewest and most, of which random weights get the most.
    """

    root: Path
    train: int
    val: int
    test: int
    student: ClassVar[str]
    bits: ClassVar[str]
    things: ClassVar[str]
    optimizers: ClassVar[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]
    distillation: ClassVar[tuple[float | None, float, float]] = (None, 0.5, 0.5)
    learns: ClassVar[str] = "labels"
    most_in_batch: ClassVar[int] = 32
    epochs_in_float: ClassVar[tuple[int, int]] = (10, 20)

    @property
    def task(self) -> dict[str, Any] | None:
        """The task's configuration; None for the classification of images."""
        return None

    def task_at(self, size: Any) -> dict[str, Any] | None:
        """The same for images of a size in pixels, height and width or a side, where it depends on that."""
        return self.task

    def distils(self, network: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Settings that say what a student learns from its teacher, for a network of that configuration, and words."""
        temperature, of_task, of_teacher = self.distillation
        hotter = {} if temperature is None else {"init_args": {"temperature": temperature}}
        balance = {"task": of_task, "distill": of_teacher}
        settings = {
            "distillation_loss": {"class_path": "lqkd.losses.HintonKL", **hotter},
            "balance": {"class_path": "lqkd.balances.FixedBalance", "init_args": balance},
        }
        return settings, f"{of_task} of the {self.learns}, {of_teacher} of HintonKL from the teacher"

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """The data's configuration, but for sizes."""

    @classmethod
    def file_format(cls, bits: str) -> str | None:
        """The format of the file that a student of so many bits becomes; None where there is none."""
        return "portable"

    @abstractmethod
    def told(self) -> Iterator[str]:
        """What it is, in lines."""

    def _numbers(self) -> str:
        return f"{self.train} to train, {self.val} to validate, {self.test} to test"


def _optimizer(name: str, rate: float, decay: float, **further: float) -> dict[str, Any]:
    return {"class_path": f"torch.optim.{name}", "init_args": {"lr": rate, **further, "weight_decay": decay}}


@dataclass(frozen=True)
class Photographs(Found):
    """A folder with a folder of images for each class.

    Attributes:
        classes: their names, in the order of the labels.
        side: median of the shorter sides of some images, in pixels.
    """

    classes: tuple[str, ...]
    side: int
    student = "resnet18"
    bits = "w4a4"
    things = "images"
    optimizers = (
        _optimizer("SGD", 0.05, 5e-4, momentum=0.9),
        _optimizer("SGD", 0.01, 5e-4, momentum=0.9),
        _optimizer("SGD", 0.01, 1e-4, momentum=0.9),
    )

    def data(self) -> dict[str, Any]:
        settings = {"root": str(self.root.resolve()), "crop_scale": [0.5, 1.0]}
        return {"class_path": "lqkd.data.ImageFolder", "init_args": settings}

    def told(self) -> Iterator[str]:
        yield f"{self.train + self.val + self.test} images of {len(self.classes)} classes: {_listed(self.classes)}"
        yield self._numbers()


@dataclass(frozen=True)
class Pairs(Found):
    """A folder of images and masks.

    Attributes:
        classes: the numbers that pixels have, as names.
        size: median height and width of some images, in pixels.
    """

    classes: tuple[str, ...]
    size: tuple[int, int]
    student = "lraspp_mobilenet_v3_large"
    bits = "w4a4"
    things = "images"
    optimizers = (_optimizer("Adam", 0.003, 0.0), _optimizer("Adam", 0.001, 0.0), _optimizer("Adam", 0.001, 0.0))

    @property
    def task(self) -> dict[str, Any]:
        return {"class_path": "lqkd.tasks.Segmentation", "init_args": {"classes": len(self.classes)}}

    def data(self) -> dict[str, Any]:
        settings = {"root": str(self.root.resolve()), "classes": [*self.classes], "crop_scale": [0.5, 1.0]}
        return {"class_path": "lqkd.data.SegmentationFolder", "init_args": settings}

    def told(self) -> Iterator[str]:
        count, names = self.train + self.val + self.test, _listed(self.classes)
        yield f"{count} images with masks of {len(self.classes)} classes: {names}"
        yield self._numbers()


def reach_of(longest: int) -> float:
    """``reach`` of :class:`~lqkd.tasks.Detection` for images whose longer side has so many pixels.

    The three levels then share boxes of up to a quarter, up to a half, and of more than half of an image.

    Examples:
        >>> reach_of(96), reach_of(256), reach_of(1333)
        (1.5, 4.0, 8.0)
    """
    return min(8.0, max(1.0, round(longest / 32) / 2))


@dataclass(frozen=True)
class Boxed(Found):
    """A folder of images with boxes around what they show.

    Attributes:
        classes: their names.
        size: median height and width of some images, in pixels.
        module: the class that reads them, of :mod:`lqkd.data`.
        empty: boxes without an area, which are left out.
    """

    classes: tuple[str, ...]
    size: tuple[int, int]
    module: str
    empty: int
    student = "small_fcos"
    bits = "w4a4"
    things = "images"
    optimizers = (_optimizer("Adam", 0.002, 0.0), _optimizer("Adam", 0.001, 0.0), _optimizer("Adam", 0.001, 0.0))
    most_in_batch = 8
    epochs_in_float = (20, 60)

    def task_at(self, size: Any) -> dict[str, Any]:
        """Each level of the pyramid looks for boxes of other sizes, see :func:`reach_of`."""
        reach = reach_of(size if isinstance(size, int) else max(size))
        return {"class_path": "lqkd.tasks.Detection", "init_args": {"classes": [*self.classes], "reach": reach}}

    def distils(self, network: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Levels of a pyramid that is known, by PKD, and otherwise the classes of every position."""
        loss: dict[str, Any]
        if network["class_path"] != SMALL_FCOS:
            name, loss, weight = "classes", {"loss": "lqkd.losses.BinaryKL"}, 50.0
        else:
            taps = [
                {"teacher": f"pyramid.outputs.{level}", "student": f"pyramid.outputs.{level}"} for level in range(3)
            ]
            name, loss, weight = "pyramid", {"loss": "lqkd.losses.PKD", "taps": taps}, 6.0  # the paper's
        settings = {
            "distillation": {name: loss},
            "balance": {"class_path": "lqkd.balances.FixedBalance", "init_args": {"terms": {name: weight}}},
        }
        return settings, f"1.0 of the boxes, {weight} of {str(loss['loss']).rpartition('.')[2]} from the teacher"

    def data(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"root": str(self.root.resolve())}
        settings |= {"leave_out_empty": True} if self.empty else {}
        return {"class_path": f"lqkd.data.{self.module}", "init_args": settings}

    def told(self) -> Iterator[str]:
        count = self.train + self.val + self.test
        yield f"{count} images with boxes of {len(self.classes)} classes: {_listed(self.classes)}"
        yield self._numbers()
        if self.empty:
            yield f"boxes without an area are left out: {self.empty}"


@dataclass(frozen=True)
class Texts(Found):
    """A folder of texts, read as bytes.

    Attributes:
        parts: settings of :class:`~lqkd.data.TextFiles` that name the folders.
    """

    parts: dict[str, str] = field(hash=False)
    student = "gpt"
    bits = "q4_0"
    things = "windows"
    optimizers = (_optimizer("AdamW", 0.003, 0.1), _optimizer("AdamW", 0.001, 0.1), _optimizer("AdamW", 0.0003, 0.0))
    distillation = (1.0, 1.0, 1.0)
    learns = "text"

    @property
    def task(self) -> dict[str, Any]:
        return {"class_path": "lqkd.tasks.CausalLM", "init_args": {"bytes_per_token": 1}}

    def data(self) -> dict[str, Any]:
        return {"class_path": "lqkd.data.TextFiles", "init_args": {**self.parts, "context": CONTEXT}}

    @classmethod
    def file_format(cls, bits: str) -> str | None:
        return "gguf" if bits in BLOCK_FORMATS else None

    def told(self) -> Iterator[str]:
        yield f"text, as bytes: {self.train + self.val + self.test} windows of {CONTEXT}; the next byte is predicted"
        yield self._numbers()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
