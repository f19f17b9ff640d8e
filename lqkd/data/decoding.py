"""The common parent of image sets that are too large for memory: decoded by workers, batch by batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqkd.data.base import ImageDataModule
from lqkd.data.encoded import EncodedImages, ImageFiles
from lqkd.data.loader import EpochShuffle, TensorBatches
from lqkd.data.worker_loader import CroppedImages, WorkerBatches
from lqkd.errors import UsageError

_MOST_WORKERS = 8
_WORTH_WORKERS = 1000  # images: fewer are decoded before workers have started


class DecodingDataModule(ImageDataModule):
    """Images of any size, decoded, cropped and resized by worker processes to batches of uint8.

    Training takes a random resized crop and evaluation resizes the shorter side and cuts out the centre, both as in
    torchvision's reference training; flips and normalisation happen on the device. The crop of an image is a function
    of (seed, epoch, image), so that neither the number of workers nor the batch size changes it.

    Args:
        image_size: Height and width of what networks see, in pixels.
        resize_size: What the shorter side is resized to before the centre crop of evaluation; null means
            image_size / 0.875.
        crop_scale: Smallest and largest share of an image's area that a random crop of training takes.
        num_workers: Processes that decode, for each training process; null means one per processor core, at most 8,
            and none for fewer than 1,000 images.
        horizontal_flip: Whether half of the training images are mirrored.
        kwargs: The other settings of :class:`~lqkd.data.ImageDataModule`.

    Raises:
        UsageError: when a setting is out of range or an image, class folder or file is unusable.
    """

    default_mean = (0.485, 0.456, 0.406)  # of ImageNet, which most published weights expect
    default_std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        *,
        image_size: int = 224,
        resize_size: int | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        num_workers: int | None = None,
        horizontal_flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(horizontal_flip=horizontal_flip, **kwargs)
        if image_size < 1:
            raise UsageError(f"image_size={image_size} is not accepted: it must be at least 1 pixel.")
        self.image_size = image_size
        self.resize_size = round(image_size / 0.875) if resize_size is None else resize_size
        if self.resize_size < image_size:
            raise UsageError(f"resize_size={resize_size} is not accepted: it must be at least image_size={image_size}.")
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UsageError(
                f"crop_scale={list(crop_scale)} is not accepted: it must be two numbers above 0 and at most 1, the"
                " smaller first."
            )
        if num_workers is not None and num_workers < 0:
            raise UsageError(f"num_workers={num_workers} is not accepted: it must be at least 0.")
        self.num_workers = num_workers

    def augmentation_key(self) -> dict[str, Any]:
        """All settings that, with epoch and index, decide what a training image looks like; see the parent."""
        crop = {"image_size": self.image_size, "crop_scale": list(self.crop_scale)}
        return {"seed": self.run_seed, **super().augmentation_key(), **crop}

    def test_files(self) -> list[str]:
        """Names of the test images below ``root``, in their order; none where they are no files; needs ``setup``."""
        return self._files(self._loaded().test_images)

    def _files(self, images: Tensor | EncodedImages) -> list[str]:
        root = getattr(self, "root", None)
        if not isinstance(images, ImageFiles) or root is None:
            return []
        return [Path(images.path(index)).relative_to(root).as_posix() for index in range(images.shape[0])]

    def _batches(
        self, images: Tensor | EncodedImages, labels: Tensor, indices: Tensor, *, train: bool, **settings: Any
    ) -> WorkerBatches:
        assert isinstance(images, EncodedImages)
        settings |= {"order": self._order(images, indices)}
        plan = TensorBatches(torch.empty(len(labels), 0, dtype=torch.uint8), labels, indices, **settings)
        cropped = CroppedImages(
            images,
            seed=self.run_seed,
            crop_scale=self.crop_scale if train else None,
            resize_size=self.resize_size,
        )
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return WorkerBatches(plan, cropped, workers=self._workers(len(indices), len(plan)), pin_memory=on_gpu)

    def _order(self, images: EncodedImages, indices: Tensor) -> EpochShuffle | None:
        """The order of training images in each epoch; None shuffles them all."""
        return None

    def _workers(self, samples: int, batches: int) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if samples < _WORTH_WORKERS:
            return 0
        processes = self.trainer.num_devices if self.trainer else 1  # of this machine, which share its cores
        return min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // processes), batches)
