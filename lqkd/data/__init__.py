"""Data sets as Lightning data modules: uint8 batches, augmented on the device, replayable.

Small sets are held in memory; large ones are decoded by worker processes.
"""

from lqkd.data.augmentation import Augmentation
from lqkd.data.base import ImageDataModule
from lqkd.data.cifar import CIFAR10, CIFAR100
from lqkd.data.decoding import DecodingDataModule
from lqkd.data.digits import Digits
from lqkd.data.fashion_mnist import FashionMNIST
from lqkd.data.image_folder import ImageFolder
from lqkd.data.imagenet import ImageNet
from lqkd.data.loader import Batch, TensorBatches
from lqkd.data.streamed import StreamedImageNet
from lqkd.data.worker_loader import WorkerBatches

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Augmentation",
    "Batch",
    "DecodingDataModule",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "StreamedImageNet",
    "TensorBatches",
    "WorkerBatches",
]
