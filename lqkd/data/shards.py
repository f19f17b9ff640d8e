"""Pack folders of images into tar shards for :class:`~lqkd.data.StreamedImageNet`.

``python -m lqkd make-shards SOURCE DEST`` reads ``SOURCE/{train,val}/<class>/<image>`` and writes
``DEST/{train,val}/<part>-000000.tar ...``, in the format of WebDataset, and an index beside them.
"""

from __future__ import annotations

import io
import os
import tarfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from lqkd.data.class_folders import check_same_classes, list_class_folders
from lqkd.data.decode import decode
from lqkd.data.shard_index import INDEX, PARTS, ShardIndex, import_webdataset, write_index
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_SHARDING, random_bits
from lqkd.utils.files import atomic_path
from lqkd.utils.progress import Progress
from lqkd.utils.renames import moved_command

_AT_ONCE = 256  # images in memory


def make_shards(source: Path, destination: Path, shard_bytes: int) -> None:
    """Pack both parts of ``source``; images are mixed over the shards, the same way each time.

    Every image is decoded once, so that a damaged one is found now and not in the middle of a training.

    Args:
        source: holds ``train`` and ``val`` with the same class folders.
        destination: a folder without shards; made when missing.
        shard_bytes: size from which on a shard is full.

    Raises:
        UsageError: when webdataset is not installed, an image or class folder is unusable or shards are there already.
    """
    parts = {part: list_class_folders(source / part) for part in PARTS if (source / part).is_dir()}
    if len(parts) < len(PARTS):
        raise UsageError(f"{source} must hold train and val, each with one folder of images per class.")
    check_same_classes(source / "train", list(parts["train"]), source / "val", list(parts["val"]))
    for part in PARTS:
        if (destination / part / INDEX).exists():
            raise UsageError(f"{destination / part} holds shards already: choose another folder or remove it.")
    for part, classes in parts.items():
        index = _pack(classes, destination / part, part, shard_bytes)
        write_index(destination / part, index)
        print(f"{destination / part}: {len(index.label)} images in {len(index.shard_names)} shards")


def _pack(classes: dict[str, list[str]], folder: Path, part: str, shard_bytes: int) -> ShardIndex:
    listed = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    mixed = random_bits(0, 0, torch.arange(len(listed)), STREAM_SHARDING).argsort(stable=True).tolist()
    images = [listed[position] for position in mixed]
    rows: list[tuple[int, int, int, int]] = []
    names: list[str] = []
    sizes: list[int] = []
    with Progress(f"writing {part}") as bar:
        while len(rows) < len(images):
            name = f"{part}-{len(names):06d}.tar"
            with atomic_path(folder / name) as temporary:
                _fill(temporary, images, len(rows), shard_bytes, bar)
                rows += [(len(names), *place) for place in _places(temporary, images, len(rows))]
            names.append(name)
            sizes.append((folder / name).stat().st_size)
    shard, offset, size, label = np.array(rows, dtype=np.int64).T
    return ShardIndex(
        shard.astype(np.int32), offset, size, label, np.array(names), np.array(sizes), np.array(list(classes))
    )


def _fill(target: Path, images: list[tuple[str, int]], start: int, shard_bytes: int, bar: Progress) -> None:
    """Write images from ``start`` on until the shard is full."""
    webdataset = import_webdataset()
    with (
        open(target, "wb") as stream,
        webdataset.TarWriter(stream, encoder=False, compress=False, mtime=0) as shard,
        ThreadPool(os.cpu_count()) as pool,  # decoders release the GIL
    ):
        position = start
        while position < len(images) and stream.tell() < shard_bytes:
            bar.update(position, len(images))
            some = images[position : position + _AT_ONCE]
            for (path, label), content in zip(some, pool.map(_read_checked, [path for path, _ in some]), strict=True):
                if stream.tell() >= shard_bytes:
                    break
                suffix = path.rpartition(".")[2].lower()
                shard.write({"__key__": f"{position:09d}", "cls": str(label).encode(), suffix: content})
                position += 1


def _read_checked(path: str) -> bytes:
    content = Path(path).read_bytes()
    decode(io.BytesIO(content), path)
    return content


def _places(shard: Path, images: list[tuple[str, int]], start: int) -> list[tuple[int, int, int]]:
    """Offset, size and label of each image in a shard, as they are on disk."""
    with tarfile.open(shard) as archive:
        members = [member for member in archive if not member.name.endswith(".cls")]
    assert [int(member.name.partition(".")[0]) for member in members] == list(range(start, start + len(members)))
    labels = [label for _, label in images[start : start + len(members)]]
    return [(member.offset_data, member.size, label) for member, label in zip(members, labels, strict=True)]


if __name__ == "__main__":
    moved_command("lqkd.data.shards", "make-shards")
