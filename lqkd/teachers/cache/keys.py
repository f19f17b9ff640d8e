"""What a teacher's answers depend on, as plain values."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.outputs import Asked, everything
from lqkd.quantization.computed import copy_of
from lqkd.teachers.frozen import FrozenTeacher

NEEDED = {
    "fingerprint": "a method that returns a hash of all images and labels",
    "augmentation_key": "a method that returns all settings that decide what a training image looks like in an epoch",
    "train_indices": "a sorted tensor of the indices of all training samples",
    "image_shape": "that of one input, (C, H, W) of images",
}
"""What a DataModule must offer for its teacher's answers to be stored, ..."""
_OF_IMAGES = {
    "mean": "the channel means that are subtracted",
    "std": "the channel standard deviations that are divided by",
}
"""... and where its inputs are no whole numbers, such as the tokens of a text."""

_PROBES = 4  # images that a teacher is told by

_PREPARES = ("preprocess", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Methods of a DataModule that can change its images on the way to the step."""


def teacher_key(
    teacher: FrozenTeacher, bf16: bool, image_shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """All that a teacher's answers to an image depend on.

    Args:
        teacher: before it is accelerated.
        bf16: whether bfloat16 is asked for.
        image_shape: (C, H, W) of the images, or the shape of an input of another kind.
        dtype: of an input.
    """
    kind = type(teacher.network)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "network": re.sub(r" at 0x[0-9a-f]+", "", str(teacher.network)),
        "weights": weights_hash(teacher.network),
        "answers": probe(teacher, image_shape, dtype),
        "mean": teacher.mean,
        "std": teacher.std,
        "image_size": teacher.image_size,
        "precision": f"{teacher.precision}, {'bf16' if bf16 else 'fp32'}",
    }


def probe(teacher: FrozenTeacher, image_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> str:
    """What the network itself answers to fixed noise, for all that its code and its attributes decide.

    A copy answers on the CPU, in float32, on one thread and to one batch, whatever the training does, and all that it
    answers to an image is projected onto one direction that is fixed as well. These few numbers are rounded to 1/256
    of the power of two above the largest, so that differences of summation (some 1e-6) hardly ever reach a rounding
    edge; where one does, the teacher is asked again. Tokens are drawn from the network's smallest table of embeddings.
    Global random numbers stay as they are.

    Args:
        teacher: before it is accelerated.
        image_shape: (C, H, W), or the shape of an input of another kind.
        dtype: of an input.
    """
    copied = copy_of(teacher).cpu().float()
    noise = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        images = torch.randn(_PROBES, *image_shape, generator=noise).to(dtype)
    else:
        tables = [module.num_embeddings for module in copied.modules() if isinstance(module, nn.Embedding)]
        images = torch.randint(min(tables, default=1), (_PROBES, *image_shape), dtype=dtype, generator=noise)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            torch.default_generator.manual_seed(0)  # for a network that draws; manual_seed would reach other devices
            answered = everything(copied(images), Asked("teacher", _PROBES))
    finally:
        torch.set_num_threads(threads)
    answers = answered.double() @ torch.randn(answered.shape[1], generator=noise).double()
    exponent = math.frexp(float(answers.abs().max()))[1]
    steps = [f"{math.ldexp(answer, 8 - exponent):.0f}" for answer in answers.tolist()]
    return hashlib.sha256(f"{exponent} {' '.join(steps)}".encode()).hexdigest()


def weights_hash(network: nn.Module) -> str:
    """Hash of names, dtypes, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor of any dtype and device, in C order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def data_key(data: Any) -> dict[str, Any]:
    """All that the training images of a DataModule depend on, but for the epoch and the index.

    ``augmentation`` is empty where an image looks the same in all epochs.

    Raises:
        UsageError: when the DataModule does not tell.
    """
    needed = NEEDED | (_OF_IMAGES if input_dtype(data).is_floating_point else {})
    lacks = [f"{name} ({what})" for name, what in needed.items() if getattr(data, name, None) is None]
    if data is None or lacks:
        raise UsageError(
            f"teacher_cache needs a DataModule that tells what its images are: it lacks {'; '.join(lacks)}"
        )
    _check_that_the_key_covers(type(data))
    return {
        "fingerprint": data.fingerprint(),
        "samples": hashlib.sha256(tensor_bytes(data.train_indices)).hexdigest(),
        "image_shape": tuple(data.image_shape),
        **{name: tuple(values) for name in _OF_IMAGES if (values := getattr(data, name, None)) is not None},
        "augmentation": data.augmentation_key(),
    }


def input_dtype(data: Any) -> torch.dtype:
    """The dtype of an input of a DataModule; float32 where it does not say."""
    dtype = getattr(data, "input_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _check_that_the_key_covers(kind: type) -> None:
    """Refuse a class that changes images in a method of its own, but takes over its parent's augmentation_key."""
    keyed = next(owner for owner in kind.__mro__ if "augmentation_key" in vars(owner))
    own = [name for owner in kind.__mro__[: kind.__mro__.index(keyed)] for name in _PREPARES if name in vars(owner)]
    if own:
        raise UsageError(
            f"teacher_cache cannot know what {kind.__name__}.{own[0]} does to images: give {kind.__name__} an "
            "augmentation_key of its own that names every setting"
        )
