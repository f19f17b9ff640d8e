"""Images with boxes around what they show: checking, reading and cropping both alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lqkd.data.decode import decode
from lqkd.data.encoded import EncodedImages, ImageFiles
from lqkd.data.resized_crop import random_window
from lqkd.data.worker_loader import CroppedImages, Key
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_FLIP, uniform

VISIBLE = 0.25
"""The share of a box's area that must be left in a window for the object still to count."""

_ROUNDED = 0.5
"""Pixels by which a box may reach out of its image, as those that were rounded do; it is cut to the image."""


class Boxed(NamedTuple):
    """An image's file and its objects."""

    image: str
    boxes: np.ndarray
    """(N, 4) float32 xyxy, in pixels."""
    labels: np.ndarray
    """(N,) int64."""
    annotated: str
    """Where the boxes are from, for messages."""


def check_sides(box: Sequence[float], name: str, where: str) -> bool:
    """Refuse a box whose corners are swapped or no numbers; whether it has an area.

    Args:
        box: x1, y1, x2, y2.
        name: of its class.
        where: the file.

    Raises:
        UsageError: then, in one sentence with file and box.
    """
    if not np.isfinite(box).all():
        raise UsageError(f"{where}: the box {_told(box)} of {name!r} has a side that is no number.")
    if box[2] < box[0] or box[3] < box[1]:
        raise UsageError(
            f"{where}: the box {_told(box)} of {name!r} has swapped corners: x1, y1 is the upper left one."
        )
    return bool(box[2] > box[0] and box[3] > box[1])


def check_inside(box: Sequence[float], name: str, size: tuple[int, int], image: str, where: str) -> None:
    """Refuse a box that reaches out of its image by more than rounding.

    Args:
        box: x1, y1, x2, y2.
        name: of its class.
        size: width and height of the image, in pixels.
        image: its file.
        where: the file of the box.

    Raises:
        UsageError: then, in one sentence with both files and the box.
    """
    if min(box[0], box[1], size[0] - box[2], size[1] - box[3]) < -_ROUNDED:
        raise UsageError(
            f"{where}: the box {_told(box)} of {name!r} reaches out of {image}, which has {size[0]}x{size[1]} pixels."
        )


def empty_box(box: Sequence[float], name: str, where: str) -> str:
    """What is said of a box without an area."""
    return f"{where}: the box {_told(box)} of {name!r} has no area"


def _told(box: Sequence[float]) -> str:
    return f"[{', '.join(f'{side:g}' for side in box)}]"


