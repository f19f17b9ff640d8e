"""What the public sets of small images have in common: torchvision's files or folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lqkd.data.base import ImageDataModule, ImageSet
from lqkd.data.packed import read_class_folders
from lqkd.errors import UsageError, first_line
from lqkd.utils.files import default_cache_dir


class TorchvisionDataModule(ImageDataModule):
    """A set of small images that torchvision knows, from its files or from one folder of images per class.

    Class folders are ``train/<class>/<image>`` and ``test/<class>/<image>``, class names in sorted order giving the
    labels, in any format that Pillow reads. They are decoded once and packed into ``cache_dir``.

    Args:
        root: Folder that holds torchvision's files, or train and test with one folder of images per class.
        cache_dir: Folder for the packed copy of class folders; null means $LQKD_CACHE, else ~/.cache/lqkd.
        download: Whether to download torchvision's files into root when they are missing and it has no class folders.
        kwargs: The other settings of :class:`~lqkd.data.ImageDataModule`.

    Raises:
        UsageError: when ``root`` holds neither layout, or an image, label or class folder in it is unusable.
    """

    title: ClassVar[str]
    torchvision_name: ClassVar[str]
    torchvision_folder: ClassVar[str]
    expected_classes: ClassVar[int]
    image_size: ClassVar[int]
    mode: ClassVar[Literal["RGB", "L"]] = "RGB"

    def __init__(self, *, root: str, cache_dir: str | None = None, download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        images = read_class_folders(self.root, size=self.image_size, cache_dir=self.cache_dir, mode=self.mode)
        if len(images.class_names) != self.expected_classes:
            raise UsageError(
                f"root={self.root} has {len(images.class_names)} class folders: {self.title} has"
                f" {self.expected_classes}."
            )
        return images

    def _read_torchvision_files(self) -> ImageSet:
        folder = self.root / self.torchvision_folder
        try:
            parts = [self._torchvision(train=train) for train in (True, False)]
        except Exception as error:  # files that are missing, cut short or altered raise almost anything
            raise UsageError(f"{folder} is incomplete or damaged: {first_line(error)}.") from error
        (train_images, train_labels), (test_images, test_labels) = (self._tensors(folder, part) for part in parts)
        return ImageSet(train_images, train_labels, test_images, test_labels, tuple(parts[0].classes))

    def _tensors(self, folder: Path, part: Any) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) uint8 and (N,) int64."""
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets).to(torch.int64)
        if len(images) != len(labels):
            raise UsageError(f"{folder} has {len(images)} images for {len(labels)} labels: the files do not match.")
        if not bool(((labels >= 0) & (labels < self.expected_classes)).all()):
            raise UsageError(
                f"{folder} has labels from {labels.min()} to {labels.max()}: {self.title} has 0 to"
                f" {self.expected_classes - 1}."
            )
        return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()), labels

    def _download(self) -> None:
        try:
            self._torchvision(train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"download=true could not fetch {self.title} into root={self.root}: {error}.") from error

    def _torchvision(self, *, train: bool, download: bool = False) -> Any:
        """The part as torchvision reads it: ``data``, ``targets`` and ``classes``."""
        from torchvision import datasets

        return getattr(datasets, self.torchvision_name)(self.root, train=train, download=download)

    def _has_torchvision_files(self) -> bool:
        return (self.root / self.torchvision_folder).is_dir()

    def _has_class_folders(self) -> bool:
        return (self.root / "train").is_dir() and (self.root / "test").is_dir()
