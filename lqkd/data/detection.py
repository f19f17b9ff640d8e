"""The common parent of image sets with boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.data.augment import normalize
from lqkd.data.base import ImageDataModule, ImageSet
from lqkd.data.boxes import Boxed, BoxedImages, CroppedBoxes
from lqkd.data.encoded import EncodedImages
from lqkd.data.folder import FolderDataModule, check_test_fraction, of_one_class
from lqkd.data.loader import Batch, TensorBatches
from lqkd.data.readable import refuse_unreadable
from lqkd.data.resized_crop import check_crop_scale
from lqkd.data.worker_loader import WorkerBatches, check_workers, worker_batches
from lqkd.errors import UsageError
from lqkd.utils.tables import write_csv


class DetectionDataModule(ImageDataModule):
    """Images with boxes around what they show, for the task :class:`~lqkd.tasks.Detection`.

    Batches are :class:`~lqkd.data.Batch`, whose ``labels`` are a dict for each image, on the device: ``boxes`` (N, 4)
    float32 xyxy in pixels of the resized image, and ``labels`` (N,) int64 from 0. Training takes a random window of an
    image, resized, and may mirror half of them; evaluation takes whole images, resized. Boxes go with their images.
    What is done to an image depends on (seed, epoch, image) alone. Metrics are in pixels of ``image_size``.

    Args:
        image_size: Height and width of what networks see, in pixels: multiples of the network's coarsest stride.
        batch_size: Training images per process and step.
        eval_batch_size: Images per process and step in validation and test; null means batch_size.
        crop_scale: Smallest and largest share of an image's area that a random window of training takes.
        horizontal_flip: Whether half of the training images are mirrored.
        validation_fraction: Share of the training set held out for validation where the data say nothing, in (0, 1).
        num_workers: Processes that decode, for each training process; null means one per processor core, at most 8,
            and none for fewer than 1,000 images.
        seed: Seed of the split, the order and the augmentation; null means the run's seed (seed_everything), else 0.
        mean: Channel means on the [0, 1] scale that are subtracted; null means those of ImageNet.
        std: Channel standard deviations on the [0, 1] scale to divide by; null means those of ImageNet.
        limit_train: Train on only this many images, for quick studies; null means all.

    Raises:
        UsageError: when a setting is out of range.
    """

    default_mean = (0.485, 0.456, 0.406)  # of ImageNet, which most published weights expect
    default_std = (0.229, 0.224, 0.225)
    whole_images = True
    """Evaluation cuts nothing off."""

    def __init__(
        self,
        *,
        image_size: tuple[int, int] = (320, 320),
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        horizontal_flip: bool = True,
        validation_fraction: float = 0.2,
        num_workers: int | None = None,
        seed: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        limit_train: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            horizontal_flip=horizontal_flip,
            validation_fraction=validation_fraction,
            seed=seed,
            mean=mean,
            std=std,
            limit_train=limit_train,
        )
        whole = isinstance(image_size, (tuple, list)) and all(isinstance(side, int) for side in image_size)
        if not whole or len(image_size) != 2 or min(image_size) < 1:
            raise UsageError(f"image_size={image_size!r} is not accepted: two whole numbers >= 1, height and width.")
        self.image_size = (image_size[0], image_size[1])
        self.crop_scale = check_crop_scale(crop_scale)
        self.num_workers = check_workers(num_workers)

    def preprocess(self, batch: Batch, *, train: bool, epoch: int) -> Batch:
        """Normalise a batch on its device; what is random has been done before, to image and boxes alike."""
        return batch._replace(images=normalize(batch.images, self.mean, self.std))

    def augment(self, epoch: int | Tensor, images: Tensor, indices: Tensor, *of_mixing: Tensor) -> dict[str, Tensor]:
        """Normalise images (B, C, H, W) uint8; see the parent."""
        return {"images": normalize(images, self.mean, self.std)}

    def augmentation_key(self) -> dict[str, Any]:
        """All settings that, with epoch and index, decide what a training image looks like; see the parent."""
        crop = {"image_size": list(self.image_size), "crop_scale": list(self.crop_scale)}
        return {"seed": self.run_seed, **super().augmentation_key(), **crop}

    def _batches(
        self, images: Tensor | EncodedImages, labels: Tensor, indices: Tensor, *, train: bool, **settings: Any
    ) -> WorkerBatches:
        plan = TensorBatches(torch.empty(len(labels), 0, dtype=torch.uint8), labels, indices, **settings)
        crop_scale = self.crop_scale if train else None
        flip = train and self.augmentation.horizontal_flip
        cropped = CroppedBoxes(images, seed=self.run_seed, crop_scale=crop_scale, flip=flip)
        return worker_batches(plan, cropped, self.num_workers, self.trainer)


class DetectionFolder(FolderDataModule, DetectionDataModule, ABC):
    """Images with boxes in files; a subclass reads their annotations, in :meth:`annotated`.

    Where there are only a part for training and another one, this is for testing, and ``validation_fraction`` of the
    training part is held out; of images without parts ``test_fraction`` are for testing, the same ones in every run.

    Args:
        root: the folder.
        test_fraction: Share of all images held out for testing where there are no parts, in (0, 1).
        leave_out_empty: Whether boxes without an area are left out, with a warning; otherwise they are refused.
        settings: Those of :class:`DetectionDataModule`.

    Raises:
        UsageError: when a setting is out of range, an annotation is not possible, or no image has an object.
    """

    def __init__(
        self, *, root: str, test_fraction: float = 0.2, leave_out_empty: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.test_fraction, self.leave_out_empty = check_test_fraction(test_fraction), leave_out_empty
        self._read: tuple[dict[str, list[Boxed]], tuple[str, ...]] | None = None

    @abstractmethod
    def annotated(self) -> tuple[dict[str, list[Boxed]], tuple[str, ...], list[str]]:
        """By part (``train``, ``val``, ``test``, or ``all``) its images; the classes; what is said of empty boxes."""

    def prepare_data(self) -> None:
        """Read every image of a small set once, in one process while the others wait."""
        parts, names = self._parts()
        everything = [boxed for part in parts.values() for boxed in part]
        refuse_unreadable(BoxedImages(everything, self.image_size, names), "images with boxes cannot be used")

    def load(self) -> ImageSet:
        """Read all annotations; no image is opened."""
        found, names = self._parts()
        parts = dict(found)
        if "all" in parts:
            parts = self._hold_out_test(parts["all"])
        train = parts["train"]
        if {"val", "test"} <= parts.keys():
            self._given_validation = len(parts["val"])
            train = train + parts["val"]
        test = parts["test"] if "test" in parts else parts["val"]
        sets = [BoxedImages(part, self.image_size, names) for part in (train, test)]
        return ImageSet(sets[0], of_one_class(len(train)), sets[1], of_one_class(len(test)), names)

    def write_split(self, target: Path) -> None:
        """Write a table that says of each image whether it is for training, validation or testing; needs ``setup``.

        Columns: ``split`` (``train``, ``val`` or ``test``), and ``file``, a name below ``root`` that is escaped as
        :func:`lqkd.utils.escaping.csv_cell` says.
        """
        images = self._loaded()
        tested = torch.arange(len(images.test_labels))
        groups = (
            ("train", images.train_images, self.train_indices),
            ("val", images.train_images, self.val_indices),
            ("test", images.test_images, tested),
        )
        rows = [
            {"split": name, "file": self._file(of, index)} for name, of, indices in groups for index in indices.tolist()
        ]
        write_csv(target, rows, ("split", "file"))

    def test_files(self) -> list[str]:
        """Names of the test images below ``root``, in their order; needs ``setup``."""
        images = self._loaded()
        return [self._file(images.test_images, index) for index in range(len(images.test_labels))]

    def _file(self, images: Tensor | EncodedImages, index: int) -> str:
        assert isinstance(images, BoxedImages)
        return Path(images.files.path(index)).relative_to(self.root).as_posix()

    def _parts(self) -> tuple[dict[str, list[Boxed]], tuple[str, ...]]:
        if self._read is None:
            if not self.root.is_dir():
                raise UsageError(f"root={self.root} does not exist: give a folder of images and annotations.")
            parts, names, empty = self.annotated()
            self._check_parts(parts)
            if empty:
                more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
                if not self.leave_out_empty:
                    raise UsageError(f"{empty[0]}{more}: correct them, or give leave_out_empty: true.")
                rank_zero_warn(f"left out {len(empty)} boxes without an area: {empty[0]}{more}")
            self._read = parts, names
        return self._read

    def _check_parts(self, parts: dict[str, list[Boxed]]) -> None:
        for name, part in parts.items():
            where = f"root={self.root}" if name == "all" else f"the part {name!r} of root={self.root}"
            if not part:
                raise UsageError(f"{where} has no image.")
            if not any(len(boxed.labels) for boxed in part):
                raise UsageError(f"no image of {where} has an object: there is nothing to find.")
        listed: dict[str, str] = {}
        for name, boxed in ((name, boxed) for name, part in parts.items() for boxed in part):
            other = listed.setdefault(boxed.image, name)
            if other != name:
                raise UsageError(f"image {boxed.image} is in the parts {other!r} and {name!r}: it can be in one only.")
        if len(listed) < sum(map(len, parts.values())):
            image, times = Counter(boxed.image for part in parts.values() for boxed in part).most_common(1)[0]
            raise UsageError(f"image {image} is listed {times} times: list it once.")
        if "all" not in parts and (parts.keys() == {"train"} or "train" not in parts):
            raise UsageError(
                f"root={self.root} has {' and '.join(parts) or 'nothing'}: a part 'train' and at least one of 'val' "
                "and 'test' are needed"
            )

    def _hold_out_test(self, boxed: list[Boxed]) -> dict[str, list[Boxed]]:
        parts = self._test_apart(of_one_class(len(boxed)))
        return {name: [boxed[index] for index in indices] for name, indices in parts.items()}
