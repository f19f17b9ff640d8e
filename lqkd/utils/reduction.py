"""Statistics of a batch that is spread over processes."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of each element over all processes, differentiable, in the shape of ``values``."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        values = all_reduce(values) / distributed.get_world_size()
    return values


def mean_over_batch(values: Tensor) -> Tensor:
    """The mean over all elements of all processes, differentiable, 0-dim; each process has as many elements."""
    return mean_over_processes(values.mean())
