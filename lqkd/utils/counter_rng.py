"""Random numbers that are a function of what they are for, not of what was drawn before.

A number depends on (seed, epoch, sample, stream) alone, so it does not change with the batch size, the order of the
samples, the number of processes or the device, and a run that resumes draws what it would have drawn. The global
generators of torch, NumPy and Python are neither read nor advanced.

The hash is the SplitMix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# One stream per decision, so that two decisions about the same sample are independent.
STREAM_ORDER = 0
STREAM_VALIDATION = 1
STREAM_LIMIT = 2
STREAM_TEST = 3
STREAM_CROP_Y = 4
STREAM_CROP_X = 5
STREAM_FLIP = 6
STREAM_OPERATION = 7
STREAM_OPERATION_SIGN = 8
STREAM_ERASE = 9
STREAM_ERASE_AREA = 10
STREAM_ERASE_RATIO = 11
STREAM_ERASE_Y = 12
STREAM_ERASE_X = 13
STREAM_MIX = 14
STREAM_MIX_KIND = 15
STREAM_MIX_PARTNER = 16
STREAM_MIX_SHARE = 17
STREAM_CUTMIX_Y = 18
STREAM_CUTMIX_X = 19
STREAM_HELD_OUT = 20
STREAM_TRUST = 21

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB

STREAM_RESIZED_CROP = 1000
"""And the 39 after it: four numbers for each of ten attempts."""
STREAM_SHARDS = 1040
"""The order of shards."""
STREAM_SHARDING = 1041
"""Which image comes into which shard."""
STREAM_SCENE = 1042
"""What is in a drawn scene, and where."""


def random_bits(seed: int, epoch: int | Tensor, indices: Tensor, stream: int, draw: int = 0) -> Tensor:
    """Return 64 random bits per sample.

    Args:
        seed: any integer; values that differ by a multiple of 2**64 are the same seed.
        epoch: the epoch, counted from 0: a number, or a 0-dim int64 tensor on the device of ``indices``, so that a
            compiled graph is not bound to one epoch.
        indices: (B,) int64 stable sample ids.
        stream: which decision the numbers are for, one of the ``STREAM_*`` constants, below 2**32.
        draw: which of several independent numbers for the same decision, counted from 0.

    Returns:
        (B,) int64 on the device of ``indices``, uniform over all 2**64 values.
    """
    assert indices.dtype == torch.int64, indices.dtype
    key: int | Tensor = 0
    for part in (seed, epoch, stream + (draw << 32)):
        if isinstance(part, Tensor) or isinstance(key, Tensor):
            key = _finalised((_wrapped(key) ^ _wrapped(part)) + _signed(_GOLDEN))
        else:
            key = _mix(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return _finalised((indices * _signed(_GOLDEN)).add_(_wrapped(key)))


def uniform(seed: int, epoch: int | Tensor, indices: Tensor, stream: int, draw: int = 0) -> Tensor:
    """Return one uniform number per sample; the arguments are those of :func:`random_bits`.

    Returns:
        (B,) float32 in [0, 1), a multiple of 2**-24, on the device of ``indices``.

    Examples:
        >>> ids = torch.tensor([3, 7])
        >>> together = uniform(0, 5, ids, STREAM_FLIP)
        >>> bool(together[1] == uniform(0, 5, ids[1:], STREAM_FLIP)[0])
        True
    """
    # 24 bits are what a float32 holds exactly: more would round some values up to 1.
    return _shift_right(random_bits(seed, epoch, indices, stream, draw), 40).to(torch.float32).mul_(2.0**-24)


def integers(
    seed: int, epoch: int | Tensor, indices: Tensor, stream: int, limit: int | Tensor, draw: int = 0
) -> Tensor:
    """Return one uniform integer per sample; the other arguments are those of :func:`random_bits`.

    Args:
        limit: how many values there are, 0 < limit < 2**31: one number, or a (B,) int64 tensor with one per sample.

    Returns:
        (B,) int64 in 0 ... limit - 1 on the device of ``indices``.
    """
    high: Tensor = _shift_right(random_bits(seed, epoch, indices, stream, draw), 32)
    return (high * limit) >> 32


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def _finalised(z: Tensor) -> Tensor:
    """:func:`_mix` of int64, which wraps modulo 2**64 as SplitMix needs it; ``z`` is overwritten."""
    # In place, because these tensors are so small that most of the time goes into making them.
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(_FIRST))
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_SECOND))
    return z.bitwise_xor_(_shift_right(z, 31))


def _wrapped(value: int | Tensor) -> Any:
    """What is calculated with a tensor of int64: a tensor, or the number of the same 64 bits."""
    return value if isinstance(value, Tensor) else _signed(value & _MASK)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``value``."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: Tensor, places: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically, so the copies of the sign bit are masked away."""
    return (z >> places).bitwise_and_(2 ** (64 - places) - 1)
