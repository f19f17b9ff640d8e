"""How an image file becomes what a network sees, as evaluation prepares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lqkd.data.decode import decode
from lqkd.errors import UsageError
from lqkd.utils.schema import PREPROCESSING, check


@dataclass(frozen=True)
class Preprocessing:
    """Decoding, resizing and normalisation of one image.

    An image of the network's own size is taken as it is, so that its numbers are those of validation, bit for bit. Of
    any other, data sets of small images have none in validation; the largest centred window of the network's aspect
    ratio is then resized. Data sets of large images say ``resize_size``: the shorter side becomes so long, and the
    centre is cut out. Those with masks or boxes say ``whole``: all of the image is resized. Resizing is bilinear with
    antialiasing, by Pillow, within one of 255 levels of torchvision's.

    Attributes:
        channels: 3 for RGB or 1 for grey.
        size: height and width in pixels.
        mean, std: per channel, on the [0, 1] scale.
        resize_size: pixels, or ``None``.
        whole: whether images are resized without cutting anything off, whatever their aspect ratio.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_size: int | None = None
    whole: bool = False

    @classmethod
    def of(cls, described: Mapping[str, Any], source: str) -> Preprocessing:
        """From what a file says about itself: ``channels``, ``size``, ``mean``, ``std``, and perhaps others.

        Raises:
            UsageError: when something is missing, is not possible, or cannot be done with an image file.
        """
        check(described, PREPROCESSING, source)
        channels, size, mean, std = (described.get(key) for key in ("channels", "size", "mean", "std"))
        if channels not in (1, 3) or len(size or ()) != 2 or not len(mean or ()) == len(std or ()) == channels:
            raise UsageError(
                f"{source!r} does not say how images are prepared for it (channels={channels}, size={size}, "
                f"mean={mean}, std={std}): predict needs 1 or 3 channels, and the mean and std of each, which the "
                "argument about of lqkd.export.to_onnx takes as preprocessing"
            )
        height, width = size  # type: ignore[misc]
        resize_size, whole = described.get("resize_size"), bool(described.get("whole"))
        return cls(channels, (height, width), tuple(mean), tuple(std), resize_size, whole)  # type: ignore[arg-type]

    def read(self, path: str | Path) -> np.ndarray:
        """One image as the network sees it: (C, H, W) float32.

        Raises:
            UsageError: when the file is missing, a folder or no image.
        """
        values = self.resized(self.pixels(path)).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return (values - mean) / std

    def pixels(self, path: str | Path) -> np.ndarray:
        """One image as its file has it: (H, W, C) uint8.

        Raises:
            UsageError: likewise.
        """
        if not Path(path).is_file():
            folder = Path(path).is_dir()
            raise UsageError(
                f"{path} {'is a folder' if folder else 'does not exist'}: give image files"
                f"{f', e.g. {Path(path)}/*' if folder else ''}"
            )
        mode: Literal["RGB", "L"] = "RGB" if self.channels == 3 else "L"
        return decode(str(path), str(path), mode)

    def resized(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 of the network's size from (H, W, C) uint8 of any size."""
        from PIL import Image, ImageOps

        height, width = self.size
        if self.resize_size is None and pixels.shape[:2] == self.size:
            return pixels
        image = Image.fromarray(pixels if self.channels == 3 else pixels[:, :, 0])
        if self.whole:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        elif self.resize_size is None:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        else:
            sides = [int(self.resize_size * side / min(image.size)) for side in image.size]
            image = image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
            left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).reshape(height, width, self.channels)
