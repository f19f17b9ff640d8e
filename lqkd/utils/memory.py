"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = (2**30, 2**25)
"""Bytes from which an allocation is given back at once: the first that the library takes; older ones have a limit."""
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_TUNABLES = tuple("glibc.malloc." + name.removeprefix("MALLOC_").strip("_").lower() for name in _CHOICES)


def keep_freed_memory() -> bool:
    """Keep what is freed for what is allocated next, and say whether this was done.

    A training step frees what it has allocated, and the next one allocates the same again. The GNU C library gives much
    of it back to the system in between, which then clears every page anew; from now on it does so with single
    allocations of a gigabyte and more (32 MiB with older libraries). The process keeps the most memory that it ever
    had.

    Nothing is done on other systems than Linux with this library, nor where the environment has a choice of its own:
    one of the variables ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TOP_PAD_`` and
    ``MALLOC_MMAP_MAX_``, or the same in ``GLIBC_TUNABLES``. Large pages, ``glibc.malloc.hugetlb``, are no such choice.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in _CHOICES) or any(name in tunables for name in _TUNABLES)
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and mapped
