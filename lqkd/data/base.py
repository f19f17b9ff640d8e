"""The common parent of image sets that fit in memory: split, loaders, augmentation and normalisation."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lqkd.data.augment import normalize
from lqkd.data.augment_mix import choose_partners
from lqkd.data.augmentation import Augmentation
from lqkd.data.fingerprint import content_hash
from lqkd.data.loader import Batch, TensorBatches
from lqkd.data.split import stratified_split
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_HELD_OUT, STREAM_LIMIT, STREAM_VALIDATION

if TYPE_CHECKING:
    from lqkd.data.encoded import EncodedImages
    from lqkd.data.worker_loader import WorkerBatches


_AUGMENTATION = frozenset(field.name for field in dataclasses.fields(Augmentation))


class ImageSet(NamedTuple):
    """A whole data set in memory."""

    train_images: Tensor | EncodedImages
    """(N, C, H, W) uint8."""
    train_labels: Tensor
    """(N,) int64; negative where an image has no label, which then takes part in distillation alone."""
    test_images: Tensor | EncodedImages
    """(M, C, H, W) uint8."""
    test_labels: Tensor
    """(M,) int64; negative where an image has no label."""
    class_names: tuple[str, ...]
    """The name of label 0, 1, ..."""


class ImageDataModule(LightningDataModule):
    """A data set of small images, held in memory as uint8, that yields :class:`~lqkd.data.Batch`.

    A subclass says where the images come from (:meth:`load`) and what their channels look like (``default_mean``,
    ``default_std``). The validation images are held out of the training set; the test set is never touched by the
    split, so nothing that is selected on validation data has seen it. The split, the order and the augmentation are
    pure functions of the seed: they are the same for every batch size and number of processes, and on resuming.

    Mixup and CutMix mix an image with another of the whole training set, not of its batch, chosen by its own random
    numbers and augmented as it is in the same epoch. The batch then carries class probabilities as ``targets``, for
    the task loss, beside ``labels``, the class that most of an image belongs to. Both are refused for images that are
    decoded batch by batch, since the partners would have to be decoded as well.

    Training leaves out the last, short global batch of an epoch (its samples change with the order), unless it is the
    only one.

    Args:
        batch_size: Training images per process and step.
        eval_batch_size: Images per process and step in validation and test; null means batch_size.
        validation_fraction: Share of the training set held out for validation, stratified by class, in (0, 1).
        seed: Seed of the split, the order and the augmentation; null means the run's seed (seed_everything), else 0.
        crop_padding: Pixels of black added on every side before a random crop of the original size; 0 means no crop.
        horizontal_flip: Whether half of the training images are mirrored.
        rand_augment: Operations of RandAugment per training image, each image its own; 0 means none, 2 is common.
        rand_augment_magnitude: Strength of these operations, 0 to 30; null means 9.
        random_erasing: Probability that a rectangle of a training image is blanked.
        mixup: Alpha of mixup's Beta(alpha, alpha) distribution; 0 means no mixup.
        cutmix: Alpha of CutMix's Beta(alpha, alpha) distribution; 0 means no CutMix. With mixup too, each has half of
            the mixed images.
        mix_probability: Probability that a training image is mixed with another at all; null means 1.
        mean: Channel means on the [0, 1] scale that are subtracted; null means the data set's own.
        std: Channel standard deviations on the [0, 1] scale to divide by; null means the data set's own.
        limit_train: Train on only this many images, all classes in proportion, for quick studies; null means all.
        trust_fraction: Share of these training images, stratified by class, that are in no training batch: their labels
            say how far teachers can be believed (``combination: trust`` of a distillation); in [0, 1), 0 means none.

    Raises:
        UsageError: when a setting is out of range, here or, where the data decide, in ``setup``.
    """

    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]

    num_classes: int
    """Known after ``setup``."""
    class_names: tuple[str, ...]
    """The name of label 0, 1, ...; known after ``setup``."""
    image_shape: tuple[int, int, int]
    """(C, H, W); known after ``setup``."""
    mean: tuple[float, ...]
    """Channel means on the [0, 1] scale."""
    std: tuple[float, ...]
    """Channel standard deviations on the [0, 1] scale."""
    run_seed: int
    """The seed in use, after ``setup``."""
    train_indices: Tensor
    """Sorted int64 positions of the training images in the training set; known after ``setup``."""
    val_indices: Tensor
    """Sorted int64 positions of the validation images in the training set; known after ``setup``."""
    trust_indices: Tensor
    """Sorted int64 positions of the images of :meth:`trust_batches` in the training set; known after ``setup``."""

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        validation_fraction: float = 0.1,
        seed: int | None = None,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        rand_augment: int = 0,
        rand_augment_magnitude: int | None = None,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        limit_train: int | None = None,
        trust_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.augmentation = Augmentation(
            crop_padding=crop_padding,
            horizontal_flip=horizontal_flip,
            rand_augment=rand_augment,
            rand_augment_magnitude=rand_augment_magnitude,
            random_erasing=random_erasing,
            mixup=mixup,
            cutmix=cutmix,
            mix_probability=mix_probability,
        )
        self.mean = self.default_mean if mean is None else tuple(mean)
        self.std = self.default_std if std is None else tuple(std)
        self.limit_train = limit_train
        self.trust_fraction = trust_fraction
        self._images: ImageSet | None = None
        self._fingerprint: str | None = None
        self.compiled: Callable[..., dict[str, Tensor]] | None = None
        self._check_settings()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would have no effect: the augmentation's settings are those of ``augmentation``."""
        if name in _AUGMENTATION:
            raise UsageError(f"{name} is set when the data module is made: pass {name}={value!r} to its constructor.")
        super().__setattr__(name, value)

    def _check_settings(self) -> None:
        for name in ("batch_size", "eval_batch_size", "limit_train"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} is not accepted: it must be at least 1.")
        if not 0 < self.validation_fraction < 1:
            raise UsageError(
                f"validation_fraction={self.validation_fraction} is not accepted: it must lie between 0 and 1,"
                " both excluded."
            )
        if not 0 <= self.trust_fraction < 1:
            raise UsageError(f"trust_fraction={self.trust_fraction} is not accepted: it must be in [0, 1).")
        for name in ("mean", "std"):
            values, channels = getattr(self, name), len(self.default_mean)
            if len(values) != channels:
                raise UsageError(f"{name}={list(values)} is not accepted: it must have {channels} number(s).")
            if not all(map(math.isfinite, values)):
                raise UsageError(f"{name}={list(values)} is not accepted: every number must be finite.")
        if not all(value > 0 for value in self.std):
            raise UsageError(f"std={list(self.std)} is not accepted: every number must be above 0.")

    def load(self) -> ImageSet:
        """Read the whole data set; a subclass overrides this and it is called once, in ``setup``, on every process."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the images and hold out the validation set, once for all stages."""
        if self._images is not None:
            return
        images = self.load()
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        self.class_names = images.class_names
        self.num_classes = len(images.class_names)
        channels, height, width = images.train_images.shape[1:]
        self.augmentation.check_images(channels, height, width)
        if self.augmentation.mixes and not isinstance(images.train_images, Tensor):
            mixing = [name for name in ("mixup", "cutmix") if getattr(self.augmentation, name)]
            raise UsageError(
                f"{' and '.join(mixing)} above 0 need the training images in memory, from which each image's partner"
                f" is chosen: {type(self).__name__} decodes them batch by batch."
            )
        if self.augmentation.mixes and bool((images.train_labels < 0).any()):
            raise UsageError(
                "mixup and cutmix need the labels of all training images: some have none (a negative number)"
            )
        self.image_shape = (channels, height, width)
        self._split(images.train_labels)
        self._images = images

    def _hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sorted positions of the validation images and of those that are left for training."""
        held_out = round(self.validation_fraction * len(labels))
        if not 0 < held_out < len(labels):
            raise UsageError(
                f"validation_fraction={self.validation_fraction} holds out {held_out} of {len(labels)} training images:"
                " at least one must be held out and one left."
            )
        everything = torch.arange(len(labels))
        return stratified_split(everything, labels, held_out, seed=self.run_seed, stream=STREAM_VALIDATION)

    def _split(self, labels: Tensor) -> None:
        self.val_indices, self.train_indices = self._hold_out(labels)
        self._limit(labels)
        held_out = round(self.trust_fraction * len(self.train_indices))
        if self.trust_fraction and not 0 < held_out < len(self.train_indices):
            raise UsageError(
                f"trust_fraction={self.trust_fraction} holds out {held_out} of {len(self.train_indices)} training"
                " images: at least one must be held out and one left."
            )
        self.trust_indices, self.train_indices = stratified_split(
            self.train_indices, labels[self.train_indices], held_out, seed=self.run_seed, stream=STREAM_HELD_OUT
        )

    def _limit(self, labels: Tensor) -> None:
        if self.limit_train is None:
            return
        if self.limit_train > len(self.train_indices):
            raise UsageError(
                f"limit_train={self.limit_train} is not accepted: {len(self.train_indices)} training images are"
                " available once the validation images are held out."
            )
        self.train_indices, _ = stratified_split(
            self.train_indices,
            labels[self.train_indices],
            self.limit_train,
            seed=self.run_seed,
            stream=STREAM_LIMIT,
        )

    def train_dataloader(self) -> TensorBatches | WorkerBatches:
        """Return this process's share of the training images, in a new order in each epoch."""
        images = self._loaded()
        rank, world_size = self._place()
        return self._batches(
            images.train_images,
            images.train_labels,
            self.train_indices,
            train=True,
            batch_size=self.batch_size,
            # overfit_batches means the same batches again and again; Lightning can turn off its own samplers only.
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            seed=self.run_seed,
            drop_last=len(self.train_indices) >= self.batch_size * world_size,
            rank=rank,
            world_size=world_size,
        )

    def trust_batches(self, device: torch.device) -> Iterator[Batch]:
        """All images of ``trust_fraction``, on every process, augmented as in the first epoch but not mixed.

        They are the same in the same order each time, since answers to them are kept by their places.
        """
        if not len(self.trust_indices):
            return
        images = self._loaded()
        loader = self._batches(
            images.train_images,
            images.train_labels,
            self.trust_indices,
            train=True,
            batch_size=self.eval_batch_size,
            shuffle=False,
        )
        unmixed = copy.copy(self)
        unmixed.compiled = None
        unmixed.augmentation = dataclasses.replace(self.augmentation, mixup=0.0, cutmix=0.0, mix_probability=None)
        for batch in loader:
            on_device = Batch(batch.images.to(device), batch.labels.to(device), batch.indices.to(device))
            yield unmixed.preprocess(on_device, train=True, epoch=0)

    def val_dataloader(self) -> TensorBatches | WorkerBatches:
        """Return this process's share of the validation images."""
        images = self._loaded()
        return self._evaluation(images.train_images, images.train_labels, self.val_indices)

    def test_dataloader(self) -> TensorBatches | WorkerBatches:
        """Return this process's share of the test images."""
        images = self._loaded()
        return self._evaluation(images.test_images, images.test_labels, torch.arange(len(images.test_labels)))

    def predict_dataloader(self) -> TensorBatches | WorkerBatches:
        """Return the test images, as ``test_dataloader`` does."""
        return self.test_dataloader()

    def _evaluation(
        self, images: Tensor | EncodedImages, labels: Tensor, indices: Tensor
    ) -> TensorBatches | WorkerBatches:
        rank, world_size = self._place()
        return self._batches(
            images,
            labels,
            indices,
            train=False,
            batch_size=self.eval_batch_size,
            shuffle=False,
            rank=rank,
            world_size=world_size,
        )

    def _batches(
        self, images: Tensor | EncodedImages, labels: Tensor, indices: Tensor, *, train: bool, **settings: Any
    ) -> TensorBatches | WorkerBatches:
        """The loader of a subset; ``train`` tells whether the images are to be augmented."""
        assert isinstance(images, Tensor)
        return TensorBatches(images, labels, indices, **settings)

    def preprocess(self, batch: Batch, *, train: bool, epoch: int) -> Batch:
        """Augment (in training) and normalise a batch on the device it is on; needs ``setup``, but no trainer.

        Args:
            batch: a batch as a loader yields it: uint8 images (B, C, H, W).
            train: whether to augment.
            epoch: the epoch, counted from 0, that the augmentation is drawn for.

        Returns:
            The batch with (B, C, H, W) float32 images, contiguous, and, where images were mixed, with ``targets``.
        """
        if not train:
            return batch._replace(images=normalize(batch.images, self.mean, self.std))
        given = [batch.images, batch.indices]
        if self.augmentation.mixes:
            given += [batch.labels, *self._partners(batch, epoch)]
        if self.compiled is None:
            return batch._replace(**self.augment(epoch, *given))
        # A number would be a graph's own, and each epoch would be compiled anew.
        now = torch.full((), epoch, dtype=torch.int64, device=batch.images.device)
        return batch._replace(**self.compiled(now, *given))

    def augment(self, epoch: int | Tensor, images: Tensor, indices: Tensor, *of_mixing: Tensor) -> dict[str, Tensor]:
        """What is done to a training batch on its device, by tensors alone, so that it can be compiled.

        Args:
            epoch: counted from 0; a 0-dim int64 tensor in a graph.
            images: (B, C, H, W) uint8.
            indices: (B,) int64 stable sample ids.
            of_mixing: where images are mixed, the labels (B,), then of each image's partner image, index and label.

        Returns:
            Those fields of the batch that change, by their names.
        """
        if not of_mixing:
            return {"images": self._augmented(images, indices, epoch)}
        labels, partners, ids, others = of_mixing
        both = self._augmented(torch.cat([images, partners]), torch.cat([indices, ids]), epoch)
        images, share = self.augmentation.mix(*both.chunk(2), seed=self.run_seed, epoch=epoch, indices=indices)
        own, other = (F.one_hot(of, self.num_classes) for of in (labels, others))
        return {
            "images": images,
            "labels": torch.where(share >= 0.5, labels, others),
            "targets": own * share[:, None] + other * (1 - share[:, None]),
        }

    def _augmented(self, images: Tensor, indices: Tensor, epoch: int | Tensor) -> Tensor:
        return self.augmentation.single(images, self.mean, self.std, seed=self.run_seed, epoch=epoch, indices=indices)

    def _partners(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image's partner image, index and label, on the device of the batch."""
        data, device = self._loaded(), batch.images.device
        assert isinstance(data.train_images, Tensor), "setup refuses mixing for others"
        # The images are in the main memory, and so is the choice among them.
        ids = choose_partners(self.train_indices, seed=self.run_seed, epoch=epoch, indices=batch.indices.cpu())
        chosen = (data.train_images.index_select(0, ids), ids, data.train_labels.index_select(0, ids))
        return tuple(of.to(device) for of in chosen)  # type: ignore[return-value]

    def stays_eager(self) -> str | None:
        """Why :meth:`augment` cannot be compiled; None where it can."""
        if self.augmentation.rand_augment:
            return f"rand_augment={self.augmentation.rand_augment} sorts images by what is done to them"
        return None

    def augmentation_key(self) -> dict[str, Any]:
        """All settings but for mean and std that, with epoch and index, decide what a training image looks like.

        Plain JSON values; empty when an image looks the same in all epochs. A subclass that changes images by other
        settings adds them.
        """
        settings = dataclasses.asdict(self.augmentation)
        return {"seed": self.run_seed, **settings} if any(settings.values()) else {}

    def fingerprint(self) -> str:
        """Hash of all images and labels, in their order; needs ``setup``."""
        if self._fingerprint is None:
            images = self._loaded()
            parts = (images.train_images, images.train_labels, images.test_images, images.test_labels)
            self._fingerprint = content_hash(parts)
        return self._fingerprint

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Preprocess each batch on the device: Lightning calls this for every loader and stage."""
        assert self.trainer is not None
        return self.preprocess(batch, train=self.trainer.training, epoch=self.trainer.current_epoch)

    def _loaded(self) -> ImageSet:
        assert self._images is not None, "call setup() first"
        return self._images

    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
