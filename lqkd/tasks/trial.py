"""Trying a network before the first step: whether it takes the data and returns what the task needs."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from lqkd.errors import UsageError, first_line
from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked
from lqkd.quantization import float_mode
from lqkd.quantization.modes import evaluating
from lqkd.tasks.base import Task


@torch.no_grad()
def try_network(network: nn.Module, name: str, inputs: Inputs, task: Task) -> Any:
    """The task's outputs of what the network called ``name`` returns for ``inputs`` in eval mode.

    Raises:
        UsageError: when it cannot take the inputs, or returns nothing for this task.
    """
    with evaluating(network):
        try:
            returned = inputs.call(network)
        except (RuntimeError, AssertionError, TypeError, ValueError, LookupError, AttributeError) as error:
            advice = _advice(error, inputs)
            raise UsageError(
                f"the {name} cannot take {inputs.described()} from the data ({first_line(error)}){advice}"
            ) from error
    return task.outputs(returned, Asked(name, len(inputs)))


def _advice(error: Exception, inputs: Inputs) -> str:
    if all(tensor.is_floating_point() for tensor in inputs.tensors()):
        return ""
    if isinstance(error, LookupError):
        return ": tokens are of a larger vocabulary than the network's, or texts are longer than it knows positions"
    image = inputs.alone()
    return ": pixels are given as floating-point numbers, normalised" if image is not None and image.ndim > 2 else ""


@torch.no_grad()
def try_training(network: nn.Module, name: str, inputs: Inputs, task: Task) -> None:
    """See that the network called ``name`` gives the same kind of outputs in training mode, and trains on so few.

    It runs in floating point and ends with the state that it had. Other errors than these two are left for the
    training to show: a network may well need a whole batch.

    Raises:
        UsageError: when it returns something else than in eval mode, or its batch norm has too few values.
    """
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return  # which would be compiled once more for this
    with isolate_rng(), float_mode(network), evaluating(network), enough_samples(name, len(inputs)):
        network.train()
        buffers = {key: buffer.clone() for key, buffer in network.named_buffers()}  # which batch norm updates
        own = inputs.map(torch.clone)
        try:
            returned = functional_call(network, buffers, own.args, dict(own.keywords))
        except Exception as error:
            if _too_few(error):
                raise
            return
        refuse_auxiliary(network, name, inputs, returned)
    task.outputs(returned, Asked(name, len(inputs), training=True))


@torch.no_grad()
def refuse_auxiliary(network: nn.Module, name: str, inputs: Inputs, returned: Any) -> None:
    """Refuse a network that returns a tensor in eval mode and more than that while it trains.

    Args:
        network: the network.
        name: what a message calls it.
        inputs: what it was called with.
        returned: what it returned in training mode.

    Raises:
        UsageError: then: what its other heads say would be lost.
    """
    if isinstance(returned, Tensor):
        return
    with evaluating(network):
        usual = inputs.call(network)
    if isinstance(usual, Tensor):
        raise UsageError(
            f"the {name} returns a {type(returned).__name__} while it trains, as networks with auxiliary heads do "
            "(GoogLeNet, Inception): build it without them (aux_logits=False), or wrap it in a module that returns "
            "logits of shape (B, C) alone"
        )


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
