"""Records of one size on disk, a file for each epoch, that tell by themselves whether they are whole."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

Records = NDArray[np.void]


class RecordStore:
    """``samples`` records per epoch; many processes may read and write at once, and one may die at any moment.

    Each record carries a CRC-32 of itself: one that was never written, was cut short, was damaged later or is being
    written right now is absent for a reader, who computes it again. Files have their full size from the start, with
    holes, so that rank and order do not matter. Reading maps the file into memory; writing does not, since a full disk
    would then end the process by a signal instead of an error.

    Args:
        folder: of the files; exists.
        samples: records in an epoch.
        layout: fields of a record: a structured dtype, packed.
    """

    def __init__(self, folder: Path, samples: int, layout: np.dtype) -> None:
        self.folder, self.samples = folder, samples
        self.layout = np.dtype([("crc", "<u4"), *((name, layout[name]) for name in layout.names or ())])
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self._warned = False

    def read(self, epoch: int, rows: NDArray[np.int64]) -> tuple[Records, NDArray[np.bool_]]:
        """Records (B,) at ``rows``, copied, and which of them are there, (B,)."""
        data = self._map(epoch)
        if data is None:
            return np.zeros(len(rows), self.layout), np.zeros(len(rows), bool)
        found = data[rows]  # (B, bytes), a copy
        records = found.view(self.layout)[:, 0]
        present = np.array([crc != 0 for crc in records["crc"]])
        whole = np.array([_crc(row) == crc for row, crc in zip(found, records["crc"], strict=True)])
        if (present & ~whole).any() and not self._warned:
            self._warned = True
            rank_zero_warn(f"damaged records in {self._path(epoch)} are computed again")
        return records, present & whole

    def write(self, epoch: int, rows: NDArray[np.int64], records: Records) -> None:
        """Store ``records`` (B,) at ``rows``.

        Raises:
            OSError: when the folder cannot be written or the disk is full.
        """
        path, size = self._path(epoch), self.layout.itemsize
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(descriptor).st_size != self.samples * size:
                os.ftruncate(descriptor, self.samples * size)
                self._maps.pop(epoch, None)
            plain = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), size).copy()
            plain.view(self.layout)["crc"][:, 0] = [_crc(row) for row in plain]
            for row, record in zip(rows.tolist(), plain, strict=True):
                if os.pwrite(descriptor, record.tobytes(), row * size) != size:
                    raise OSError(f"{path}: a record could be written in part only: the disk may be full")
        finally:
            os.close(descriptor)

    def bytes_on_disk(self) -> int:
        """What the files take now, holes not counted."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.glob("epoch_*.records"))

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:05d}.records"

    def _map(self, epoch: int) -> NDArray[np.uint8] | None:
        """The file of an epoch as (samples, bytes); None while there is none of the right size."""
        if epoch not in self._maps:
            self._maps.clear()  # one epoch at a time
            path, size = self._path(epoch), self.layout.itemsize
            if not path.is_file() or path.stat().st_size != self.samples * size:
                return None
            self._maps[epoch] = np.memmap(path, np.uint8, "r", shape=(self.samples, size))
        return self._maps[epoch]


def _crc(record: NDArray[np.uint8]) -> int:
    """Of one record (bytes,) after its own CRC field; never 0, which stands for nothing."""
    return zlib.crc32(record[4:].data) or 1
