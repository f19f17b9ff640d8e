"""Images and masks in files beside each other: finding pairs, reading and cropping both alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.data.class_folders import SUFFIXES, shown_files
from lqkd.data.decode import decode
from lqkd.data.encoded import EncodedImages, ImageFiles
from lqkd.data.resized_crop import random_window
from lqkd.data.worker_loader import CroppedImages
from lqkd.errors import UsageError, first_line

_ONE_NUMBER = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")
"""Pillow's kinds of images with one number for each pixel; of a palette the index, not the colour."""


def list_pairs(folder: Path) -> tuple[list[str], list[str]]:
    """The images of ``folder/images``, sorted, and the mask of each: ``folder/masks/NAME.png`` for ``images/NAME.jpg``.

    Both may lie in folders within, of the same names. Hidden files are left out; so are files that are no image and
    masks without an image, with a warning.

    Raises:
        UsageError: when a folder is missing or empty, an image has no mask, or two images have the same.
    """
    found = {}
    for kind in ("images", "masks"):
        if not (folder / kind).is_dir():
            raise UsageError(f"{folder} has no folder {kind!r}: it must hold images and masks.")
        found[kind] = sorted(shown_files(f"{folder}/{kind}"))
    images = [path for path in found["images"] if path.lower().endswith(SUFFIXES)]
    if not images:
        raise UsageError(f"{folder}/images holds no image ({', '.join(SUFFIXES)}).")
    masks = {_name(path, f"{folder}/masks"): path for path in found["masks"] if path.lower().endswith(".png")}
    paired: dict[str, str] = {}
    for image in images:
        name = _name(image, f"{folder}/images")
        if name not in masks:
            raise UsageError(f"image {image} has no mask: {folder}/masks/{name}.png does not exist.")
        if name in paired:
            raise UsageError(f"images {paired[name]} and {image} have the same mask: rename one of them and its mask.")
        paired[name] = image
    used = {*images, *(masks[name] for name in paired)}
    left_out = [path for path in (*found["images"], *found["masks"]) if path not in used]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        rank_zero_warn(f"left out {left_out[0]!r}{more}: neither an image nor the mask (PNG) of one")
    return list(paired.values()), [masks[name] for name in paired]


def read_mask(path: str) -> np.ndarray:
    """The numbers of a mask's pixels, (H, W) uint8: of a PNG with a palette the indices.

    Raises:
        UsageError: when it cannot be read, or has colours or numbers of more than 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as mask:
            mode, values = mask.mode, np.asarray(mask)
    except UnidentifiedImageError as error:  # whose text is the path once more
        raise UsageError(f"mask {path} cannot be read: it is of no known kind.") from error
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise UsageError(f"mask {path} cannot be read: {first_line(error)}.") from error
    if mode not in _ONE_NUMBER:
        raise UsageError(
            f"mask {path} has colours ({mode}): each pixel must be the number of its class, as grey or by a palette."
        )
    if int(values.max()) > 255 or int(values.min()) < 0:
        raise UsageError(f"mask {path} has the number {values.max()}: the numbers of classes are 0 to 255.")
    return values.astype(np.uint8)


class MaskedImages(EncodedImages):
    """Files of images, each with its mask as a fourth channel.

    Args:
        images: the images' files.
        masks: the mask's file of each.
        size: height and width, in pixels, that a loader brings them to.
        classes: number of classes: masks hold 0 to classes - 1.
        ignore_index: what else masks may hold.
    """

    channels = 4

    def __init__(
        self, images: Sequence[str], masks: Sequence[str], size: tuple[int, int], classes: int, ignore_index: int
    ) -> None:
        super().__init__(len(images), size)
        self.files = ImageFiles([*images, *masks], max(size))
        self.classes, self.ignore_index = classes, ignore_index
        self.allowed = np.zeros(256, dtype=bool)
        self.allowed[[*range(classes), ignore_index]] = True
        self.seen = np.zeros(256, dtype=bool)
        """Which numbers the masks have had that were read in this process."""

    def paths(self, index: int) -> tuple[str, str]:
        """The files of an image and of its mask."""
        return self.files.path(index), self.files.path(index + self.shape[0])

    def read(self, index: int) -> np.ndarray:
        """Decode one image and its mask: (H, W, 4) uint8 in its own size.

        Raises:
            UsageError: when one cannot be read, they differ in size, or the mask has another number than the classes'.
        """
        path, mask_path = self.paths(index)
        image, mask = decode(path, path), read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            sizes = ["x".join(map(str, pixels.shape[:2])) for pixels in (image, mask)]
            raise UsageError(f"image {path} has {sizes[0]} pixels and mask {mask_path} {sizes[1]}: they must agree.")
        here = np.bincount(mask.ravel(), minlength=256).nonzero()[0]
        foreign = here[~self.allowed[here]]
        if len(foreign):
            raise UsageError(
                f"mask {mask_path} has the number {foreign[0]}: accepted are 0 to {self.classes - 1}, the classes, and"
                f" {self.ignore_index}, which is ignored."
            )
        self.seen[here] = True
        return np.dstack([image, mask])

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the order, names, sizes and modification times of all files."""
        return self.files.fingerprint()


class CroppedMasks(CroppedImages):
    """Crops and resizes images with their masks: images with antialiasing, masks to the nearest pixel.

    Evaluation takes whole images.

    Args:
        images: where both are.
        seed: of the random crops.
        crop_scale: smallest and largest share of an image's area that a random crop takes; null for evaluation.
    """

    def __init__(self, images: MaskedImages, *, seed: int, crop_scale: tuple[float, float] | None) -> None:
        super().__init__(images, seed=seed, crop_scale=crop_scale, resize_size=max(images.shape[-2:]))

    def cropped(self, pixels: np.ndarray, draws: list[list[float]]) -> Tensor:
        """An image and its mask, (4, H, W) uint8; the arguments are those of the parent."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        size = list(self.images.shape[-2:])
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        both = tv_tensors.Image(planes[:3]), tv_tensors.Mask(planes[3:])
        if self.crop_scale is None:
            resized = [functional.resize(part, size) for part in both]
        else:
            height, width = pixels.shape[:2]
            window = random_window(height, width, self.crop_scale, draws, aspect=size[1] / size[0])
            resized = [functional.resized_crop(part, *window, size) for part in both]
        return torch.cat([part.as_subclass(Tensor) for part in resized])


def _name(path: str, folder: str) -> str:
    return os.path.splitext(os.path.relpath(path, folder))[0].replace(os.sep, "/")
