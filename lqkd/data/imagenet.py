"""ImageNet from its folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.data.class_folders import check_same_classes, has_folders, list_class_folders, paths_and_labels
from lqkd.data.decoding import DecodingDataModule
from lqkd.data.encoded import ImageFiles
from lqkd.errors import UsageError


class ImageNet(DecodingDataModule):
    """ImageNet-1k (ILSVRC 2012) as ``train/<synset>/<image>`` and ``val/<synset>/<image>``, or any part of its classes.

    ImageNet's own validation images are what is tested on; what training is judged by is held out of its training
    images. The classes are the synsets, n01440764 first, which is the order of torchvision's and timm's weights.

    Args:
        root: Folder with train and val, each with one folder of images per synset.
        batch_size: Training images per process and step.
        validation_fraction: Share of the training set held out for validation, stratified by class, in (0, 1).
        kwargs: The other settings of :class:`~lqkd.data.DecodingDataModule`.

    Raises:
        UsageError: when the folders are not as they must be, with the way there; nothing is ever downloaded.
    """

    def __init__(self, *, root: str, batch_size: int = 256, validation_fraction: float = 0.01, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, **kwargs)
        self.root = Path(root).expanduser()
        self._prepared: ImageSet | None = None

    def prepare_data(self) -> None:
        """Check the folders, in one process while the others wait; no image is opened."""
        self._prepared = self._list()

    def load(self) -> ImageSet:
        """List all images; none is opened."""
        images, self._prepared = self._prepared or self._list(), None
        return images

    def _list(self) -> ImageSet:
        for part in ("train", "val"):
            check_synset_folders(self.root, part)
        train, val = list_class_folders(self.root / "train"), list_class_folders(self.root / "val")
        check_same_classes(self.root / "train", list(train), self.root / "val", list(val))
        return ImageSet(*self._part(train), *self._part(val), tuple(train))

    def _part(self, classes: dict[str, list[str]]) -> tuple[ImageFiles, Tensor]:
        paths, labels = paths_and_labels(classes)
        return ImageFiles(paths, self.image_size), labels


def check_synset_folders(root: Path, part: str) -> None:
    """Refuse a root whose ``part`` has no synset folders, and say how to get them.

    Raises:
        UsageError: when it is missing, not sorted into classes, or sorted into others than synsets.
    """
    folder = root / part
    way = f"torchvision.datasets.ImageNet({str(root)!r}, split={part!r}) makes it from the archives of image-net.org"
    if not folder.is_dir():
        raise UsageError(f"root={root} has no folder {part!r} with one folder of images per synset: {way}.")
    if not has_folders(folder):
        raise UsageError(f"{folder} is not sorted into one folder per synset (n01440764, ...): {way}.")
    other = [path.name for path in folder.iterdir() if path.is_dir() and not re.fullmatch(r"n\d{8}|\..*", path.name)]
    if other:
        raise UsageError(
            f"{folder} has folder {min(other)!r}, which is no synset (n01440764, ...): lqkd.data.ImageFolder reads"
            " folders of other names."
        )
