"""Choosing the memory format of a student by a measurement."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lqkd.errors import first_line
from lqkd.quantization.computed import copy_of
from lqkd.tasks import Inputs

_ROUNDS = 5
_FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


def faster_in_channels_last(network: nn.Module, inputs: Inputs) -> bool:
    """Whether training passes of ``network`` are faster in channels_last, which one line says, with both times.

    Forward and backward passes of two copies alternate; the medians decide. The network, its buffers, its quantizers
    and random numbers stay as they are.

    Args:
        network: whose quantizers need not have been fitted.
        inputs: of a training batch, on the network's device.
    """
    copies = {wanted: _copy(network, of) for wanted, of in _FORMATS.items()}
    taken: dict[bool, list[float]] = {wanted: [] for wanted in copies}
    with isolate_rng():
        for _ in range(1 + _ROUNDS):
            for wanted, copied in copies.items():
                try:
                    taken[wanted].append(_seconds(copied, inputs))
                except RuntimeError as error:  # which views activations as if they were contiguous
                    if not wanted or isinstance(error, torch.OutOfMemoryError):
                        raise
                    rank_zero_info(
                        f"channels_last=false: the student cannot train in channels_last ({first_line(error)})"
                    )
                    return False
    plain, other = (statistics.median(taken[wanted][1:]) for wanted in (False, True))
    faster = other < plain
    rank_zero_info(
        f"channels_last={str(faster).lower()}: a pass of the student takes {1000 * other:.1f} ms in channels_last and "
        f"{1000 * plain:.1f} ms without (medians of {_ROUNDS})"
    )
    return faster


def _copy(network: nn.Module, wanted: torch.memory_format) -> nn.Module:
    return copy_of(network).train().to(memory_format=wanted)  # type: ignore[call-overload, no-any-return]


def _seconds(network: nn.Module, inputs: Inputs) -> float:
    """Of one forward and backward pass."""
    _wait(inputs)
    started = time.perf_counter()
    returned: Any = inputs.map(torch.clone).call(network)
    parts = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.stack([part.float().square().mean() for part in parts]).sum().backward()
    _wait(inputs)
    return time.perf_counter() - started


def _wait(inputs: Inputs) -> None:
    device = inputs.tensors()[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
