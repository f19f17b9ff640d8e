"""Which modules are batch norm in evaluation: an affine map of each channel, which the layer before can take over."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_TENSORS = ("weight", "bias", "running_mean", "running_var")


def is_frozen_norm(module: nn.Module | None) -> bool:
    """Whether it is a batch norm whose statistics and parameters are buffers, that do not change in training either.

    torchvision's ``FrozenBatchNorm2d`` is one, and those of other detectors that took over its name and tensors.

    Examples:
        >>> from torchvision.ops import FrozenBatchNorm2d
        >>> is_frozen_norm(FrozenBatchNorm2d(3)), is_frozen_norm(nn.BatchNorm2d(3))
        (True, False)
    """
    named = type(module).__name__ == "FrozenBatchNorm2d"
    return module is not None and named and all(name in module._buffers for name in _TENSORS) and hasattr(module, "eps")


def is_batch_norm(module: nn.Module | None) -> bool:
    """Whether it is one of PyTorch's batch norms, or a frozen one.

    Examples:
        >>> is_batch_norm(nn.BatchNorm2d(3)), is_batch_norm(nn.GroupNorm(1, 3))
        (True, False)
    """
    return isinstance(module, _BatchNorm) or is_frozen_norm(module)
