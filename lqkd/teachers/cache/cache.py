"""The cache of a training: which folder it is, what fits into it, and what happens for each batch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.teachers.cache.codec import Codec, TeacherOutputs, TensorShapes, projection
from lqkd.teachers.cache.records import RecordStore
from lqkd.utils.files import default_cache_dir, write_json

DTYPES = ("float16", "float32")
_FORMAT = 3  # part of the key: raise it when what is stored changes


@dataclass
class TeacherCache:
    """Store what the teacher answers, so that later epochs, runs and methods need not ask it again.

    TeacherOutputs are kept for each epoch and sample in a folder of their own for everything that they depend on: the
    teacher's weights, normalisation and precision, the images, the augmentation and its seed, and the settings below.
    Anything else gets another folder. In the run that writes, the student already sees what is stored, so that it
    learns the same as one that replays.

    Attributes:
        folder: where caches are kept; null means the folder teachers in $LQKD_CACHE, else in ~/.cache/lqkd.
        dtype: of the stored numbers: ``float16`` or ``float32``.
        top_k: keep this many of a teacher's logits, of a text for each token, and share the rest's probability out
            evenly; null keeps all. :class:`~lqkd.losses.ForwardKL` and its like with the same ``top_k`` and temperature
            1 say of these what they say of all.
        epochs: the first epochs that are stored, the teacher answers live in later ones; null means all.
        max_bytes: a training that would store more is refused.

    Raises:
        UsageError: when a setting is not possible.
    """

    folder: str | None = None
    dtype: str = "float16"
    top_k: int | None = None
    epochs: int | None = None
    max_bytes: int = 10 * 2**30

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"teacher_cache.dtype={self.dtype!r} is unknown: use {' or '.join(DTYPES)}")
        for name in ("top_k", "epochs", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"teacher_cache.{name}={value} is not possible: it must be at least 1")

    def open(
        self,
        key: dict[str, Any],
        indices: Tensor,
        epochs: int,
        teachers: Sequence[str],
        shapes: Callable[[], TensorShapes],
        class_axis: int = 1,
    ) -> OpenCache:
        """The cache of ``key``, made where there is none.

        Args:
            key: all that answers depend on, as JSON values; an empty ``augmentation`` of its ``data`` means that an
                image is the same in all epochs.
            indices: (N,) int64, sorted: the indices of all training samples.
            epochs: of the training.
            teachers: their names, in the order in which the key tells of them.
            shapes: gives the shapes of all that is stored of them; called only for a new cache.
            class_axis: of their outputs (B, ...); ``top_k`` takes the largest along the last axis alone.

        Raises:
            UsageError: when it would be too large, for ``max_bytes`` or for the disk, or the folder cannot be written.
        """
        root = default_cache_dir() / "teachers" if self.folder is None else Path(self.folder).expanduser()
        key = json.loads(json.dumps(key | {"format": _FORMAT, "dtype": self.dtype, "top_k": self.top_k}))
        repeats = not key["data"]["augmentation"]
        stored = 1 if repeats else min(epochs, self.epochs or epochs)
        folder, header = _find(root, key)
        if header is None:
            header = {"key": key, "tensors": shapes()}
        tensors = [[(name, tuple(shape)) for name, shape in of_teacher] for of_teacher in header["tensors"]]
        self._check_top_k([of_teacher[0][1] for of_teacher in tensors], class_axis)
        codec = Codec(tuple(teachers), tensors, self.dtype, self.top_k)
        store = RecordStore(folder, len(indices), codec.layout)
        self._check_size(store, stored, folder)
        try:
            if not (folder / "header.json").exists():
                write_json(folder / "header.json", header)
        except OSError as error:
            raise UsageError(f"teacher_cache.folder={root} cannot be written: {error}") from error
        return OpenCache(folder, store, codec, indices.cpu().numpy(), repeats, self.epochs)

    def _check_top_k(self, outputs: Sequence[tuple[int, ...]], class_axis: int) -> None:
        if self.top_k is None:
            return
        if any(class_axis not in (-1, len(shape)) for shape in outputs):
            raise UsageError(
                f"teacher_cache.top_k={self.top_k} is not possible: teachers answer with {outputs[0]} numbers for a "
                "sample, of which the last axis is not that of classes"
            )
        classes = min(shape[-1] for shape in outputs)
        if self.top_k >= classes:
            raise UsageError(
                f"teacher_cache.top_k={self.top_k} is not possible: it must be less than the number of classes, which "
                f"is {classes}"
            )

    def _check_size(self, store: RecordStore, epochs: int, folder: Path) -> None:
        record, present = store.layout.itemsize, store.bytes_on_disk()
        size = epochs * store.samples * record
        needs = f"{_readable(size)} ({store.samples} samples x {epochs} epochs x {record} bytes)"
        if size > self.max_bytes:
            raise UsageError(
                f"the teacher cache needs {needs}, more than teacher_cache.max_bytes={self.max_bytes}: raise that, or "
                "store fewer epochs, or only the top_k logits"
            )
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if size - present > free:
            raise UsageError(f"the teacher cache needs {needs}: teacher_cache.folder has {_readable(free)} left")
        rank_zero_info(f"teacher cache in {folder}: {needs}, of which {_readable(min(present, size))} are there")


def _find(root: Path, key: dict[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """The folder of ``key`` and its header, None for a new one; one with a damaged or foreign header is skipped."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    for attempt in count(1):
        folder = root / (name if attempt == 1 else f"{name}-{attempt}")
        path = folder / "header.json"
        if not path.exists():
            return folder, None
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["key"] == key and "tensors" in header:
                return folder, header
        except (OSError, ValueError, KeyError, TypeError):
            pass
        rank_zero_warn(f"the teacher cache in {folder} has another or a damaged header.json and is not used")
    raise AssertionError("count() never ends")


