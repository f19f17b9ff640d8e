"""CIFAR-10 and CIFAR-100 from torchvision's files or from folders of images."""

from __future__ import annotations

from typing import Any

from lqkd.data.torchvision_set import TorchvisionDataModule


class CIFAR10(TorchvisionDataModule):
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
    title = "CIFAR-10"
    torchvision_name = "CIFAR10"
    torchvision_folder = "cifar-10-batches-py"
    expected_classes = 10
    image_size = 32

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
        super().__init__(
            root=root,
            cache_dir=cache_dir,
            download=download,
            crop_padding=crop_padding,
            horizontal_flip=horizontal_flip,
            **kwargs,
        )


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 training and 10,000 test images, 32x32 RGB, 100 classes (Krizhevsky, 2009).

    ``root`` holds torchvision's files (``cifar-100-python``) or class folders, as for :class:`~lqkd.data.CIFAR10`. The
    labels are the 100 fine ones, and the settings those of CIFAR-10.

    Raises:
        UsageError: as for :class:`~lqkd.data.CIFAR10`.
    """

    default_mean = (0.5071, 0.4866, 0.4409)
    default_std = (0.2673, 0.2564, 0.2762)
    title = "CIFAR-100"
    torchvision_name = "CIFAR100"
    torchvision_folder = "cifar-100-python"
    expected_classes = 100
