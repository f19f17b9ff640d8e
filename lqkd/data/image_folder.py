"""Anyone's own images, one folder per class."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqkd.data.base import ImageSet
from lqkd.data.class_folders import check_same_classes, has_folders, list_class_folders, paths_and_labels
from lqkd.data.decoding import DecodingDataModule
from lqkd.data.encoded import ImageFiles
from lqkd.data.folder import FolderDataModule, check_test_fraction
from lqkd.data.parts import folders_of_parts, looked_for
from lqkd.data.readable import refuse_unreadable
from lqkd.errors import UsageError
from lqkd.utils.tables import write_csv


class ImageFolder(FolderDataModule, DecodingDataModule):
    """A folder of one's own images; the names of the class folders, sorted, are the classes.

    What ``root`` holds decides what a network is trained, selected and tested on:

    ========================================  ====================================================================
    ``CLASS/`` folders only                   ``test_fraction`` of the images are for testing, the same ones in
                                              every run; ``validation_fraction`` of the others for validation
    ``train/CLASS/`` and ``test/CLASS/``      ``validation_fraction`` of train is held out for validation
    ``train/CLASS/`` and ``val/CLASS/``       the same: the one folder that is not trained on is for testing
    ``train/``, ``val/`` and ``test/``        as they are named
    ========================================  ====================================================================

    All fractions are stratified by class. Up to 5,000 images are checked before the training starts.

    Args:
        root: Folder with one folder of images per class, or with train, val (also valid, validation) and test.
        batch_size: Training images per process and step.
        validation_fraction: Share of the training set held out for validation, stratified by class, in (0, 1).
        test_fraction: Share of all images held out for testing where root holds class folders only, in (0, 1).
        kwargs: The other settings of :class:`~lqkd.data.DecodingDataModule`.

    Raises:
        UsageError: when ``root`` has no class folders, the parts differ in their classes, a class has too few images
            or an image cannot be read.
    """

    def __init__(
        self,
        *,
        root: str,
        batch_size: int = 32,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, **kwargs)
        self.root = Path(root).expanduser()
        self.test_fraction = check_test_fraction(test_fraction)
        self._listed: dict[str, dict[str, list[str]]] | None = None

    def prepare_data(self) -> None:
        """Decode every image of a small set once, in one process while the others wait."""
        paths = list(chain.from_iterable(chain.from_iterable(classes.values()) for classes in self._parts().values()))
        refuse_unreadable(ImageFiles(paths, self.image_size), "images are damaged, remove or replace them")

    def load(self) -> ImageSet:
        """List all images; none is opened."""
        listed = self._parts()
        names = tuple(next(iter(listed.values())))
        if len(names) < 2:
            raise UsageError(f"root={self.root} has one class folder, {names[0]!r}: there must be at least two.")
        parts = {name: paths_and_labels(classes) for name, classes in listed.items()}
        if "all" in parts:
            parts = self._hold_out_test(*parts["all"])
        train_paths, train_labels = parts["train"]
        if {"val", "test"} <= parts.keys():
            paths, labels = parts["val"]
            self._given_validation = len(labels)
            train_paths, train_labels = train_paths + paths, torch.cat([train_labels, labels])
        test_paths, test_labels = parts["test"] if "test" in parts else parts["val"]
        return ImageSet(
            ImageFiles(train_paths, self.image_size),
            train_labels,
            ImageFiles(test_paths, self.image_size),
            test_labels,
            names,
        )

    def write_split(self, target: Path) -> None:
        """Write a table that says of each image whether it is for training, validation, testing or trust.

        Needs ``setup``. Columns: ``split`` (``train``, ``val``, ``test``, or ``trust`` for ``trust_fraction``),
        ``class`` and ``file``, its name below ``root``; names are escaped as :func:`lqkd.utils.escaping.csv_cell` says.
        """
        images = self._loaded()
        trained = self._files(images.train_images), images.train_labels
        tested = self._files(images.test_images), images.test_labels
        splits = (
            ("train", trained, self.train_indices),
            ("val", trained, self.val_indices),
            ("trust", trained, self.trust_indices),
            ("test", tested, torch.arange(len(images.test_labels))),
        )
        rows = [
            {"split": name, "class": self.class_names[int(labels[index])], "file": files[index]}
            for name, (files, labels), indices in splits
            for index in indices.tolist()
        ]
        write_csv(target, rows, ("split", "class", "file"))

    def _hold_out_test(self, paths: list[str], labels: Tensor) -> dict[str, tuple[list[str], Tensor]]:
        return {
            name: ([paths[index] for index in indices], labels[indices])
            for name, indices in self._test_apart(labels).items()
        }

    def _hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        validation, train = super()._hold_out(labels)
        left = torch.bincount(labels[train], minlength=self.num_classes)
        if not self._given_validation and not left.all():
            name = self.class_names[int(left.argmin())]
            raise UsageError(
                f"class {name!r} of root={self.root} has too few images: none is left for training once those for"
                " validation and testing are held out."
            )
        return validation, train

    def _parts(self) -> dict[str, dict[str, list[str]]]:
        """Name of the part (``train``, ``val``, ``test``, or ``all``) -> class name -> the paths of its images."""
        if self._listed is None:
            self._listed = self._list()
        return self._listed

    def _list(self) -> dict[str, dict[str, list[str]]]:
        if not self.root.is_dir():
            raise UsageError(
                f"root={self.root} does not exist{looked_for(self.root)}: give a folder with one folder of images per"
                " class, for a run that was moved as --data.init_args.root FOLDER; export and sensitivity take it from"
                " the run's config.yaml."
            )
        if not has_folders(self.root / "train"):
            return {"all": list_class_folders(self.root)}
        folders = folders_of_parts(self.root, "the class folders")
        parts = {name: list_class_folders(folder) for name, folder in folders.items()}
        for name, classes in parts.items():
            check_same_classes(folders["train"], list(parts["train"]), folders[name], list(classes))
        return parts
