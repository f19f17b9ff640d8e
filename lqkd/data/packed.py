"""Folders of small images, decoded once and packed into one file of uint8 tensors."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.data.class_folders import check_same_classes, list_class_folders
from lqkd.data.decode import decode
from lqkd.errors import UsageError
from lqkd.utils.files import atomic_path

_FORMAT = "2"  # part of the fingerprint: raise it when what is packed changes


def read_class_folders(root: Path, *, size: int, cache_dir: Path, mode: Literal["RGB", "L"] = "RGB") -> ImageSet:
    """Read ``root/{train,test}/<class>/<image>``, from the packed copy where there is one.

    Class names in sorted order give the labels, and images come in the sorted order of class and name, both as in
    torchvision's ``ImageFolder``. The packed copy is found by the names, sizes and modification times of all images, so
    a changed folder is decoded again. Where ``cache_dir`` cannot be written, a warning says so and the images are
    decoded again next time.

    Args:
        root: the folder that holds ``train`` and ``test``.
        size: height and width that every image must have, in pixels.
        cache_dir: where packed copies are kept; made when missing.
        mode: ``RGB`` for three channels, ``L`` for one.

    Raises:
        UsageError: when a class folder is empty, the two parts have different classes, or an image cannot be read or
            has another size.
    """
    train, test = list_class_folders(root / "train"), list_class_folders(root / "test")
    check_same_classes(root / "train", list(train), root / "test", list(test))
    parts = {"train": train, "test": test}
    cache = cache_dir / f"folders-{_fingerprint(root, parts, f'{size} {mode}')}.pt"
    packed = _read_cache(cache)
    if packed is None:
        packed = {}
        for name, classes in parts.items():
            packed[f"{name}_images"], packed[f"{name}_labels"] = _decode_part(classes, size, mode)
        _write_cache(cache, packed)
    return ImageSet(
        packed["train_images"], packed["train_labels"], packed["test_images"], packed["test_labels"], tuple(train)
    )


def _fingerprint(root: Path, parts: dict[str, dict[str, list[str]]], kind: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {kind}".encode())
    for classes in parts.values():
        for path in chain.from_iterable(classes.values()):
            stat = os.stat(path)
            name = path.removeprefix(str(root))  # relative, so that a moved folder keeps its packed copy
            digest.update(os.fsencode(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return digest.hexdigest()[:16]


def _decode_part(classes: dict[str, list[str]], size: int, mode: Literal["RGB", "L"]) -> tuple[Tensor, Tensor]:
    """(N, C, size, size) uint8 and (N,) int64."""
    paths = list(chain.from_iterable(classes.values()))
    images = np.empty((len(paths), 3 if mode == "RGB" else 1, size, size), dtype=np.uint8)
    with ThreadPool(os.cpu_count()) as pool:  # decoders release the GIL
        for row, pixels in enumerate(pool.imap(partial(_decode, size=size, mode=mode), paths, chunksize=64)):
            images[row] = pixels.transpose(2, 0, 1)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(group) for group in classes.values()]))
    return torch.from_numpy(images), labels


def _decode(path: str, size: int, mode: Literal["RGB", "L"]) -> np.ndarray:
    """(size, size, C) uint8."""
    pixels = decode(path, path, mode)
    if pixels.shape[:2] != (size, size):
        height, width = pixels.shape[:2]
        raise UsageError(f"{path} is {width}x{height} pixels: every image must be {size}x{size}.")
    return pixels


def _read_cache(cache: Path) -> dict[str, Tensor] | None:
    if not cache.is_file():
        return None
    try:
        # Mapped, so that the processes of one machine share one copy in memory.
        packed: dict[str, Tensor] = torch.load(cache, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None  # damaged: it is packed again
    return packed


def _write_cache(cache: Path, packed: dict[str, Tensor]) -> None:
    try:
        with atomic_path(cache) as temporary:
            torch.save(packed, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a folder or disk that it cannot write as RuntimeError
        warnings.warn(
            f"cache_dir={cache.parent} cannot be written, so the images are decoded again in every run: {error}",
            stacklevel=2,
        )