@dataclass
class OpenCache:
    """The cache of a training: answers a batch from what is stored, or asks the teacher and stores what it says."""

    folder: Path
    store: RecordStore
    codec: Codec
    indices: np.ndarray
    """(N,) int64, sorted: the index of the sample of each row."""
    repeats: bool
    """Whether an image is the same in all epochs."""
    limit: int | None
    """The number of epochs that are stored; None for all."""
    asked: int = field(default=0, init=False)
    """Batches that the teacher was asked for."""
    _full: bool = field(default=False, init=False)

    def answers(self, images: Tensor, indices: Tensor, epoch: int, ask: Callable[[], TeacherOutputs]) -> TeacherOutputs:
        """TeacherOutputs to a batch.

        A batch of which an answer is missing is asked for as a whole, so that it is computed as in a run that was never
        interrupted; what is there already stays.

        Args:
            images: (B, C, H, W), as the student sees them.
            indices: (B,) int64 indices of the samples.
            epoch: counted from 0.
            ask: gives the teacher's live answers.

        Raises:
            UsageError: when stored answers belong to other images than these, or float16 cannot hold the teacher's.
        """
        epoch = 0 if self.repeats else epoch
        if self.limit is not None and epoch >= self.limit:
            self.asked += 1
            return ask()
        rows = self._rows(indices)
        records, present = self.store.read(epoch, rows)
        projections = projection(images)
        self._check_images(records["image"][present], projections.cpu().numpy()[present], epoch, rows[present])
        if not present.all():
            self.asked += 1
            missing = ~present
            fresh = np.zeros(len(rows), self.store.layout)
            self.codec.encode(fresh, ask(), projections)
            records[missing] = fresh[missing]
            self._write(epoch, rows[missing], records[missing])
        return self.codec.decode(records, images.device)

    def _rows(self, indices: Tensor) -> np.ndarray:
        wanted = indices.cpu().numpy()
        rows = np.searchsorted(self.indices, wanted)
        assert (self.indices[np.minimum(rows, len(self.indices) - 1)] == wanted).all(), "not a training sample"
        return rows

    def _check_images(self, stored: np.ndarray, given: np.ndarray, epoch: int, rows: np.ndarray) -> None:
        """Rounding moves a projection by less than 0.01 (see :func:`~lqkd.teachers.cache.codec.projection`)."""
        wrong = np.flatnonzero(np.abs(stored - given) > 0.01 + 1e-4 * np.abs(stored))
        if len(wrong):
            sample = self.indices[rows[wrong[0]]]
            raise UsageError(
                f"the teacher cache in {self.folder} answers for another image of sample {sample} "
                f"in epoch {epoch} than the data give: the DataModule's augmentation_key() does not name everything "
                "that changes an image, or an image depends on others in its batch; train without teacher_cache"
            )

    def _write(self, epoch: int, rows: np.ndarray, records: np.ndarray) -> None:
        if self._full:
            return
        try:
            self.store.write(epoch, rows, records)
        except OSError as error:
            self._full = True
            rank_zero_warn(f"the teacher cache cannot be written any more and the teacher goes on live: {error}")


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