class BoxedImages(EncodedImages):
    """Files of images, each with its objects.

    Args:
        boxed: the images.
        size: height and width, in pixels, that a loader brings them to.
        names: of the classes.
    """

    def __init__(self, boxed: Sequence[Boxed], size: tuple[int, int], names: Sequence[str]) -> None:
        super().__init__(len(boxed), size)
        self.names = tuple(names)
        self.files = ImageFiles([each.image for each in boxed], max(size))
        self.annotated = [each.annotated for each in boxed] if len({each.annotated for each in boxed}) > 1 else None
        self._one_file = boxed[0].annotated if boxed else ""
        # Flat: workers that touch many small arrays would each copy the memory that holds them.
        self._ends = np.cumsum([len(each.labels) for each in boxed])
        self._boxes = np.concatenate([np.zeros((0, 4), np.float32), *(each.boxes for each in boxed)]).astype(np.float32)
        self._labels = np.concatenate([np.zeros(0, np.int64), *(each.labels for each in boxed)]).astype(np.int64)

    @property
    def objects(self) -> int:
        """How many there are in all images."""
        return len(self._labels)

    def objects_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) float32 xyxy in the image's own pixels, and labels (N,) int64, of one image."""
        part = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        return torch.tensor(self._boxes[part]), torch.tensor(self._labels[part])

    def read(self, index: int) -> np.ndarray:
        """Decode one image: (H, W, 3) uint8 as the file stores it, for which boxes are, whatever rotation EXIF notes.

        Raises:
            UsageError: when it cannot be read, or a box lies outside of it.
        """
        path = self.files.path(index)
        pixels = decode(path, path, upright=False)
        height, width = pixels.shape[:2]
        for box, label in zip(*(part.tolist() for part in self.objects_of(index)), strict=True):
            where = self._one_file if self.annotated is None else self.annotated[index]
            check_inside(box, self.names[label], (width, height), path, where)
        return pixels

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the files of the images, see the parent, and with all boxes."""
        digest = hashlib.sha256(self.files.fingerprint().encode())
        for part in (self._ends, self._boxes, self._labels):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]


class CroppedBoxes(CroppedImages):
    """Crops, resizes and mirrors images with their boxes, by torchvision's ``transforms.v2``.

    Evaluation takes whole images. A box is cut to the window; what has less than a quarter of its area left in it is
    no object there.

    Args:
        images: where both are: anything with ``objects_of``.
        seed: of the random crops and mirrors.
        crop_scale: smallest and largest share of an image's area that a random crop takes; null for evaluation.
        flip: whether half of the images are mirrored.
    """

    images: Any

    def __init__(self, images: Any, *, seed: int, crop_scale: tuple[float, float] | None, flip: bool) -> None:
        super().__init__(images, seed=seed, crop_scale=crop_scale, resize_size=max(images.shape[-2:]))
        self.flip = flip

    def __getitem__(self, key: Key) -> Any:  # type: ignore[override]
        """The fields ``images`` (B, C, H, W) uint8 and ``labels``, a dict of boxes and labels for each image."""
        from lqkd.data.resized_crop import crop_draws

        draws = crop_draws(seed=self.seed, epoch=key.epoch, indices=key.indices).tolist()
        flips = (uniform(self.seed, key.epoch, key.indices, STREAM_FLIP) < 0.5).tolist()
        try:
            scenes = [
                self._scene(index, draw, self.flip and flipped)
                for index, draw, flipped in zip(key.indices.tolist(), draws, flips, strict=True)
            ]
        except UsageError as error:
            return error
        return {"images": torch.stack([image for image, _ in scenes]), "labels": [target for _, target in scenes]}

    def _scene(self, index: int, draws: list[list[float]], flip: bool) -> tuple[Tensor, dict[str, Tensor]]:
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        size = list(self.images.shape[-2:])
        pixels = torch.tensor(self.images.read(index)).permute(2, 0, 1)  # (3, H, W)
        corners, labels = self.images.objects_of(index)
        height, width = pixels.shape[-2:]
        boxes: Any = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))  # type: ignore[call-arg]
        image: Any = tv_tensors.Image(pixels)
        if self.crop_scale is None:
            image, boxes = functional.resize(image, size, antialias=True), functional.resize(boxes, size)
        else:
            window = random_window(height, width, self.crop_scale, draws, aspect=size[1] / size[0])
            image = functional.resized_crop(image, *window, size, antialias=True)
            boxes = functional.resized_crop(boxes, *window, size)  # which cuts them to the window
            height, width = window[2:]
        if flip:
            image, boxes = functional.horizontal_flip(image), functional.horizontal_flip(boxes)
        whole = _area(corners) * (size[0] * size[1] / (height * width))  # of a box that nothing is cut off
        boxes = functional.clamp_bounding_boxes(boxes)
        kept = _area(boxes) > (0.0 if self.crop_scale is None else VISIBLE) * whole
        target = {"boxes": boxes.as_subclass(Tensor)[kept].contiguous(), "labels": labels[kept]}
        return image.as_subclass(Tensor), target


def _area(boxes: Tensor) -> Tensor:
    sides = boxes.as_subclass(Tensor)[:, 2:] - boxes.as_subclass(Tensor)[:, :2]
    return sides.clamp_min(0).prod(dim=1)
