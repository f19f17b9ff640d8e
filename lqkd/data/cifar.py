"""CIFAR-10 from torchvision's files or from folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from lqkd.data.base import ImageDataModule, ImageSet
from lqkd.data.packed import default_cache_dir, read_class_folders
from lqkd.errors import UsageError

_SIZE = 32  # pixels


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32 RGB, 10 classes (Krizhevsky, 2009).

    ``root`` holds either torchvision's files (``cifar-10-batches-py``) or one folder of images per class:
    ``train/<class>/<image>`` and ``test/<class>/<image>``, class names in sorted order giving the labels, in any
    format that Pillow reads. Folders are decoded once and packed into ``cache_dir``.

    Args:
        root: Folder that holds cifar-10-batches-py, or train and test with one folder of images per class.
        cache_dir: Folder for the packed copy of class folders; null means $LQKD_CACHE, else ~/.cache/lqkd.
        download: Whether to download torchvision's files into root when they are missing and it has no class folders.
        crop_padding: Pixels of black added on every side before a random crop of the original size; 0 means no crop.
        horizontal_flip: Whether half of the training images are mirrored.
        kwargs: The other settings of :class:`~lqkd.data.ImageDataModule`.

    Raises:
        UsageError: when ``root`` holds neither layout, or an image or class folder in it is unusable.
    """

    default_mean = (0.4914, 0.4822, 0.4465)
    default_std = (0.2470, 0.2435, 0.2616)
    title: ClassVar[str] = "CIFAR-10"
    torchvision_name: ClassVar[str] = "CIFAR10"
    torchvision_folder: ClassVar[str] = "cifar-10-batches-py"
    expected_classes: ClassVar[int] = 10

    def __init__(
        self,
        *,
        root: str,
        cache_dir: str | None = None,
        download: bool = False,
        crop_padding: int = 4,
        horizontal_flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(crop_padding=crop_padding, horizontal_flip=horizontal_flip, **kwargs)
        self.root = Path(root).expanduser()
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.download = download
        self._prepared: ImageSet | None = None

    def prepare_data(self) -> None:
        """Download when asked to, and pack class folders, in one process while the others wait."""
        if self.download and not self._has_class_folders():
            self._download()  # does nothing where the files are there and whole
        # Kept for load: where nothing can be cached, this process need not decode twice.
        self._prepared = self._read()

    def load(self) -> ImageSet:
        """Return all images; where both layouts are present, torchvision's files."""
        images, self._prepared = self._prepared or self._read(), None
        return images

    def _read(self) -> ImageSet:
        if self._has_torchvision_files():
            return self._read_torchvision_files()
        if not self._has_class_folders():
            raise UsageError(
                f"root={self.root} does not hold {self.title}: it must be a folder with {self.torchvision_folder}, or"
                " with train/<class>/ and test/<class>/ folders of images; download=true fetches it."
            )
        images = read_class_folders(self.root, size=_SIZE, cache_dir=self.cache_dir)
        if len(images.class_names) != self.expected_classes:
            raise UsageError(
                f"root={self.root} has {len(images.class_names)} class folders: {self.title} has"
                f" {self.expected_classes}."
            )
        return images

    def _read_torchvision_files(self) -> ImageSet:
        try:
            train, test = (self._torchvision(train=train) for train in (True, False))
        except RuntimeError as error:  # a missing file or a wrong checksum
            raise UsageError(f"{self.root / self.torchvision_folder} is incomplete or damaged: {error}.") from error
        return ImageSet(
            torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),  # (N, 3, 32, 32) from (N, 32, 32, 3)
            torch.tensor(train.targets),
            torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(test.targets),
            tuple(train.classes),
        )

    def _download(self) -> None:
        try:
            self._torchvision(train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"download=true could not fetch {self.title} into root={self.root}: {error}.") from error

    def _torchvision(self, *, train: bool, download: bool = False) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.torchvision_name)(self.root, train=train, download=download)

    def _has_torchvision_files(self) -> bool:
        return (self.root / self.torchvision_folder).is_dir()

    def _has_class_folders(self) -> bool:
        return (self.root / "train").is_dir() and (self.root / "test").is_dir()
