"""What a network must return, found out before the first step: logits (B, C), in evaluation and in training."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from lqkd.errors import UsageError, first_line
from lqkd.modules.batches import dtype_name
from lqkd.quantization import float_mode
from lqkd.quantization.modes import evaluating


def logits_of(output: Any, name: str, samples: int, training: bool = False) -> Tensor:
    """``output`` of the network called ``name`` for so many samples, if it is logits (B, C).

    Raises:
        UsageError: when it is anything else.
    """
    if isinstance(output, Tensor):
        if output.ndim == 2 and len(output) == samples:
            return output
        shape = "x".join(map(str, output.shape)) or "()"
        raise UsageError(
            f"the {name} returns a tensor of shape {shape} for {samples} images: logits of shape (B, C) are needed"
        )
    if training:
        raise UsageError(
            f"the {name} returns a {type(output).__name__} while it trains, as networks with auxiliary heads do "
            "(GoogLeNet, Inception): build it without them (aux_logits=False), or wrap it in a module that returns "
            "logits of shape (B, C) alone"
        )
    raise UsageError(
        f"the {name} returns a {type(output).__name__}: logits of shape (B, C) are needed, from a module around it "
        "that returns them alone"
    )


@torch.no_grad()
def try_network(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """Logits (B, C) that the network called ``name`` gives for ``images`` in eval mode.

    Raises:
        UsageError: when it cannot take the images, or returns something else.
    """
    with evaluating(network):
        try:
            output = network(images)
        except (RuntimeError, AssertionError, TypeError, ValueError, LookupError, AttributeError) as error:
            shape = "x".join(map(str, images.shape[1:]))
            kind = "" if images.dtype == torch.float32 else f"{dtype_name(images)} "
            advice = "" if images.is_floating_point() else ": pixels are given as floating-point numbers, normalised"
            raise UsageError(
                f"the {name} cannot take {kind}images of {shape} from the data ({first_line(error)}){advice}"
            ) from error
    return logits_of(output, name, len(images))


@torch.no_grad()
def try_training(network: nn.Module, name: str, images: Tensor) -> None:
    """See that the network called ``name`` gives logits in training mode too, and can train on so few ``images``.

    It runs in floating point and ends with the state that it had. Other errors than these two are left for the
    training to show: a network may well need a whole batch.

    Raises:
        UsageError: when it returns something else than in eval mode, or its batch norm has too few values.
    """
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return  # which would be compiled once more for this
    with isolate_rng(), float_mode(network), evaluating(network), enough_samples(name, len(images)):
        network.train()
        buffers = {key: buffer.clone() for key, buffer in network.named_buffers()}  # which batch norm updates
        try:
            output = functional_call(network, buffers, (images.clone(),))
        except Exception as error:
            if _too_few(error):
                raise
            return
    logits_of(output, name, len(images), training=True)


@contextmanager
def enough_samples(name: str, samples: int) -> Iterator[None]:
    """Say in one sentence that batch norm of the network called ``name`` cannot train on a batch of so few samples.

    Raises:
        UsageError: in place of what batch norm raises.
    """
    try:
        yield
    except ValueError as error:
        if not _too_few(error):
            raise
        raise UsageError(
            f"the {name} cannot train on a batch of {samples}, of which its batch norm has one value a channel: give "
            "the training DataLoader drop_last=True, or a batch_size that leaves no single sample over"
        ) from error


def _too_few(error: Exception) -> bool:
    return isinstance(error, ValueError) and "more than 1 value per channel" in str(error)


def leaves_one(loader: Any, batches: float) -> bool:
    """Whether one of the ``batches`` of an epoch has a single sample, as far as ``loader`` tells."""
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if not isinstance(size, int) or not isinstance(sampler, Sized):
        return False
    samples = len(sampler)
    return size == 1 or (samples % size == 1 and not getattr(loader, "drop_last", False) and batches * size > samples)
