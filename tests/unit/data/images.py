"""Small folders of images for the tests of data modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_classes(folder: Path, classes: dict[str, int], size: tuple[int, int] = (40, 30), start: int = 0) -> None:
    """``folder/<class>/<number>.png``: noise, (width, height), so that every image is another one."""
    rng = np.random.default_rng(start)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
