"""scikit-learn's two photographs, cut into pieces with masks of what is to be seen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("other", "blue", "warm")
"""By colour: sky and leaves in shadow, roofs and a dahlia, and all else."""


def write_photographs(folder: Path, parts: Iterable[str] = ("",), side: int = 106) -> None:
    """Write 24 pieces in turn into ``folder/PART/images`` (JPEG) and ``folder/PART/masks``, each of 106x106 pixels."""
    pieces = [
        photograph[top : top + side, left : left + side]
        for top in range(0, 4 * side, side)
        for left in range(0, 6 * side, 2 * side)
        for photograph in load_sample_images().images
    ]
    names = list(parts)
    for number, piece in enumerate(pieces):
        red, blue = piece[..., 0].astype(int), piece[..., 2].astype(int)
        mask = np.where(red > blue + 60, 2, np.where(blue > red + 8, 1, 0)).astype(np.uint8)
        part = folder / names[number % len(names)]
        for kind, pixels, name in (("images", piece, f"{number}.jpg"), ("masks", mask, f"{number}.png")):
            (part / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(part / kind / name)
