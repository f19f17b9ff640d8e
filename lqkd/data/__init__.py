"""Data sets as Lightning data modules: uint8 batches, augmented on the device, replayable.

Small sets are held in memory; large ones are decoded by worker processes.

What it offers is imported when first used: preparing an image needs no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqkd.utils.lazy import offers

if TYPE_CHECKING:  # what __getattr__ imports, for type checkers
    from lqkd.data.augmentation import Augmentation as Augmentation
    from lqkd.data.base import ImageDataModule as ImageDataModule
    from lqkd.data.cifar import CIFAR10 as CIFAR10
    from lqkd.data.cifar import CIFAR100 as CIFAR100
    from lqkd.data.coco_detection import CocoDetection as CocoDetection
    from lqkd.data.decoding import DecodingDataModule as DecodingDataModule
    from lqkd.data.detection import DetectionDataModule as DetectionDataModule
    from lqkd.data.detection import DetectionFolder as DetectionFolder
    from lqkd.data.digit_crops import DigitCrops as DigitCrops
    from lqkd.data.digit_scenes import DigitScenes as DigitScenes
    from lqkd.data.digits import Digits as Digits
    from lqkd.data.fashion_mnist import FashionMNIST as FashionMNIST
    from lqkd.data.image_folder import ImageFolder as ImageFolder
    from lqkd.data.imagenet import ImageNet as ImageNet
    from lqkd.data.loader import Batch as Batch
    from lqkd.data.loader import TensorBatches as TensorBatches
    from lqkd.data.segmentation_folder import SegmentationFolder as SegmentationFolder
    from lqkd.data.streamed import StreamedImageNet as StreamedImageNet
    from lqkd.data.text import TextDataModule as TextDataModule
    from lqkd.data.text import TokenBatches as TokenBatches
    from lqkd.data.text import Tokens as Tokens
    from lqkd.data.text_files import PythonTopics as PythonTopics
    from lqkd.data.text_files import TextFiles as TextFiles
    from lqkd.data.text_stream import TextStream as TextStream
    from lqkd.data.voc_detection import VocDetection as VocDetection
    from lqkd.data.worker_loader import WorkerBatches as WorkerBatches

_WHERE = {
    "Augmentation": "lqkd.data.augmentation",
    "Batch": "lqkd.data.loader",
    "CIFAR10": "lqkd.data.cifar",
    "CIFAR100": "lqkd.data.cifar",
    "CocoDetection": "lqkd.data.coco_detection",
    "DecodingDataModule": "lqkd.data.decoding",
    "DetectionDataModule": "lqkd.data.detection",
    "DetectionFolder": "lqkd.data.detection",
    "DigitCrops": "lqkd.data.digit_crops",
    "DigitScenes": "lqkd.data.digit_scenes",
    "Digits": "lqkd.data.digits",
    "FashionMNIST": "lqkd.data.fashion_mnist",
    "ImageDataModule": "lqkd.data.base",
    "ImageFolder": "lqkd.data.image_folder",
    "ImageNet": "lqkd.data.imagenet",
    "PythonTopics": "lqkd.data.text_files",
    "SegmentationFolder": "lqkd.data.segmentation_folder",
    "StreamedImageNet": "lqkd.data.streamed",
    "TensorBatches": "lqkd.data.loader",
    "TextDataModule": "lqkd.data.text",
    "TextFiles": "lqkd.data.text_files",
    "TextStream": "lqkd.data.text_stream",
    "TokenBatches": "lqkd.data.text",
    "Tokens": "lqkd.data.text",
    "VocDetection": "lqkd.data.voc_detection",
    "WorkerBatches": "lqkd.data.worker_loader",
}

__all__ = [*_WHERE]  # noqa: PLE0604
__getattr__, __dir__ = offers(__name__, _WHERE)
