"""ImageNet from tar shards on a file system that many machines share, or behind a URL."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.data.decode import decode
from lqkd.data.decoding import DecodingDataModule
from lqkd.data.encoded import EncodedImages
from lqkd.data.loader import EpochShuffle
from lqkd.data.shard_index import INDEX, PARTS, ShardIndex, import_webdataset, parse_index
from lqkd.errors import UsageError, first_line
from lqkd.utils.counter_rng import STREAM_ORDER, STREAM_SHARDS, random_bits
from lqkd.utils.files import atomic_path, default_cache_dir

_BLOCK = 512  # bytes, of a tar file


class StreamedImageNet(DecodingDataModule):
    """ImageNet, or any set with train and val, from the tar shards that ``python -m lqkd make-shards`` makes.

    For clusters: a few hundred large files instead of a million small ones. The shards are in the format of WebDataset;
    an index beside them says where each image lies, so that batches, splits and resuming are as exact as for images in
    memory: the same for every number of machines and workers, no image twice, none left out. Behind a URL, each
    machine fetches a shard when it needs it and keeps it in ``cache_dir``, which must have room for all of them.

    Training shuffles the shards and then the images of ``shuffle_shards`` of them at a time.

    Args:
        root: Folder with train and val, or its URL (http, https, s3, gs), opened as webdataset opens it.
        batch_size: Training images per process and step.
        validation_fraction: Share of the training set held out for validation, stratified by class, in (0, 1).
        shuffle_shards: How many shards are mixed at a time.
        cache_dir: Folder for shards fetched from a URL; null means $LQKD_CACHE, else ~/.cache/lqkd.
        kwargs: The other settings of :class:`~lqkd.data.DecodingDataModule`.

    Raises:
        UsageError: when webdataset is not installed, or an index, shard or image is missing, damaged or does not
            belong to the others.
    """

    def __init__(
        self,
        *,
        root: str,
        batch_size: int = 256,
        validation_fraction: float = 0.01,
        shuffle_shards: int = 16,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, **kwargs)
        if shuffle_shards < 1:
            raise UsageError(f"shuffle_shards={shuffle_shards} is not accepted: it must be at least 1.")
        self.root = root if "://" in root else str(Path(root).expanduser())
        self.shuffle_shards = shuffle_shards
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()

    def prepare_data(self) -> None:
        """Check index and shards, in one process while the others wait."""
        self.load()

    def load(self) -> ImageSet:
        """Read the index of both parts and check the sizes of the shards; no image is opened."""
        train, val = (ImageShards(f"{self.root}/{part}", self.cache_dir, self.image_size) for part in PARTS)
        if train.class_names != val.class_names:
            raise UsageError(f"the shards of train and val in root={self.root} have different classes: make both anew.")
        return ImageSet(train, train.labels(), val, val.labels(), train.class_names)

    def _order(self, images: EncodedImages, indices: Tensor) -> EpochShuffle:
        assert isinstance(images, ImageShards)
        return ShardShuffle(indices, self.run_seed, images.shards()[indices], self.shuffle_shards)


class ShardShuffle(EpochShuffle):
    """Shards in random order, and all images of a few of them at a time mixed.

    A pure function of (seed, epoch, the set of samples), as its parent is.

    Args:
        indices: (N,) int64 sample ids.
        seed: of the order.
        shards: (N,) int64 shard of each sample.
        together: how many shards are mixed at a time.
    """

    def __init__(self, indices: Tensor, seed: int, shards: Tensor, together: int) -> None:
        super().__init__(indices, seed)
        self.shards = shards
        self.together = together

    def order(self) -> Tensor:
        """Return the (N,) int64 sample ids in the order of the current epoch."""
        every = torch.arange(int(self.shards.max()) + 1)
        place = random_bits(self.seed, self.epoch, every, STREAM_SHARDS).argsort(stable=True).argsort(stable=True)
        by_chance = random_bits(self.seed, self.epoch, self.indices, STREAM_ORDER).argsort(stable=True)
        group = place[self.shards[by_chance]] // self.together
        return self.indices[by_chance[group.argsort(stable=True)]]


class ImageShards(EncodedImages):
    """The images of one part, read from their places in tar files.

    Args:
        folder: of the shards and their index; a path or a URL.
        cache_dir: where shards fetched from a URL are kept.
        size: height and width, in pixels, that a loader brings images to.

    Raises:
        UsageError: when the index or a shard is missing or damaged.
    """

    def __init__(self, folder: str, cache_dir: Path, size: int) -> None:
        self._remote = "://" in folder
        self._folder = folder
        content = self._index_content()
        self._fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._index: ShardIndex = parse_index(content, f"{folder}/{INDEX}")
        self._cache_dir = cache_dir / f"shards-{self._fingerprint}"
        self._open: dict[int, int] = {}  # shard -> file descriptor
        super().__init__(len(self._index.label), size)
        self.class_names = tuple(str(name) for name in self._index.class_names)
        if not self._remote:
            for shard in range(len(self._index.shard_names)):
                self._check_size(shard, Path(folder) / str(self._index.shard_names[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a worker opens files of its own

    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(self._index.label)

    def shards(self) -> Tensor:
        """(N,) int64 shard of each image."""
        return torch.from_numpy(self._index.shard.astype(np.int64))

    def read(self, index: int) -> np.ndarray:
        """Decode one image: (H, W, 3) uint8 in its own size.

        Raises:
            UsageError: when the shard does not hold this image, with its label, at its place.
        """
        shard, offset, size = (int(column[index]) for column in self._index[:3])
        name = f"{self._folder}/{self._index.shard_names[shard]}, image {index:09d}"
        # A label's header and content lie before an image's header: both are compared with what the index says.
        start = offset - 3 * _BLOCK
        content = os.pread(self._descriptor(shard), 3 * _BLOCK + size, start) if start >= 0 else b""
        label = content[_BLOCK : 2 * _BLOCK].rstrip(b"\0")
        key = content[2 * _BLOCK : 2 * _BLOCK + 10]
        if len(content) != 3 * _BLOCK + size or key != f"{index:09d}.".encode() or label != _text(self._index, index):
            raise UsageError(f"{name} is not where the index says: the shard is of another set, or damaged.")
        return decode(io.BytesIO(content[3 * _BLOCK :]), name)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images, their labels, order and sizes."""
        return self._fingerprint

    def _index_content(self) -> bytes:
        name = f"{self._folder}/{INDEX}"
        try:
            if not self._remote:
                return Path(name).read_bytes()
            with import_webdataset().gopen(name) as stream:
                content: bytes = stream.read()
                return content
        except OSError as error:
            raise UsageError(
                f"{name} cannot be read ({first_line(error)}): python -m lqkd make-shards SOURCE DEST makes shards."
            ) from error

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            name = str(self._index.shard_names[shard])
            path = self._fetched(shard, name) if self._remote else Path(self._folder) / name
            try:
                self._open[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {first_line(error)}.") from error
        return self._open[shard]

    def _fetched(self, shard: int, name: str) -> Path:
        """The copy of a shard on this machine, fetched by the first process that needs it."""
        import fcntl  # not on Windows

        path = self._cache_dir / name
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    with (
                        atomic_path(path) as temporary,
                        open(temporary, "wb") as target,
                        import_webdataset().gopen(f"{self._folder}/{name}") as stream,
                    ):
                        shutil.copyfileobj(stream, target, 1 << 20)
                        target.flush()
                        self._check_size(shard, temporary)
        except OSError as error:
            raise UsageError(f"{self._folder}/{name} cannot be fetched into {path}: {first_line(error)}.") from error
        return path

    def _check_size(self, shard: int, path: Path) -> None:
        expected, name = int(self._index.shard_bytes[shard]), f"{self._folder}/{self._index.shard_names[shard]}"
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise UsageError(
                f"{name} has {size} bytes instead of {expected}: it is cut short, missing or another file."
            )


def _text(index: ShardIndex, sample: int) -> bytes:
    return str(int(index.label[sample])).encode()
