"""Fashion-MNIST from its IDX files or from folders of images."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lqkd.data.torchvision_set import TorchvisionDataModule

_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


class FashionMNIST(TorchvisionDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images, 28x28 grey, 10 classes (Xiao et al., 2017).

    ``root`` holds either the four IDX files, packed with gzip or not, in torchvision's ``FashionMNIST/raw`` or in
    ``root`` itself, or one folder of images per class: ``train/<class>/<image>`` and ``test/<class>/<image>``. The IDX
    files give the classes in the set's own order, class folders in the sorted order of their names.

    Args:
        root: Folder that holds the IDX files, or train and test with one folder of images per class.
        cache_dir: Folder for the packed copy of class folders; null means $LQKD_CACHE, else ~/.cache/lqkd.
        download: Whether to download torchvision's files into root when they are missing and it has no class folders.
        crop_padding: Pixels of black added on every side before a random crop of the original size; 0 means no crop.
        horizontal_flip: Whether half of the training images are mirrored.
        kwargs: The other settings of :class:`~lqkd.data.ImageDataModule`.

    Raises:
        UsageError: when ``root`` holds neither layout, or an image, label or class folder in it is unusable.
    """

    default_mean = (0.2860,)
    default_std = (0.3530,)
    title = "Fashion-MNIST"
    torchvision_name = "FashionMNIST"
    torchvision_folder = "FashionMNIST/raw"
    expected_classes = 10
    image_size = 28
    mode = "L"

    def __init__(
        self,
        *,
        root: str,
        cache_dir: str | None = None,
        download: bool = False,
        crop_padding: int = 2,
        horizontal_flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root,
            cache_dir=cache_dir,
            download=download,
            crop_padding=crop_padding,
            horizontal_flip=horizontal_flip,
            **kwargs,
        )

    def _torchvision(self, *, train: bool, download: bool = False) -> Any:
        from torchvision.datasets import FashionMNIST as Reference
        from torchvision.datasets import mnist

        if download:
            return Reference(self.root, train=train, download=True)
        images, labels = _FILES[:2] if train else _FILES[2:]
        # Read file by file: torchvision's class knows neither files that are still packed nor another folder.
        return SimpleNamespace(
            data=self._read_idx(images, mnist.read_image_file),
            targets=self._read_idx(labels, mnist.read_label_file),
            classes=Reference.classes,
        )

    def _read_idx(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        folder = self._idx_folder()
        if (folder / name).is_file():
            return read(str(folder / name))
        with tempfile.TemporaryDirectory() as unpacked, gzip.open(folder / f"{name}.gz") as packed:
            path = Path(unpacked) / name
            path.write_bytes(packed.read())
            return read(str(path))

    def _idx_folder(self) -> Path:
        inner = self.root / self.torchvision_folder
        return inner if inner.is_dir() else self.root

    def _has_torchvision_files(self) -> bool:
        folder = self._idx_folder()
        return any((folder / f"{name}{suffix}").is_file() for name in _FILES for suffix in ("", ".gz"))
