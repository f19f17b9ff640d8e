"""Data sets as Lightning data modules: uint8 in memory, augmented in batches on the device, replayable."""

from lqkd.data.augmentation import Augmentation
from lqkd.data.base import ImageDataModule
from lqkd.data.cifar import CIFAR10
from lqkd.data.digits import Digits
from lqkd.data.loader import Batch, TensorBatches

__all__ = ["CIFAR10", "Augmentation", "Batch", "Digits", "ImageDataModule", "TensorBatches"]
