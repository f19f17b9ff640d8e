"""What a folder can hold that a network is trained on, and what is chosen for each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lqkd.quantization.recipe import BLOCK_FORMATS

CONTEXT = 128
"""Bytes that a language model sees at once."""


@dataclass(frozen=True)
class Found:
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

    @property
    def task(self) -> dict[str, Any] | None:
        """The task's configuration; None for the classification of images."""
        return None

    def data(self) -> dict[str, Any]:
        """The data's configuration, but for sizes."""
        raise NotImplementedError

    @classmethod
    def file_format(cls, bits: str) -> str | None:
        """The format of the file that a student of so many bits becomes; None where there is none."""
        return "portable"

    def told(self) -> Iterator[str]:
        """What it is, in lines."""
        raise NotImplementedError

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
