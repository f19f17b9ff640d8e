"""The common parent of image sets that are too large for memory: decoded by workers, batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqkd.data.base import ImageDataModule
from lqkd.data.encoded import EncodedImages, ImageFiles
from lqkd.data.loader import EpochShuffle, TensorBatches
from lqkd.data.resized_crop import check_crop_scale
from lqkd.data.worker_loader import CroppedImages, WorkerBatches, check_workers, worker_batches
from lqkd.errors import UsageError


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
        self.crop_scale = check_crop_scale(crop_scale)
        self.num_workers = check_workers(num_workers)

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
        return worker_batches(plan, cropped, self.num_workers, self.trainer)

    def _order(self, images: EncodedImages, indices: Tensor) -> EpochShuffle | None:
        """The order of training images in each epoch; None shuffles them all."""
        return None
