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

import numpy as np
import torch
from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.errors import UsageError
from lqkd.files import atomic_path

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder
_FORMAT = "1"  # part of the fingerprint: raise it when what is packed changes


def default_cache_dir() -> Path:
    """Return the folder for packed data: the environment variable ``LQKD_CACHE``, else ``~/.cache/lqkd``."""
    return Path(os.environ.get("LQKD_CACHE") or Path.home() / ".cache" / "lqkd")


def read_class_folders(root: Path, *, size: int, cache_dir: Path) -> ImageSet:
    """Read ``root/{train,test}/<class>/<image>`` as RGB, from the packed copy where there is one.

    Class names in sorted order give the labels, and images come in the sorted order of class and name, both as in
    torchvision's ``ImageFolder``; other files and hidden folders are ignored. The packed copy is found by the names,
    sizes and modification times of all images, so a changed folder is decoded again. Where ``cache_dir`` cannot be
    written, a warning says so and the images are decoded again next time.

    Args:
        root: the folder that holds ``train`` and ``test``.
        size: height and width that every image must have, in pixels.
        cache_dir: where packed copies are kept; made when missing.

    Raises:
        UsageError: when a class folder is empty, the two parts have different classes, or an image cannot be read or
            has another size.
    """
    train, test = _list_part(root / "train"), _list_part(root / "test")
    if list(train) != list(test):
        differing = ", ".join(sorted(set(train) ^ set(test)))
        raise UsageError(
            f"{root}/train and {root}/test must hold the same class folders, but only one has: {differing}."
        )
    parts = {"train": train, "test": test}
    cache = cache_dir / f"folders-{_fingerprint(root, parts, size)}.pt"
    packed = _read_cache(cache)
    if packed is None:
        packed = {}
        for name, classes in parts.items():
            packed[f"{name}_images"], packed[f"{name}_labels"] = _decode_part(classes, size)
        _write_cache(cache, packed)
    return ImageSet(
        packed["train_images"], packed["train_labels"], packed["test_images"], packed["test_labels"], tuple(train)
    )


def _list_part(folder: Path) -> dict[str, list[str]]:
    """Class name -> the paths of its images, both sorted; strings, because 60,000 Path objects take a second."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"{folder} has no class folder: it must hold one folder of images per class.")
    classes = {}
    for name in names:
        files = sorted(os.listdir(folder / name))
        classes[name] = [f"{folder}/{name}/{file}" for file in files if file.lower().endswith(_SUFFIXES)]
        if not classes[name]:
            raise UsageError(f"{folder / name} holds no image: every class folder needs one ({', '.join(_SUFFIXES)}).")
    return classes


def _fingerprint(root: Path, parts: dict[str, dict[str, list[str]]], size: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {size}".encode())
    for classes in parts.values():
        for path in chain.from_iterable(classes.values()):
            stat = os.stat(path)
            name = path.removeprefix(str(root))  # relative, so that a moved folder keeps its packed copy
            digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _decode_part(classes: dict[str, list[str]], size: int) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) uint8 and (N,) int64."""
    paths = list(chain.from_iterable(classes.values()))
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    with ThreadPool(os.cpu_count()) as pool:  # decoders release the GIL
        for row, pixels in enumerate(pool.imap(partial(_decode, size=size), paths, chunksize=64)):
            images[row] = pixels.transpose(2, 0, 1)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(group) for group in classes.values()]))
    return torch.from_numpy(images), labels


def _decode(path: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise UsageError(f"{path} cannot be read as an image: {error}.") from error
    if pixels.shape != (size, size, 3):
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
