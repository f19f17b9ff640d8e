"""Anyone's own images with masks, for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.data.augment import normalize, random_flip
from lqkd.data.base import ImageSet
from lqkd.data.class_folders import has_folders
from lqkd.data.encoded import EncodedImages
from lqkd.data.folder import FolderDataModule, check_test_fraction, of_one_class
from lqkd.data.loader import Batch, TensorBatches
from lqkd.data.mask_files import CroppedMasks, MaskedImages, list_pairs
from lqkd.data.parts import folders_of_parts, looked_for
from lqkd.data.readable import refuse_unreadable
from lqkd.data.resized_crop import check_crop_scale
from lqkd.data.worker_loader import WorkerBatches, check_workers, worker_batches
from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED
from lqkd.utils.tables import write_csv

Pairs = tuple[list[str], list[str]]
"""Files of images, and the mask's file of each."""


class SegmentationFolder(FolderDataModule):
    """A folder of one's own images, each with a mask, for the task :class:`~lqkd.tasks.Segmentation`.

    The mask of ``images/NAME.jpg`` is ``masks/NAME.png``, of the same size: grey or with a palette, each pixel the
    number of its class. What ``root`` holds decides what a network is trained, selected and tested on:

    ============================================  ================================================================
    ``images/`` and ``masks/``                    ``test_fraction`` of the images are for testing, the same ones in
                                                  every run; ``validation_fraction`` of the others for validation
    ``train/images/``, ... and ``test/images/``   ``validation_fraction`` of train is held out for validation
    ``train/images/``, ... and ``val/images/``    the same: the one folder that is not trained on is for testing
    ``train/``, ``val/`` and ``test/``            as they are named
    ============================================  ================================================================

    Training takes a random window of an image, resized, and mirrors half of them; evaluation takes whole images,
    resized. What is done to an image is done to its mask, but that masks are resized to the nearest pixel, and depends
    on (seed, epoch, image) alone. Metrics are of masks of ``image_size``. Up to 5,000 pairs are checked before the
    training starts.

    Batches are :class:`~lqkd.data.Batch` with masks (B, H, W) int64 as ``labels``, -1 where a pixel is ignored.

    Args:
        root: Folder with images and masks, or with train, val (also valid, validation) and test that have them.
        classes: Names of the classes 0, 1, ... of the masks, at least two.
        image_size: Height and width of what networks see, in pixels.
        ignore_index: The number of pixels that belong to no class, beyond those of the classes and at most 255.
        batch_size: Training images per process and step.
        eval_batch_size: Images per process and step in validation and test; null means batch_size.
        crop_scale: Smallest and largest share of an image's area that a random window of training takes.
        horizontal_flip: Whether half of the training images are mirrored.
        validation_fraction: Share of the training set held out for validation, in (0, 1).
        test_fraction: Share of all images held out for testing where root has no parts, in (0, 1).
        num_workers: Processes that decode, for each training process; null means one per processor core, at most 8,
            and none for fewer than 1,000 images.
        seed: Seed of the split, the order and the augmentation; null means the run's seed (seed_everything), else 0.
        mean: Channel means on the [0, 1] scale that are subtracted; null means those of ImageNet.
        std: Channel standard deviations on the [0, 1] scale to divide by; null means those of ImageNet.
        limit_train: Train on only this many images, for quick studies; null means all.
        trust_fraction: Share of these training images that are in no training batch: their masks say how far teachers
            can be believed (``combination: trust`` of a distillation); in [0, 1), 0 means none.

    Raises:
        UsageError: when a setting is out of range, an image has no mask of its size, or a mask has other numbers.
    """

    default_mean = (0.485, 0.456, 0.406)  # of ImageNet, which most published weights expect
    default_std = (0.229, 0.224, 0.225)
    whole_images = True
    """Evaluation cuts nothing off."""

    def __init__(
        self,
        *,
        root: str,
        classes: Sequence[str],
        image_size: tuple[int, int] = (256, 256),
        ignore_index: int = 255,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        crop_scale: tuple[float, float] = (0.25, 1.0),
        horizontal_flip: bool = True,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.2,
        num_workers: int | None = None,
        seed: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        limit_train: int | None = None,
        trust_fraction: float = 0.0,
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
            trust_fraction=trust_fraction,
        )
        if isinstance(classes, str) or not 2 <= len(classes) <= 255 or len(set(classes)) < len(classes):
            raise UsageError(f"classes={classes!r} is not accepted: it must be 2 to 255 different names.")
        if not len(classes) <= ignore_index <= 255:
            raise UsageError(
                f"ignore_index={ignore_index} is not accepted: it must lie beyond the {len(classes)} classes, from"
                f" {len(classes)} to 255."
            )
        if not isinstance(image_size, (tuple, list)) or len(image_size) != 2 or min(image_size) < 1:
            raise UsageError(f"image_size={image_size!r} is not accepted: two numbers >= 1, height and width.")
        self.root = Path(root).expanduser()
        self.classes, self.image_size, self.ignore_index = tuple(classes), (image_size[0], image_size[1]), ignore_index
        self.crop_scale = check_crop_scale(crop_scale)
        self.test_fraction = check_test_fraction(test_fraction)
        self.num_workers = check_workers(num_workers)
        self._listed: dict[str, Pairs] | None = None

    def prepare_data(self) -> None:
        """Read every pair of a small set once, in one process while the others wait."""
        pairs = self._parts().values()
        paths, masks = (list(chain.from_iterable(part[kind] for part in pairs)) for kind in (0, 1))
        images = self._masked(paths, masks)
        if not refuse_unreadable(images, "pairs of an image and a mask cannot be used"):
            return
        absent = [name for label, name in enumerate(self.classes) if not images.seen[label]]
        if len(self.classes) - len(absent) < 2:
            raise UsageError(
                f"the masks of root={self.root} have the numbers {', '.join(map(str, images.seen.nonzero()[0]))}: at"
                f" least two of the classes 0 to {len(self.classes) - 1} must occur; {self.ignore_index} is ignored."
            )
        if absent:
            rank_zero_warn(f"no pixel of root={self.root} is of class {', '.join(map(repr, absent))}")

    def load(self) -> ImageSet:
        """List all pairs; none is opened."""
        parts = dict(self._parts())
        if "all" in parts:
            parts = self._hold_out_test(*parts["all"])
        images, masks = parts["train"]
        if {"val", "test"} <= parts.keys():
            self._given_validation = len(parts["val"][0])
            images, masks = images + parts["val"][0], masks + parts["val"][1]
        test = parts["test"] if "test" in parts else parts["val"]
        train_labels, test_labels = of_one_class(len(images)), of_one_class(len(test[0]))
        return ImageSet(self._masked(images, masks), train_labels, self._masked(*test), test_labels, self.classes)

    def write_split(self, target: Path) -> None:
        """Write a table that says of each image whether it is for training, validation, testing or trust.

        Needs ``setup``. Columns: ``split`` (``train``, ``val``, ``test``, or ``trust`` for ``trust_fraction``), and
        ``file`` and ``mask``, names below ``root`` that are escaped as :func:`lqkd.utils.escaping.csv_cell` says.
        """
        images = self._loaded()
        tested = torch.arange(len(images.test_labels))
        trained = images.train_images
        held_out = (("train", self.train_indices), ("val", self.val_indices), ("trust", self.trust_indices))
        rows = [
            {"split": name} | dict(zip(("file", "mask"), self._pair(pairs, index), strict=True))
            for name, pairs, indices in (*((n, trained, i) for n, i in held_out), ("test", images.test_images, tested))
            for index in indices.tolist()
        ]
        write_csv(target, rows, ("split", "file", "mask"))

    def test_files(self) -> list[str]:
        """Names of the test images below ``root``, in their order; needs ``setup``."""
        images = self._loaded()
        return [self._pair(images.test_images, index)[0] for index in range(len(images.test_labels))]

    def preprocess(self, batch: Batch, *, train: bool, epoch: int) -> Batch:
        """Mirror (in training), normalise, and take the masks off; needs ``setup``, but no trainer.

        Args:
            batch: a batch as a loader yields it: uint8 images (B, 4, H, W), whose last channel is the mask.
            train: whether to augment.
            epoch: the epoch, counted from 0, that the augmentation is drawn for.

        Returns:
            The batch with (B, 3, H, W) float32 images, contiguous, and (B, H, W) int64 masks as ``labels``.
        """
        if train:
            return super().preprocess(batch, train=True, epoch=epoch)
        return batch._replace(**self._taken_apart(batch.images))

    def augment(self, epoch: int | Tensor, images: Tensor, indices: Tensor, *of_mixing: Tensor) -> dict[str, Tensor]:
        """Mirror half of the images (B, 4, H, W) with their masks, and take these off; see the parent."""
        if self.augmentation.horizontal_flip:
            images = random_flip(images, seed=self.run_seed, epoch=epoch, indices=indices)
        return self._taken_apart(images)

    def _taken_apart(self, planes: Tensor) -> dict[str, Tensor]:
        masks = planes[:, 3].to(torch.int64)
        return {
            "images": normalize(planes[:, :3], self.mean, self.std),
            "labels": masks.masked_fill(masks == self.ignore_index, UNLABELLED),
        }

    def augmentation_key(self) -> dict[str, Any]:
        """All settings that, with epoch and index, decide what a training image looks like; see the parent."""
        crop = {"image_size": list(self.image_size), "crop_scale": list(self.crop_scale)}
        return {"seed": self.run_seed, **super().augmentation_key(), **crop}

    def _batches(
        self, images: Tensor | EncodedImages, labels: Tensor, indices: Tensor, *, train: bool, **settings: Any
    ) -> WorkerBatches:
        assert isinstance(images, MaskedImages)
        plan = TensorBatches(torch.empty(len(labels), 0, dtype=torch.uint8), labels, indices, **settings)
        cropped = CroppedMasks(images, seed=self.run_seed, crop_scale=self.crop_scale if train else None)
        return worker_batches(plan, cropped, self.num_workers, self.trainer)

    def _pair(self, pairs: Tensor | EncodedImages, index: int) -> tuple[str, ...]:
        assert isinstance(pairs, MaskedImages)
        return tuple(Path(path).relative_to(self.root).as_posix() for path in pairs.paths(index))

    def _masked(self, images: list[str], masks: list[str]) -> MaskedImages:
        return MaskedImages(images, masks, self.image_size, len(self.classes), self.ignore_index)

    def _hold_out_test(self, images: list[str], masks: list[str]) -> dict[str, Pairs]:
        return {
            name: ([images[index] for index in indices], [masks[index] for index in indices])
            for name, indices in self._test_apart(of_one_class(len(images))).items()
        }

    def _parts(self) -> dict[str, Pairs]:
        """Name of the part (``train``, ``val``, ``test``, or ``all``) -> its pairs."""
        if self._listed is None:
            if not self.root.is_dir():
                raise UsageError(
                    f"root={self.root} does not exist{looked_for(self.root)}: give a folder with images and masks."
                )
            whole = not has_folders(self.root / "train")
            folders = {"all": self.root} if whole else folders_of_parts(self.root, "images and masks")
            self._listed = {name: list_pairs(folder) for name, folder in folders.items()}
        return self._listed
