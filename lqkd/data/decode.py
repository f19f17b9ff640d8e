"""Reading one image file, of whatever kind, as 8-bit pixels."""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

import numpy as np

from lqkd.errors import UsageError, first_line

_ORIENTATION = 0x0112  # the EXIF tag
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TOO_DEEP = ("I", "F")  # 32 bits per pixel: nothing says which value is white


def decode(file: str | BinaryIO, name: str, mode: Literal["RGB", "L"] = "RGB", *, upright: bool = True) -> np.ndarray:
    """Decode an image that Pillow can read.

    Grey, palette and CMYK images are converted, an alpha channel is dropped (as torchvision's ``ImageFolder`` does),
    16-bit grey is scaled to 8 bits, the rotation that a camera notes in EXIF is applied, and of several frames the
    first is taken.

    Args:
        file: a path or an open binary file.
        name: what messages call the image.
        mode: ``RGB`` for three channels, ``L`` for one.
        upright: whether the rotation in EXIF is applied; otherwise the pixels are as the file stores them.

    Returns:
        (H, W, C) uint8, not writable.

    Raises:
        UsageError: when it is damaged, cut short, no image, or has 32-bit pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(file, str) and not os.path.getsize(file):
            raise UsageError(f"{name} cannot be read as an image: the file is empty.")
        with Image.open(file) as image:
            image.load()
            if image.mode in _TOO_DEEP:
                raise UsageError(f"{name} has 32-bit pixels: images must have 8 or 16 bits per channel.")
            turned = ImageOps.exif_transpose(image) if upright and _orientation(image) != 1 else image
            if turned.mode in _SIXTEEN_BITS:
                turned = Image.fromarray(((np.asarray(turned).astype(np.uint32) + 128) // 257).astype(np.uint8))
            pixels = np.asarray(turned if turned.mode == mode else turned.convert(mode))
    except UsageError:
        raise
    except UnidentifiedImageError as error:  # whose text is the path once more
        raise UsageError(f"{name} cannot be read as an image: it is of no known kind.") from error
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise UsageError(f"{name} cannot be read as an image: {first_line(error)}.") from error
    return pixels if mode == "RGB" else pixels[:, :, None]


def _orientation(image: object) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))  # type: ignore[attr-defined]
    except Exception:  # a damaged note beside sound pixels
        return 1
