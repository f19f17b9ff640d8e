"""Images that stay encoded until they are needed: what a loader with workers reads from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from lqkd.data.decode import decode


class EncodedImages(ABC):
    """A set of encoded images of any size, numbered from 0.

    Args:
        count: how many there are.
        size: height and width, in pixels, that a loader brings them to; one number is both.
    """

    channels = 3
    """Of what :meth:`read` gives."""

    def __init__(self, count: int, size: int | tuple[int, int]) -> None:
        self.shape = (count, 3, *((size, size) if isinstance(size, int) else size))
        """(N, C, H, W) of the images as networks see them."""

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Decode one image: (H, W, channels) uint8 in its own size.

        Raises:
            UsageError: when it cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images: with the order, names, sizes and times of their files."""


class ImageFiles(EncodedImages):
    """One file per image.

    Args:
        paths: the files.
        size: height and width, in pixels, that a loader brings them to.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        super().__init__(len(paths), size)
        # One block of bytes: workers that touch a million strings would each copy the memory that holds them.
        names = [os.fsencode(path) for path in paths]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])

    def path(self, index: int) -> str:
        """The file of one image."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[start : int(self._ends[index])])

    def read(self, index: int) -> np.ndarray:
        """Decode one image: (H, W, 3) uint8 in its own size."""
        return decode(self.path(index), self.path(index))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the order, names, sizes and modification times of the files."""
        paths = [self.path(index) for index in range(len(self._ends))]
        folder = os.path.commonpath(paths)  # left out, so that a folder may be moved
        digest = hashlib.sha256()
        for path in paths:
            stat = os.stat(path)
            digest.update(os.fsencode(f"{path[len(folder) :]}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
        return digest.hexdigest()[:16]
